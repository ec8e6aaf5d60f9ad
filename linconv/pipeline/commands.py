"""Fine-tuning of a teacher, distillation of a student, scoring of a checkpoint."""

import contextlib
import copy
import importlib
import math
import re
import shutil
import warnings
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from accelerate.utils import DynamoBackend
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from linconv.data import Splits, build_bpe_tokenizer, build_tokenizer, load_splits
from linconv.data.holdout import SPLITS
from linconv.distillation import (
    DistillationArguments,
    DistillationTrainer,
    TrajectoryGuided,
    Unguided,
    WaypointGuided,
    make_mode,
)
from linconv.distillation.learning_rate import set_training
from linconv.errors import UserError, check_output, unknown
from linconv.pipeline.checkpoints import OF_TEXT, TRAINED_IN, load_model, load_tokenizer, load_trained
from linconv.pipeline.models import any_length, base_model, make_student, name_classes, override, task_config
from linconv.pipeline.preprocessing import cut_into_blocks, feature_extractor_of, make_preprocessing
from linconv.pipeline.processes import by_main_process
from linconv.pipeline.run import KeepRecipe, Run, is_score, size_of, streamed
from linconv.progress import Progress
from linconv.recipe import Recipe

WAYPOINTS_FOLDER = "waypoints"  # in the teacher's folder
RANGES = {  # of arguments that transformers does not check: minimum, exclusive maximum, description
    "per_device_train_batch_size": (1, math.inf, "a whole number above 0"),
    "per_device_eval_batch_size": (1, math.inf, "a whole number above 0"),
    "gradient_accumulation_steps": (1, math.inf, "a whole number above 0"),
    "eval_accumulation_steps": (1, math.inf, "a whole number above 0"),
    "dataloader_num_workers": (0, math.inf, "a whole number from 0 up"),
    "dataloader_prefetch_factor": (1, math.inf, "a whole number above 0"),
    "learning_rate": (0, math.inf, "a number from 0 up"),
    "weight_decay": (0, math.inf, "a number from 0 up"),
    "adam_epsilon": (0, math.inf, "a number from 0 up"),
    "adam_beta1": (0, 1, "a number from 0 up, below 1"),
    "adam_beta2": (0, 1, "a number from 0 up, below 1"),
}
SCORES = {  # of each task, besides its loss, and whether higher is better
    "classification": {"accuracy": True},
    "text_classification": {"accuracy": True},
    "ctc": {"wer": False, "cer": False},
    "language_modeling": {"perplexity": False, "nats_per_token": False},
}
MISTAKES = (ImportError, OSError, TypeError, ValueError)  # in arguments: some need a package or name a file
SAMPLING = ("random", "sequential", "group_by_length")  # transformers' names for the orders of examples


def finetune(recipe: Recipe, folder: str | None = None) -> Run:
    """Prepares fine-tuning ``model.source`` (or a new model) on the task; the result goes to ``model.teacher``.

    If ``folder`` is given, the trainer writes there instead, for a dry run.
    """
    output = _required(recipe.model.teacher, "model.teacher", "a folder for the fine-tuned model")
    check_output(output, "model.teacher", model__source=recipe.model.source)
    splits = load_splits(recipe.data, recipe.task)
    _need_train(splits)
    args = _arguments(recipe, recipe.finetune, folder or output, splits)
    transformers.set_seed(recipe.seed)
    tokenizer = None if recipe.task == "classification" else load_tokenizer(recipe.model.source)
    if recipe.task == "ctc" and tokenizer is None:
        if streamed(splits.train):
            raise UserError("data.streaming: a vocabulary cannot be built from a stream")
        tokenizer = build_tokenizer(splits.train.targets)
    if recipe.task == "language_modeling" and recipe.model.source is None and recipe.model.config:
        texts, size = (text for (text,) in splits.train.texts), recipe.model.config.get("vocab_size")
        tokenizer = by_main_process(args, lambda: build_bpe_tokenizer(texts, size))
    config = task_config(recipe, splits, tokenizer)
    if recipe.task in OF_TEXT and tokenizer is None:
        raise UserError("model.source: want a checkpoint with a tokenizer")
    splits = cut_into_blocks(recipe, splits, config, tokenizer, args)
    model = any_length(base_model(recipe, config))
    _freeze(model, recipe)
    extractor = feature_extractor_of(recipe.model.source, config, recipe)
    preprocessing = make_preprocessing(recipe, splits, config, extractor, tokenizer)
    trainer = _trainer(recipe, args, model, splits, preprocessing, mode=Unguided())
    if recipe.model.waypoints < 0:
        raise UserError(f"model.waypoints: got {recipe.model.waypoints}; want a number from 0 up")
    if recipe.model.waypoints:
        trainer.add_callback(KeepWaypoints(Path(folder or output) / WAYPOINTS_FOLDER, recipe.model.waypoints))
    return Run(recipe, trainer, splits, Path(output), f"fine-tune {recipe.model.source or 'a new model'}", "finetune")


