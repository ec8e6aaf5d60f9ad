"""A pretrained transformer with linear-time mixers for attention."""

import copy
from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import nn
from transformers import PreTrainedModel

import linconv.auto  # noqa: F401  the classes of converted models stand there, under the names in their checkpoints
from linconv import mixers
from linconv.conversion import families
from linconv.conversion.models import ConvertedModel, Recipe, auto_map, converted_config_class, install


def convert(
    teacher: PreTrainedModel, mixer: str = "bimamba2", layers: str | Sequence[int] | None = None, **mixer_kwargs
) -> PreTrainedModel:
    """A copy of a model in which a mixer takes the place of self-attention.

    Everything but the converted attention is the teacher's: weights, dtype, device, train or eval mode. The mixers are
    new and untrained, drawn from torch's random generator. LayerDrop is switched off, for a student's layers must line
    up with its teacher's. The result is of a subclass of the teacher's class: save and load it as any transformers
    model, after ``import linconv.auto``, which this function does too.

    Args:
        teacher: a transformers model of a family in `linconv.conversion.families`, with any of its heads, or what
            convert has made of one without converting a layer; not changed.
        mixer: name of the mixer, see `linconv.mixers.names`.
        layers: which transformer blocks to convert: None or "all", indices (a list, an array or a tensor; negative ones
            count from the end), or "none" or [] for none, which gives the teacher's own outputs.
        mixer_kwargs: options of the mixer.

    Returns:
        The converted model, with the recipe in ``config.linconv``.

    Raises:
        TypeError: a model that cannot be converted, an option the mixer does not have or of another type, or layers
            of another type.
        ValueError: an unknown mixer, one that looks ahead where the model attends to the past only, a layer that is not
            there, or options that are out of range or do not fit the model's width.
    """
    family = convertible_family(teacher)
    check_mixer(mixer, family)
    recipe = Recipe(mixer, layer_indices(layers, len(family.blocks(teacher))), mixer_kwargs)

    entries = teacher.config.to_dict()
    del entries["model_type"]
    config = converted_config_class(family).from_dict(entries)
    config.linconv = recipe.to_config()
    config.auto_map = auto_map(family)
    if family.layer_drop is not None:
        setattr(config, family.layer_drop, 0.0)

    # Whatever in the copy refers to the teacher's config refers to the student's.
    student = copy.deepcopy(teacher, {id(teacher.config): config})
    install(student, family, recipe)
    student.set_attn_implementation(teacher.config._attn_implementation)
    return student


def convertible_family(teacher: PreTrainedModel) -> families.Family:
    """The family of a model that can be converted.

    Raises:
        TypeError: a model that cannot; the message has those that can.
    """
    family, stock = families.of(teacher), type(teacher)
    if isinstance(teacher, ConvertedModel):
        if Recipe.from_config(teacher.config).layers:
            raise TypeError(
                f"teacher is a {stock.__name__}, converted already; wanted a stock model or one with no layer converted"
            )
        stock = stock.__bases__[-1]
    decoder = family.cache is None and getattr(teacher.config, "is_decoder", False)
    if decoder and not getattr(teacher.config, "is_encoder_decoder", False):
        raise TypeError(f"teacher is a {stock.__name__} with is_decoder, wanted one that attends both ways")
    if not any(stock is family.stock_class(name) for name in family.heads.values()):
        raise TypeError(f"teacher is a {stock.__name__}, wanted one of {', '.join(family.heads.values())}")
    return family


def check_mixer(mixer: str, family: families.Family) -> type[mixers.Mixer]:
    """The mixer class of that name, which fits the family.

    Raises:
        ValueError: no such mixer, or one that looks ahead in a family that does not.
    """
    found = mixers.get(mixer)
    if family.cache is not None and not found.causal:
        wanted = ", ".join(name for name in mixers.names() if mixers.get(name).causal)
        raise ValueError(
            f"mixer is {mixer!r}, which looks ahead, and {family.model_type} attends to the past only; wanted a causal "
            f"one: {wanted}"
        )
    return found


def layer_indices(layers: str | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The blocks that ``layers`` of `convert` means, of ``count``, in order.

    Raises:
        TypeError, ValueError: something else than convert takes, or a block that is not there.
    """
    if layers is None:
        return tuple(range(count))
    wanted = "wanted None, 'all', 'none' or indices"
    if isinstance(layers, str):
        if layers not in ("all", "none"):
            raise ValueError(f"layers is {layers!r}, {wanted}")
        return tuple(range(count)) if layers == "all" else ()
    found = layers.tolist() if hasattr(layers, "tolist") else layers  # of an array or a tensor
    if isinstance(found, Iterable):
        found = list(found)
    if not isinstance(found, list) or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in found):
        raise TypeError(f"layers is {layers!r}, {wanted}")
    for i in found:
        if not -count <= i < count:
            raise ValueError(f"layers has {i}, wanted {-count} to {count - 1}: the model has {count} blocks")
    return tuple(sorted({int(i) % count for i in found}))


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a stock or converted model, first to last; they line up between the two."""
    return list(families.of(model).blocks(model))


def frame_lengths(model: nn.Module, attention_mask: torch.Tensor) -> torch.Tensor:
    """How many frames of each clip the transformer blocks see.

    Args:
        model: a stock or converted model.
        attention_mask: (batch, input length), 1 at the valid samples (Wav2Vec2) or features (Whisper), padding right.

    Returns:
        (batch,) int64.
    """
    return families.of(model).frame_lengths(model, attention_mask.sum(dim=-1).long())
