"""KL of outputs over a large vocabulary, from the hidden states before the last projection: logits tile by tile."""

import functools
from math import prod

import torch
from torch import Tensor

from linconv.ops import checks, dispatch
from linconv.ops.autograd import once_differentiable, register_autograd
from linconv.ops.distillation_loss import reference
from linconv.ops.distillation_loss.arguments import STATISTICS, check_temperature, checked_mask, valid_rows

__all__ = ["linear_kd_loss"]

# Rows and classes of a tile of logits. On CPU it fits a core's caches: 1 MiB in float32. Elsewhere it must be worth
# its launches and fill a GPU: 64 MiB.
TILE, TILE_OF_CPU = (4096, 4096), (512, 512)


def linear_kd_loss(
    hidden_s: Tensor,
    weight_s: Tensor,
    hidden_t: Tensor,
    weight_t: Tensor,
    *,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    scale_by_t2: bool = False,
    backend: str | None = None,
) -> Tensor:
    """:func:`kd_loss` of the logits ``hidden @ weight.T``, computed tile by tile in float32 and never held in full.

    The backward pass recomputes each tile: six matrix products in total, against four with all logits in memory. If the
    hidden states and weights of a side are both bfloat16 or both float16, products take them as they are and sum in
    float32; a tile's gradient is rounded to the student's dtype for them. Memory besides the gradients: 3 MiB, that of
    the matrix products and, for hidden states narrower than float32, their gradient in float32, 32 MiB for 8,192 rows
    of width 1,024. On CUDA tiles are larger, about 250 MiB in total.

    Args:
        hidden_s, hidden_t: (..., d) of student and teacher; their widths may differ.
        weight_s, weight_t: (classes, d) each; gradients flow to ``hidden_s`` and ``weight_s``, never to the teacher.
        temperature, scale_by_t2: as for :func:`kd_loss`.
        mask: the valid rows: bool, the shape of ``hidden_s`` without its last axis; or int (batch,) lengths of
            (batch, L, d). None: all. Every product skips invalid rows, so the host reads their number: on CUDA a mask
            costs one wait for the device in each of forward and backward, and rules out CUDA graphs.
        backend: a name from :func:`linconv.ops.backends`, or None for the best available.

    Returns:
        A scalar, float32 (float64 for float64 input); zero if no row is valid.

    Raises:
        TypeError, ValueError: an argument does not match its description; the message names it.
    """
    _check(hidden_s, weight_s, hidden_t, weight_t)
    check_temperature(temperature)
    checks.flag("scale_by_t2", scale_by_t2)
    valid = valid_rows(checked_mask("mask", mask, hidden_s), hidden_s)
    backend = dispatch.pick("distillation_loss", hidden_s.device, backend)
    hidden_t, weight_t = hidden_t.detach(), weight_t.detach()
    if backend == "reference":
        kd = reference.linear_kd(hidden_s, weight_s, hidden_t, weight_t, valid=valid, temperature=temperature)
    else:
        kd, _ = _operator("linear_kd_loss", backend)(
            hidden_s.flatten(0, -2),
            weight_s,
            hidden_t.flatten(0, -2),
            weight_t,
            None if valid is None else valid.flatten(),
            float(temperature),
        )
        kd = kd[0]
    return kd * float(temperature) ** 2 if scale_by_t2 else kd


def _check(hidden_s, weight_s, hidden_t, weight_t) -> None:
    """Check that hidden states and weights fit each other."""
    for name, value in (
        ("hidden_s", hidden_s),
        ("weight_s", weight_s),
        ("hidden_t", hidden_t),
        ("weight_t", weight_t),
    ):
        checks.floating_tensor(name, value)
        checks.like(name, value, "hidden_s", hidden_s)
    if hidden_s.dim() < 2 or hidden_s.shape[-1] == 0:
        raise ValueError(f"hidden_s has shape {tuple(hidden_s.shape)}, wanted (..., d) with two axes or more and d > 0")
    checks.shape("weight_s", weight_s, (None, hidden_s.shape[-1]), "(classes, d)")
    checks.shape("hidden_t", hidden_t, (*hidden_s.shape[:-1], None), "the rows of hidden_s and a width")
    checks.shape("weight_t", weight_t, (weight_s.shape[0], hidden_t.shape[-1]), "(classes, width of hidden_t)")
    if weight_s.shape[0] == 0 or hidden_t.shape[-1] == 0:
        raise ValueError(f"weight_t has shape {tuple(weight_t.shape)}, wanted at least one class and a width above 0")


