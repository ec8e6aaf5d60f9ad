"""The classes of converted models: subclasses of the stock head classes, generated from the entry of each family."""

import dataclasses
import functools
import importlib
import types
from typing import ClassVar

import transformers
from transformers import PreTrainedModel, conversion_mapping
from transformers.models.auto import feature_extraction_auto, processing_auto, tokenization_auto
from transformers.utils import output_capturing

from linconv import mixers
from linconv.conversion import causal, masks
from linconv.conversion.families import Family

PREFIX = "Linconv"
AUTO_MODULE = "linconv.auto"  # holds the classes; its file goes into every checkpoint
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted: the ``linconv`` block of a config.

    mixer: name in `linconv.mixers`; layers: indices of the converted blocks; options: keywords of the mixer.
    """

    mixer: str
    layers: tuple[int, ...]
    options: dict

    def to_config(self) -> dict:
        return {
            "version": FORMAT_VERSION,
            "mixer": self.mixer,
            "layers": list(self.layers),
            "options": dict(self.options),
        }

    @classmethod
    def from_config(cls, config) -> "Conversion":
        """Reads the ``linconv`` block of a config.

        Raises:
            ValueError: the block is missing, has another version or is malformed.
        """
        block = getattr(config, "linconv", None)
        if not isinstance(block, dict):
            raise ValueError(
                f"the config of model type {config.model_type!r} has no 'linconv' block: this is not a converted "
                "model, make one of it with linconv.convert"
            )
        version = block.get("version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"the config's 'linconv' block has version {version!r}, wanted {FORMAT_VERSION}: "
                "update linconv to load this model"
            )
        fields = {"version", "mixer", "layers", "options"}
        if block.keys() != fields:
            raise ValueError(f"the config's 'linconv' block has {sorted(block)}, wanted {sorted(fields)}")
        layers = block["layers"]
        if not isinstance(layers, (list, tuple)) or not all(type(i) is int for i in layers):
            raise ValueError(f"the config's 'linconv' block has layers {layers!r}, wanted a list of indices")
        options = block["options"]
        if not isinstance(options, dict):
            raise ValueError(f"the config's 'linconv' block has options {options!r}, wanted a mapping of names")
        return cls(block["mixer"], tuple(layers), dict(options))


class ConvertedModel:
    """Mixin that adds conversion to a stock class. Not for use by itself."""

    linconv_family: ClassVar[Family]

    def __init__(self, config, *args, **kwargs):
        conversion = Conversion.from_config(config)
        super().__init__(config, *args, **kwargs)
        install(self, self.linconv_family, conversion)

    def _init_weights(self, module):
        if isinstance(module, mixers.Mixer):
            if not all(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
                module.reset_parameters()
        else:
            super()._init_weights(module)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        """Maps "sdpa" and "eager" to the implementations whose masks do not grow with L²."""
        requested = attn_implementation and attn_implementation.removeprefix(masks.PREFIX)
        chosen = super()._check_and_adjust_attn_implementation(requested, *args, **kwargs)
        if chosen in masks.UNCHANGED:
            return chosen
        if chosen not in ("sdpa", "eager"):
            wanted = ", ".join(("sdpa", "eager", *masks.UNCHANGED))
            raise ValueError(f"attn_implementation is {attn_implementation!r}, a converted model takes {wanted}")
        return masks.PREFIX + chosen

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As for the stock class, but only from safetensors.

        Raises:
            ValueError: use_safetensors=False, or the checkpoint lacks weights of its mixers, has them in another
                shape, or has weights of mixers that its config does not have.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors is False, wanted True: a converted model loads no pickled weights")
        kwargs["use_safetensors"] = True
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        lacking = sorted(key for key in lacking if ".mixer." in key)
        if lacking:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(lacking)} weights of its mixers, the first of them "
                f"{lacking[0]}: it is not a complete checkpoint of a converted model"
            )
        # If the config has no such mixer, or not this part of it, a module with random weights is in its place.
        left_over = sorted(key for key in info["unexpected_keys"] if ".mixer." in key)
        if left_over:
            raise ValueError(
                f"{pretrained_model_name_or_path} has {len(left_over)} weights of mixers that are not in its config, "
                f"the first of them {left_over[0]}: the 'linconv' block is not that of these weights"
            )
        return (model, info) if output_loading_info else model


def install(model: PreTrainedModel, family: Family, conversion: Conversion) -> None:
    """Converts a stock model in place: its class, the classes of its modules, and its attention.

    The model's config must already be that of a converted model.

    Raises:
        TypeError, ValueError: the mixer is unknown, its options do not fit, or a layer does not exist.
    """
    classes = converted_classes(family)
    for module in model.modules():
        converted = classes.get(PREFIX + type(module).__name__)
        if converted is not None and issubclass(converted, type(module)):
            module.__class__ = converted
            if hasattr(module, "_old_forward"):  # accelerate's hook calls it; it was bound when the hook was added
                module._old_forward = types.MethodType(converted.forward, module)
    blocks, mixer_class = family.blocks(model), mixers.get(conversion.mixer)
    for index in conversion.layers:
        if not 0 <= index < len(blocks):
            raise ValueError(
                f"the config's 'linconv' block has layer {index}, wanted 0 to {len(blocks) - 1}: "
                f"the model has {len(blocks)} blocks"
            )
    new = [
        mixer_class.from_attention(family.self_attention(blocks[i]), model.config, **conversion.options)
        for i in conversion.layers
    ]
    mixer_class.join(new)
    family.keep_for_others(blocks, conversion.layers)
    for index, mixer in zip(conversion.layers, new):
        attention = blocks[index].get_submodule(family.attention)
        if family.cache is None:
            slot = masks.AttentionSlot(mixer, family.attention_outputs)
        else:
            slot = causal.CausalSlot(mixer, family.attention_outputs, family.cache, index)
        slot.train(attention.training)
        if not any(parameter.is_meta for parameter in slot.parameters()):
            for module in slot.modules():
                module._is_hf_initialized = True  # else a later init_weights would reset it
        family.replace_attention(blocks[index], slot)
    if len(conversion.layers) == len(blocks):
        family.drop_attention_only(model)


@functools.cache
def converted_config_class(family: Family) -> type:
    """The config class of a family's converted models."""
    stock = family.stock_config_class()
    namespace = {
        "__module__": AUTO_MODULE,
        "__doc__": f"Config of a converted {stock.__name__[: -len('Config')]} model, with a `linconv` block.",
        "model_type": f"linconv-{family.model_type}",
        "linconv": None,
        "_auto_class": "AutoConfig",
    }
    return type(PREFIX + stock.__name__, (stock,), namespace)


