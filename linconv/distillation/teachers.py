"""Teachers: fixed ones, and ones that change during training, by their own fine-tuning or from snapshot to snapshot.

The trainer calls ``advance(step, batches, counts)`` before each optimizer step of the student, and ``save`` and
``load`` with its checkpoints. The teacher at a step depends only on the step and, if it is trained, on the contents of
the checkpoint, so a resumed run continues as before.
"""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import Tensor
from transformers import PreTrainedModel

from linconv.conversion import encoder_layers, families
from linconv.distillation.checkpoint_names import accept_checkpoint_names
from linconv.distillation.heads import Head
from linconv.distillation.learning_rate import set_training, teacher_scheduler
from linconv.distillation.schedules import Mode, TrajectoryGuided, WaypointGuided

__all__ = ["FixedTeacher", "TrajectoryTeacher", "WaypointTeacher", "check_fits", "check_trainable", "make_teacher"]

FOLDER = "teacher"  # inside a checkpoint of the student
OPTIMIZER_FILE = "teacher_optimizer.pt"
# The config entry with the number of classes of an answer, by the suffix of the head's class name.
_CLASSES = {
    "ForCTC": "vocab_size",
    "ForMaskedLM": "vocab_size",
    "ForCausalLM": "vocab_size",
    "ForConditionalGeneration": "vocab_size",
    "ForSequenceClassification": "num_labels",
    "ForAudioClassification": "num_labels",
    "ForAudioFrameClassification": "num_labels",
    "ForTokenClassification": "num_labels",
}


class FixedTeacher:
    """A teacher that does not change."""

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval().requires_grad_(False)

    def advance(self, step: int, batches: list[dict], counts: Tensor) -> Tensor | None:
        """Updates the teacher for optimizer step ``step``, counted from 0.

        Args:
            batches: the micro-batches of this step, in this process.
            counts: [answers, frames] of the step, over all its micro-batches and all processes.

        Returns:
            This process's share of the teacher's own mean loss; None if it was not trained.
        """
        return None

    def save(self, folder: str) -> None:
        """Writes what ``load`` needs into a checkpoint; called in one process only."""

    def load(self, folder: str) -> None:
        """Restores the teacher from a checkpoint.

        Raises:
            ValueError: the checkpoint is not from a run with such a teacher.
        """


class WaypointTeacher(FixedTeacher):
    """The first snapshot of a fine-tuning after the current step; at the end, the last one."""

    def __init__(self, model: PreTrainedModel, mode: WaypointGuided):
        super().__init__(model)
        self.mode, self.at = mode, None

    def advance(self, step: int, batches: list[dict], counts: Tensor) -> None:
        wanted = self.mode.waypoint(step)
        if wanted != self.at:
            _read(self.model, wanted)
            self.at = wanted


