"""Both directions of the state space dual scan in plain torch: two causal scans, one of them over reversed time."""

import torch

from linconv.ops.masks import frame_mask
from linconv.ops.ssd import reference as one_direction

# Dimensions each argument has when both directions share it; one more is a leading axis (forward, backward).
SHARED_DIMS = dict(x=4, dt=3, A=1, B=4, C=4, D=1, dt_bias=1)


def direction(tensor, name, index):
    """The forward (0) or backward (1) direction's part of an argument."""
    return tensor if tensor is None or tensor.dim() == SHARED_DIMS[name] else tensor[index]


def shift(y, reverse, bounds):
    """y one frame later (earlier if reverse) within each sequence of bounds [(start, end)], zero at its first frame."""
    moved = torch.zeros_like(y)
    for start, end in bounds:
        earlier, later = slice(start, max(start, end - 1)), slice(min(start + 1, end), end)
        to, source = (earlier, later) if reverse else (later, earlier)
        moved[:, to] = y[:, source]
    return moved


def bidirectional_ssd(
    x, dt, A, B, C, D=None, *, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf")), diagonal="both",
    seq_lens=None, cu_seqlens=None, scan=one_direction.chunked,
):  # fmt: skip
    """The function of `linconv.ops.bidirectional_ssd`, differentiable by torch."""
    valid = None if seq_lens is None else frame_mask(seq_lens, x.shape[-3])[..., None, None]
    if valid is not None:
        x = x.masked_fill(~valid, 0)
    arguments = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
    per_direction = x.dim() > SHARED_DIMS["x"]
    math = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[-3]
    bounds = [(0, length)] if cu_seqlens is None else list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]))
    outputs = []
    for index in (0, 1):
        part = {name: direction(t, name, index) for name, t in arguments.items()}
        skip = part.pop("D")
        # The result stays in the math dtype until the directions are summed, to be rounded once.
        y, _ = one_direction.ssd(
            part["x"].to(math), part["dt"], part["A"], part["B"], part["C"], dt_bias=part["dt_bias"],
            dt_softplus=dt_softplus, dt_limit=dt_limit, seq_lens=seq_lens, cu_seqlens=cu_seqlens, reverse=index == 1,
            strict=diagonal == "once" and index == 1, scan=scan,
        )  # fmt: skip
        if diagonal == "shifted":
            y = shift(y, index == 1, bounds)
        # A skip shared by both directions counts once in their sum.
        if skip is not None and not (index == 1 and not per_direction and D.dim() == SHARED_DIMS["D"]):
            y = y + skip.to(math)[:, None] * part["x"]
        if valid is not None:
            y = y.masked_fill(~valid, 0)
        outputs.append(y)
    return (torch.stack(outputs) if per_direction else outputs[0] + outputs[1]).to(x.dtype)