@functools.cache
def converted_classes(family: Family) -> dict[str, type]:
    """A family's converted model classes by name; registers them with transformers' Auto classes."""
    masks.register()
    config_class = converted_config_class(family)
    overrides = importlib.import_module(family.overrides) if family.overrides else None
    auto_classes = {stock: auto for auto, stock in family.heads.items()}
    classes = {}
    for name in (*family.heads.values(), *family.inner):
        stock, override = family.stock_class(name), getattr(overrides, name, None)
        own = (override,) if override else ()
        if family.mask_sums and auto_classes.get(name) == "AutoModel":
            own = (masks.WaveformMask, *own)
        if not issubclass(stock, PreTrainedModel):
            namespace = {"__module__": AUTO_MODULE, "__doc__": f"{name} of a converted model."}
            classes[PREFIX + name] = type(PREFIX + name, (*own, stock), namespace)
            continue
        namespace = {
            "__module__": AUTO_MODULE,
            "__doc__": f"{name} with linear-time mixers for attention, see `linconv.convert`.",
            "config_class": config_class,
            "linconv_family": family,
            "_auto_class": auto_classes.get(name),
        }
        converted = type(PREFIX + name, (*own, ConvertedModel, stock), namespace)
        # transformers looks up by class name which outputs it can record, and fills this in when a model is
        # constructed; an inner model becomes an instance of this class only later.
        dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(converted), stock._can_record_outputs)
        classes[PREFIX + name] = converted
        # It also looks up by class name which weights have other names in checkpoints.
        renamed = conversion_mapping.get_checkpoint_conversion_mapping(name)
        if renamed is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(PREFIX + name, renamed, overwrite=True)
    _register(family, config_class, classes)
    return classes


def auto_map(family: Family) -> dict[str, str]:
    """The config entry by which a checkpoint loads with ``trust_remote_code=True``."""
    module = AUTO_MODULE.rpartition(".")[2]
    names = {"AutoConfig": family.config, **family.heads}
    return {auto: f"{module}.{PREFIX}{name}" for auto, name in names.items()}


def _register(family: Family, config_class: type, classes: dict[str, type]) -> None:
    transformers.AutoConfig.register(config_class.model_type, config_class)
    for auto_name, stock_name in family.heads.items():
        auto = getattr(transformers, auto_name)
        auto.register(config_class, classes[PREFIX + stock_name])
        # The speech recognition pipeline decides by these class names which models generate.
        auto._model_mapping._model_mapping[config_class.model_type] = PREFIX + stock_name
    # Preprocessing is that of the stock model.
    for auto, mapping in (
        (transformers.AutoFeatureExtractor, feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING),
        (transformers.AutoProcessor, processing_auto.PROCESSOR_MAPPING),
        (transformers.AutoTokenizer, tokenization_auto.TOKENIZER_MAPPING),
    ):
        stock = mapping.get(family.stock_config_class(), None)
        if stock is not None:
            auto.register(config_class, stock)
