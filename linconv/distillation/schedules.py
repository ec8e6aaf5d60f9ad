"""Which of the teacher's losses count at which step, and where the student's kept weights come from.

A mode depends only on the optimizer step, so a resumed run needs only its step to continue as before.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

__all__ = [
    "MODES",
    "Hybrid",
    "Lessons",
    "Mode",
    "TargetGuided",
    "TrajectoryGuided",
    "Unguided",
    "WaypointGuided",
    "make_mode",
]

ORIGINS = ("target", "source")


@dataclass(frozen=True)
class Lessons:
    """The losses that count at one step, besides the task's."""

    layers: bool
    kd: bool

    @property
    def any(self) -> bool:
        return self.layers or self.kd


class Mode:
    """A way of guiding the student.

    ``origin`` names the model whose weights the student keeps: "target", the fine-tuned teacher, or "source", the
    pretrained model that the teacher was fine-tuned from.
    """

    origin: str

    @property
    def guide(self) -> "Mode":
        """The mode that says what the teacher is: this one, or the one it wraps."""
        return self

    def lessons(self, step: int) -> Lessons:
        """The teacher's losses that count at optimizer step ``step``, counted from 0."""
        raise NotImplementedError


@dataclass(frozen=True)
class Unguided(Mode):
    """The pretrained model, converted and trained only on the task."""

    origin = "source"

    def lessons(self, step: int) -> Lessons:
        return Lessons(layers=False, kd=False)


@dataclass(frozen=True)
class TargetGuided(Mode):
    """A fixed, fine-tuned teacher.

    Args:
        init: "target": the student starts from the teacher's own weights; "source": from the pretrained model.
    """

    init: str = "target"

    def __post_init__(self):
        if self.init not in ORIGINS:
            raise ValueError(f"init: got {self.init!r}; want one of {', '.join(ORIGINS)}")

    @property
    def origin(self) -> str:
        return self.init

    def lessons(self, step: int) -> Lessons:
        return Lessons(layers=True, kd=True)


@dataclass(frozen=True)
class TrajectoryGuided(Mode):
    """A teacher that starts from the pretrained model, as the student does, and is fine-tuned alongside it.

    Args:
        update_every: the student's optimizer steps per update of the teacher. The teacher has the student's kind of
            optimizer and, unless ``teacher_learning_rate`` is set, its learning rate; the schedule is compressed to the
            number of the teacher's updates.
    """

    update_every: int = 1
    origin = "source"

    def __post_init__(self):
        if type(self.update_every) is not int or self.update_every < 1:
            raise ValueError(f"update_every: got {self.update_every!r}; want an integer from 1 up")

    def lessons(self, step: int) -> Lessons:
        return Lessons(layers=True, kd=True)


@dataclass(frozen=True)
class WaypointGuided(Mode):
    """The teachers are snapshots of a finished fine-tuning: at each step the first one after it, at the end the last.

    Args:
        checkpoints: the snapshots' folders, each named after its step, such as ``checkpoint-300``; or one folder that
            contains them. ``linconv finetune`` keeps such folders if ``model.waypoints`` is set.
    """

    checkpoints: Sequence[str | Path]
    origin = "source"

    def __post_init__(self):
        given = self.checkpoints
        folders = Path(given).glob("checkpoint-*") if isinstance(given, str | Path) else given
        found = list(folders) if isinstance(folders, Iterable) else [folders]
        if not all(isinstance(folder, str | Path) for folder in found):
            raise TypeError(f"checkpoints: got {given!r}; want a folder, or folders such as checkpoint-300")
        found = [Path(folder) for folder in found]
        if not found:
            raise ValueError(f"checkpoints: got {given!r}, no snapshot; want folders such as checkpoint-300")
        for folder in found:
            if not re.search(r"-\d+$", folder.name):
                raise ValueError(f"checkpoints: got {folder}; want a name that ends in -STEP, such as checkpoint-300")
            if not (folder / "model.safetensors").is_file():
                raise ValueError(f"checkpoints: no model.safetensors in {folder}")
        steps = [self._step(folder) for folder in found]
        if len(set(steps)) < len(steps):
            raise ValueError(f"checkpoints: two of the same step among {sorted(steps)}")
        object.__setattr__(self, "checkpoints", tuple(sorted((str(f) for f in found), key=self._step)))

    @staticmethod
    def _step(folder: str | Path) -> int:
        return int(str(folder).rpartition("-")[2])

    def waypoint(self, step: int) -> str:
        """The folder of the teacher at optimizer step ``step``, counted from 0."""
        return next((c for c in self.checkpoints if self._step(c) > step), self.checkpoints[-1])

    def lessons(self, step: int) -> Lessons:
        return Lessons(layers=True, kd=True)


@dataclass(frozen=True)
class Hybrid(Mode):
    """Guided by ``mode`` at first; later one or both of its losses are dropped.

    Args:
        mode: the mode that guides.
        drop_layer_loss_at, drop_kd_at: the optimizer step, counted from 0, from which that loss no longer counts.
            None: it is never dropped.
    """

    mode: Mode = TargetGuided()
    drop_layer_loss_at: int | None = None
    drop_kd_at: int | None = None

    def __post_init__(self):
        if not isinstance(self.mode, Mode):
            raise TypeError(f"mode: got {type(self.mode).__name__}; want a mode such as TargetGuided()")
        for name in ("drop_layer_loss_at", "drop_kd_at"):
            step = getattr(self, name)
            if step is not None and (type(step) is not int or step < 0):
                raise ValueError(f"{name}: got {step!r}; want a step, an integer from 0 up, or None")
        if self.drop_layer_loss_at is None and self.drop_kd_at is None:
            raise ValueError("drop_layer_loss_at: got None, and drop_kd_at too; want a step for one of them at least")

    @property
    def origin(self) -> str:
        return self.mode.origin

    @property
    def guide(self) -> Mode:
        return self.mode.guide

    def lessons(self, step: int) -> Lessons:
        lessons = self.mode.lessons(step)
        return Lessons(
            layers=lessons.layers and (self.drop_layer_loss_at is None or step < self.drop_layer_loss_at),
            kd=lessons.kd and (self.drop_kd_at is None or step < self.drop_kd_at),
        )


MODES: dict[str, type[Mode]] = {
    "unguided": Unguided,
    "target_guided": TargetGuided,
    "trajectory_guided": TrajectoryGuided,
    "waypoint_guided": WaypointGuided,
    "hybrid": Hybrid,
}


def make_mode(name: str, **options) -> Mode:
    """The mode called ``name`` with the options of its class; Hybrid passes others on to the mode it wraps."""
    if not isinstance(name, str) or name not in MODES:
        near = get_close_matches(str(name), MODES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"mode: got {name!r}; want one of {', '.join(MODES)}{hint}")
    cls = MODES[name]
    own = {f.name for f in fields(cls)}
    if cls is Hybrid:
        guide = options.pop("mode", "target_guided")
        inner = {k: options.pop(k) for k in list(options) if k not in own}
        options["mode"] = make_mode(guide, **inner)
    for key in options:
        if key not in own:
            raise ValueError(f"{key}: not an option of the mode {name!r}; it has {', '.join(sorted(own)) or 'none'}")
    return cls(**options)
