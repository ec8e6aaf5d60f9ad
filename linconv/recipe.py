"""Recipes: YAML files that say what to train, on what data and how. Every key is checked, also in nested blocks."""

import dataclasses
import enum
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from linconv.errors import UserError, unknown

__all__ = ["Conversion", "Data", "Guide", "Model", "Recipe", "load_recipe", "read_yaml"]


@dataclass
class Data:
    """Where the clips, sentences or documents are, and what their columns mean.

    ``path`` is the name of a data set on the hub or a folder: for clips with a ``metadata.csv``, for sentences with a
    table (.tsv or .csv) for each split, for documents with a table, .txt file or folder of .txt files for each.
    ``label`` names the column of the classes, ``text`` that of the transcripts or documents, ``sentence`` that of the
    sentences, or both columns of a pair task. Splits come from ``split_column`` of ``metadata.csv``, from the tables,
    files or folders by name, or from the hub; ``holdout`` takes shares of the clips (or the training text), drawn by
    ``holdout_seed`` within each label. ``limit`` keeps this many sentences or documents of a split, drawn by the same
    seed. ``max_length`` truncates sentences to this many tokens, and cuts documents into blocks of this many.
    """

    path: str | None = None
    name: str | None = None
    label: str | None = None
    text: str | None = None
    sentence: str | list[str] | None = None
    audio: str = "audio"
    split_column: str = "split"
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    where: dict[str, Any] = field(default_factory=dict)
    holdout: dict[str, float] = field(default_factory=dict)
    holdout_seed: int = 0
    limit: dict[str, int] = field(default_factory=dict)
    max_length: int | None = None
    max_seconds: float | None = None
    sampling_rate: int = 16000
    normalize_text: bool = True
    streaming: bool = False


@dataclass
class Model:
    """The models of a run: folders of checkpoints, or names on the hub.

    ``source`` is the pretrained model, or ``config`` describes one to train from scratch. ``teacher`` is the
    fine-tuned model: ``finetune`` writes it and ``distill`` reads it. ``overrides`` change the config of the trained
    model. ``waypoints`` is the number of evenly spaced snapshots that ``finetune`` keeps in the folder ``waypoints``
    inside the teacher's, for the mode waypoint_guided.
    """

    source: str | None = None
    teacher: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    freeze_feature_encoder: bool = False
    waypoints: int = 0


@dataclass
class Conversion:
    """What replaces attention: a mixer, its options, and the layers to convert (None: all)."""

    mixer: str = "bimamba2"
    layers: list[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Guide:
    """How the teacher guides the student. linconv.distillation.schedules explains the options."""

    name: Literal["unguided", "target_guided", "trajectory_guided", "waypoint_guided", "hybrid"] = "target_guided"
    init: Literal["target", "source"] | None = None
    update_every: int | None = None
    checkpoints: str | list[str] | None = None
    mode: Literal["unguided", "target_guided", "trajectory_guided", "waypoint_guided"] | None = None
    drop_layer_loss_at: int | None = None
    drop_kd_at: int | None = None

    def options(self) -> dict[str, Any]:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "name"}
        return {key: value for key, value in given.items() if value is not None}


@dataclass
class Recipe:
    """A run. ``finetune`` and ``distill`` contain arguments of :class:`linconv.distillation.DistillationArguments`."""

    task: Literal["classification", "ctc", "text_classification", "language_modeling"] = "classification"
    seed: int = 0
    output: str | None = None
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    conversion: Conversion = field(default_factory=Conversion)
    guide: Guide = field(default_factory=Guide)
    finetune: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)


# The recipe sets these at its top level; a second value could contradict it.
_NOT_IN_TRAINING = {"output_dir", "seed", "data_seed"}


def load_recipe(path: str | Path | None, overrides: typing.Iterable[tuple[str, Any]] = ()) -> Recipe:
    """Reads the recipe in ``path`` (None: all defaults) and applies ``overrides``, pairs of a dotted key and a value.

    Raises:
        UserError: no such file, not YAML, an unknown key, or a value of the wrong type.
    """
    tree: dict = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            siblings = path.parent.glob("*.yaml") if path.parent.is_dir() else ()
            raise unknown("recipe", path, (str(p) for p in siblings))
        try:
            tree = read_yaml(path.read_bytes()) or {}
        except ValueError as error:
            raise UserError(f"{path}: not YAML: {error}") from error
        if not isinstance(tree, dict):
            raise UserError(f"{path}: got {type(tree).__name__} at the top; want keys such as task and data")
    for key, value in overrides:
        _set(tree, key.split("."), value, key)
    recipe = _build(Recipe, tree, "")
    if not 0 <= recipe.seed < 2**32:  # NumPy's generator takes 32 bits
        raise UserError(f"seed: got {recipe.seed}; want a whole number from 0 to {2**32 - 1}")
    for block in ("finetune", "distill"):
        setattr(recipe, block, _training_arguments(getattr(recipe, block), block))
    return recipe


