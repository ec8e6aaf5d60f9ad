"""The maths of the distillation losses in plain differentiable torch. ``valid`` is bool, the shape of a row index."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layerwise_mse(student, teacher, *, valid, weights, layer_norm, reduction) -> Tensor:
    errors = torch.stack([_mse(s, t, valid, layer_norm) for s, t in zip(student, teacher)])  # (layers,)
    if weights is not None:
        errors = errors * weights.to(errors.dtype)
    return errors if reduction == "none" else getattr(errors, reduction)()


def kd_loss(student_logits, teacher_logits, *, valid, temperature, scale_by_t2) -> Tensor:
    log_student = F.log_softmax(_clean(student_logits, valid) / temperature, dim=-1)  # (..., classes)
    log_teacher = F.log_softmax(_clean(teacher_logits, valid) / temperature, dim=-1)
    p = log_teacher.exp()
    # Selected before the product: 0 * (-inf - -inf) is NaN, and so would be its gradient.
    log_ratio = torch.where(p > 0, log_teacher - log_student, 0)
    loss = _mean_over_rows((p * log_ratio).sum(-1), valid)
    return loss * temperature**2 if scale_by_t2 else loss


def _mse(student: Tensor, teacher: Tensor, valid: Tensor | None, layer_norm: bool) -> Tensor:
    student, teacher = _clean(student, valid), _clean(teacher, valid)  # (..., d)
    if layer_norm:
        width = student.shape[-1:]
        student, teacher = F.layer_norm(student, width), F.layer_norm(teacher, width)
    return _mean_over_rows((student - teacher).square().mean(-1), valid)


def _clean(x: Tensor, valid: Tensor | None) -> Tensor:
    """x in the dtype of the arithmetic, its masked rows replaced by zeros, whatever stood there."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if valid is None else torch.where(valid[..., None], x, 0)


def _mean_over_rows(rows: Tensor, valid: Tensor | None) -> Tensor:
    count = rows.numel() if valid is None else valid.sum()
    return rows.sum() / (max(count, 1) if isinstance(count, int) else count.clamp(min=1))
