"""Linformer attention on CPU against its floor, the eager formula and exact attention, in one run.

    python benchmarks/bench_linformer.py --out benchmarks/results/cpu/linformer.json

Batch 1, 12 heads of 64, r = 256, fp32. The floor is the operations over the rate of a 2048 x 2048 fp32 torch.mm timed
in turn with the kernel: forward 8 L r d, backward 18 L r d (docs/kernels/linformer.md). The self-attention rows include
the projections of queries, keys and values of width 768, ours with the rewrite if it costs less.
"""

import math

import torch
import torch.nn.functional as F

from linconv import ops
from linconv.benchmarking import compare
from linconv.benchmarking.machine import matmul_work
from linconv.benchmarking.record import run
from linconv.benchmarking.suites.linformer import HEADDIM, HEADS, RANK, in_torch

WIDTH = HEADS * HEADDIM
EXACT_UP_TO = 4_096


def eager_self_attention(x, parameters, proj_k, proj_v):
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (HEADS, HEADDIM)).transpose(1, 2)
        for w, b in zip(parameters[::2], parameters[1::2])
    )
    return in_torch(q, k, v, proj_k, proj_v).transpose(1, 2).flatten(-2)


def check():
    """The kernels' error, root mean square, is at most 1.25 times eager's; gradients are checked by the tests."""
    q, k, v = torch.randn(3, 1, HEADS, 300, HEADDIM).unbind(0)
    proj = torch.randn(2, 300, RANK).unbind(0)
    exact = in_torch(*(t.double() for t in (q, k, v, *proj)))
    ours, theirs = ((f(q, k, v, *proj).double() - exact).norm() for f in (ops.linformer_attention, in_torch))
    if not ours <= 1.25 * theirs:
        raise SystemExit(f"error {ours:.2e} against {theirs:.2e} of the eager formula; no speed is reported")


def body(record, lengths):
    check()
    mm, flops = matmul_work()
    for length in lengths:
        q, k, v = (torch.randn(1, length, HEADS, HEADDIM).transpose(1, 2) for _ in range(3))
        proj = [torch.randn(length, RANK) for _ in range(2)]
        x, parameters = torch.randn(1, length, WIDTH), []
        for _ in range(3):
            parameters += [torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH), torch.randn(WIDTH)]
        upstream = torch.randn(1, length, HEADS, HEADDIM).transpose(1, 2)

        def training(function, tensors, upstream=upstream):
            leaves = [t.detach().requires_grad_() for t in tensors]
            torch.autograd.grad(function(*leaves), leaves, upstream)

        tensors = (q, k, v, *proj)
        works = {
            "mm": mm,
            "forward": lambda t=tensors: ops.linformer_attention(*t),
            "eager forward": lambda t=tensors: in_torch(*t),
            "training": lambda t=tensors, f=training: f(ops.linformer_attention, t),
            "eager training": lambda t=tensors, f=training: f(in_torch, t),
        }
        for name, second in (("", proj[1]), (" with one projection", None)):
            works[f"self-attention{name}"] = lambda x=x, p=parameters, e=proj[0], f=second: (
                ops.linformer_self_attention(x, *p, e, f, num_heads=HEADS)
            )
            works[f"eager self-attention{name}"] = lambda x=x, p=parameters, e=proj[0], f=second: eager_self_attention(
                x, p, e, e if f is None else f
            )
        if length <= EXACT_UP_TO:
            works["exact"] = lambda t=tensors: F.scaled_dot_product_attention(*t[:3])
        with torch.set_grad_enabled(False):
            plain = {name: work for name, work in works.items() if "training" not in name}
            taken = compare(plain, min_repeats=9, min_seconds=0.5)
        taken |= compare({n: w for n, w in works.items() if "training" in n}, min_repeats=5, min_seconds=0.5)
        seconds = {name: latency.median for name, latency in taken.items()}
        operation = seconds["mm"] / flops
        for part, count in (("forward", 8), ("training", 26)):
            floor = count * length * RANK * WIDTH * operation
            record.add(
                length=length, part=part, seconds=seconds[part], floor_seconds=floor, over_floor=seconds[part] / floor,
                gflops_of_mm=1e-9 / operation, peer="eager formula", peer_seconds=seconds[f"eager {part}"],
                speedup=seconds[f"eager {part}"] / seconds[part],
            )  # fmt: skip
        if "exact" in seconds:
            record.add(
                length=length, part="forward", seconds=seconds["forward"], peer="exact attention (SDPA)",
                peer_seconds=seconds["exact"], speedup=seconds["exact"] / seconds["forward"],
            )  # fmt: skip
        for name in ("self-attention", "self-attention with one projection"):
            record.add(
                length=length, part=name, seconds=seconds[name], peer="eager formula",
                peer_seconds=seconds[f"eager {name}"], speedup=seconds[f"eager {name}"] / seconds[name],
            )  # fmt: skip


if __name__ == "__main__":
    run("linformer", __doc__.splitlines()[0], [512, 768, 1_024, 4_096, 16_384], body)
