"""The distillation losses in plain differentiable torch. ``valid`` is bool, of shape (...) for inputs (..., d)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layers(student, teacher, *, valid, layer_norm, device) -> tuple[Tensor, Tensor]:
    """Mean squared error and mean cosine, (layers,) each."""
    if not student:
        return torch.zeros(2, 0, device=device).unbind()
    pairs = [(_clean(s, valid), _clean(t, valid)) for s, t in zip(student, teacher)]  # (..., d)
    with torch.no_grad():
        cosine = [_mean_over_rows(F.cosine_similarity(s, t, dim=-1), valid) for s, t in pairs]
    if layer_norm:
        pairs = [[F.layer_norm(x, x.shape[-1:]) for x in pair] for pair in pairs]
    mse = [_mean_over_rows((s - t).square().mean(-1), valid) for s, t in pairs]
    return torch.stack(mse), torch.stack(cosine)


def kd(student_logits, teacher_logits, *, valid, temperature, device) -> Tensor:
    """KL(teacher‖student) of the softened distributions, a scalar."""
    if student_logits is None:
        return torch.zeros((), device=device)
    log_student = F.log_softmax(_clean(student_logits, valid) / temperature, dim=-1)  # (..., classes)
    log_teacher = F.log_softmax(_clean(teacher_logits, valid) / temperature, dim=-1)
    p = log_teacher.exp()
    # Selected before the product: 0 * (-inf - -inf) is NaN, and so would be its gradient.
    log_ratio = torch.where(p == 0, 0, log_teacher - log_student)
    return _mean_over_rows((p * log_ratio).sum(-1), valid)


def linear_kd(hidden_s, weight_s, hidden_t, weight_t, *, valid, temperature) -> Tensor:
    """:func:`kd` of the logits ``hidden @ weight.T``, which are held in memory in full."""
    math = torch.float64 if hidden_s.dtype == torch.float64 else torch.float32
    hidden_s, hidden_t = (_clean(h, valid) for h in (hidden_s, hidden_t))
    logits = hidden_s.to(math) @ weight_s.to(math).T, hidden_t.to(math) @ weight_t.to(math).T
    return kd(*logits, valid=valid, temperature=temperature, device=hidden_s.device)


def _clean(x: Tensor, valid: Tensor | None) -> Tensor:
    """x in the math dtype, with masked rows replaced by zeros, whatever their content."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if valid is None else torch.where(valid[..., None], x, 0)


def _mean_over_rows(rows: Tensor, valid: Tensor | None) -> Tensor:
    if valid is not None:
        rows = torch.where(valid, rows, 0)
    count = rows.numel() if valid is None else valid.sum()
    return rows.sum() / (max(count, 1) if isinstance(count, int) else count.clamp(min=1))
