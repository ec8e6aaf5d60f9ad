"""The arguments of a distillation: those of transformers' Trainer and those of the losses, teacher and schedule."""

import sys
from dataclasses import dataclass, field

from transformers import TrainingArguments

__all__ = ["DistillationArguments"]


@dataclass
class DistillationArguments(TrainingArguments):
    """``loss = alpha_ce * task + alpha_kd * KL(teacher‖student) + alpha_ld * layerwise MSE``.

    Task loss and KL are means over the head's valid answers (frames, tokens or clips), the MSE over the valid frames,
    of one optimizer step: all micro-batches on all processes.
    """

    alpha_ce: float = field(default=1.0, metadata={"help": "Weight of the task's own loss."})
    alpha_kd: float = field(default=1.0, metadata={"help": "Weight of KL(teacher‖student) of the outputs."})
    alpha_ld: float = field(default=15.0, metadata={"help": "Weight of the layer-wise MSE of the hidden states."})
    temperature: float = field(default=2.0, metadata={"help": "Softens both outputs before the KL."})
    scale_by_t2: bool = field(default=False, metadata={"help": "Multiply the KL by the temperature squared."})
    layer_norm: bool = field(default=True, metadata={"help": "Normalise hidden states (no affine) before the MSE."})
    layer_weights: list[float] | None = field(default=None, metadata={"help": "A factor for each layer."})
    layer_reduction: str = field(default="mean", metadata={"help": "Over the layers: mean or sum."})
    include_embeddings: bool = field(default=False, metadata={"help": "Compare the input of the first layer too."})
    teacher_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of a teacher that is trained alongside the student; None: the student's."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder that caches a fixed teacher's hidden states, in bfloat16, and logits."},
    )
    exponential_decay_to: float | None = field(
        default=None,
        metadata={
            "help": "Decay the learning rate exponentially after the warm-up, to this share of itself at the last "
            "step, in place of lr_scheduler_type."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("alpha_ce", "alpha_kd", "alpha_ld"):
            if not _is_number(value := getattr(self, name)) or not value >= 0:
                raise ValueError(f"{name}: got {value!r}; want a finite number from 0 up")
        if not _is_number(self.temperature) or not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature!r}; want a finite number above 0")
        for name in ("scale_by_t2", "layer_norm", "include_embeddings"):
            if not isinstance(value := getattr(self, name), bool):  # the string "False" is truthy
                raise ValueError(f"{name}: got {value!r}; want true or false")
        weights = self.layer_weights
        if weights is not None and not (isinstance(weights, list | tuple) and all(map(_is_number, weights))):
            raise ValueError(f"layer_weights: got {weights!r}; want a list of numbers, or None")
        if self.layer_reduction not in ("mean", "sum"):
            raise ValueError(f"layer_reduction: got {self.layer_reduction!r}; want mean or sum")
        rate, share = self.teacher_learning_rate, self.exponential_decay_to
        if rate is not None and (not _is_number(rate) or not rate > 0):
            raise ValueError(f"teacher_learning_rate: got {rate!r}; want a finite number above 0, or None")
        if share is not None and (not _is_number(share) or not 0 < share <= 1):
            raise ValueError(f"exponential_decay_to: got {share!r}; want a share in (0, 1]")
        if self.accelerator_config.dispatch_batches is None:
            # Accelerate would read a stream in the first process and join its batches, which are not of one length.
            self.accelerator_config.dispatch_batches = False
        if self.gradient_checkpointing:
            # Re-entrant checkpointing runs a layer without a graph: what a hook catches there teaches nothing.
            kwargs = self.gradient_checkpointing_kwargs or {}
            if kwargs.get("use_reentrant"):
                raise ValueError("gradient_checkpointing_kwargs: got use_reentrant=True; want use_reentrant=False")
            # Newer releases of transformers call the same thing activation_checkpointing.
            for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
                if hasattr(self, name):
                    setattr(self, name, {**kwargs, "use_reentrant": False})
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: not supported; the task's loss is that of the head")


def _is_number(value) -> bool:
    """Whether the value is an int or float, not a bool, and finite as a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
