"""What the command line does, as functions: fine-tune a teacher, distil a student, score a checkpoint."""

import contextlib
import copy
import json
import math
import warnings
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, PreTrainedModel

import linconv.auto  # noqa: F401  converted checkpoints load by name from here on
from linconv import mixers
from linconv.benchmarking.machine import provenance
from linconv.conversion import ConvertedModel, convert
from linconv.conversion.families import FAMILIES, Family
from linconv.data import (
    BlockCollator,
    Blocks,
    Collator,
    SentenceCollator,
    Splits,
    build_bpe_tokenizer,
    build_tokenizer,
    in_blocks,
    load_splits,
)
from linconv.data.metrics import Metrics, Perplexity
from linconv.data.sources import durations
from linconv.distillation import (
    DistillationArguments,
    DistillationTrainer,
    TrajectoryGuided,
    Unguided,
    WaypointGuided,
    make_mode,
)
from linconv.distillation.probe import Probe
from linconv.errors import UserError, check_output, first_of, may_be_on_hub, no_folder, unknown
from linconv.progress import Progress
from linconv.recipe import Recipe

__all__ = [
    "RESULTS_FILE",
    "WAYPOINTS_FOLDER",
    "Run",
    "distill",
    "evaluate",
    "finetune",
    "load_config",
    "load_model",
    "make_student",
    "positions",
    "save_preprocessing",
]

RESULTS_FILE = "results.json"
RECIPE_FILE = "recipe.json"  # in each checkpoint
PROBE_CLIPS = 8
# Weights of half precision would lose small steps, and features are float32: `bf16` in a recipe is autocast.
TRAINED_IN = torch.float32
WAYPOINTS_FOLDER = "waypoints"  # in the teacher's

SPLITS = ("train", "validation", "test")
_AUTO_CLASS = {
    "classification": "AutoModelForAudioClassification",
    "ctc": "AutoModelForCTC",
    "text_classification": "AutoModelForSequenceClassification",
    "language_modeling": "AutoModelForCausalLM",
}
_OF_TEXT = ("text_classification", "language_modeling")
BLOCK = 1024  # tokens, unless a recipe or the model's positions say otherwise


# ---- Models


def load_config(path: str, what: str):
    """The config of a checkpoint folder or of a model on the hub, of a family that linconv knows."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{what}: no config.json in {path}")
    if not folder.is_dir() and not may_be_on_hub(path):
        raise no_folder(what, path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise UserError(f"{what}: {path}: {' '.join(str(error).split())[:300]}") from error
        raise UserError(f"{no_folder(what, path)}, and no such model on the hub") from error
    _family(config.model_type, f"{what}: {path}: model type")
    return config


def _check_head(config, what: str, path: str, task: str) -> None:
    """Raises UserError where a checkpoint is of another task."""
    found = _auto_class(config)
    if found != _AUTO_CLASS[task]:
        fit = [other for other, auto_class in _AUTO_CLASS.items() if auto_class == found]
        head = FAMILIES[config.model_type.removeprefix("linconv-")].heads[found]
        want = fit[0] if fit else "a checkpoint fine-tuned for the task"
        raise UserError(f"task: got {task}, but {what} {path} is a {head}; want {want}")


def load_model(path: str, what: str, auto_class: str | None = None, **kwargs) -> PreTrainedModel:
    """A model of a checkpoint, with the head it was saved with or that of ``auto_class``."""
    config = kwargs.pop("config", None) or load_config(path, what)
    auto = getattr(transformers, auto_class or _auto_class(config))
    try:
        return auto.from_pretrained(path, config=config, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{what}: {path}: {' '.join(str(error).split())[:300]}") from error


def empty_model(path: str, what: str) -> PreTrainedModel:
    """The model of a checkpoint without its weights, which are not read."""
    config = load_config(path, what)
    with torch.device("meta"):
        return getattr(transformers, _auto_class(config)).from_config(config)


def positions(config) -> int | None:
    """How many frames or tokens a model has positions for; None where it is not bound to any."""
    if "whisper" in config.model_type:
        return config.max_source_positions
    if config.model_type == "linconv-gpt_neox" and len(config.linconv["layers"]) == config.num_hidden_layers:
        return None  # only attention turned by its positions
    limit = getattr(config, "max_position_embeddings", None)
    # RoBERTa's start behind the index of padding.
    return limit - config.pad_token_id - 1 if limit and "roberta" in config.model_type else limit


def make_student(base: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """``base`` converted as the recipe says."""
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


def _family(model_type: str, what: str) -> Family:
    stock = model_type.removeprefix("linconv-")
    if stock not in FAMILIES:
        raise unknown(what, model_type, FAMILIES)
    return FAMILIES[stock]


def _auto_class(config) -> str:
    """The Auto class of the head that a config names."""
    heads = FAMILIES[config.model_type.removeprefix("linconv-")].heads
    saved = (config.architectures or [next(iter(heads.values()))])[0].removeprefix("Linconv")
    for auto, stock in heads.items():
        if stock == saved:
            return auto
    raise unknown("model: head", saved, heads.values())


def _any_length(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself; or, of a family whose stock forward pass takes one length only or lets padding in, a copy that
    takes any and does not."""
    family = _family(model.config.model_type, "model type")
    return convert(model, layers=[]) if family.overrides and not isinstance(model, ConvertedModel) else model


