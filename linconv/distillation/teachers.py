"""Teachers that move while the student learns: along their own fine-tuning, or from one saved snapshot to the next.

The trainer calls ``advance(step, batches, counts)`` before each optimizer step of the student, and ``save`` and
``load`` with its checkpoints. What a teacher is at a step depends on the step alone, and, for the one that is trained,
on what went into the checkpoint; so a resumed run goes on as before.
"""

from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import Tensor
from transformers import PreTrainedModel

from linconv.distillation.augmentation import SharedSpecAugment
from linconv.distillation.checkpoint_names import accept_checkpoint_names
from linconv.distillation.learning_rate import teacher_scheduler
from linconv.distillation.schedules import Mode, TrajectoryGuided, WaypointGuided

__all__ = ["FixedTeacher", "TrajectoryTeacher", "WaypointTeacher", "make_teacher"]

FOLDER = "teacher"  # in a checkpoint of the student
OPTIMIZER_FILE = "teacher_optimizer.pt"


class FixedTeacher:
    """One that stays as it is."""

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval().requires_grad_(False)

    def advance(self, step: int, batches: list[dict], counts: Tensor) -> Tensor | None:
        """Makes the teacher what it is to be at optimizer step ``step``, counted from 0.

        Args:
            batches: the micro-batches of this step, in this process.
            counts: [answers, frames] of the step, over all its micro-batches and all processes.

        Returns:
            This process's share of the teacher's own mean loss, where it was trained.
        """
        return None

    def save(self, folder: str) -> None:
        """Writes what ``load`` needs into a checkpoint; called in one process."""

    def load(self, folder: str) -> None:
        """Takes up again what a checkpoint holds.

        Raises:
            ValueError: the checkpoint is not one of a run with such a teacher.
        """


class WaypointTeacher(FixedTeacher):
    """The first snapshot of a fine-tuning that lies after the current step; then the last one."""

    def __init__(self, model: PreTrainedModel, mode: WaypointGuided):
        super().__init__(model)
        self.mode, self.at = mode, None

    def advance(self, step: int, batches: list[dict], counts: Tensor) -> None:
        wanted = self.mode.waypoint(step)
        if wanted != self.at:
            _read(self.model, wanted)
            self.at = wanted


class TrajectoryTeacher(FixedTeacher):
    """Trained on the task beside the student: before step s it has had s // update_every updates."""

    def __init__(self, model: PreTrainedModel, mode: TrajectoryGuided, trainer):
        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(model)
        for parameter in trained:
            parameter.requires_grad_(True)
        self.update_every, self.trainer = mode.update_every, trainer
        self.optimizer = self.scheduler = None

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
        self.optimizer = kind(groups, **options)
        updates = max((steps - 1) // self.update_every, 1)
        self.scheduler = teacher_scheduler(self.optimizer, trainer.args, steps=steps, updates=updates)

    def advance(self, step: int, batches: list[dict], counts: Tensor) -> Tensor | None:
        self._prepare()
        if step == 0 or step % self.update_every:
            return None
        trainer, parameters = self.trainer, [p for p in self.model.parameters() if p.requires_grad]
        total = torch.zeros((), device=trainer.args.device)
        self.model.train()
        for batch in batches:
            inputs = trainer._prepare_inputs(batch)
            if trainer.head.labels(inputs) is None:
                raise ValueError("labels: got None; want labels, for the teacher of this mode is trained on the task")
            frame_mask = trainer._frame_mask(inputs)
            augment = SharedSpecAugment(self.model, frame_mask)
            with trainer.accelerator.autocast(), augment.applied_to(self.model):
                outputs = self.model(**trainer.head.model_inputs(inputs), **augment.arguments)
                loss = trainer.head.task_loss(outputs, inputs, frame_mask, self.model.config) / counts[0]
            loss.backward()
            total = total + loss.detach()
        self.model.eval()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = trainer.accelerator.reduce(parameter.grad, "sum")
        if trainer.args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
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
        state = torch.load(Path(folder) / OPTIMIZER_FILE, weights_only=True, map_location=self.trainer.args.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def make_teacher(model: PreTrainedModel, mode: Mode, trainer) -> FixedTeacher:
    """The teacher that ``mode`` wants, made of ``model``."""
    accept_checkpoint_names(model)
    guide = mode.guide
    if isinstance(guide, TrajectoryGuided):
        return TrajectoryTeacher(model, guide, trainer)
    if isinstance(guide, WaypointGuided):
        return WaypointTeacher(model, guide)
    return FixedTeacher(model)


def _read(model: PreTrainedModel, folder: str | Path) -> None:
    """The weights of a checkpoint folder into ``model``, which must have the same ones."""
    file = Path(folder) / "model.safetensors"
    try:
        load_model(model, file, device=str(model.device))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"teacher: {file}: {' '.join(str(error).split())[:300]}") from error
