"""Losses that pull a student towards its teacher: hidden states layer by layer, and output distributions.

Every loss is a mean over the valid rows (frames of a padded batch, or clips), so its size does not depend on the
batch, on the padding or on how a batch is cut up. What stands in a masked row, NaN and Inf too, reaches neither the
loss nor a gradient. The arithmetic is fp32, or fp64 for fp64 inputs; so is the result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from linconv.ops.distillation_loss import reference

__all__ = ["distillation_loss", "kd_loss", "layerwise_mse"]

REDUCTIONS = ("mean", "sum", "none")


def layerwise_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    weights: Tensor | Sequence[float] | None = None,
    layer_norm: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared error between the hidden states of a student and a teacher, layer by layer.

    Per layer it is the mean over valid rows and over the width.

    Args:
        student, teacher: one tensor a layer, (batch, L, d), or (..., d) where ``mask`` is not given as lengths. The
            width may differ between layers, never between student and teacher.
        mask: the valid rows: bool, the shape of a hidden state without its last axis; or int (batch,), the length of
            each sequence. None: all rows.
        weights: (layers,) a factor for each layer. None: ones.
        layer_norm: normalise every row of both sides to mean 0 and variance 1 first (eps 1e-5, no affine part).
        reduction: over the layers, after the weights: "mean", "sum" or "none".

    Returns:
        A scalar, or (layers,) with ``reduction="none"``. Zero where no row is valid.

    Raises:
        TypeError, ValueError: an argument is not what is described here; the message names it.

    Source: the layer-wise loss of CALD (arXiv 2410.06846).
    """
    student, teacher = list(student), list(teacher)
    if not student:
        raise ValueError("student: got no hidden states; want one tensor a layer")
    if len(student) != len(teacher):
        raise ValueError(f"teacher: got {len(teacher)} hidden states; want {len(student)}, as many as the student's")
    for i, (s, t) in enumerate(zip(student, teacher)):
        _check_pair(f"student[{i}]", s, f"teacher[{i}]", t)
        if s.shape[:-1] != student[0].shape[:-1]:
            got, want = tuple(s.shape), tuple(student[0].shape[:-1])
            raise ValueError(f"student[{i}]: got shape {got}; want the rows {want} of student[0]")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; want one of {', '.join(REDUCTIONS)}")
    valid = _valid_rows("mask", mask, student[0])
    if weights is not None:
        weights = torch.as_tensor(weights, device=student[0].device)
        if weights.shape != (len(student),):
            raise ValueError(f"weights: got shape {tuple(weights.shape)}; want ({len(student)},), one for each layer")
    return reference.layerwise_mse(
        student, teacher, valid=valid, weights=weights, layer_norm=layer_norm, reduction=reduction
    )


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    scale_by_t2: bool = False,
) -> Tensor:
    """KL(teacher‖student) of the two output distributions softened by a temperature, a mean over valid rows.

    A logit of −inf is a class of probability zero: it adds nothing where the teacher has it, and makes the loss
    infinite where only the student has it.

    Args:
        student_logits, teacher_logits: (batch, classes) or (batch, L, classes).
        temperature: divides both logits.
        mask: the valid rows, bool (batch,) or (batch, L); or int (batch,) lengths for (batch, L, classes). None: all.
        scale_by_t2: multiply by the temperature squared, which keeps the gradient's size (Hinton et al.,
            arXiv 1503.02531).

    Returns:
        A scalar; zero where no row is valid.

    Raises:
        TypeError, ValueError: an argument is not what is described here; the message names it.
    """
    _check_pair("student_logits", student_logits, "teacher_logits", teacher_logits)
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; want a number above 0")
    valid = _valid_rows("mask", mask, student_logits)
    return reference.kd_loss(
        student_logits, teacher_logits, valid=valid, temperature=temperature, scale_by_t2=scale_by_t2
    )


def distillation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha_kd: float = 1.0,
    alpha_ld: float = 1.0,
    temperature: float = 2.0,
    scale_by_t2: bool = False,
    mask: Tensor | None = None,
    logits_mask: Tensor | None = None,
    weights: Tensor | Sequence[float] | None = None,
    layer_norm: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """``alpha_kd * kd_loss(...) + alpha_ld * layerwise_mse(...)``: all that a student learns from its teacher.

    Args:
        student, teacher, mask, weights, layer_norm: as for :func:`layerwise_mse`.
        student_logits, teacher_logits, temperature, scale_by_t2: as for :func:`kd_loss`.
        logits_mask: the valid rows of the logits, as the ``mask`` of :func:`kd_loss`.
        alpha_kd, alpha_ld: the weights of the two losses.
        reduction: over the layers, "mean" or "sum".

    Returns:
        A scalar.
    """
    if reduction == "none":
        raise ValueError("reduction: got 'none'; want 'mean' or 'sum', for the result is one number")
    kd = kd_loss(student_logits, teacher_logits, temperature=temperature, mask=logits_mask, scale_by_t2=scale_by_t2)
    ld = layerwise_mse(student, teacher, mask=mask, weights=weights, layer_norm=layer_norm, reduction=reduction)
    return alpha_kd * kd + alpha_ld * ld


def _check_pair(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    for n, t in ((name, tensor), (other_name, other)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{n}: got {type(t).__name__}; want a tensor")
        if not t.is_floating_point():
            raise TypeError(f"{n}: got {t.dtype}; want a floating-point dtype")
        if t.ndim < 2 or t.shape[-1] == 0:
            raise ValueError(f"{n}: got shape {tuple(t.shape)}; want (..., width) with at least two axes and width > 0")
    if tensor.shape != other.shape:
        raise ValueError(f"{other_name}: got shape {tuple(other.shape)}; want {tuple(tensor.shape)}, that of {name}")
    if tensor.device != other.device:
        raise ValueError(f"{other_name}: got device {other.device}; want {tensor.device}, that of {name}")


def _valid_rows(name: str, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The mask as bool with the row shape of ``like``: (batch,) lengths are spread over the frames."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}; want a bool or integer tensor")
    rows = like.shape[:-1]
    if mask.device != like.device:
        raise ValueError(f"{name}: got device {mask.device}; want {like.device}")
    if mask.dtype == torch.bool:
        if mask.shape != rows:
            raise ValueError(f"{name}: got bool of shape {tuple(mask.shape)}; want {tuple(rows)}")
        return mask
    if mask.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {mask.dtype}; want bool (valid rows), or int32 or int64 (lengths)")
    if len(rows) != 2 or mask.shape != rows[:1]:
        want = f"lengths of shape ({rows[0]},) for inputs (batch, L, width)" if len(rows) == 2 else "a bool mask here"
        raise ValueError(f"{name}: got integers of shape {tuple(mask.shape)}; want {want}")
    return torch.arange(rows[1], device=like.device) < mask[:, None]
