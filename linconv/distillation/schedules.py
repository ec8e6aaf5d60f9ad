"""Which of the teacher's lessons count at which step, and where the student's kept weights come from.

A mode is a function of the optimizer step alone, so a resumed run needs nothing but its step to go on as before.
"""

from dataclasses import dataclass, fields
from difflib import get_close_matches

__all__ = ["MODES", "Hybrid", "Lessons", "Mode", "TargetGuided", "Unguided", "make_mode"]

ORIGINS = ("target", "source")


@dataclass(frozen=True)
class Lessons:
    """The losses that count at one step, beside that of the task."""

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

    def lessons(self, step: int) -> Lessons:
        """What the teacher teaches at optimizer step ``step``, counted from 0."""
        raise NotImplementedError


@dataclass(frozen=True)
class Unguided(Mode):
    """The pretrained model, converted and trained on the task alone."""

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
class Hybrid(Mode):
    """Guided by ``mode`` at first, then left to the task.

    Args:
        mode: the mode that guides.
        drop_layer_loss_at, drop_kd_at: the optimizer step, counted from 0, from which that loss no longer counts.
            None: it always counts.
    """

    mode: Mode = TargetGuided()
    drop_layer_loss_at: int | None = None
    drop_kd_at: int | None = None

    def __post_init__(self):
        if not isinstance(self.mode, Mode):
            raise TypeError(f"mode: got {type(self.mode).__name__}; want a mode such as TargetGuided()")
        for name in ("drop_layer_loss_at", "drop_kd_at"):
            step = getattr(self, name)
            if step is not None and (not isinstance(step, int) or step < 0):
                raise ValueError(f"{name}: got {step!r}; want a step, an integer from 0 up, or None")
        if self.drop_layer_loss_at is None and self.drop_kd_at is None:
            raise ValueError("Hybrid drops no loss: give drop_layer_loss_at or drop_kd_at")

    @property
    def origin(self) -> str:
        return self.mode.origin

    def lessons(self, step: int) -> Lessons:
        lessons = self.mode.lessons(step)
        return Lessons(
            layers=lessons.layers and (self.drop_layer_loss_at is None or step < self.drop_layer_loss_at),
            kd=lessons.kd and (self.drop_kd_at is None or step < self.drop_kd_at),
        )


MODES: dict[str, type[Mode]] = {"unguided": Unguided, "target_guided": TargetGuided, "hybrid": Hybrid}


def make_mode(name: str, **options) -> Mode:
    """The mode called ``name`` with the options of its class; what Hybrid does not know goes to the mode it wraps."""
    if name not in MODES:
        near = get_close_matches(name, MODES, 1)
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
