"""bidirectional_ssd on CPU against its floor, exact attention and the chunk formula in plain torch, in one run.

    python benchmarks/bench_bidirectional_ssd.py --out benchmarks/results/cpu/bidirectional_ssd.json

Shape: batch 1, 16 heads of 64, dstate 128, 1 group. The floor is the operations over the rate of a 2048 x 2048 fp32
torch.mm timed in turn with the kernel. Forward operations a frame are 2 (4 H N P + Q H P + Q G N) with Q = 64, backward
2 (10 H N P + 2 Q H P + 3 Q G N): see docs/kernels/bidirectional_ssd.md.
"""

import functools

import torch
import torch.nn.functional as F

from linconv import ops
from linconv.benchmarking import compare, peak_extra_bytes
from linconv.benchmarking.machine import matmul_work
from linconv.benchmarking.record import run
from linconv.ops.bidirectional_ssd import reference
from linconv.ops.ssd.reference import recurrence

HEADS, HEADDIM, DSTATE, GROUPS, CHUNK = 16, 64, 128, 1, 64
FORWARD_FLOPS = 2 * (4 * HEADS * DSTATE * HEADDIM + CHUNK * HEADS * HEADDIM + CHUNK * GROUPS * DSTATE)
BACKWARD_FLOPS = 2 * (10 * HEADS * DSTATE * HEADDIM + 2 * CHUNK * HEADS * HEADDIM + 3 * CHUNK * GROUPS * DSTATE)
REGIMES = {
    "separate": {"x", "dt", "A", "B", "C", "D"},
    "hydra": {"dt", "B", "C"},
    "quasiseparable": {"dt", "A"},
    "tied": set(),
}
ATTENTION_UP_TO = 16_384  # exact attention takes minutes behind it
PLAIN_TORCH_UP_TO = 4_096


def arguments(regime, length, dtype=torch.float32):
    def tensor(name, *shape):
        return torch.randn(*((2, *shape) if name in REGIMES[regime] else shape))

    x, B, C = tensor("x", 1, length, HEADS, HEADDIM), *(tensor(n, 1, length, GROUPS, DSTATE) for n in "BC")
    dt, A, D = tensor("dt", 1, length, HEADS) - 3, -tensor("A", HEADS).abs() - 1, tensor("D", HEADS)
    return tuple(t.to(dtype) if t.dim() > 2 else t for t in (x, dt, A, B, C)), {"D": D, "dt_softplus": True}


def scan(tensors, options):
    return ops.bidirectional_ssd(*tensors, **options, backend="cpu")


def check(regime, dtype):
    """The kernel's error is at most twice plain torch's, judged by the recurrence in float64."""
    tensors, options = arguments(regime, 200, dtype)
    double, double_options = [t.double() for t in tensors], {**options, "D": options["D"].double()}
    exact = reference.bidirectional_ssd(*double, double_options.pop("D"), **double_options, scan=recurrence)
    plain = ops.bidirectional_ssd(*tensors, **options, backend="reference")
    ours, theirs = ((y.double() - exact).abs().max().item() for y in (scan(tensors, options), plain))
    if not ours <= 2 * theirs:
        raise SystemExit(
            f"{regime}, {dtype}: error {ours:.2e} against {theirs:.2e} of plain torch; no speed is reported"
        )


def forward_work(length):
    tensors, options = arguments("separate", length)
    return lambda: scan(tensors, options)


def rounds(length):
    return {"min_repeats": 15, "min_seconds": 1.0} if length < 5000 else {"min_repeats": 5, "min_seconds": 0.0}


def body(record, lengths):
    for regime in REGIMES:
        for dtype in (torch.float32, torch.bfloat16):
            check(regime, dtype)
    matmul, matmul_flops = matmul_work()
    for length in lengths:
        kept = {}
        works = {"mm": matmul}
        for dtype in (torch.float32, torch.bfloat16):
            for regime in REGIMES:
                tensors, options = arguments(regime, length, dtype)
                works[regime, dtype, "forward"] = lambda t=tensors, o=options: scan(t, o)
        timed = compare(works, **rounds(length))
        backward = {"mm": matmul}
        for (regime, dtype, _), _ in ((k, v) for k, v in works.items() if k != "mm"):
            if dtype is torch.float32 or regime == "separate":
                tensors, options = arguments(regime, length, dtype)
                leaves = [t.requires_grad_() for t in tensors]
                y = scan(leaves, options)
                backward[regime, dtype, "backward"] = functools.partial(
                    torch.autograd.grad, y, leaves, torch.randn_like(y), retain_graph=True
                )
        timed_backward = compare(backward, **rounds(length))
        for taken, flops in ((timed, FORWARD_FLOPS), (timed_backward, BACKWARD_FLOPS)):
            floor = flops * length / (matmul_flops / taken["mm"].median)
            for key, latency in taken.items():
                if key == "mm":
                    continue
                kept[key] = latency.median
                record.add(
                    length=length, regime=key[0], dtype=str(key[1])[6:], part=key[2], seconds=latency.median,
                    fastest_seconds=latency.fastest, floor_seconds=floor, over_floor=latency.median / floor,
                )  # fmt: skip
        del backward, works
        ours = kept["separate", torch.float32, "forward"]
        peers = {}
        if length <= ATTENTION_UP_TO:
            q, k, v = (torch.randn(1, HEADS, length, HEADDIM) for _ in range(3))
            peers["scaled_dot_product_attention"] = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)
        if length <= PLAIN_TORCH_UP_TO:
            tensors, options = arguments("separate", length)
            peers["chunk formula in plain torch"] = lambda t=tensors, o=options: ops.bidirectional_ssd(
                *t, **o, backend="reference"
            )
        tensors, options = arguments("separate", length)
        if peers:
            many = {"min_repeats": 5} if length < 5000 else {"min_repeats": 1, "min_seconds": 0.0, "warmup": 0}
            with torch.no_grad():
                taken = compare({"ours": functools.partial(scan, tensors, options), **peers}, **many)
            for name in peers:
                record.add(
                    length=length, peer=name, peer_seconds=taken[name].median, seconds=taken["ours"].median,
                    speedup=taken[name].median / taken["ours"].median,
                )  # fmt: skip
        record.add(
            length=length,
            seconds_per_frame=ours / length,
            extra_bytes_per_frame=peak_extra_bytes(_memory, length) / length,
        )


def _memory(length):
    return forward_work(length)


if __name__ == "__main__":
    run("bidirectional_ssd", __doc__.splitlines()[0], [1_024, 1_499, 4_096, 16_384, 29_999, 65_536], body)
