"""Losses of a student against its teacher: hidden states layer by layer, and output distributions.

Every loss is a mean over the valid rows (frames of a padded batch, or clips), so its size does not depend on the
batch, the padding or how a batch is split. The content of masked rows, including NaN and Inf, affects neither the loss
nor a gradient. Arithmetic and result are fp32, or fp64 for fp64 inputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linconv.ops import checks, dispatch
from linconv.ops.autograd import once_differentiable
from linconv.ops.distillation_loss import reference
from linconv.ops.distillation_loss.arguments import (
    STATISTICS,
    check_pair,
    check_temperature,
    checked_mask,
    checked_states,
    checked_weights,
    valid_rows,
)
from linconv.ops.distillation_loss.linear import linear_kd_loss

__all__ = ["Terms", "distillation_loss", "distillation_terms", "kd_loss", "layerwise_mse", "linear_kd_loss"]

REDUCTIONS = ("mean", "sum", "none")


class Terms(NamedTuple):
    """Results of one pass over the hidden states and logits of student and teacher."""

    mse: Tensor  # (layers,), differentiable
    cosine: Tensor  # (layers,), mean over valid rows, not differentiable; of the states before any layer_norm
    kd: Tensor  # scalar, differentiable; zero if no logits were given


def distillation_terms(
    student: Sequence[Tensor] = (),
    teacher: Sequence[Tensor] = (),
    student_logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    *,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    logits_mask: Tensor | None = None,
    layer_norm: bool = False,
    backend: str | None = None,
) -> Terms:
    """The unweighted parts of :func:`distillation_loss` per layer, and each layer's cosine, in the same launch.

    Args:
        student, teacher, mask, layer_norm: as for :func:`layerwise_mse`; may be empty.
        student_logits, teacher_logits, temperature: as for :func:`kd_loss`; both or neither.
        logits_mask: the valid rows of the logits, as the ``mask`` of :func:`kd_loss`.
        backend: a name from :func:`linconv.ops.backends`, or None for the best available.

    Raises:
        TypeError, ValueError: an argument does not match its description; the message names it.
    """
    student, teacher = checked_states("student", student), checked_states("teacher", teacher)
    if len(student) != len(teacher):
        raise ValueError(f"teacher: got {len(teacher)} hidden states; want {len(student)}, as many as the student's")
    for i, (s, t) in enumerate(zip(student, teacher)):
        check_pair(f"student[{i}]", s, f"teacher[{i}]", t)
        if s.shape[:-1] != student[0].shape[:-1]:
            got, want = tuple(s.shape), tuple(student[0].shape[:-1])
            raise ValueError(f"student[{i}]: got shape {got}; want the rows {want} of student[0]")
        if s.device != student[0].device:
            raise ValueError(f"student[{i}]: got device {s.device}; want {student[0].device}, that of student[0]")
    if (student_logits is None) != (teacher_logits is None):
        missing = "student_logits" if student_logits is None else "teacher_logits"
        raise ValueError(f"{missing}: got None; want logits on both sides, or on neither")
    if student:
        mask = checked_mask("mask", mask, student[0])
    if student_logits is not None:
        check_pair("student_logits", student_logits, "teacher_logits", teacher_logits)
        logits_mask = checked_mask("logits_mask", logits_mask, student_logits)
        if student and student_logits.device != student[0].device:
            got, want = student_logits.device, student[0].device
            raise ValueError(f"student_logits: got device {got}; want {want}, that of student[0]")
    check_temperature(temperature)
    checks.flag("layer_norm", layer_norm)
    if not student and student_logits is None:
        raise ValueError("student: got no hidden states and no logits; want at least one of them")
    device = student[0].device if student else student_logits.device
    backend = dispatch.pick("distillation_loss", device, backend)
    if backend == "reference":
        valid = valid_rows(mask, student[0]) if student else None
        valid_logits = None if student_logits is None else valid_rows(logits_mask, student_logits)
        return Terms(
            *reference.layers(student, teacher, valid=valid, layer_norm=layer_norm, device=device),
            reference.kd(student_logits, teacher_logits, valid=valid_logits, temperature=temperature, device=device),
        )
    rows = None if not student else student[0].shape[:-1]
    logit_rows = None if student_logits is None else student_logits.shape[:-1]
    mse, cosine, kd, _ = dispatch.run(
        "distillation_loss",
        backend,
        [_three_axes(x) for x in student],
        [_three_axes(x) for x in teacher],
        _mask_of(mask, rows),
        layer_norm,
        _three_axes(student_logits),
        _three_axes(teacher_logits),
        _mask_of(logits_mask, logit_rows),
        float(temperature),
    )
    return Terms(mse, cosine, kd[0])


def layerwise_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    weights: Tensor | Sequence[float] | None = None,
    layer_norm: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Mean squared error between the hidden states of a student and a teacher, layer by layer.

    Each layer's error is the mean over valid rows and over the width.

    Args:
        student, teacher: one tensor per layer, (batch, L, d), or (..., d) if ``mask`` is not given as lengths. The
            width may differ between layers, but not between student and teacher.
        mask: the valid rows: bool, the shape of a hidden state without its last axis; or int (batch,), the length of
            each sequence. None: all rows.
        weights: (layers,), a factor for each layer. None: ones.
        layer_norm: normalise every row of both sides to mean 0 and variance 1 first (eps 1e-5, no affine part).
        reduction: over the layers, after the weights: "mean", "sum" or "none".
        backend: a name from :func:`linconv.ops.backends`, or None for the best available.

    Returns:
        A scalar, or (layers,) with ``reduction="none"``. Zero if no row is valid.

    Raises:
        TypeError, ValueError: an argument does not match its description; the message names it.

    Source: the layer-wise loss of CALD (arXiv 2410.06846).
    """
    student, teacher = checked_states("student", student), checked_states("teacher", teacher)
    if not student:
        raise ValueError("student: got no hidden states; want one tensor a layer")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; want one of {', '.join(REDUCTIONS)}")
    weights = checked_weights(weights, student)
    mse = distillation_terms(student, teacher, mask=mask, layer_norm=layer_norm, backend=backend).mse
    return _over_layers(mse, weights, reduction)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    scale_by_t2: bool = False,
    backend: str | None = None,
) -> Tensor:
    """KL(teacher‖student) of the two output distributions at a temperature, averaged over valid rows.

    A logit of −inf means probability zero for the class: it adds nothing if the teacher has it, and makes the loss
    infinite if only the student has it.

    Args:
        student_logits, teacher_logits: (batch, classes) or (batch, L, classes).
        temperature: divides both logits; finite and above 0.
        mask: the valid rows, bool (batch,) or (batch, L); or int (batch,) lengths for (batch, L, classes). None: all.
        scale_by_t2: multiply by the temperature squared, which keeps the size of the gradient (Hinton et al.,
            arXiv 1503.02531).
        backend: a name from :func:`linconv.ops.backends`, or None for the best available.

    Returns:
        A scalar; zero if no row is valid.

    Raises:
        TypeError, ValueError: an argument does not match its description; the message names it.
    """
    check_pair("student_logits", student_logits, "teacher_logits", teacher_logits)
    checks.flag("scale_by_t2", scale_by_t2)
    mask = checked_mask("mask", mask, student_logits)  # here, so that errors use this argument's name
    kd = distillation_terms(
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        temperature=temperature,
        logits_mask=mask,
        backend=backend,
    ).kd
    return kd * float(temperature) ** 2 if scale_by_t2 else kd


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
    backend: str | None = None,
) -> Tensor:
    """``alpha_kd * kd_loss(...) + alpha_ld * layerwise_mse(...)``.

    Args:
        student, teacher, mask, weights, layer_norm: as for :func:`layerwise_mse`.
        student_logits, teacher_logits, temperature, scale_by_t2: as for :func:`kd_loss`.
        logits_mask: the valid rows of the logits, as the ``mask`` of :func:`kd_loss`.
        alpha_kd, alpha_ld: the weights of the two losses.
        reduction: over the layers, "mean" or "sum".
        backend: a name from :func:`linconv.ops.backends`, or None for the best available.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: an argument does not match its description; the message names it.
    """
    if reduction not in REDUCTIONS[:2]:
        raise ValueError(f"reduction: got {reduction!r}; want 'mean' or 'sum', for the result is one number")
    checks.number("alpha_kd", alpha_kd)
    checks.number("alpha_ld", alpha_ld)
    checks.flag("scale_by_t2", scale_by_t2)
    student = checked_states("student", student)
    weights = checked_weights(weights, student)
    terms = distillation_terms(
        student,
        teacher,
        student_logits,
        teacher_logits,
        temperature=temperature,
        mask=mask,
        logits_mask=logits_mask,
        layer_norm=layer_norm,
        backend=backend,
    )
    kd = terms.kd * float(temperature) ** 2 if scale_by_t2 else terms.kd
    return float(alpha_kd) * kd + float(alpha_ld) * _over_layers(terms.mse, weights, reduction)


