"""bidirectional_ssd on CPU against its floor, exact attention and the chunk formula in plain torch, in one run.

    python benchmarks/bench_bidirectional_ssd.py --out benchmarks/results/cpu/bidirectional_ssd.json

Shape: batch 1, 16 heads of 64, dstate 128, 1 group. The floor is the operations over the rate of a 2048 x 2048 fp32
torch.mm timed in turn with the kernel. Forward operations a frame are 2 (4 H N P + Q H P + Q G N) with Q = 64, backward
2 (10 H N P + 2 Q H P + 3 Q G N): see docs/kernels/bidirectional_ssd.md.
"""

import functools
import itertools

import torch

from linconv.benchmarking import compare, peak_extra_bytes
from linconv.benchmarking.machine import matmul_work
from linconv.benchmarking.record import run
from linconv.benchmarking.suite import Setting
from linconv.benchmarking.suites import peers, scan
from linconv.benchmarking.suites.scan import CHUNK, DSTATE, HEADDIM, HEADS

GROUPS = 1
FORWARD_FLOPS = 2 * (4 * HEADS * DSTATE * HEADDIM + CHUNK * HEADS * HEADDIM + CHUNK * GROUPS * DSTATE)
BACKWARD_FLOPS = 2 * (10 * HEADS * DSTATE * HEADDIM + 2 * CHUNK * HEADS * HEADDIM + 3 * CHUNK * GROUPS * DSTATE)
DTYPES = ("float32", "bfloat16")


def forward(regime, length, dtype="float32", function=scan.scan):
    """The scan as a callable."""
    return scan.run(Setting(dtype=dtype), length, function, regime)[0]


def backward(regime, length, dtype):
    """The gradients of every argument but D, as a callable; forward has been run."""
    work, leaves = scan.run(Setting("training", dtype), length, scan.scan, regime)
    y = work()
    return functools.partial(torch.autograd.grad, y, leaves[:-1], torch.randn_like(y), retain_graph=True)


def attention(length):
    return peers.attention(Setting(), length, HEADS, HEADDIM, "any")[0]


def plain_torch(length):
    return forward("separate", length, function=functools.partial(scan.scan, backend="reference"))


PARTS = {"forward": (forward, FORWARD_FLOPS), "backward": (backward, BACKWARD_FLOPS)}
PEERS = {  # name: (peer, longest length timed: beyond it, minutes)
    "scaled_dot_product_attention": (attention, 16_384),
    "chunk formula in plain torch": (plain_torch, 4_096),
}


def over_floor(record, part, length):
    """Time a pass in every regime, fp32 and bf16, against its floor. Returns seconds by (regime, dtype)."""
    make, flops = PARTS[part]
    matmul, matmul_flops = matmul_work()
    keys = list(itertools.product(scan.PER_DIRECTION, DTYPES))
    works = {"mm": matmul, **{key: make(key[0], length, key[1]) for key in keys}}
    limits = {"min_repeats": 15, "min_seconds": 1.0} if length < 5000 else {"min_repeats": 5, "min_seconds": 0.0}
    taken = compare(works, **limits)
    floor = flops * length / (matmul_flops / taken["mm"].median)
    for regime, dtype in keys:
        latency = taken[regime, dtype]
        record.add(
            length=length, regime=regime, dtype=dtype, part=part, seconds=latency.median,
            fastest_seconds=latency.fastest, floor_seconds=floor, over_floor=latency.median / floor,
            to_separate_float32=latency.median / taken["separate", "float32"].median,
        )  # fmt: skip
    return {key: taken[key].median for key in keys}


@torch.no_grad()
def against_peers(record, length):
    for name, (make, up_to) in PEERS.items():
        if length > up_to:
            continue
        limits = {"min_repeats": 5} if length < 5000 else {"min_repeats": 3, "min_seconds": 0.0, "warmup": 1}
        taken = compare({"ours": forward("separate", length), name: make(length)}, **limits)
        record.add(
            length=length, peer=name, peer_seconds=taken[name].median, seconds=taken["ours"].median,
            speedup=taken[name].median / taken["ours"].median,
        )  # fmt: skip


def growth(record, lengths):
    """Time and memory per frame of the separate regime, at every length: constant if the cost is linear."""
    taken = compare({length: forward("separate", length) for length in lengths}, min_repeats=9, min_seconds=0.0)
    extra = {length: peak_extra_bytes(forward, "separate", length) for length in lengths}
    first = min(lengths)
    for length in lengths:
        per_frame = taken[length].median / length
        record.add(
            length=length, part="growth", seconds_per_frame=per_frame,
            to_shortest=per_frame * first / taken[first].median, extra_bytes_per_frame=extra[length] / length,
            extra_bytes_per_frame_beyond_shortest=(extra[length] - extra[first]) / max(length - first, 1),
        )  # fmt: skip


def body(record, lengths):
    for regime, dtype in itertools.product(scan.PER_DIRECTION, DTYPES):
        scan.check(scan.scan, regime, Setting(dtype=dtype))
    for length in lengths:
        for part in PARTS:
            over_floor(record, part, length)
        against_peers(record, length)
    growth(record, lengths)


if __name__ == "__main__":
    run("bidirectional_ssd", __doc__.splitlines()[0], [1_024, 1_499, 4_096, 16_384, 29_999, 65_536], body)
