"""Trains a converted student with its teacher, based on transformers' Trainer."""

import contextlib
import itertools
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length

from linconv.conversion import encoder_layers, frame_lengths
from linconv.distillation.activation_cache import ActivationCache, check_cacheable
from linconv.distillation.arguments import DistillationArguments
from linconv.distillation.augmentation import SharedSpecAugment
from linconv.distillation.checkpoint_names import accept_checkpoint_names
from linconv.distillation.heads import Head
from linconv.distillation.hooks import LayerStates
from linconv.distillation.learning_rate import exponential_decay, set_training
from linconv.distillation.sampling import LikeLengths
from linconv.distillation.schedules import Mode, TargetGuided, TrajectoryGuided, Unguided
from linconv.distillation.teachers import FixedTeacher, check_fits, check_trainable, make_teacher
from linconv.mixers import Mixer
from linconv.ops.distillation_loss import distillation_terms

__all__ = ["METRICS_FILE", "DistillationTrainer"]

METRICS_FILE = "metrics.jsonl"
LOSSES = ("task_loss", "layer_loss", "kd_loss")  # in a log record, if the step has them
SECONDS_TO_FREE = 1  # wait at the end of a run until gathered memory is freed: far more than it takes

logger = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """Trains ``model``, the student, on its task and, depending on ``mode``, to match ``teacher``.

    It works as transformers' Trainer, but for what docs/distillation.md lists under Limits: resuming, Accelerate's ways
    of running on many devices, bf16, streaming data sets, gradient checkpointing, logging. In addition:

    - The three losses are means over one whole optimizer step (see :class:`DistillationArguments`).
    - The teacher teaches in evaluation mode, and its weights are not in the student's optimizer. If the mode changes
      it, this happens between steps, and the student's checkpoints hold what is needed to continue
      (linconv.distillation.teachers). It gets the student's batch with the student's SpecAugment mask. LayerDrop is
      turned off in the student, because each of its layers follows one of the teacher's.
    - Each log record contains the parts of the loss, and per layer the MSE and the cosine between student and teacher
      (``layer_mse/1``, ...), over the optimizer step that was logged. All records also go to ``metrics.jsonl`` in
      ``output_dir``. If a loss there is not finite, training ends if weights are not finite either; otherwise there is
      a warning.
    - Resuming from a checkpoint gives the same losses as an uninterrupted run, bit for bit on one CPU.
    - With ``train_sampling_strategy="group_by_length"`` training batches group similar lengths. Evaluation still uses
      the order of its data set, because single clips are compared between runs.

    Args:
        model: the student, with float32 weights, or a PEFT model of it. None if ``model_init`` makes it.
        args: :class:`DistillationArguments`.
        teacher: a model with as many transformer layers as the student, of the same width, and with a head for the
            same task; in any dtype, unless it is trained. It may be None if ``mode`` is Unguided; if given then, it is
            only used for measurements. For TrajectoryGuided it is the pretrained model, for WaypointGuided any of the
            snapshots.
        mode: None means ``TargetGuided()`` with a teacher, ``Unguided()`` without.
        lengths: of each training example, in any unit, for batches of similar lengths. None leaves it to the stock
            Trainer, which looks for ``length_column_name`` in a ``datasets.Dataset``, or else takes the ``len`` of each
            example's model input.
        **kwargs: as for transformers' Trainer.

    Raises:
        TypeError, ValueError: an argument does not fit this description, as far as classes and configs tell; the
            message names it.
        FloatingPointError: raised by ``train`` when training has diverged.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: DistillationArguments | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        mode: Mode | None = None,
        lengths: Sequence[float] | None = None,
        **kwargs,
    ):
        if not isinstance(args, DistillationArguments):
            raise TypeError(f"args: got {type(args).__name__}; want DistillationArguments")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: the task's loss is that of the head; it cannot be replaced")
        if args.n_gpu > 1:
            raise ValueError("several GPUs in one process (DataParallel) are not supported: start with torchrun")
        if mode is None:
            mode = Unguided() if teacher is None else TargetGuided()
        if not isinstance(mode, Mode):
            raise TypeError(f"mode: got {mode!r}; want a mode such as TargetGuided(), which make_mode makes of a name")
        if teacher is None and not isinstance(mode, Unguided):
            raise ValueError(f"teacher: got None; want a model, for the mode is {mode}")
        if model is not None:
            accept_checkpoint_names(model)
        self.mode, self.lengths = mode, lengths
        self.guide: FixedTeacher | None = None
        super().__init__(model, args, **kwargs)
        if self.train_dataset is not None and args.train_sampling_strategy == "group_by_length":
            self._check_has_lengths(self.train_dataset)
        # Both state that compute_loss has already divided by the counts of the whole accumulated batch.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._use_student(self.model, teacher)
        self._check_losses(teacher)
        if teacher is not None:
            self.guide = make_teacher(teacher.to(args.device), mode, self)
        self.cache: ActivationCache | None = None
        if args.teacher_cache is not None:
            check_cacheable(self.student, teacher, mode)
            precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "own"
            options = {"precision": precision, "embeddings": args.include_embeddings}
            self.cache = ActivationCache(args.teacher_cache, self.teacher, self.head, **options)
            self.add_callback(_FlushCache(self.cache))
        self._batches: list | None = None  # of the next optimizer step
        self._measures: dict[str, Tensor] = {}
        self.add_callback(_TrimMetrics())

    @property
    def teacher(self) -> PreTrainedModel | None:
        return None if self.guide is None else self.guide.model

    @property
    def student(self) -> PreTrainedModel:
        """The student itself, without PEFT's wrapper."""
        return without_adapters(self.model)

    def call_model_init(self, trial=None):
        """The student that ``model_init`` makes: one at construction, a new one for each call of ``train``."""
        model = super().call_model_init(trial)
        accept_checkpoint_names(model)
        self._use_student(model, self.teacher)
        return model

    def _use_student(self, model: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Makes ``model`` the student."""
        model = without_adapters(model)
        self.head = Head.of(model)
        if self.head.of_frames and getattr(model.config, "add_adapter", False):
            raise ValueError(
                f"model: got a {type(model).__name__} with add_adapter=True, which answers for fewer frames than its "
                "blocks have; want one without an adapter"
            )
        self.student_layers = encoder_layers(model)
        check_trainable("model", model)
        if teacher is None:
            return
        check_fits(model, teacher, kd=self.args.alpha_kd > 0 and self.mode.lessons(0).kd)
        self.teacher_layers = encoder_layers(teacher)
        if {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}:
            raise ValueError("teacher: it shares parameters with the student; freezing it would freeze the student")
        holders = [m for m in model.modules() if self.student_layers[0] in m.modules()]
        for owner in (model.config, *holders):
            for name in ("layerdrop", "encoder_layerdrop"):
                if getattr(owner, name, 0.0):
                    logger.warning("%s of the student is set to 0: every layer follows the teacher's", name)
                    setattr(owner, name, 0.0)
        moving = isinstance(self.mode.guide, TrajectoryGuided)
        if moving and (self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.fp16):
            raise ValueError(f"{self.mode}: not supported with DeepSpeed, FSDP or fp16; bf16 is")
        if moving and any(kind in self.args.optim for kind in ("layerwise", "lomo")):
            raise ValueError(
                f"optim: got {self.args.optim.value}, which steps during the backward pass; want one that steps after "
                f"it, since the mode is {self.mode}"
            )
        if moving:
            check_trainable("teacher", teacher)

    def _check_losses(self, teacher: PreTrainedModel | None) -> None:
        """Checks that some loss counts, and that the layer weights match the layers."""
        args = self.args
        last = args.max_steps - 1 if args.max_steps > 0 else sys.maxsize
        for step, when in ((0, ""), (last, " to the end")):  # a loss that a mode has dropped does not come back
            lessons = self.mode.lessons(step)
            if not (args.alpha_ce or lessons.kd and args.alpha_kd or lessons.layers and args.alpha_ld):
                got = f"{args.alpha_ce:g}, {args.alpha_kd:g}, {args.alpha_ld:g}"
                raise ValueError(
                    f"alpha_ce, alpha_kd, alpha_ld: got {got}; want one above 0 that the mode {self.mode} uses{when}"
                )
        weights = args.layer_weights
        if weights is None or teacher is None:
            return
        if len(weights) != (want := len(self.student_layers) + args.include_embeddings):
            raise ValueError(f"layer_weights: got {len(weights)}; want {want}, one for each hidden state")
        if not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(f"layer_weights: got {weights}; want numbers from 0 up")

    def leave_process_group(self) -> None:
        """Ends a run over several processes: the last call of a script. No effect in a single process.

        Gloo's threads need the interpreter lock to free gathered data. If a thread still waits for it when the
        interpreter exits, the process aborts; ending the group at once would hold the lock and wait for the threads
        forever. So the threads get the lock first: at a barrier, and for a moment after it, because the barrier's own
        data are freed after it. Nothing signals when that is done.
        """
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            time.sleep(SECONDS_TO_FREE)
        self.accelerator.end_training()

    # ---- The order of examples

    @staticmethod
    def _check_has_lengths(dataset) -> None:
        if isinstance(dataset, torch.utils.data.IterableDataset) or not has_length(dataset):
            raise ValueError(
                f"train_sampling_strategy: got group_by_length, and a train_dataset ({type(dataset).__name__}) that is "
                "streamed, so that no lengths are known beforehand; want one that is read by index (in a recipe "
                "data.streaming=false), or the strategy random"
            )

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = self.lengths
        if lengths is None:
            columns = hasattr(dataset, "column_names")  # a datasets.Dataset; lengths may be a column
            # Others may be readable past their end, where transformers expects an IndexError: a Subset raises it.
            ending = dataset if columns else torch.utils.data.Subset(dataset, range(len(dataset)))
            try:
                lengths = super()._get_train_sampler(ending).lengths
            except ValueError as error:
                raise ValueError(f"lengths: got None; want one for each example of train_dataset: {error}") from error
        if len(lengths) != len(dataset):
            raise ValueError(f"lengths: got {len(lengths):,}; want {len(dataset):,}, one for each training example")
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LikeLengths(lengths, step, seed, epoch=lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset):
        return None  # the data set's own order

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        return super().get_eval_dataloader(list(dataset) if self._is_shared_out(dataset) else eval_dataset)

    def get_test_dataloader(self, test_dataset):
        shared_out = self._is_shared_out(test_dataset)
        return super().get_test_dataloader(list(test_dataset) if shared_out else test_dataset)

    def _is_shared_out(self, dataset) -> bool:
        """Whether a stream is split over several processes, which get equal numbers of examples, some of them twice.
        Scoring each example once requires their number, so they are held in memory."""
        return self.accelerator.num_processes > 1 and isinstance(dataset, torch.utils.data.IterableDataset)

    # ---- The loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, with [answers, frames] summed over them and over all processes."""
        # The stock Trainer would gather the number of labels only in processes whose first batch has labels.
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if 0 < self.state.max_steps <= self.state.global_step:
            # Resumed at the last step: the Trainer would check for the end only after one more.
            self.control.should_training_stop = True
            batches = []
        elif not self._is_whole(batches, num_batches):
            # End of a stream: the Trainer would take no step here, but would leave these gradients to the next one.
            batches = []
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batches:
            frame_mask = self._frame_mask(batch)
            answers = self.head.valid_answers(batch, frame_mask)
            counts += torch.stack([answers.sum(), frame_mask.sum()]).to(device)
        self._measures = {}
        self._batches = batches
        return batches, self.accelerator.reduce(counts, "sum").clamp(min=1)

    def _is_whole(self, batches: list, num_batches: int) -> bool:
        """Whether every process has micro-batches for one more step: shards of a stream may be unequal."""
        whole = len(batches) == num_batches
        if self.accelerator.num_processes == 1 or has_length(self.train_dataset):
            return whole
        found = self.accelerator.reduce(torch.tensor(int(whole), device=self.args.device), "sum")
        return int(found) == self.accelerator.num_processes

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Here, not where the batches are fetched: a resumed run restores its random state in between.
        if self._batches is not None:
            batches, self._batches = self._batches, None
            if self.guide is not None:
                loss = self.guide.advance(self.state.global_step, batches, num_items_in_batch)
                if loss is not None:
                    self._measure(teacher_loss=loss)
        return super().training_step(model, inputs, num_items_in_batch)

    def inputs_for(self, model: PreTrainedModel, inputs: dict) -> dict:
        """The inputs of the student or the teacher for a batch: the signal in the dtype of that model's weights."""
        given, name = self.head.model_inputs(inputs), model.main_input_name
        if name in given and given[name].is_floating_point():
            given[name] = given[name].to(model.dtype)
        return given

    def autocast_for(self, model: PreTrainedModel):
        """The context of a forward pass of the student or the teacher: autocast, if ``args`` enable it.

        A model in the other half precision runs in its own dtype, since CPU kernels do not accept both.
        """
        other = {"bf16": torch.float16, "fp16": torch.bfloat16}.get(self.accelerator.mixed_precision)
        return contextlib.nullcontext() if model.dtype is other else self.accelerator.autocast()

    def augmentation_for(self, model: PreTrainedModel, inputs: dict, frame_mask: Tensor) -> SharedSpecAugment:
        """A draw of SpecAugment for a batch, with the settings of ``model``."""
        given = self.head.sequences(inputs)
        frames = given[model.main_input_name].shape[-1]
        return SharedSpecAugment(model, frame_mask, signal_mask=given.get("attention_mask"), frames=frames)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """In training, this micro-batch's share of the optimizer step's loss; in evaluation, the task's mean loss."""
        frame_mask = self._frame_mask(inputs)  # (sequences, L)
        answers = self.head.valid_answers(inputs, frame_mask)
        if not model.training:
            outputs = model(**self.inputs_for(self.student, inputs))
            loss = self.head.task_loss(outputs, inputs, frame_mask, self.student.config) / answers.sum().clamp(min=1)
            return (loss, outputs) if return_outputs else loss

        all_answers, all_frames = num_items_in_batch
        share_of_answers, share_of_frames = answers.sum() / all_answers, frame_mask.sum() / all_frames
        lessons = self.mode.lessons(self.state.global_step)
        augment = self.augmentation_for(self.student, inputs, frame_mask)
        student = LayerStates(self.student_layers)
        with student, augment.applied_to(self.student):
            outputs = model(**self.inputs_for(self.student, inputs), **augment.arguments)

        logits = self.head.logits(outputs)
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.head.labels(inputs) is not None:
            task = self.head.task_loss(outputs, inputs, frame_mask, self.student.config) / all_answers
            self._measure(task_loss=task)
        if self.head.labels(inputs) is not None and self.args.alpha_ce > 0:
            loss = loss + self.args.alpha_ce * task
        else:
            # DistributedDataParallel waits for the gradients of all outputs, so an empty sum over each is added. A
            # product with 0 would not do, because the unused task loss may be infinite.
            given = (logits, outputs.get("loss"))
            loss = loss + sum(x.flatten()[:0].sum() for x in given if x is not None)
        with_layers, with_kd = lessons.layers and self.args.alpha_ld > 0, lessons.kd and self.args.alpha_kd > 0
        if self.head.labels(inputs) is None and not (with_layers or with_kd):
            raise ValueError(
                f"labels: got None, and at step {self.state.global_step} nothing is learnt from a teacher; want "
                "labels, or a teacher with alpha_kd or alpha_ld above 0"
            )
        measured = self.teacher is not None and self._logs_this_step()
        if with_layers or with_kd or measured:
            with_states = with_layers or measured
            teacher_states, teacher_logits = self._teacher_outputs(inputs, augment, frame_mask, with_states)
            terms = distillation_terms(
                self._states(student) if with_states else (),
                teacher_states,
                self.head.distributions(logits, inputs, frame_mask) if with_kd else None,
                self.head.distributions(teacher_logits, inputs, frame_mask) if with_kd else None,
                temperature=self.args.temperature,
                mask=frame_mask,
                logits_mask=answers,
                layer_norm=self.args.layer_norm,
            )
        if with_layers:
            weights = self.args.layer_weights
            mse = terms.mse if weights is None else terms.mse * terms.mse.new_tensor(weights)
            layers = share_of_frames * getattr(mse, self.args.layer_reduction)()
            loss = loss + self.args.alpha_ld * layers
            self._measure(layer_loss=layers)
        if with_kd:
            kd = share_of_answers * terms.kd * (self.args.temperature**2 if self.args.scale_by_t2 else 1)
            loss = loss + self.args.alpha_kd * kd
            self._measure(kd_loss=kd)
        if measured:
            self._measure(layer_mse=share_of_frames * terms.mse, layer_cosine=share_of_frames * terms.cosine)
        # Processes average their gradients, but the sum is needed: all_answers and all_frames count all processes.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_outputs(self, inputs, augment: SharedSpecAugment, frame_mask: Tensor, with_states: bool):
        """The teacher's hidden states, empty unless ``with_states``, and its logits."""
        if self.cache is not None:
            if (frame_mask[:, 1:] & ~frame_mask[:, :-1]).any():
                raise ValueError(
                    "teacher_cache: got a batch padded on the left; want it padded on the right, or no cache"
                )
            frames = frame_mask.sum(-1)
            keys = self.cache.keys(inputs, frames)
            if not all(key in self.cache for key in keys):
                self.cache.add(keys, frames, *self._run_teacher(inputs, augment))
            return self.cache.batch(keys, frame_mask.shape[1], frame_mask.device, with_states=with_states)
        states, logits = self._run_teacher(inputs, augment)
        return (states if with_states else ()), logits

    def _run_teacher(self, inputs, augment: SharedSpecAugment) -> tuple[list[Tensor], Tensor]:
        # Without labels that only the loss needs: the teacher may have other classes.
        inputs = {name: x for name, x in inputs.items() if name not in self.head.label_names}
        states = LayerStates(self.teacher_layers)
        with states, augment.applied_to(self.teacher), self.autocast_for(self.teacher):
            outputs = self.teacher(**self.inputs_for(self.teacher, inputs), **augment.arguments)
        return self._states(states), self.head.logits(outputs)

    def _states(self, states: LayerStates) -> list[Tensor]:
        return [states.before, *states.after] if self.args.include_embeddings else states.after

    def _frame_mask(self, inputs) -> Tensor:
        """bool (sequences, L): True at the frames of the hidden states that are not padding."""
        given = self.head.sequences(inputs)
        x, mask = given[self.student.main_input_name], given.get("attention_mask")
        everything = x.new_ones((x.shape[0], x.shape[-1]), dtype=torch.int64)
        mask = everything if mask is None else mask
        if mask.shape[-1] != x.shape[-1]:  # such as one over samples, which Whisper accepts too
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, wanted {tuple(everything.shape)}, one entry for each "
                f"frame of {self.student.main_input_name}"
            )
        length = int(frame_lengths(self.student, everything[:1]))
        if length == mask.shape[-1]:  # tokens, which may be padded on the left in a causal model
            return mask.bool()
        return torch.arange(length, device=x.device) < frame_lengths(self.student, mask)[:, None]

    # ---- Reports

    def _logs_this_step(self) -> bool:
        step = self.state.global_step + 1
        first = self.args.logging_first_step and step == 1
        return self.args.logging_strategy != "steps" or step % self.state.logging_steps == 0 or first

    def _measure(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._measures[name] = self._measures.get(name, 0) + value.detach()

    def log(self, logs, start_time=None):
        record = {}
        if "loss" in logs:
            # A process whose batches had no labels has no task loss.
            for name in dict.fromkeys(gather_object(list(self._measures))):
                value = self._measures.get(name, torch.zeros((), device=self.args.device))
                record[name] = self.accelerator.reduce(value, "sum").tolist()
                if isinstance(record[name], list):
                    start = 0 if self.args.include_embeddings else 1
                    logs.update({f"{name}/{i}": v for i, v in enumerate(record[name], start)})
                else:
                    logs[name] = record[name]
        super().log(logs, start_time)
        if self.is_world_process_zero():
            record = {"step": self.state.global_step, **{k: v for k, v in logs.items() if "/" not in k}, **record}
            with open(os.path.join(self.args.output_dir, METRICS_FILE), "a") as file:
                file.write(json.dumps(record) + "\n")
        # The Trainer's last record has no losses: for steps after the last logged one, only the weights can be checked.
        self._check_finite({name: record[name] for name in LOSSES if name in record}, at_the_end="train_loss" in logs)

    def _check_finite(self, losses: dict[str, float], at_the_end: bool) -> None:
        """Ends a run that has diverged. The Trainer's own mean leaves out losses that are not finite."""
        sound = all(map(math.isfinite, losses.values()))
        if sound and not at_the_end:
            return
        step, told = self.state.global_step, ", ".join(f"{name} is {value}" for name, value in losses.items())
        finite = all(bool(p.isfinite().all()) for p in self.model.parameters())
        spoilt = self.accelerator.reduce(torch.tensor(float(not finite), device=self.args.device), "sum")
        if spoilt > 0:
            raise FloatingPointError(
                f"training has diverged: at step {step} {told and told + ', and '}the student has weights that are not "
                f"finite; want a lower learning_rate (got {self.args.learning_rate:g}), a longer warm-up or a smaller "
                f"max_grad_norm (got {self.args.max_grad_norm:g}); checkpoints in {self.args.output_dir} from before "
                "may be whole"
            )
        if sound:
            return
        warnings.warn(
            f"at step {step} {told}; the weights are finite. Look for clips whose samples or labels are not, or train "
            "in bfloat16 where it is float16",
            stacklevel=2,
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self._check_all_have_labels(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if logits is not None:
            logits = self.head.predictions(logits, self._frame_mask(self._prepare_inputs(inputs)), self.student.config)
        return loss, logits, labels

    def _check_all_have_labels(self, inputs: dict) -> None:
        """Raises ValueError if only some processes have labels: they would wait for the others' losses forever."""
        if (processes := self.accelerator.num_processes) == 1:
            return
        labelled = all(inputs.get(name) is not None for name in self.label_names)
        found = int(self.accelerator.reduce(torch.tensor(int(labelled), device=self.args.device), "sum"))
        if 0 < found < processes:
            raise ValueError(
                f"{', '.join(self.label_names)}: got a batch to evaluate without, in {processes - found} of "
                f"{processes} processes; want them in all batches of an evaluation, or in none"
            )

    # ---- The optimizer

    def get_decay_parameter_names(self, model):
        """As the stock Trainer, without the parameters that mixers exclude: the rates, skips and steps of a state."""
        # The mixers' own lists are used too, because copies of a parameter lose mamba_ssm's attribute.
        spared = {name for name, parameter in model.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
        for path, module in model.named_modules():
            if isinstance(module, Mixer):
                spared.update(f"{path}.{name}" for name in module.no_weight_decay)
        return [name for name in super().get_decay_parameter_names(model) if name not in spared]

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.args.exponential_decay_to is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = exponential_decay(
                optimizer or self.optimizer,
                warmup=warmup,
                steps=num_training_steps,
                decay_to=self.args.exponential_decay_to,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- Checkpoints

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        """Finished epochs, and finished batches of the current one. The Trainer counts all of a stream as one epoch."""
        done = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial)
        state = os.path.join(checkpoint or "", TRAINER_STATE_NAME)
        if checkpoint is None or has_length(self.train_dataset) or not os.path.isfile(state):
            return done
        then = TrainerState.load_from_json(state)  # its epoch is counted in the steps of that run
        epochs, part = divmod(then.epoch, 1)
        batches = round(part * then.max_steps * self.args.gradient_accumulation_steps)
        return int(epochs), 0 if self.args.ignore_data_skip else batches

    def save_model(self, *args, **kwargs):
        set_training(self.optimizer, False)  # the Trainer leaves this to an evaluation, which may not come first
        super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.cache is not None:  # a resumed run must find the values that this one used
            self.cache.flush()
        if self.guide is not None and self.args.should_save:
            self.guide.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.guide is not None and checkpoint is not None:
            self.guide.load(checkpoint)


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The base model of a PeftModel, with adapters in place of some layers; any other model itself."""
    return getattr(model, "get_base_model", lambda: model)()


class _FlushCache(TrainerCallback):
    def __init__(self, cache: ActivationCache):
        self.cache = cache

    def on_train_end(self, args, state, control, **kwargs):
        self.cache.flush()


class _TrimMetrics(TrainerCallback):
    """Drops the records of steps that a run, killed after its last checkpoint, will repeat."""

    def on_train_begin(self, args, state, control, **kwargs):
        path = os.path.join(args.output_dir, METRICS_FILE)
        if not state.is_world_process_zero or not os.path.exists(path):
            return
        with open(path) as file:
            # A kill may have cut the last line short.
            lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
        with open(path, "w") as file:
            file.writelines(lines)
