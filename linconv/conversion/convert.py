"""Replaces attention in a pretrained transformer by linear-time mixers."""

import copy
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import nn
from transformers import PreTrainedModel

import linconv.auto  # noqa: F401  holds the classes of converted models, under the names in their checkpoints
from linconv import mixers
from linconv.conversion import families
from linconv.conversion.models import Conversion, ConvertedModel, auto_map, converted_config_class, install


def convert(
    teacher: PreTrainedModel, mixer: str = "bimamba2", layers: str | Sequence[int] | None = None, **mixer_kwargs
) -> PreTrainedModel:
    """A copy of a model in which mixers replace self-attention.

    Everything else is the teacher's: weights, dtype, device, train or eval mode. The mixers are new and untrained,
    initialized from torch's random generator. LayerDrop is turned off, because the student's layers must line up with
    the teacher's. The result's class is a subclass of the teacher's: save and load it like any transformers model,
    after ``import linconv.auto``, which this function does too.

    Args:
        teacher: a transformers model of a family in `linconv.conversion.families`, with any of its heads, or the result
            of `convert` with no layer converted. It is not changed.
        mixer: name of the mixer, see `linconv.mixers.names`.
        layers: the transformer blocks to convert: None or "all", indices (a list, an array or a tensor; negative ones
            count from the end), or "none" or [] for none, which gives the teacher's own outputs.
        mixer_kwargs: options of the mixer.

    Returns:
        The converted model, with its conversion in ``config.linconv``.

    Raises:
        TypeError: the model cannot be converted, the mixer does not have an option, or an option or ``layers`` has
            the wrong type.
        ValueError: the mixer is unknown, bidirectional in a causal model, or causal in all layers of a bidirectional
            model whose head reads only the first token; a layer does not exist; options are out of range or do not fit
            the model's width; the teacher's weights are offloaded, or it has a function in place of a module's forward.

    Warns:
        UserWarning: a causal mixer in a bidirectional model.
    """
    family = convertible_family(teacher)
    check_mixer(mixer, family)
    check_weights(teacher)
    conversion = Conversion(mixer, layer_indices(layers, len(family.blocks(teacher))), mixer_kwargs)
    check_direction(teacher, mixer, conversion.layers, family)

    entries = teacher.config.to_dict()
    del entries["model_type"]
    config = converted_config_class(family).from_dict(entries)
    config.linconv = conversion.to_config()
    config.auto_map = auto_map(family)
    if family.layer_drop is not None:
        setattr(config, family.layer_drop, 0.0)

    # References to the teacher's config become references to the student's.
    student = copy.deepcopy(teacher, {id(teacher.config): config})
    check_forwards(teacher, student)
    install(student, family, conversion)
    student.set_attn_implementation(teacher.config._attn_implementation)
    return student


def convertible_family(teacher: PreTrainedModel) -> families.Family:
    """The family of a model that can be converted.

    Raises:
        TypeError: the model cannot be converted; the message lists the classes that can.
    """
    family, stock = families.of(teacher, "teacher"), type(teacher)
    heads = [family.stock_class(name) for name in family.heads.values()]
    if isinstance(teacher, ConvertedModel):
        if Conversion.from_config(teacher.config).layers:
            raise TypeError(
                f"teacher is a {stock.__name__}, converted already; wanted a stock model, which `linconv distill` "
                "converts by itself, or one with no layer converted"
            )
        stock = stock.__bases__[-1]
    decoder = family.cache is None and getattr(teacher.config, "is_decoder", False)
    if decoder and not getattr(teacher.config, "is_encoder_decoder", False):
        raise TypeError(f"teacher is a {stock.__name__} with is_decoder, wanted one that attends both ways")
    if stock not in heads:
        known = next((base.__name__ for base in stock.__mro__ if base in heads), None)
        hint = known and (
            f"; it is a subclass of {known}, whose additions conversion does not know: convert a {known} with its "
            "weights (load_state_dict), and add them to the result"
        )
        raise TypeError(f"teacher is a {stock.__name__}, wanted one of {', '.join(family.heads.values())}{hint or ''}")
    return family


