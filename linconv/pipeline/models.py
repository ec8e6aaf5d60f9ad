"""The models of a recipe: with the head of its task, converted, for input of any length."""

import warnings

import transformers
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from linconv import mixers
from linconv.conversion import ConvertedModel, convert
from linconv.data import Splits
from linconv.errors import UserError, unknown
from linconv.pipeline.checkpoints import (
    AUTO_CLASS,
    OF_TEXT,
    TRAINED_IN,
    check_head,
    family_of,
    fill_in_padding,
    load_config,
    load_model,
    mistakes_in,
)
from linconv.recipe import Recipe


def task_config(recipe: Recipe, splits: Splits | None, tokenizer):
    """Makes the config of the model to fine-tune, from ``model.source`` or ``model.config``, fitted to the task."""
    model = recipe.model
    if (model.source is None) == (not model.config):
        raise UserError("model: want one of source (a checkpoint) and config (to train from scratch)")
    if model.source is not None:
        config = load_config(model.source, "model.source")
        override(config, model.overrides)
    else:
        entries = dict(model.config)
        model_type = entries.pop("model_type", None)
        family = family_of(str(model_type), "model.config.model_type")
        config_class, entries = family.stock_config_class(), {**entries, **model.overrides}
        _check_entries(config_class(), entries, "model.config")
        with mistakes_in("model.config"):
            config = config_class(**entries)  # all entries at once: some are derived from others
    family = family_of(config.model_type, "model type")
    if AUTO_CLASS[recipe.task] not in family.heads:
        fit = [task for task, auto_class in AUTO_CLASS.items() if auto_class in family.heads]
        raise UserError(f"task: got {recipe.task}, for which {family.model_type} has no head; want {' or '.join(fit)}")
    if recipe.task == "language_modeling" and model.source is not None:  # needs a pretrained head
        check_head(config, "model.source", model.source, recipe.task)
    if splits.labels is not None:
        config.id2label = dict(enumerate(splits.labels))
        config.label2id = {label: i for i, label in enumerate(splits.labels)}
    elif recipe.task == "ctc":
        config.vocab_size = len(tokenizer)
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = config.eos_token_id = None
        # By default, a transcript that does not fit into its clip has no effect on training and does not end the run.
        config.ctc_zero_infinity = {**model.config, **model.overrides}.get("ctc_zero_infinity", True)
    elif model.source is None:  # a language model with a tokenizer built for it
        config.vocab_size = len(tokenizer)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    if recipe.task in OF_TEXT and tokenizer is not None:
        fill_in_padding(config, tokenizer)
    return config


def _check_entries(config, entries: dict, what: str) -> None:
    known = config.to_dict()
    for key, value in entries.items():
        if key not in known:
            raise unknown(f"{what}.{key}", key, known)
        # A model looks up activations when it is built; its error has only the name that was not found.
        if _is_activation(known[key]) and not _is_activation(value):
            raise unknown(f"{what}.{key}", value, ACT2FN)


def _is_activation(value) -> bool:
    return isinstance(value, str) and value in ACT2FN


def override(config, entries: dict) -> None:
    _check_entries(config, entries, "model.overrides")
    with mistakes_in("model.overrides"):
        config.update(entries)


def base_model(recipe: Recipe, config) -> PreTrainedModel:
    """Loads ``model.source`` with the head of the task, or builds a new model."""
    if recipe.model.source is None:
        with mistakes_in("model.config"):
            return getattr(transformers, AUTO_CLASS[recipe.task]).from_config(config)
    return load_model(
        recipe.model.source, "model.source", AUTO_CLASS[recipe.task], config=config, ignore_mismatched_sizes=True,
        dtype=TRAINED_IN,
    )  # fmt: skip


def any_length(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model itself, or, for families whose stock forward pass requires one length or mixes in padding, a
    copy that takes any length and ignores padding."""
    family = family_of(model.config.model_type, "model type")
    return convert(model, layers=[]) if family.overrides and not isinstance(model, ConvertedModel) else model


def make_student(base: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Converts ``base`` as the recipe says."""
    conversion = recipe.conversion
    if conversion.mixer not in mixers.names():
        raise unknown("conversion.mixer", conversion.mixer, mixers.names())
    known = mixers.get(conversion.mixer).options()
    for key in conversion.options:
        if key not in known:
            raise unknown(f"conversion.options.{key}", key, known)
    try:
        return convert(base, mixer=conversion.mixer, layers=conversion.layers, **conversion.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"conversion: {error}") from error


def name_classes(config, splits: Splits, what: str) -> None:
    """Gives the classes of a checkpoint without class names (LABEL_0, ...) their names in the data.

    This needs classes that are numbers, or a hub data set that lists them in order: other orders are unknown.
    """
    count = config.num_labels
    if splits.labels is None or config.label2id != {f"LABEL_{i}": i for i in range(count)}:
        return
    numbers = [str(i) for i in range(count)]
    names = numbers if set(splits.labels) <= set(numbers) else splits.train.classes
    if names is None or len(names) != count:
        return
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    warnings.warn(
        f"{what}: its classes have no names; taken in the order of the data, LABEL_0 for {names[0]!r} and so on: "
        "if its accuracy is low, write their names into its config, as id2label and label2id",
        stacklevel=2,
    )