def _check_operator(hidden_s, weight_s, hidden_t, weight_t, mask) -> None:
    """Check the operator's own arguments: rows in one axis, and a mask of them."""
    checks.floating_tensor("hidden_s", hidden_s)
    checks.shape("hidden_s", hidden_s, (None, None), "(rows, d)")
    _check(hidden_s, weight_s, hidden_t, weight_t)
    checked_mask("mask", mask, hidden_s)


def _tile(like: Tensor) -> tuple[int, int]:
    return TILE_OF_CPU if like.device.type == "cpu" else TILE


def _tiles(like: Tensor, indices: Tensor | None):
    """Per tile: its rows of ``like`` (a slice, or indices of valid rows) and their place in the list of valid rows."""
    total, step = len(like) if indices is None else len(indices), _tile(like)[0]
    for start in range(0, total, step):
        place = slice(start, min(start + step, total))
        yield (place if indices is None else indices[place]), place


def _classes(weight: Tensor):
    """The classes of each tile of ``weight``."""
    step = _tile(weight)[1]
    return (slice(start, start + step) for start in range(0, len(weight), step))


def _multiplied_as(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a side's hidden states and weights in products; sums are always in the math dtype."""
    math = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.dtype if hidden.dtype == weight.dtype and _sums_wider(hidden.device) else math


def _ours(device: torch.device) -> bool:
    """Whether `linear` computes products here; elsewhere torch does."""
    return device.type == "cpu" and dispatch.compiled("linear_out")


def _sums_wider(device: torch.device) -> bool:
    """Whether products of numbers narrower than float32 give sums in float32."""
    return device.type == "cuda" or _ours(device)


def _indices(mask: Tensor | None) -> Tensor | None:
    # Invalid rows are dropped before any product: 0 * NaN is NaN, and a product's bits may depend on its number of
    # rows.
    return None if mask is None else mask.nonzero()[:, 0]


class _Scratch:
    """Memory for the tiles, allocated once: allocating and freeing per tile may fragment memory."""

    def __init__(self, like: Tensor, math: torch.dtype):
        self.like, self.math = like, math
        self._held: dict[str, Tensor] = {}

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """(shape), by default in the math dtype, uninitialised; the first use of a name must be the largest."""
        if name not in self._held:
            self._held[name] = self.like.new_empty(shape, dtype=dtype or self.math).flatten()
        return self._held[name][: prod(shape)].view(shape)

    def cast(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in a dtype; ``x`` itself if it already has it."""
        return x if x.dtype == dtype else self.tensor(name, *x.shape, dtype=dtype).copy_(x)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a b^T in the math dtype."""
        out = self.tensor(name, a.shape[0], b.shape[0])
        if _ours(out.device):
            torch.ops.linconv.linear_out(out, a, b, False)
        elif a.dtype == self.math:
            torch.mm(a, b.T, out=out)
        else:
            torch.mm(a, b.T, out_dtype=self.math, out=out)
        return out

    def add_product(self, name: str, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a b^T, in the math dtype."""
        if _ours(total.device):
            torch.ops.linconv.linear_out(total, a, b, True)
        elif a.dtype == self.math:
            total.addmm_(a, b.T)
        else:
            total.add_(self.product(name, a, b))


def _operator(name: str, backend: str):
    # Only the operators on tiles are kernels: linear_kd_loss has one version for the compiled backends.
    if name.startswith("linear"):
        return getattr(torch.ops.linconv, f"{name}_triton" if backend == "triton" else name)
    return dispatch.operator(name, backend)


def _forward(hidden_s, weight_s, hidden_t, weight_t, mask, temperature, backend=None):
    _check_operator(hidden_s, weight_s, hidden_t, weight_t, mask)
    kd_statistics = _operator("kd_statistics", backend or hidden_s.device.type)
    math = torch.promote_types(hidden_s.dtype, torch.float32)
    indices = _indices(mask)
    rows = hidden_s.shape[0] if indices is None else len(indices)
    of_s, of_t = _multiplied_as(hidden_s, weight_s), _multiplied_as(hidden_t, weight_t)
    statistics, scratch = hidden_s.new_empty(rows, STATISTICS, dtype=torch.float64), _Scratch(hidden_s, math)
    for index, place in _tiles(hidden_s, indices):
        s, t = scratch.cast("s", hidden_s[index], of_s), scratch.cast("t", hidden_t[index], of_t)
        known = None
        for classes in _classes(weight_s):
            logits_s = scratch.product("logits_s", s, scratch.cast("w_s", weight_s[classes], of_s))
            logits_t = scratch.product("logits_t", t, scratch.cast("w_t", weight_t[classes], of_t))
            known = kd_statistics(logits_s, logits_t, known, temperature)
        statistics[place] = known
    return (statistics[:, -1].sum() / max(rows, 1)).to(math)[None], statistics


def _backward(grad, hidden_s, weight_s, hidden_t, weight_t, mask, temperature, statistics, backend=None):
    _check_operator(hidden_s, weight_s, hidden_t, weight_t, mask)
    kd_gradient = _operator("kd_gradient", backend or hidden_s.device.type)
    math = torch.promote_types(hidden_s.dtype, torch.float32)
    indices = _indices(mask)
    rows = hidden_s.shape[0] if indices is None else len(indices)
    checks.shape("grad", grad, (1,), "(1,)")
    checks.shape("statistics", statistics, (rows, STATISTICS), f"(rows that count, {STATISTICS})")
    of_s, of_t = _multiplied_as(hidden_s, weight_s), _multiplied_as(hidden_t, weight_t)
    # The mean's factor is applied last: with it, a tile's gradient might be too small for float16.
    scale = (grad / max(len(statistics), 1)).to(math)
    ones = scale.new_ones(1).expand(len(statistics))
    scratch = _Scratch(hidden_s, math)
    of_hidden = torch.zeros(len(statistics), hidden_s.shape[1], dtype=math, device=hidden_s.device)  # valid rows
    of_weight = torch.empty_like(weight_s, memory_format=torch.contiguous_format)
    # Classes are the outer loop, so that a weight tile's sum over all rows is rounded once.
    for classes in _classes(weight_s):
        w_s, w_t = scratch.cast("w_s", weight_s[classes], of_s), scratch.cast("w_t", weight_t[classes], of_t)
        total = scratch.tensor("total", *w_s.shape).zero_()
        for index, place in _tiles(hidden_s, indices):
            s, t = scratch.cast("s", hidden_s[index], of_s), scratch.cast("t", hidden_t[index], of_t)
            logits_s, logits_t = scratch.product("logits_s", s, w_s), scratch.product("logits_t", t, w_t)
            tile = kd_gradient(logits_s, logits_t, statistics[place], ones[place], temperature)
            tile = scratch.cast("tile", tile, of_s)
            scratch.add_product("of_weight", total, tile.T, s.T)
            scratch.add_product("of_hidden", of_hidden[place], tile, w_s.T)
            del tile  # before the next one is computed
        of_weight[classes] = total.mul_(scale)
    of_hidden.mul_(scale)
    if indices is None:
        return of_hidden.to(hidden_s.dtype), of_weight
    of_all = hidden_s.new_zeros(hidden_s.shape)
    of_all[indices] = of_hidden.to(hidden_s.dtype)
    return of_all, of_weight


def _fake(hidden_s, weight_s, hidden_t, weight_t, mask, temperature):
    math = torch.promote_types(hidden_s.dtype, torch.float32)
    rows = hidden_s.shape[0] if mask is None else torch.library.get_ctx().new_dynamic_size()
    return hidden_s.new_empty(1, dtype=math), hidden_s.new_empty(rows, STATISTICS, dtype=torch.float64)


def _fake_backward(grad, hidden_s, weight_s, hidden_t, weight_t, mask, temperature, statistics):
    return hidden_s.new_empty(hidden_s.shape), weight_s.new_empty(weight_s.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.temperature = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, grad, _, backend=None):
    return *_gradients(ctx, backend, grad, *ctx.saved_tensors), None, None, None, None


@once_differentiable
def _gradients(ctx, backend, grad, *saved):
    *tensors, statistics = saved
    operator = _operator("linear_kd_loss_backward", backend or grad.device.type)
    return operator(grad, *tensors, ctx.temperature, statistics)


def _fake_statistics(student, teacher, before, temperature):
    return student.new_empty(student.shape[0], STATISTICS, dtype=torch.float64)


def _fake_gradient(student, teacher, statistics, scale, temperature):
    return student.new_empty(student.shape)


def _register() -> None:
    fakes = {
        "kd_statistics": _fake_statistics,
        "kd_gradient": _fake_gradient,
        "linear_kd_loss": _fake,
        "linear_kd_loss_backward": _fake_backward,
    }
    made = {"linear_kd_loss": _forward, "linear_kd_loss_backward": _backward}  # from the operators on tiles
    for name, fake in fakes.items():
        run = functools.partial(made[name], backend="triton") if name in made else None
        dispatch.define_triton(name, "linconv.ops.distillation_loss.triton", run)
        if name in made:
            torch.library.impl(f"linconv::{name}", ("cpu", "cuda"), made[name])
        for suffix in ("", "_triton"):
            torch.library.register_fake(f"linconv::{name}{suffix}", fake)
    for suffix, backend in (("", None), ("_triton", "triton")):
        differentiate = functools.partial(_differentiate, backend=backend)
        register_autograd(f"linear_kd_loss{suffix}", differentiate, _save)


if dispatch.compiled("kd_statistics"):
    _register()
