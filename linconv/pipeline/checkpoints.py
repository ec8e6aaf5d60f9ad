"""Loading of checkpoints: config, head, tokenizer and weights."""

import contextlib
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, PreTrainedModel

import linconv.auto  # noqa: F401  converted checkpoints load by name from here on
from linconv.conversion.families import FAMILIES, Family
from linconv.errors import UserError, may_be_on_hub, no_folder, unknown

# Half-precision weights would lose small updates, and features are float32. `bf16` in a recipe means autocast.
TRAINED_IN = torch.float32
AUTO_CLASS = {
    "classification": "AutoModelForAudioClassification",
    "ctc": "AutoModelForCTC",
    "text_classification": "AutoModelForSequenceClassification",
    "language_modeling": "AutoModelForCausalLM",
}
OF_TEXT = ("text_classification", "language_modeling")


# What transformers raises for invalid config entries or weights; it validates few of them itself.
_MISTAKES = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def mistakes_in(what: str):
    """Turns errors of transformers about invalid config entries or files into a UserError about ``what``."""
    try:
        yield
    except (*_MISTAKES, StrictDataclassError, SafetensorError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}") from error


def load_config(path: str, what: str):
    """Loads the config of a checkpoint folder or hub model, which must be of a family that linconv supports."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{what}: no config.json in {path}")
    if not folder.is_dir() and not may_be_on_hub(path):
        raise no_folder(what, path)
    try:
        with mistakes_in(f"{what}: {path}"):
            config = AutoConfig.from_pretrained(path)
    except UserError as error:
        if folder.is_dir():
            raise
        raise UserError(f"{no_folder(what, path)}, and no such model on the hub") from error
    family_of(config.model_type, f"{what}: {path}: model type")
    return config


def load_model(path: str, what: str, auto_class: str | None = None, **kwargs) -> PreTrainedModel:
    """Loads a checkpoint's model, with the head it was saved with or that of ``auto_class``.

    Raises:
        UserError: the files are invalid, or lack weights of the model's blocks. Other weights may be missing, such as
            those of a new head.
    """
    config = kwargs.pop("config", None) or load_config(path, what)
    auto = getattr(transformers, auto_class or auto_class_of(config))
    with mistakes_in(f"{what}: {path}"):
        model, info = auto.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    blocks = family_of(config.model_type, what).blocks(model)
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if any(module is block for block in blocks))
    if lacking := sorted(key for key in info["missing_keys"] if key.startswith(prefixes)):
        raise UserError(
            f"{what}: {path} lacks {len(lacking)} weights of the blocks of a {type(model).__name__}, such as "
            f"{lacking[0]}, which would be random"
        )
    return model


def empty_model(path: str, what: str) -> PreTrainedModel:
    """Builds a checkpoint's model on the meta device, without reading weights."""
    config = load_config(path, what)
    with torch.device("meta"), mistakes_in(f"{what}: {path}"):
        return getattr(transformers, auto_class_of(config)).from_config(config)


def positions(config) -> int | None:
    """Returns how many frames or tokens a model has positions for, or None if it has no limit."""
    if "whisper" in config.model_type:
        return config.max_source_positions
    if config.model_type == "linconv-gpt_neox" and len(config.linconv["layers"]) == config.num_hidden_layers:
        return None  # only attention uses the (rotary) positions
    limit = getattr(config, "max_position_embeddings", None)
    # RoBERTa's positions start after the padding index.
    return limit - config.pad_token_id - 1 if limit and "roberta" in config.model_type else limit


def family_of(model_type: str, what: str) -> Family:
    """Returns the family of a model type, stock or converted."""
    stock = model_type.removeprefix("linconv-")
    if stock not in FAMILIES:
        raise unknown(what, model_type, FAMILIES)
    return FAMILIES[stock]


def auto_class_of(config) -> str:
    """Returns the Auto class of the head that a config names."""
    heads = FAMILIES[config.model_type.removeprefix("linconv-")].heads
    saved = (config.architectures or [next(iter(heads.values()))])[0].removeprefix("Linconv")
    for auto, stock in heads.items():
        if stock == saved:
            return auto
    raise unknown("model: head", saved, heads.values())


def check_head(config, what: str, path: str, task: str) -> None:
    """Raises UserError if a checkpoint has the head of another task."""
    found = auto_class_of(config)
    if found != AUTO_CLASS[task]:
        fit = [other for other, auto_class in AUTO_CLASS.items() if auto_class == found]
        head = FAMILIES[config.model_type.removeprefix("linconv-")].heads[found]
        want = fit[0] if fit else "a checkpoint fine-tuned for the task"
        raise UserError(f"task: got {task}, but {what} {path} is a {head}; want {want}")


def load_trained(path: str, what: str, task: str) -> tuple:
    """Loads config and tokenizer of a checkpoint trained on the task; the tokenizer is None for audio classification.

    Raises:
        UserError: the checkpoint was trained on another task, or has no tokenizer.
    """
    config = load_config(path, what)
    check_head(config, what, path, task)
    if task == "classification":
        return config, None
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise UserError(f"{what}: no tokenizer in {path}")
    if task in OF_TEXT:
        fill_in_padding(config, tokenizer)
    return config, tokenizer


def load_tokenizer(path: str | None):
    """Loads the tokenizer of a checkpoint; None if it has none."""
    try:
        tokenizer = None if path is None else AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    # For some model types without files, transformers builds a tokenizer of special tokens only.
    return None if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_ids) else tokenizer


def fill_in_padding(config, tokenizer) -> None:
    """Pads with the end of text if a decoder has no padding token; masks and labels tell padding from text."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError("model: its tokenizer has no token that pads, and no end of text; want one with either")
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def check_vocabulary(config, tokenizer, task: str) -> None:
    """Raises UserError if the tokenizer can produce an id that the model has no output for."""
    ids = set(tokenizer.get_vocab().values())
    if task == "ctc":  # transcripts have no sentence markers; transformers adds them to vocabularies without
        ids -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    if (largest := max(ids)) >= config.vocab_size:
        raise UserError(
            f"model: its tokenizer's ids go up to {largest:,}; want them below {config.vocab_size:,}, its outputs"
        )


def save_preprocessing(source: str, folder: str) -> None:
    """Copies the feature extractor and the tokenizer of a checkpoint, if it has them, to ``folder``."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # it has none
        AutoFeatureExtractor.from_pretrained(source).save_pretrained(folder)
    if (tokenizer := load_tokenizer(source)) is not None:
        tokenizer.save_pretrained(folder)