def _task_config(recipe: Recipe, splits: Splits | None, tokenizer):
    """The config of the model to be fine-tuned: that of ``model.source``, or from scratch, fitted to the task."""
    model = recipe.model
    if (model.source is None) == (not model.config):
        raise UserError("model: want one of source (a checkpoint) and config (to train from scratch)")
    if model.source is not None:
        config = load_config(model.source, "model.source")
        _override(config, model.overrides)
    else:
        entries = dict(model.config)
        model_type = entries.pop("model_type", None)
        family = _family(str(model_type), "model.config.model_type")
        config_class, entries = family.stock_config_class(), {**entries, **model.overrides}
        _check_entries(config_class(), entries, "model.config")
        with _mistakes_in("model.config"):
            config = config_class(**entries)  # made at once: some entries follow from others
    family = _family(config.model_type, "model type")
    if _AUTO_CLASS[recipe.task] not in family.heads:
        fit = [task for task, auto_class in _AUTO_CLASS.items() if auto_class in family.heads]
        raise UserError(f"task: got {recipe.task}, for which {family.model_type} has no head; want {' or '.join(fit)}")
    if recipe.task == "language_modeling" and model.source is not None:  # its head is the pretrained one
        _check_head(config, "model.source", model.source, recipe.task)
    if splits.labels is not None:
        config.id2label = dict(enumerate(splits.labels))
        config.label2id = {label: i for i, label in enumerate(splits.labels)}
    elif recipe.task == "ctc":
        config.vocab_size = len(tokenizer)
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = config.eos_token_id = None
        # If not told otherwise, a transcript that does not fit into its clip teaches nothing, and does not end the run.
        config.ctc_zero_infinity = {**model.config, **model.overrides}.get("ctc_zero_infinity", True)
    elif model.source is None:  # a language model, whose tokenizer was built for it
        config.vocab_size = len(tokenizer)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    if recipe.task in _OF_TEXT and tokenizer is not None:
        _fill_in_padding(config, tokenizer)
    return config


def _check_entries(config, entries: dict, what: str) -> None:
    for key in entries:
        if key not in config.to_dict():
            raise unknown(f"{what}.{key}", key, config.to_dict())


def _override(config, entries: dict) -> None:
    _check_entries(config, entries, "model.overrides")
    with _mistakes_in("model.overrides"):
        config.update(entries)


@contextlib.contextmanager
def _mistakes_in(what: str):
    """What transformers says of entries that will not do is said of ``what``."""
    try:
        yield
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}") from error


def _base_model(recipe: Recipe, config) -> PreTrainedModel:
    """``model.source`` with a new head, or a new model."""
    if recipe.model.source is None:
        with _mistakes_in("model.config"):
            return getattr(transformers, _AUTO_CLASS[recipe.task]).from_config(config)
    return load_model(
        recipe.model.source, "model.source", _AUTO_CLASS[recipe.task], config=config, ignore_mismatched_sizes=True,
        dtype=TRAINED_IN,
    )  # fmt: skip


# ---- Preprocessing