def _over_layers(mse: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    if weights is not None:
        mse = mse * weights.to(mse)
    return mse if reduction == "none" else getattr(mse, reduction)()


def _three_axes(x: Tensor | None) -> Tensor | None:
    """A tensor with two or more axes as (batch, L, width)."""
    if x is None or x.dim() == 3:
        return x
    return x[None] if x.dim() == 2 else x.flatten(0, -3)


def _mask_of(mask: Tensor | None, rows) -> Tensor | None:
    """The mask for the result of :func:`_three_axes` for a tensor with these rows."""
    if mask is None or rows is None:
        return None
    if mask.dtype != torch.bool or len(rows) == 2:
        return mask
    return mask[None] if len(rows) == 1 else mask.flatten(0, -2)


def _math(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def _fake(student, teacher, mask, layer_norm, student_logits, teacher_logits, logits_mask, temperature):
    like = student[0] if student else student_logits
    math = _math(*student, *teacher)
    layers = (like.new_empty(len(student), dtype=math) for _ in range(2))
    rows = 0 if student_logits is None else student_logits.shape[0] * student_logits.shape[1]
    kd = like.new_empty(1, dtype=_math(student_logits, teacher_logits))
    return *layers, kd, like.new_empty(rows, STATISTICS, dtype=torch.float64)


def _fake_backward(grad_mse, grad_kd, student, teacher, mask, layer_norm, student_logits, teacher_logits, *rest):
    *_, of_student, of_teacher, of_student_logits, of_teacher_logits = rest

    def of(wanted, x):
        if x is None:
            return grad_mse.new_empty(0, dtype=torch.float32)
        return x.new_empty(x.shape if wanted else 0)

    return (
        [of(of_student, x) for x in student],
        [of(of_teacher, x) for x in teacher],
        of(of_student_logits, student_logits),
        of(of_teacher_logits, teacher_logits),
    )


def _save(ctx, inputs, output):
    student, teacher, mask, ctx.layer_norm, student_logits, teacher_logits, logits_mask, ctx.temperature = inputs
    _, cosine, _, statistics = output
    ctx.mark_non_differentiable(cosine, statistics)
    ctx.layers = len(student)
    ctx.save_for_backward(*student, *teacher, mask, student_logits, teacher_logits, logits_mask, statistics)


def _backward(ctx, grad_mse, grad_cosine, grad_kd, grad_statistics):
    found, n = _gradients(ctx, grad_mse, grad_kd, *ctx.saved_tensors), ctx.layers
    return list(found[:n]), list(found[n : 2 * n]), None, None, *found[2 * n :], None, None


@once_differentiable
def _gradients(ctx, grad_mse, grad_kd, *saved):
    student, teacher = list(saved[: ctx.layers]), list(saved[ctx.layers : 2 * ctx.layers])
    mask, student_logits, teacher_logits, logits_mask, statistics = saved[2 * ctx.layers :]
    needs = ctx.needs_input_grad
    wanted = [any(needs[0]), any(needs[1]), bool(needs[4]), bool(needs[5])]
    arguments = (mask, ctx.layer_norm, student_logits, teacher_logits, logits_mask, ctx.temperature, statistics)
    found = ctx.backward_operator(grad_mse, grad_kd, student, teacher, *arguments, *wanted)
    lists = [g if w else [None] * ctx.layers for g, w in zip(found[:2], wanted[:2])]
    return *lists[0], *lists[1], *(g if w else None for g, w in zip(found[2:], wanted[2:]))


dispatch.register(
    "distillation_loss",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_save,
    backward=_backward,
    triton="linconv.ops.distillation_loss.triton",
    prefer=("triton", "cuda"),
)
