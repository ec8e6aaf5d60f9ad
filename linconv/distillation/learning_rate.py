"""Learning rate schedules, and optimizers that need none."""

from collections.abc import Callable
from functools import partial

import transformers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

__all__ = ["exponential_decay", "set_training", "teacher_scheduler"]


def set_training(optimizer: Optimizer | None, training: bool) -> None:
    """Switches the parameters to those for training, or those for evaluation and saving.

    They differ if the optimizer is schedule-free (arXiv 2405.15682): evaluation uses a mean over the steps.
    """
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


def exponential_decay(optimizer: Optimizer, *, warmup: int, steps: int, decay_to: float) -> LambdaLR:
    """Linear up to step ``warmup``, then exponential down to ``decay_to`` times the peak at step ``steps``."""
    return LambdaLR(optimizer, partial(_exponential, warmup=warmup, steps=steps, decay_to=decay_to))


def _exponential(step: float, *, warmup: int, steps: int, decay_to: float) -> float:
    if step < warmup:
        return step / warmup
    return decay_to ** ((step - warmup) / max(steps - warmup, 1))


def teacher_scheduler(optimizer: Optimizer, args, *, steps: int, updates: int) -> LRScheduler:
    """The student's schedule over ``steps``, compressed so that it ends at the last of the teacher's ``updates``.

    Raises:
        ValueError: the student's schedule depends on evaluation scores.
    """
    warmup = args.get_warmup_steps(steps)
    if args.exponential_decay_to is not None:
        student = exponential_decay(optimizer, warmup=warmup, steps=steps, decay_to=args.exponential_decay_to)
    else:
        student = transformers.get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    if not isinstance(student, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type: got {args.lr_scheduler_type.value}, which goes by scores, and a teacher that is "
            "trained has none; want one that goes by the step"
        )
    stride = steps / updates
    return LambdaLR(optimizer, [partial(_squeezed, share=share, stride=stride) for share in student.lr_lambdas])


def _squeezed(update: int, *, share: Callable[[float], float], stride: float) -> float:
    return share(update * stride)