def save_preprocessing(source: str, folder: str) -> None:
    """Copies the feature extractor and the tokenizer of a checkpoint, as far as it has them, to ``folder``."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # it has none
        AutoFeatureExtractor.from_pretrained(source).save_pretrained(folder)
    if (tokenizer := _tokenizer(source)) is not None:
        tokenizer.save_pretrained(folder)


def _feature_extractor(path: str | None, config, recipe: Recipe):
    if recipe.task in _OF_TEXT:
        return None
    sampling_rate = recipe.data.sampling_rate
    if path is not None:
        try:
            extractor = AutoFeatureExtractor.from_pretrained(path)
        except (OSError, ValueError):
            extractor = None
        if extractor is not None:
            if extractor.sampling_rate != sampling_rate:
                raise UserError(f"data.sampling_rate: got {sampling_rate}; the model wants {extractor.sampling_rate}")
            return extractor
    if "whisper" in config.model_type:
        extractor = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins, sampling_rate=sampling_rate)
    else:
        extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=sampling_rate)
    # The mask keeps padding out of every sum; only group-normalised Wav2Vec2 checkpoints go without.
    extractor.return_attention_mask = True
    return extractor


def _tokenizer(path: str | None):
    """The tokenizer of a checkpoint, or None where it has none."""
    try:
        tokenizer = None if path is None else AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    # Of some model types transformers makes one of special tokens alone where there are no files.
    return None if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_ids) else tokenizer


def _trained(path: str, what: str, task: str) -> tuple:
    """The config and the tokenizer of a checkpoint that was trained on the task; classes of clips need no tokenizer.

    Raises:
        UserError: it was trained on another task, or has no tokenizer.
    """
    config = load_config(path, what)
    _check_head(config, what, path, task)
    if task == "classification":
        return config, None
    tokenizer = _tokenizer(path)
    if tokenizer is None:
        raise UserError(f"{what}: no tokenizer in {path}")
    if task in _OF_TEXT:
        _fill_in_padding(config, tokenizer)
    return config, tokenizer


def _fill_in_padding(config, tokenizer) -> None:
    """Where a decoder comes without a token that pads, the end of text does; masks and labels tell it from the text."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError("model: its tokenizer has no token that pads, and no end of text; want one with either")
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def _name_classes(config, splits: Splits, what: str) -> None:
    """Gives a checkpoint whose classes are only counted (LABEL_0, ...) the names that they have in the data.

    They have some where the data set of the hub counts them too, or where they are numbers: other orders are unknown.
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


def _in_blocks(recipe: Recipe, splits: Splits, config, tokenizer, args: DistillationArguments) -> Splits:
    """The documents of a language model as blocks of tokens. The splits of other tasks stay as they are."""
    if recipe.task != "language_modeling":
        return splits
    most = positions(config)
    length = min(BLOCK, most or BLOCK) if recipe.data.max_length is None else recipe.data.max_length
    if length < 2 or (most and length > most):
        upper = f"to {most:,}, which the model has positions for" if most else "tokens or more"
        raise UserError(f"data.max_length: got {length}; want 2 {upper}")
    if tokenizer.eos_token is None:
        raise UserError("model: its tokenizer has no end of text, which stands between documents; want one that has")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"model: its tokenizer has {len(tokenizer):,} tokens; want {config.vocab_size:,}, as the model")
    there = [name for name in SPLITS if splits[name] is not None]
    blocks = _by_main_process(args, lambda: {name: in_blocks(splits[name], tokenizer, length, name) for name in there})
    return replace(splits, **blocks)


def _spelling(tokenizer, data):
    """What makes the tokens of a transcript: in capitals where a vocabulary has no others."""
    letters = [token for token in tokenizer.get_vocab() if len(token) == 1 and token.lower() != token.upper()]
    capitals = data.normalize_text and letters and all(token.isupper() for token in letters)
    return lambda text: tokenizer(text.upper() if capitals else text).input_ids


def _check_transcripts(texts, spell, tokenizer) -> None:
    """Warns of characters that there are no tokens for; it is an error if there are none for any."""
    characters = set().union(*texts) - {" "}
    unknown_ones = sorted(c for c in characters if tokenizer.unk_token_id in spell(c))
    if not unknown_ones:
        return
    shown = " ".join(unknown_ones[:20]) + (" ..." if len(unknown_ones) > 20 else "")
    if len(unknown_ones) == len(characters):
        raise UserError(f"data.text: the tokenizer has no token for any character of the transcripts: {shown}")
    warnings.warn(
        f"data.text: the tokenizer has no token for {shown}, which become {tokenizer.unk_token}: take them out of the "
        "transcripts, or fine-tune from a checkpoint whose tokenizer has them",
        stacklevel=2,
    )


def _shortest_clip(model: PreTrainedModel, extractor) -> float:
    """Seconds of sound that a model has its first frame of."""
    family, rate = _family(model.config.model_type, "model type"), extractor.sampling_rate
    # Whisper is given spectra, a hop apart, which look half a window to either side.
    hop, window = getattr(extractor, "hop_length", 1), getattr(extractor, "n_fft", 0)
    first = bisect_left(range(rate), 1, key=lambda n: int(family.frame_lengths(model, torch.tensor(n // hop))))
    return max(first, window // 2 + 1) / rate


@dataclass
class _Preprocessing:
    """From clips, sentences or blocks to batches and from outputs to scores."""

    collator: Collator | SentenceCollator | BlockCollator
    metrics: Metrics | Perplexity
    saved: Any  # what goes into the checkpoint folder


def _preprocessing(recipe: Recipe, splits: Splits, config, extractor, tokenizer) -> _Preprocessing:
    if recipe.task == "language_modeling":
        return _Preprocessing(BlockCollator(tokenizer.pad_token_id), Perplexity(), tokenizer)
    known = [splits[name].targets for name in SPLITS if splits[name] is not None and splits[name].targets is not None]
    if recipe.task != "ctc":
        label2id = dict(config.label2id)

        def encode(target: str) -> int:
            if target not in label2id:
                raise unknown("data: label", target, label2id)
            return label2id[target]

        for target in dict.fromkeys(chain.from_iterable(known)):  # now, and not in the middle of a run
            encode(target)

        if recipe.task == "text_classification":
            length = min(n for n in (recipe.data.max_length, positions(config), 1 << 20) if n)
            return _Preprocessing(SentenceCollator(tokenizer, encode, length), Metrics(), tokenizer)
        return _Preprocessing(Collator(extractor, encode), Metrics(), extractor)
    processor = transformers.Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)
    spell = _spelling(tokenizer, recipe.data)
    for name in SPLITS:
        if splits[name] is not None and splits[name].targets and not any(splits[name].targets):
            raise UserError(f"data.text: every transcript of the split {name} is empty")
    _check_transcripts(chain.from_iterable(known), spell, tokenizer)
    return _Preprocessing(Collator(extractor, spell), Metrics(tokenizer), processor)


# ---- Runs


def _by_main_process(args: DistillationArguments, function: Callable[[], Any]) -> Any:
    """What ``function`` returns in the main process, or the UserError that it raises there; the others are given it."""
    if args.world_size == 1:
        return function()
    outcome: list = [None]
    if args.process_index == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[0] = error
    torch.distributed.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


@dataclass
class Run:
    """A run made ready: ``describe`` says what it will do, ``execute`` does it."""

    recipe: Recipe
    trainer: DistillationTrainer
    splits: Splits
    output: Path
    title: str
    command: str  # finetune or distill

    def describe(self) -> list[tuple[str, str]]:
        args, model = self.trainer.args, self.trainer.model
        count = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        splits = {name: self.splits[name] for name in SPLITS if self.splits[name] is not None}
        blocks = {name: split for name, split in splits.items() if isinstance(split, Blocks)}
        steps = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        lines = [
            ("run", self.title),
            ("model", f"{type(model).__name__}, {count:,} parameters, {trained:,} trained"),
            ("blocks" if blocks else "data", ", ".join(f"{_size(split)} {name}" for name, split in splits.items())),
            ("training", f"{steps} of {batch}, learning rate {args.learning_rate:g}, seed {args.seed}"),
            ("output", str(self.output)),
        ]
        if blocks:
            tokens = [f"{split.tokens:,} {name} of {split.documents:,} documents" for name, split in blocks.items()]
            lines.insert(3, ("tokens", f"{', '.join(tokens)}; {self.splits.train.length:,} a block"))
        if (labels := self.splits.labels) is not None:
            shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
            lines.insert(3, ("classes", f"{len(labels)}: {shown}"))
        if self.trainer.teacher is not None:
            weights = f"alpha_ce {args.alpha_ce:g}, alpha_kd {args.alpha_kd:g}, alpha_ld {args.alpha_ld:g}"
            lines.insert(2, ("guide", f"{self.trainer.mode}, {weights}"))
        return lines

    def check(self, resume: bool = False) -> None:
        """Looks for what would end the run later: a checkpoint in its way, and clips that cannot be read or learned.

        Of each clip the header is read, of a few all. Streams are not looked through.

        Raises:
            UserError: something was found.
        """
        self._checkpoint(resume)
        self._check_transcripts_fit(self._seconds(*SPLITS))
        self._probe()

    def _seconds(self, *names: str) -> list[float]:
        """How long each clip of these splits is, by its header; nothing of text and streams.

        Raises:
            UserError: some clips cannot be used.
        """
        clips = [split for split in map(self.splits.__getitem__, names) if hasattr(split, "sounds")]
        if not clips:
            return []
        extractor = self.trainer.data_collator.feature_extractor
        return durations(
            chain.from_iterable(split.sounds() for split in clips),
            sum(map(len, clips)),
            shortest=_shortest_clip(self.trainer.model, extractor),
        )

    def _check_transcripts_fit(self, seconds: list[float]) -> None:
        """Looks for clips to train on whose CTC loss is infinite: all alignments have more frames than they do.

        Args:
            seconds: of each clip, those to train on first.

        Raises:
            UserError: there are some, and the model's config has no ``ctc_zero_infinity``, with which it is a warning.
        """
        if self.recipe.task != "ctc" or not seconds:
            return
        train, collator, model = self.splits.train, self.trainer.data_collator, self.trainer.model
        rate = collator.feature_extractor.sampling_rate
        samples = torch.tensor([math.ceil(s * rate - 1e-4) for s in seconds[: len(train)]])  # resampling rounds up
        frames = _family(model.config.model_type, "model type").frame_lengths(model, samples).tolist()
        short = []
        for i, labels in enumerate(map(collator.encode, train.targets)):
            least = len(labels) + sum(a == b for a, b in pairwise(labels))  # a blank parts two that are the same
            if frames[i] < least:
                short.append(f"{train.name(i)}: {frames[i]} frames, {least} wanted")
        if not short:
            return
        found = (
            f"data.text: {len(short):,} of {len(train):,} clips to train on are too short for their transcripts: "
            f"{first_of(short)}; want them left out, or shorter transcripts"
        )
        if not model.config.ctc_zero_infinity:
            raise UserError(f"{found}, or model.overrides.ctc_zero_infinity=true: else their loss is infinite")
        warnings.warn(f"{found}: their loss is infinite, which counts as zero, so they teach nothing", stacklevel=2)

    def execute(self, resume: bool = False) -> dict[str, float]:
        """Trains, saves the model and its preprocessing in ``output``, and scores it on the test split.

        Args:
            resume: go on from the last complete checkpoint in ``output``.

        Returns:
            The scores, which are also in ``results.json`` in ``output``.
        """
        checkpoint = self._checkpoint(resume)
        if (probe := self._probe()) is not None:
            self.trainer.add_callback(probe)
        if resume and self._is_at_its_end(checkpoint):
            weights = load_model(checkpoint, "--resume", dtype=TRAINED_IN).state_dict()
            self.trainer.model.load_state_dict(weights)
            state = Path(checkpoint) / "trainer_state.json"
            self.trainer.state = transformers.TrainerState.load_from_json(str(state))
        else:
            if self.recipe.task == "ctc":
                _by_main_process(self.trainer.args, lambda: self._check_transcripts_fit(self._seconds("train")))
            self.trainer.train(resume_from_checkpoint=checkpoint)
        self.trainer.save_model()
        split = "test" if self.splits.test is not None else "validation"
        scores = {}
        if self.splits[split] is not None:
            scores = self.trainer.evaluate(self.splits[split], metric_key_prefix=split)
            scores = {k: v for k, v in scores.items() if k.startswith(f"{split}_") and _is_score(k)}
        if self.trainer.is_world_process_zero():
            results = {
                "command": self.command,
                "scores": scores,
                "clips": self.trainer.compute_metrics.clips if scores else [],
                "parameters": self.trainer.model.num_parameters(),
                "recipe": asdict(self.recipe),
                "provenance": provenance(),
            }
            (self.output / RESULTS_FILE).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        return scores

    def _checkpoint(self, resume: bool) -> str | None:
        """The checkpoint to go on from, or None where the run starts.

        Raises:
            UserError: there is none to go on from, or one that would be written over.
        """
        checkpoint = last_checkpoint(self.output)
        if resume:
            if checkpoint is None:
                raise UserError(f"--resume: no complete checkpoint in {self.output}")
            self._check_checkpoint(checkpoint)
        elif checkpoint is not None:
            raise UserError(f"output: {checkpoint} is of an earlier run; want --resume, or another folder")
        return checkpoint

    def _probe(self) -> Probe | None:
        """Follows a few clips of the test split; None where there is none, or a stream."""
        test = self.splits.test
        if test is None or _streamed(test):
            return None
        count = min(PROBE_CLIPS, len(test))
        clips = [test[i * len(test) // count] for i in range(count)]
        return Probe(self.trainer, self.trainer.data_collator(clips))

    def _check_checkpoint(self, checkpoint: str) -> None:
        """Raises UserError where a checkpoint is of another run, or cannot be gone on from."""
        if self.trainer.args.save_only_model:
            raise UserError("--resume: save_only_model leaves checkpoints nothing to go on from; want it false")
        file = Path(checkpoint) / RECIPE_FILE
        if not file.is_file():
            return
        then, now = json.loads(file.read_text()), _identity(self.recipe)
        for key in now:
            if then.get(key) != now[key]:
                raise UserError(f"--resume: {checkpoint} is of a run with {key} {then.get(key)}; got {now[key]}")

    def _is_at_its_end(self, checkpoint: str) -> bool:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        steps = self.trainer.args.max_steps
        return state["global_step"] >= (steps if steps > 0 else state["max_steps"])


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What a run may not change on the way, as JSON has it. How long it is, what it logs and where data are, it may."""
    fields = {k: v for k, v in asdict(recipe).items() if k not in ("output", "finetune", "distill")}
    del fields["data"]["path"]
    return json.loads(json.dumps(fields, default=str))


