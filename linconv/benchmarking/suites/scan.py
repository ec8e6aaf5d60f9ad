"""The bidirectional state space scan against exact attention between as many heads, and against other scans."""

import functools
import itertools

import torch

from linconv import ops
from linconv.benchmarking.suite import Case, Cost, Implementation, Setting, judge
from linconv.benchmarking.suites import peers
from linconv.benchmarking.suites.backends import by_backend
from linconv.ops.bidirectional_ssd import reference
from linconv.ops.ssd.reference import recurrence

HEADS, HEADDIM, DSTATE, CHUNK = 16, 64, 128, 64
PER_DIRECTION = {
    "separate": {"x", "dt", "A", "B", "C", "D"},
    "hydra": {"dt", "B", "C"},
    "quasiseparable": {"dt", "A"},
    "tied": set(),
}
REGIMES = ("separate", "hydra")  # those that the suite measures


def inputs(setting, length, regime):
    """x, dt, A, B, C, D; those that are per direction in the regime have a leading axis of 2."""

    def tensor(name, *shape, **spread):
        return setting.tensor(*((2, *shape) if name in PER_DIRECTION[regime] else shape), **spread)

    batch, fp32 = setting.batch, torch.float32
    A = -tensor("A", HEADS, dtype=fp32).detach().abs() - 1
    return [
        tensor("x", batch, length, HEADS, HEADDIM), tensor("dt", batch, length, HEADS, shift=-3),
        A.requires_grad_(setting.work != "forward"), tensor("B", batch, length, 1, DSTATE),
        tensor("C", batch, length, 1, DSTATE), tensor("D", HEADS, dtype=fp32),
    ]  # fmt: skip


def scan(x, dt, A, B, C, D, backend=None, seq_lens=None):
    return ops.bidirectional_ssd(x, dt, A, B, C, D=D, dt_softplus=True, backend=backend, seq_lens=seq_lens)


def exact(x, dt, A, B, C, D):
    return reference.bidirectional_ssd(x, dt, A, B, C, D, dt_softplus=True, scan=recurrence)


def two_passes(x, dt, A, B, C, D):
    """The usual pattern: a causal scan, and another over flipped inputs, flipped back."""
    forward, backward = ([t[direction] for t in (x, dt, A, B, C)] for direction in (0, 1))
    flipped = [t.flip(1) if t.dim() > 1 else t for t in backward]
    return torch.stack([
        ops.ssd(*forward, D=D[0], dt_softplus=True), ops.ssd(*flipped, D=D[1], dt_softplus=True).flip(1),
    ])  # fmt: skip


def mamba_ssm_two_passes(x, dt, A, B, C, D):
    causal = peers.need("mamba_ssm.ops.triton.ssd_combined", x.device.type).mamba_chunk_scan_combined

    def one(direction, flip):
        args = [t[direction].flip(1) if flip and t.dim() > 3 else t[direction] for t in (x, dt, A, B, C)]
        y = causal(*args, chunk_size=256, D=D[direction], dt_softplus=True)
        return y.flip(1) if flip else y

    return torch.stack([one(0, False), one(1, True)])


def fla_two_passes(x, dt, A, B, C, D):
    """flash-linear-attention's gated linear recurrence with one decay per head and frame, once per direction."""
    gated = peers.need("fla.ops.simple_gla", x.device.type).chunk_simple_gla

    def one(direction, flip):
        xs, dts, Bs, Cs = (t[direction].flip(1) if flip else t[direction] for t in (x, dt, B, C))
        step = torch.nn.functional.softplus(dts.float())
        q, k = (t.expand(-1, -1, HEADS, -1) for t in (Cs, Bs))
        y = gated(q, k, xs * step[..., None].to(xs.dtype), g=step * A[direction], scale=1.0)[0]
        y = y + D[direction][:, None].to(y.dtype) * xs
        return y.flip(1) if flip else y

    return torch.stack([one(0, False), one(1, True)])


def run(setting, length, function, regime):
    tensors = inputs(setting, length, regime)
    return functools.partial(function, *tensors), tensors


def check(function, regime, setting):
    tensors = inputs(setting, 70, regime)  # more than one chunk
    judge(function, functools.partial(scan, backend="reference"), exact, tensors)


def cost(regime, setting, length):
    """See docs/kernels/bidirectional_ssd.md: multiply-adds of the chunk form, every input read and result written."""
    state, within, scores = HEADS * DSTATE * HEADDIM, CHUNK * HEADS * HEADDIM, CHUNK * DSTATE
    per_frame = 2 * (4 * state + within + scores)
    x = HEADS * HEADDIM * (2 if regime == "separate" else 1)
    other = 2 * (2 * DSTATE + HEADS)  # B, C, dt per direction
    values = x + other + x  # and y
    if setting.work != "forward":
        per_frame += 2 * (10 * state + 2 * within + 3 * scores)
        values += x + other + x + x + other  # inputs once more, dy, and a gradient of each input
    size = torch.finfo(setting.torch_dtype).bits // 8
    frames = setting.batch * length
    return Cost(flops=per_frame * frames, bytes=size * values * frames, dtype=setting.arithmetic)


def _implementations(device):
    ours = [
        (f"{name}, {regime}", function, regime) for regime in REGIMES for name, function in by_backend(scan, device)
    ]
    others = [
        ("two causal passes of linconv with flips", two_passes),
        ("chunk formula in plain torch", functools.partial(scan, backend="reference")),
        ("two passes of mamba-ssm with flips", mamba_ssm_two_passes),
        ("two passes of flash-linear-attention with flips", fla_two_passes),
    ]
    for name, function, regime in ours:
        yield Implementation(
            name, run, (function, regime), ours=True, check=functools.partial(check, function, regime),
            cost=functools.partial(cost, regime),
        )  # fmt: skip
    for name, function in others:
        # The checks compare with plain torch.
        checked = None if "plain" in name else functools.partial(check, function, "separate")
        yield Implementation(name, run, (function, "separate"), check=checked)
    yield from peers.attention_implementations(device, HEADS, HEADDIM)


def cases(device):
    for work, dtype in itertools.product(("forward", "training"), ("float32", "bfloat16")):
        yield Case(
            "scan of 16 heads of 64, state 128", Setting(work, dtype, device=device),
            tuple(_implementations(device)), baseline="attention (SDPA, flash)",
            facts={"heads": HEADS, "headdim": HEADDIM, "dstate": DSTATE},
        )  # fmt: skip