def read_yaml(text: str | bytes) -> Any:
    """Parses a YAML document; bytes must be UTF-8 or UTF-16.

    Raises:
        ValueError: it is not YAML, has an impossible value, such as a 13th month, has a key twice (PyYAML alone would
            silently keep the last one), or is nested too deep.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor):
            node, seen = super().compose_mapping_node(anchor), set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"found the key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
            return node

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:  # PyYAML parses nested blocks recursively
        raise ValueError("nested too deep") from None


def _set(tree: dict, keys: list[str], value: Any, whole: str) -> None:
    for key in keys[:-1]:
        inner = tree.get(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"{whole}: {key!r} holds a value, not keys")
        tree[key] = tree = dict(inner)  # a copy: YAML aliases share one block
    tree[keys[-1]] = value


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.')}: got {tree!r}; want keys: {', '.join(_hints(cls))}")
    hints, values = _hints(cls), {}
    for key, value in tree.items():
        if key not in hints:
            raise unknown(f"recipe key {prefix}{key}", key, hints)
        nested = dataclasses.is_dataclass(hints[key])
        values[key] = (
            _build(hints[key], value, f"{prefix}{key}.") if nested else _coerce(value, hints[key], prefix + key)
        )
    return cls(**values)


def _training_arguments(tree: dict, block: str) -> dict:
    if not tree:
        return {}
    from accelerate.utils import GradientAccumulationPlugin
    from transformers.trainer_pt_utils import AcceleratorConfig

    from linconv.distillation.arguments import DistillationArguments

    arguments = {f.name: f for f in dataclasses.fields(DistillationArguments)}
    hints = {
        name: hint
        for name, hint in _hints(DistillationArguments).items()
        if arguments[name].init and name not in _NOT_IN_TRAINING
    }
    for key in tree:
        if key in _NOT_IN_TRAINING:
            raise UserError(f"recipe key {block}.{key}: it is given at the top of the recipe")
        if key not in hints:
            raise unknown(f"recipe key {block}.{key}", key, hints)
    values = {key: _coerce(value, hints[key], f"{block}.{key}") for key, value in tree.items()}
    for key, value in values.items():  # transformers checks choices late or never
        choices = arguments[key].metadata.get("choices")
        if choices is not None and value is not None and value not in choices:
            raise unknown(f"{block}.{key}", value, choices)
    if isinstance(config := values.get("accelerator_config"), dict):
        name = f"{block}.accelerator_config"
        config = values["accelerator_config"] = _build(AcceleratorConfig, config, f"{name}.")
        if (inner := config.gradient_accumulation_kwargs) is not None:
            _build(GradientAccumulationPlugin, inner, f"{name}.gradient_accumulation_kwargs.")
    return values


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """Converts ``value`` to the annotated type: YAML reads 3e-4 as a string, and 1 where 1.0 is meant."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        errors = []
        for enumeration in (a for a in arguments if isinstance(a, type) and issubclass(a, enum.Enum)):
            arguments = (enumeration, type(None)) if type(None) in arguments else (enumeration,)
        for choice in arguments:
            try:
                return _coerce(value, choice, key)
            except UserError as error:
                if typing.get_origin(choice) is list and isinstance(value, list):
                    raise  # it names what is wrong in the list
                errors.append(error)
        raise errors[0] if arguments[1:] in ((), (type(None),)) else _wrong(key, value, hint)
    if origin is Literal:
        if value not in arguments:
            raise unknown(key, value, arguments)
        return value
    if origin is list:
        if not isinstance(value, list):
            raise _wrong(key, value, hint)
        return [_coerce(v, arguments[0], f"{key}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(key, value, hint)
        return {k: _coerce(v, arguments[1], f"{key}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise _wrong(key, value, hint) from None
        if not math.isfinite(number):  # recipes need no infinity or NaN; most would spoil weights
            raise UserError(f"{key}: got {value!r}; want a finite number")
        return number
    if hint in (int, float, str, bool, dict, list, type(None)):
        if type(value) is not hint:
            raise _wrong(key, value, hint)
        if hint is str and "\0" in value:  # the system refuses it in paths and names
            raise UserError(f"{key}: got {value!r}; want text without null characters")
        return value
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        # YAML 1.1 reads a bare no as false; transformers uses no for never.
        value = "no" if value is False else value
        if value not in [member.value for member in hint]:
            raise unknown(key, value, (member.value for member in hint))
        return value
    raise _wrong(key, value, hint)  # an object, which YAML cannot express


def _wrong(key: str, value: Any, hint: Any) -> UserError:
    wanted = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return UserError(f"{key}: got {value!r}; want {wanted}")