class KeepRecipe(transformers.TrainerCallback):
    """Writes into each checkpoint whose run it is of."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / RECIPE_FILE).write_text(json.dumps(_identity(self.recipe), indent=2, ensure_ascii=False) + "\n")


class KeepWaypoints(transformers.TrainerCallback):
    """Saves ``count`` snapshots of the model, evenly spaced and the end among them: its weights and nothing else."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step, steps = state.global_step, state.max_steps
        if step * self.count // steps > (step - 1) * self.count // steps and state.is_world_process_zero:
            model.save_pretrained(self.folder / f"checkpoint-{step}")


def finetune(recipe: Recipe, folder: str | None = None) -> Run:
    """The fine-tuning of ``model.source`` (or of a new model) on the task; the result goes to ``model.teacher``.

    ``folder``, if given, is where the trainer writes in place of that, for a dry run.
    """
    output = _required(recipe.model.teacher, "model.teacher", "a folder for the fine-tuned model")
    check_output(output, "model.teacher", model__source=recipe.model.source)
    splits = load_splits(recipe.data, recipe.task)
    _need_train(splits)
    args = _arguments(recipe, recipe.finetune, folder or output, splits)
    transformers.set_seed(recipe.seed)
    tokenizer = None if recipe.task == "classification" else _tokenizer(recipe.model.source)
    if recipe.task == "ctc" and tokenizer is None:
        if _streamed(splits.train):
            raise UserError("data.streaming: a vocabulary cannot be built from a stream")
        tokenizer = build_tokenizer(splits.train.targets)
    if recipe.task == "language_modeling" and recipe.model.source is None and recipe.model.config:
        texts, size = (text for (text,) in splits.train.texts), recipe.model.config.get("vocab_size")
        tokenizer = _by_main_process(args, lambda: build_bpe_tokenizer(texts, size))
    config = _task_config(recipe, splits, tokenizer)
    if recipe.task in _OF_TEXT and tokenizer is None:
        raise UserError("model.source: want a checkpoint with a tokenizer")
    splits = _in_blocks(recipe, splits, config, tokenizer, args)
    model = _any_length(_base_model(recipe, config))
    if recipe.model.freeze_feature_encoder:
        if not hasattr(model, "freeze_feature_encoder"):
            raise UserError(f"model.freeze_feature_encoder: a {type(model).__name__} has none")
        model.freeze_feature_encoder()
    extractor = _feature_extractor(recipe.model.source, config, recipe)
    preprocessing = _preprocessing(recipe, splits, config, extractor, tokenizer)
    trainer = _trainer(recipe, args, model, splits, preprocessing, mode=Unguided())
    if recipe.model.waypoints < 0:
        raise UserError(f"model.waypoints: got {recipe.model.waypoints}; want a number from 0 up")
    if recipe.model.waypoints:
        trainer.add_callback(KeepWaypoints(Path(folder or output) / WAYPOINTS_FOLDER, recipe.model.waypoints))
    return Run(recipe, trainer, splits, Path(output), f"fine-tune {recipe.model.source or 'a new model'}", "finetune")


