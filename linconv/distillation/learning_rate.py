"""The learning rate's course over a run."""

import math
from functools import partial

import transformers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

__all__ = ["exponential_decay", "teacher_scheduler"]


def exponential_decay(optimizer: Optimizer, *, warmup: int, steps: int, decay_to: float) -> LambdaLR:
    """Linear up to step ``warmup``, then exponential down to ``decay_to`` times the peak at step ``steps``."""
    return LambdaLR(optimizer, partial(_exponential, warmup=warmup, steps=steps, decay_to=decay_to))


def _exponential(step: int, *, warmup: int, steps: int, decay_to: float) -> float:
    if step < warmup:
        return step / warmup
    return decay_to ** ((step - warmup) / max(steps - warmup, 1))


def teacher_scheduler(optimizer: Optimizer, args, *, steps: int, updates: int) -> LRScheduler:
    """The student's schedule over ``steps`` squeezed into the teacher's ``updates``, at whose last it ends."""
    warmup = math.ceil(args.get_warmup_steps(steps) * updates / max(steps, 1))
    if args.exponential_decay_to is not None:
        return exponential_decay(optimizer, warmup=warmup, steps=updates, decay_to=args.exponential_decay_to)
    return transformers.get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=updates,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
