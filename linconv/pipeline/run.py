"""A prepared run: its description, checks, training and scores."""

import json
import math
import warnings
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

from linconv.benchmarking.machine import provenance
from linconv.data import Blocks, Splits
from linconv.data.holdout import SPLITS
from linconv.data.sources import durations
from linconv.distillation import DistillationTrainer
from linconv.distillation.probe import Probe
from linconv.errors import UserError, first_of
from linconv.pipeline.checkpoints import TRAINED_IN, family_of, load_model
from linconv.pipeline.preprocessing import shortest_clip
from linconv.pipeline.processes import by_main_process
from linconv.recipe import Recipe

RESULTS_FILE = "results.json"
RECIPE_FILE = "recipe.json"  # in each checkpoint
PROBE_CLIPS = 8


@dataclass
class Run:
    """A prepared run: ``describe`` says what it will do, ``execute`` does it."""

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
            ("blocks" if blocks else "data", ", ".join(f"{size_of(split)} {name}" for name, split in splits.items())),
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
        """Looks for what would end the run later: a checkpoint, unreadable clips, clips too short for their text.

        It reads the header of every clip and the whole of a few. It does not read streams.

        Raises:
            UserError: there is a problem.
        """
        self._checkpoint(resume)
        self._check_transcripts_fit(self._seconds(*SPLITS))
        self._probe()

    def _seconds(self, *names: str) -> list[float]:
        """Returns the seconds of each clip of these splits, from its header; nothing for text and streams.

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
            shortest=shortest_clip(self.trainer.model, extractor),
        )

    def _lengths(self) -> list[float] | None:
        """Returns the length of each training example if batches group by length: seconds of clips, tokens of text.

        For CTC it also checks that transcripts fit, so that headers are read only once.
        """
        grouped = self.trainer.args.train_sampling_strategy == "group_by_length"
        seconds = self._seconds("train") if grouped or self.recipe.task == "ctc" else []
        self._check_transcripts_fit(seconds)
        if not grouped:
            return None
        return seconds or self.trainer.data_collator.lengths(self.splits.train)

    def _check_transcripts_fit(self, seconds: list[float]) -> None:
        """Looks for training clips whose CTC loss is infinite: every alignment needs more frames than the clip has.

        Args:
            seconds: of each clip, training clips first.

        Raises:
            UserError: there are some, and ``ctc_zero_infinity`` is off in the model's config; if on, it is a warning.
        """
        if self.recipe.task != "ctc" or not seconds:
            return
        train, collator, model = self.splits.train, self.trainer.data_collator, self.trainer.model
        rate = collator.feature_extractor.sampling_rate
        samples = torch.tensor([math.ceil(s * rate - 1e-4) for s in seconds[: len(train)]])  # resampling rounds up
        frames = family_of(model.config.model_type, "model type").frame_lengths(model, samples).tolist()
        short = []
        for i, labels in enumerate(map(collator.encode, train.targets)):
            least = len(labels) + sum(a == b for a, b in pairwise(labels))  # a blank separates two equal ones
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
            resume: continue from the last complete checkpoint in ``output``.

        Returns:
            The scores, which are also in ``results.json`` in ``output``.
        """
        checkpoint = self._checkpoint(resume)
        if (probe := self._probe()) is not None:
            self.trainer.add_callback(probe)
        if resume and self._is_at_its_end(checkpoint):
            state = transformers.TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            if self.trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                checkpoint = str(self.output / Path(state.best_model_checkpoint).name)
            weights = load_model(checkpoint, "--resume", dtype=TRAINED_IN).state_dict()
            self.trainer.model.load_state_dict(weights)
            self.trainer.state = state
        else:
            self.trainer.lengths = by_main_process(self.trainer.args, self._lengths)
            try:
                self.trainer.train(resume_from_checkpoint=checkpoint)
            except FloatingPointError as error:
                raise UserError(str(error)) from error
            if not self.trainer.state.global_step:
                raise UserError(
                    "data.train: not enough for one batch, so nothing was trained; want more of it, a smaller "
                    "per_device_train_batch_size, or dataloader_drop_last=false"
                )
        self.trainer.save_model()
        split = "test" if self.splits.test is not None else "validation"
        scores = {}
        if self.splits[split] is not None:
            scores = self.trainer.evaluate(self.splits[split], metric_key_prefix=split)
            scores = {k: v for k, v in scores.items() if k.startswith(f"{split}_") and is_score(k)}
        if self.trainer.is_world_process_zero():
            results = {
                "command": self.command,
                "scores": scores,
                "clips": self.trainer.compute_metrics.clips if scores else [],
                "parameters": self.trainer.model.num_parameters(),
                "recipe": asdict(self.recipe),
                "provenance": provenance(),
            }
            text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
            (self.output / RESULTS_FILE).write_text(text, encoding="utf-8")
        return scores

    def _checkpoint(self, resume: bool) -> str | None:
        """Returns the checkpoint to continue from, or None for a new run.

        Raises:
            UserError: there is none to continue from, or a new run would overwrite one.
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
        """Returns a probe of a few clips of the test split; None if there is no test split, or it is a stream."""
        test = self.splits.test
        if test is None or streamed(test):
            return None
        count = min(PROBE_CLIPS, len(test))
        clips = [test[i * len(test) // count] for i in range(count)]
        return Probe(self.trainer, self.trainer.data_collator(clips))

    def _check_checkpoint(self, checkpoint: str) -> None:
        """Raises UserError if a checkpoint belongs to another run, or training cannot continue from it."""
        if self.trainer.args.save_only_model:
            raise UserError("--resume: checkpoints saved with save_only_model=true cannot be resumed; want false")
        file = Path(checkpoint) / RECIPE_FILE
        if not file.is_file():
            return
        then, now = json.loads(file.read_text(encoding="utf-8")), _identity(self.recipe)
        for key in now:
            if then.get(key) != now[key]:
                raise UserError(f"--resume: {checkpoint} is of a run with {key} {then.get(key)}; got {now[key]}")

    def _is_at_its_end(self, checkpoint: str) -> bool:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        steps = self.trainer.args.max_steps
        return state["global_step"] >= (steps if steps > 0 else state["max_steps"])


def last_checkpoint(folder: str | Path) -> str | None:
    """Returns the last complete checkpoint in ``folder``: one with the trainer's state, which is written last."""
    found = [p.parent for p in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Settings, as JSON, that a resumed run must not change: all but output, training arguments and data path."""
    fields = {k: v for k, v in asdict(recipe).items() if k not in ("output", "finetune", "distill")}
    del fields["data"]["path"]
    return json.loads(json.dumps(fields, default=str))


class KeepRecipe(transformers.TrainerCallback):
    """Writes into each checkpoint the settings that identify its run."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            text = json.dumps(_identity(self.recipe), indent=2, ensure_ascii=False) + "\n"
            (folder / RECIPE_FILE).write_text(text, encoding="utf-8")


def size_of(split) -> int | str:
    return "streamed" if streamed(split) else len(split)


def streamed(split) -> bool:
    return isinstance(split, torch.utils.data.IterableDataset)


def is_score(name: str) -> bool:
    return name.endswith(("_loss", "_accuracy", "_wer", "_cer", "_perplexity", "_nats_per_token"))