def distill(recipe: Recipe, folder: str | None = None) -> Run:
    """The conversion of the teacher, or of the pretrained model, and its training under the teacher's guidance.

    ``folder``, if given, is where the trainer writes in place of ``output``, for a dry run.
    """
    path = _required(recipe.model.teacher, "model.teacher", "the checkpoint of a fine-tuned model")
    output = _required(recipe.output, "output", "a folder for the student")
    check_output(output, "output", model__teacher=path, model__source=recipe.model.source)
    options = recipe.guide.options()
    if "waypoint_guided" in (recipe.guide.name, recipe.guide.mode) and "checkpoints" not in options:
        options["checkpoints"] = str(Path(path) / WAYPOINTS_FOLDER)
    try:
        mode = make_mode(recipe.guide.name, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"guide.{error}") from error
    config, tokenizer = _trained(path, "model.teacher", recipe.task)
    splits = load_splits(recipe.data, recipe.task)
    _need_train(splits)
    _name_classes(config, splits, "model.teacher")
    if splits.labels is not None:  # the student's classes are in the teacher's order
        splits = replace(splits, labels=[config.id2label[i] for i in sorted(config.id2label)])
    teacher = _any_length(load_model(path, "model.teacher", config=config, dtype=TRAINED_IN))
    extractor = _feature_extractor(path, teacher.config, recipe)
    args = _arguments(recipe, recipe.distill, folder or output, splits)
    splits = _in_blocks(recipe, splits, config, tokenizer, args)
    transformers.set_seed(recipe.seed)
    base = teacher
    if mode.origin == "source":
        if recipe.model.source is None and not recipe.model.config:
            raise UserError(
                "model.source: not given; want the pretrained model, whose weights the student keeps in this mode"
            )
        base = _base_model(recipe, _task_config(recipe, splits, tokenizer))
    elif recipe.model.overrides:
        config = copy.deepcopy(config)
        _override(config, recipe.model.overrides)
        base = _any_length(load_model(path, "model.teacher", config=config, dtype=TRAINED_IN))
    student = make_student(base, recipe)
    if isinstance(mode.guide, TrajectoryGuided):
        teacher = copy.deepcopy(base)  # the head too: both start from the same place
    elif isinstance(mode.guide, WaypointGuided):
        teacher = _any_length(load_model(mode.guide.waypoint(0), "guide.checkpoints", dtype=TRAINED_IN))
    if recipe.model.freeze_feature_encoder:
        student.freeze_feature_encoder()
    preprocessing = _preprocessing(recipe, splits, teacher.config, extractor, tokenizer)
    trainer = _trainer(recipe, args, student, splits, preprocessing, mode=mode, teacher=teacher)
    where = "all" if recipe.conversion.layers is None else len(recipe.conversion.layers)
    title = f"distil {path} into {recipe.conversion.mixer} ({where} layers)"
    return Run(recipe, trainer, splits, Path(output), title, "distill")