class TrajectoryTeacher(FixedTeacher):
    """Trained on the task alongside the student: at step s it has had s // update_every updates."""

    def __init__(self, model: PreTrainedModel, mode: TrajectoryGuided, trainer):
        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(model)
        for parameter in trained:
            parameter.requires_grad_(True)
        self.update_every, self.trainer = mode.update_every, trainer
        self.optimizer = self.scheduler = None
        # With model_init each call of train makes a new student, and its teacher starts from these weights.
        self.start = copy.deepcopy(model.state_dict()) if trainer.model_init is not None else None

    def _prepare(self) -> None:
        if self.optimizer is not None:
            return
        trainer, steps = self.trainer, self.trainer.state.max_steps
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, self.model)
        if trainer.args.teacher_learning_rate is not None:
            options["lr"] = trainer.args.teacher_learning_rate
        decayed = set(trainer.get_decay_parameter_names(self.model))
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in named if n in decayed], "weight_decay": trainer.args.weight_decay},
            {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
        ]
        groups = options.pop("params", groups)  # from optimizers that group parameters themselves
        self.optimizer = kind(groups, **options)
        updates = max((steps - 1) // self.update_every, 1)
        self.scheduler = teacher_scheduler(self.optimizer, trainer.args, steps=steps, updates=updates)

    def advance(self, step: int, batches: list[dict], counts: Tensor) -> Tensor | None:
        if step == 0:  # possibly of a second run
            self.optimizer = None
            if self.start is not None:
                self.model.load_state_dict(self.start)
        self._prepare()
        if step == 0 or step % self.update_every:
            return None
        trainer, parameters = self.trainer, [p for p in self.model.parameters() if p.requires_grad]
        total = torch.zeros((), device=trainer.args.device)
        self.model.train()
        set_training(self.optimizer, True)
        for batch in batches:
            inputs = trainer._prepare_inputs(batch)
            if trainer.head.labels(inputs) is None:
                raise ValueError("labels: got None; want labels, for the teacher of this mode is trained on the task")
            frame_mask = trainer._frame_mask(inputs)
            augment = trainer.augmentation_for(self.model, inputs, frame_mask)
            with trainer.accelerator.autocast(), augment.applied_to(self.model):
                outputs = self.model(**trainer.inputs_for(self.model, inputs), **augment.arguments)
                loss = trainer.head.task_loss(outputs, inputs, frame_mask, self.model.config) / counts[0]
            loss.backward()
            total = total + loss.detach()
        self.model.eval()
        # Each process draws its own LayerDrop: all must know which gradients exist in any of them.
        found = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64, device=trainer.args.device)
        for parameter, anywhere in zip(parameters, trainer.accelerator.reduce(found, "sum").tolist()):
            if anywhere:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = trainer.accelerator.reduce(own, "sum")
        if trainer.args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        set_training(self.optimizer, False)
        return total

    def save(self, folder: str) -> None:
        self._prepare()
        self.model.save_pretrained(Path(folder) / FOLDER)
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        torch.save(state, Path(folder) / OPTIMIZER_FILE)

    def load(self, folder: str) -> None:
        if not (Path(folder) / OPTIMIZER_FILE).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {folder} holds no {OPTIMIZER_FILE}; want one of this mode's runs"
            )
        self._prepare()
        _read(self.model, Path(folder) / FOLDER)
        # Not directly to the device: with several processes on a CPU it is cpu:0, which torch.load does not know. The
        # optimizer moves its state to the parameters' device.
        state = torch.load(Path(folder) / OPTIMIZER_FILE, weights_only=True, map_location="cpu")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def check_trainable(name: str, model: PreTrainedModel) -> None:
    """Checks that trained weights are at least in single precision; ``name`` is the argument's name for errors.

    Raises:
        ValueError: a trained weight is in half precision, where small steps are rounded away.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.element_size() < 4:
            raise ValueError(
                f"{name}: got weights in {parameter.dtype}; want float32, by {name}.float() or dtype=torch.float32 "
                "in from_pretrained, and bf16=True in the arguments for speed"
            )


def check_fits(student: PreTrainedModel, teacher: PreTrainedModel, *, kd: bool) -> None:
    """Checks that the teacher takes the student's inputs, and that their hidden states and outputs can be compared.

    Args:
        kd: whether outputs are compared too.

    Raises:
        ValueError: they do not fit, as far as configs and classes tell.
    """
    got, want = len(encoder_layers(teacher)), len(encoder_layers(student))
    if got != want:
        raise ValueError(f"teacher: got a model of {got} layers; want {want}, as many as the student has")
    named, pattern = type(teacher).__name__, type(student).__name__
    got, want = families.of(teacher).input_name, families.of(student).input_name
    if got != want:
        raise ValueError(f"teacher: got a {named}, which takes {got}; want one that takes {want}, as the student")
    got, want = teacher.config.hidden_size, student.config.hidden_size
    if got != want:
        raise ValueError(f"teacher: got hidden states of width {got}; want {want}, as the student's")
    got, want = _kind_of_head(teacher), _kind_of_head(student)
    if got is not want:
        raise ValueError(f"teacher: got a {named}; want a model with a head like that of the student, a {pattern}")
    if families.of(student).input_name == "input_ids" and teacher.config.vocab_size != student.config.vocab_size:
        got, want = teacher.config.vocab_size, student.config.vocab_size
        raise ValueError(f"teacher: got a vocabulary of {got} tokens; want the student's, of {want}")
    got, want = _classes(teacher), _classes(student)
    if kd and got != want:
        raise ValueError(
            f"teacher: got a head of {got} classes; want {want}, as the student's, or alpha_kd=0, which leaves the "
            "outputs out"
        )


def _kind_of_head(model: PreTrainedModel) -> type[Head] | None:
    try:
        return type(Head.of(model))
    except ValueError:  # a model without a head, or with one for pretraining
        return None


def _classes(model: PreTrainedModel) -> int | None:
    for base in type(model).__mro__:
        for end, entry in _CLASSES.items():
            if base.__name__.endswith(end):
                return getattr(model.config, entry)
    return None


def make_teacher(model: PreTrainedModel, mode: Mode, trainer) -> FixedTeacher:
    """The teacher that ``mode`` needs, made from ``model``."""
    accept_checkpoint_names(model)
    guide = mode.guide
    if isinstance(guide, TrajectoryGuided):
        return TrajectoryTeacher(model, guide, trainer)
    if isinstance(guide, WaypointGuided):
        return WaypointTeacher(model, guide)
    return FixedTeacher(model)


def _read(model: PreTrainedModel, folder: str | Path) -> None:
    """Loads the weights of a checkpoint folder into ``model``, which must have the same ones."""
    file = Path(folder) / "model.safetensors"
    try:
        load_model(model, file, device=str(model.device))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"teacher: {file}: {' '.join(str(error).split())[:300]}") from error