def check_mixer(mixer: str, family: families.Family) -> type[mixers.Mixer]:
    """The mixer class of that name.

    Raises:
        ValueError: there is no such mixer, or it is bidirectional and the family causal.
    """
    found = mixers.get(mixer)
    if family.cache is not None and not found.causal:
        wanted = ", ".join(name for name in mixers.names() if mixers.get(name).causal)
        raise ValueError(
            f"mixer is {mixer!r}, which looks ahead, and {family.model_type} attends to the past only; wanted a causal "
            f"one: {wanted}"
        )
    return found


def check_weights(teacher: PreTrainedModel) -> None:
    """Checks that the weights can be copied. A meta-device model without accelerate's hooks passes: it has sizes.

    Raises:
        ValueError: accelerate has offloaded weights.
    """
    meta = [name for name, parameter in teacher.named_parameters() if parameter.is_meta]
    if meta and any(hasattr(module, "_hf_hook") for module in teacher.modules()):
        raise ValueError(
            f"teacher has {meta[0]} on the meta device, wanted all weights in memory: load it without offloading, save "
            "what convert makes of it, and load that with a device_map"
        )


def check_forwards(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Checks that no module of the copy ``student`` runs a teacher module. Removes accelerate's wrappers of forward.

    Raises:
        ValueError: there is a function in place of a module's forward, which a copy shares with its original.
    """
    for (name, original), module in zip(teacher.named_modules(), student.modules()):
        forward = vars(original).get("forward")
        if forward is not None and forward is vars(module).get("forward"):
            raise ValueError(
                f"teacher has a function of its own for {name + '.' if name else ''}forward, as "
                "torch.compile(model.forward) gives, which would run the teacher in its copy too; wanted none: put it "
                "there after conversion, or use model.compile()"
            )
        if "_original_forward" in vars(module):  # Accelerator.prepare wraps the stock forward in autocast
            del module.forward, module._original_forward


def check_direction(teacher: PreTrainedModel, mixer: str, layers: tuple[int, ...], family: families.Family) -> None:
    """Checks that a causal mixer is used in a causal model.

    Raises:
        ValueError: it is in all layers of a bidirectional model whose head reads only the first token, which would see
            nothing of the text after it.

    Warns:
        UserWarning: it is in another bidirectional model.
    """
    if family.cache is not None or not mixers.get(mixer).causal or not layers:
        return
    wanted = ", ".join(name for name in mixers.names() if not mixers.get(name).causal)
    name, everywhere = type(teacher).__name__, len(layers) == len(family.blocks(teacher))
    first_token_heads = tuple(family.stock_class(family.heads[auto]) for auto in family.first_token_heads)
    if everywhere and isinstance(teacher, first_token_heads):
        raise ValueError(
            f"mixer is {mixer!r}, which sees the past only, in all layers of a {name}, whose head reads the first "
            f"token alone: it would see nothing of the text; wanted one that sees both ways ({wanted}), or fewer layers"
        )
    pooled = " The first token, which a pooler reads, sees itself alone." if everywhere and first_token_heads else ""
    warnings.warn(
        f"mixer is {mixer!r}, which sees the past only, and {name} attends both ways: what comes behind a frame or "
        f"token is hidden from it in the converted layers.{pooled} Mixers that see both ways: {wanted}",
        UserWarning,
        stacklevel=3,
    )


def layer_indices(layers: str | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The indices of the blocks, out of ``count``, that ``layers`` of `convert` selects, in order.

    Raises:
        TypeError, ValueError: `convert` does not accept the value, or a block does not exist.
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
    """The transformer blocks of a stock or converted model, in order; those of teacher and student line up."""
    return list(families.of(model).blocks(model))


def frame_lengths(model: nn.Module, attention_mask: torch.Tensor) -> torch.Tensor:
    """The number of valid frames of each clip that the transformer blocks see.

    Args:
        model: a stock or converted model.
        attention_mask: (batch, input length), 1 at the valid samples (Wav2Vec2) or features (Whisper), padding right.

    Returns:
        (batch,) int64.
    """
    return families.of(model).frame_lengths(model, attention_mask.sum(dim=-1).long())