def evaluate(checkpoint: str, recipe: Recipe, split: str = "test") -> dict[str, float]:
    """The scores of a checkpoint on one split: accuracy, word and character error rate for CTC, or perplexity."""
    config, tokenizer = _trained(checkpoint, "checkpoint", recipe.task)
    splits = load_splits(recipe.data, recipe.task)
    _name_classes(config, splits, "checkpoint")
    model = _any_length(load_model(checkpoint, "checkpoint", config=config, dtype=TRAINED_IN))
    extractor = _feature_extractor(checkpoint, model.config, recipe)
    if splits[split] is None:
        raise UserError(f"--split: the data has nothing for {split}")
    splits = replace(splits, **{other: None for other in SPLITS if other != split})
    options = {k: v for k, v in recipe.distill.items() if k == "per_device_eval_batch_size"}
    with TemporaryDirectory() as folder:
        args = _arguments(recipe, options, folder, splits)
        splits = _in_blocks(recipe, splits, config, tokenizer, args)
        preprocessing = _preprocessing(recipe, splits, model.config, extractor, tokenizer)
        trainer = _trainer(recipe, args, model, splits, preprocessing, mode=Unguided())
        scores = trainer.evaluate(splits[split], metric_key_prefix=split)
    return {
        {"text_classification": "rows", "language_modeling": "blocks"}.get(recipe.task, "clips"): _size(splits[split]),
        **{k: v for k, v in scores.items() if _is_score(k)},
    }