def distill(recipe: Recipe, folder: str | None = None) -> Run:
    """Converts the teacher, or the pretrained model, and prepares its distillation from the teacher.

    If ``folder`` is given, the trainer writes there instead of to ``output``, for a dry run.
    """
    path = _required(recipe.model.teacher, "model.teacher", "the checkpoint of a fine-tuned model")
    output = _required(recipe.output, "output", "a folder for the student")
    check_output(output, "output", model__teacher=path, model__source=recipe.model.source)
    if (cache := recipe.distill.get("teacher_cache")) is not None:
        check_output(cache, "teacher_cache")
    options = recipe.guide.options()
    if "waypoint_guided" in (recipe.guide.name, recipe.guide.mode) and "checkpoints" not in options:
        options["checkpoints"] = str(Path(path) / WAYPOINTS_FOLDER)
    try:
        mode = make_mode(recipe.guide.name, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"guide.{error}") from error
    config, tokenizer = load_trained(path, "model.teacher", recipe.task)
    splits = load_splits(recipe.data, recipe.task)
    _need_train(splits)
    name_classes(config, splits, "model.teacher")
    if splits.labels is not None:  # the student's classes are in the teacher's order
        splits = replace(splits, labels=[config.id2label[i] for i in sorted(config.id2label)])
    teacher = any_length(load_model(path, "model.teacher", config=config, dtype=TRAINED_IN))
    extractor = feature_extractor_of(path, teacher.config, recipe)
    args = _arguments(recipe, recipe.distill, folder or output, splits)
    splits = cut_into_blocks(recipe, splits, config, tokenizer, args)
    transformers.set_seed(recipe.seed)
    base = teacher
    if mode.origin == "source":
        if recipe.model.source is None and not recipe.model.config:
            raise UserError(
                "model.source: not given; want the pretrained model, whose weights the student keeps in this mode"
            )
        base = base_model(recipe, task_config(recipe, splits, tokenizer))
    elif recipe.model.overrides:
        config = copy.deepcopy(config)
        override(config, recipe.model.overrides)
        base = any_length(load_model(path, "model.teacher", config=config, dtype=TRAINED_IN))
    student = make_student(base, recipe)
    if isinstance(mode.guide, TrajectoryGuided):
        teacher = any_length(copy.deepcopy(base))  # with the head: both start from the same weights
    elif isinstance(mode.guide, WaypointGuided):
        teacher = any_length(load_model(mode.guide.waypoint(0), "guide.checkpoints", dtype=TRAINED_IN))
    _freeze(student, recipe)
    preprocessing = make_preprocessing(recipe, splits, teacher.config, extractor, tokenizer)
    trainer = _trainer(recipe, args, student, splits, preprocessing, mode=mode, teacher=teacher)
    where = "all" if recipe.conversion.layers is None else len(recipe.conversion.layers)
    title = f"distil {path} into {recipe.conversion.mixer} ({where} layers)"
    return Run(recipe, trainer, splits, Path(output), title, "distill")


def evaluate(checkpoint: str, recipe: Recipe, split: str = "test") -> dict[str, float]:
    """Scores a checkpoint on one split: accuracy, word and character error rate for CTC, or perplexity."""
    config, tokenizer = load_trained(checkpoint, "checkpoint", recipe.task)
    splits = load_splits(recipe.data, recipe.task)
    name_classes(config, splits, "checkpoint")
    model = any_length(load_model(checkpoint, "checkpoint", config=config, dtype=TRAINED_IN))
    extractor = feature_extractor_of(checkpoint, model.config, recipe)
    if splits[split] is None:
        raise UserError(f"--split: the data has nothing for {split}")
    splits = replace(splits, **{other: None for other in SPLITS if other != split})
    options = {k: v for k, v in recipe.distill.items() if k == "per_device_eval_batch_size"}
    with TemporaryDirectory() as folder:
        args = _arguments(recipe, options, folder, splits)
        splits = cut_into_blocks(recipe, splits, config, tokenizer, args)
        preprocessing = make_preprocessing(recipe, splits, model.config, extractor, tokenizer)
        trainer = _trainer(recipe, args, model, splits, preprocessing, mode=Unguided())
        scores = trainer.evaluate(splits[split], metric_key_prefix=split)
    return {
        {"text_classification": "rows", "language_modeling": "blocks"}.get(recipe.task, "clips"): size_of(
            splits[split]
        ),
        **{k: v for k, v in scores.items() if is_score(k)},
    }