def last_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint in ``folder`` that was saved to its end: the trainer's state is written last."""
    found = [p.parent for p in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def _arguments(recipe: Recipe, options: dict, output: str, splits: Splits) -> DistillationArguments:
    """Those of a training, or of an evaluation. Where there are several processes, they find each other here."""
    defaults = {
        "report_to": "none", "log_level": "warning", "dataloader_pin_memory": torch.cuda.is_available(),
        # Where there is nothing else, the processes of torchrun find each other and bf16 is taken only if told so.
        "use_cpu": not torch.accelerator.is_available(),
    }  # fmt: skip
    fixed = {"output_dir": output, "seed": recipe.seed, "remove_unused_columns": False}
    wants_evaluation = options.get("eval_strategy", "no") != "no"
    if wants_evaluation and splits.validation is None:
        raise UserError("eval_strategy: the data has no validation split")
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if options.get(key, 1) < 1:
            raise UserError(f"{key}: got {options[key]}; want a whole number above 0")
    if (steps := options.get("max_steps", -1)) < -1 or steps == 0:
        raise UserError(f"max_steps: got {steps}; want a whole number above 0, or -1 for num_train_epochs")
    if options.get("learning_rate", 0) < 0:
        raise UserError(f"learning_rate: got {options['learning_rate']:g}; want no number below 0")
    try:
        return DistillationArguments(**{**defaults, **options, **fixed})
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def _trainer(recipe: Recipe, args, model, splits: Splits, preprocessing, **kwargs) -> DistillationTrainer:
    try:
        trainer = DistillationTrainer(
            model,
            args,
            train_dataset=splits.train,
            eval_dataset=splits.validation,
            data_collator=preprocessing.collator,
            processing_class=preprocessing.saved,
            compute_metrics=preprocessing.metrics,
            preprocess_logits_for_metrics=preprocessing.metrics.answers,
            **kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    _warn_of_what_comes_too_late(recipe, args)
    trainer.add_callback(KeepRecipe(recipe))
    # One of the two is there, by disable_tqdm.
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if trainer.pop_callback(transformers.trainer_callback.ProgressCallback) is not None:
        trainer.add_callback(Progress())
    return trainer


def _warn_of_what_comes_too_late(recipe: Recipe, args) -> None:
    """Where a run was made shorter, and what its recipe says of single steps was not."""
    late = {"warmup_steps": args.warmup_steps} if args.warmup_steps >= 1 else {}
    late |= {f"guide.{key}": getattr(recipe.guide, key) for key in ("drop_layer_loss_at", "drop_kd_at")}
    for key, step in late.items():
        if step is not None and 0 < args.max_steps <= step:
            warnings.warn(f"{key}: {step:g}, but training ends at step {args.max_steps}; want it earlier", stacklevel=2)


def _required(value: str | None, key: str, what: str) -> str:
    if value is None:
        raise UserError(f"{key}: not given; want {what}")
    return value


def _need_train(splits: Splits) -> None:
    if splits.train is None:
        raise UserError("data.train: nothing to train on")


def _size(split) -> int | str:
    return "streamed" if _streamed(split) else len(split)


def _streamed(split) -> bool:
    return isinstance(split, torch.utils.data.IterableDataset)


def _is_score(name: str) -> bool:
    return name.endswith(("_loss", "_accuracy", "_wer", "_cer", "_perplexity", "_nats_per_token"))