def _arguments(recipe: Recipe, options: dict, output: str, splits: Splits) -> DistillationArguments:
    """Makes the arguments of a training or an evaluation; several processes form their group here."""
    defaults = {
        "report_to": "none", "log_level": "warning", "dataloader_pin_memory": torch.cuda.is_available(),
        # Other accelerators, such as a Mac's, have no kernels and lack torch operations that losses need. On the CPU,
        # torchrun's processes join a group, and bf16 is accepted, only if this is set.
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    if (best := options.get("metric_for_best_model")) is not None:
        scores = {"loss": False, **SCORES[recipe.task]}
        if best.removeprefix("eval_") not in scores:
            raise unknown("metric_for_best_model", best, scores)
        # transformers assumes that higher is better for everything but a loss.
        defaults["greater_is_better"] = scores[best.removeprefix("eval_")]
    fixed = {
        "output_dir": output, "seed": recipe.seed, "remove_unused_columns": False,
        "eval_do_concat_batches": True,  # scores cover a whole split
    }  # fmt: skip
    wants_evaluation = options.get("eval_strategy", "no") != "no"
    if wants_evaluation and splits.validation is None:
        raise UserError("eval_strategy: the data has no validation split")
    for key, (least, beyond, wanted) in RANGES.items():
        if not least <= (least if options.get(key) is None else options[key]) < beyond:
            raise UserError(f"{key}: got {options[key]:g}; want {wanted}")
    if (steps := options.get("max_steps", -1)) < -1 or steps == 0:
        raise UserError(f"max_steps: got {steps}; want a whole number above 0, or -1 for num_train_epochs")
    if (epochs := options.get("num_train_epochs", 1)) <= 0:
        raise UserError(f"num_train_epochs: got {epochs:g}; want a number above 0")
    if (sampling := options.get("train_sampling_strategy", "random")) not in SAMPLING:  # transformers ignores it
        raise unknown("train_sampling_strategy", sampling, SAMPLING)
    backends = [backend.value.lower() for backend in DynamoBackend]
    if (backend := options.get("torch_compile_backend") or "no").lower() not in backends:
        raise unknown("torch_compile_backend", backend, backends)
    given = {**defaults, **options, **fixed}
    try:
        return DistillationArguments(**given)
    except MISTAKES as error:
        raise UserError(_named(str(error), given, options)) from error


def _named(message: str, given: dict, options: dict) -> str:
    """Prefixes a message of transformers about an invalid option with the option's name, if it names none."""
    if any(re.search(rf"\b{field.name}\b", message) for field in fields(DistillationArguments)):
        return message
    for key in options:
        with contextlib.suppress(*MISTAKES):
            DistillationArguments(**{name: value for name, value in given.items() if name != key})
            return f"{key}: {message}"
    return message


def _trainer(recipe: Recipe, args, model, splits: Splits, preprocessing, **kwargs) -> DistillationTrainer:
    # The hub and trackers, which may not be installed, raise whatever their packages raise.
    asked = [key for key in ("report_to", "push_to_hub") if getattr(args, key)]
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
    except Exception as error:
        if not asked:
            raise
        raise UserError(f"{' or '.join(asked)}: {' '.join(str(error).split())[:300]}") from error
    _try_out(trainer)
    _warn_of_what_comes_too_late(args, kwargs["mode"])
    trainer.add_callback(KeepRecipe(recipe))
    # disable_tqdm decides which of the two is present.
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if trainer.pop_callback(transformers.trainer_callback.ProgressCallback) is not None:
        trainer.add_callback(Progress())
    return trainer


def _try_out(trainer: DistillationTrainer) -> None:
    """Builds, and discards, what transformers builds from names and options only when training starts.

    Raises:
        UserError: something cannot be built.
    """
    args, optimizer = trainer.args, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    steps = args.max_steps if args.max_steps > 0 else 1000  # any number: the steps of an epoch are not known yet
    # Layer-wise optimizers add hooks to their parameters and would train them too, hence blank parameters.
    blank = {id(p): torch.nn.Parameter(p.detach().new_zeros(1), p.requires_grad) for p in trainer.model.parameters()}
    model = copy.deepcopy(trainer.model, blank)
    makers = {
        "optim, optim_args": lambda: trainer.create_optimizer(model),
        "lr_scheduler_type, lr_scheduler_kwargs": lambda: trainer.create_scheduler(steps, optimizer),
    }
    if args.torch_compile:
        options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        makers["torch_compile_backend, torch_compile_mode"] = lambda: torch.compile(torch.nn.Identity(), **options)
    if args.neftune_noise_alpha:
        makers["neftune_noise_alpha"] = trainer.model.get_input_embeddings
    if args.gradient_checkpointing:
        how = args.gradient_checkpointing_kwargs
        makers["gradient_checkpointing_kwargs"] = lambda: checkpoint(torch.nn.Identity(), torch.zeros(1), **how)
    if args.use_liger_kernel:
        makers["use_liger_kernel"] = lambda: importlib.import_module("liger_kernel")
    if args.optim_args:
        _check_optim_args(trainer, model)
    for keys, make in makers.items():
        try:
            make()
        except (ImportError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{keys}: {' '.join(str(error).split())[:300]}") from error
    trainer.optimizer = trainer.lr_scheduler = None


def _check_optim_args(trainer: DistillationTrainer, model: PreTrainedModel) -> None:
    """Raises UserError for an argument without effect: transformers ignores those that the optimizer does not have."""
    args = copy.copy(trainer.args)

    def options(optim_args):
        args.optim_args = optim_args
        return trainer.get_optimizer_cls_and_kwargs(args, model)[1]

    for pair in trainer.args.optim_args.split(","):
        key, equals, _ = pair.strip().partition("=")
        if not equals:
            raise UserError(f"optim_args: got {pair.strip()!r}; want KEY=VALUE, with commas between")
        with contextlib.suppress(*MISTAKES, AttributeError, RuntimeError):  # an argument that is read may refuse '?'
            if options(f"{key}=?") == options(None):
                raise UserError(f"optim_args: no {key!r} for the optimizer {trainer.args.optim.value}")


def _warn_of_what_comes_too_late(args, mode) -> None:
    """Warns of steps in the recipe that a shortened run never reaches."""
    late = {"warmup_steps": args.warmup_steps} if args.warmup_steps >= 1 else {}
    # Fine-tuning has no guide, whatever the recipe says about distillation.
    late |= {f"guide.{key}": getattr(mode, key, None) for key in ("drop_layer_loss_at", "drop_kd_at")}
    for key, step in late.items():
        if step is not None and 0 < args.max_steps <= step:
            warnings.warn(f"{key}: {step:g}, but training ends at step {args.max_steps}; want it earlier", stacklevel=2)


def _freeze(model, recipe: Recipe) -> None:
    if recipe.model.freeze_feature_encoder:
        if not hasattr(model, "freeze_feature_encoder"):
            raise UserError(f"model.freeze_feature_encoder: a {type(model).__name__} has none")
        model.freeze_feature_encoder()


def _required(value: str | None, key: str, what: str) -> str:
    if value is None:
        raise UserError(f"{key}: not given; want {what}")
    return value


def _need_train(splits: Splits) -> None:
    if splits.train is None:
        raise UserError("data.train: nothing to train on")


class KeepWaypoints(transformers.TrainerCallback):
    """Saves ``count`` evenly spaced snapshots of the model, the last one at the end: config and weights only."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def on_train_begin(self, args, state, control, **kwargs):
        """Removes those of another run, which would be waypoints between this one's; a resumed run keeps its own."""
        if state.global_step == 0 and state.is_world_process_zero:
            for snapshot in self.folder.glob("checkpoint-*"):
                shutil.rmtree(snapshot)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        step, steps = state.global_step, state.max_steps
        if step * self.count // steps > (step - 1) * self.count // steps:
            set_training(optimizer, False)  # in every process, so that weights stay equal
            if state.is_world_process_zero:
                model.save_pretrained(self.folder / f"checkpoint-{step}")
