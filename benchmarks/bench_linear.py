"""linear on CPU against its floor and torch.nn.functional.linear, in one run.

    python benchmarks/bench_linear.py --out benchmarks/results/cpu/linear.json

fp32, without gradients, the products of a layer: 768 to 768, a Linformer's queries; 1,024 to 4,640 and 2,048 to 1,024,
a BiMamba2's input and output projections. The floor is the operations over the rate of a 2048 x 2048 fp32 torch.mm
timed in turn with the kernel.
"""

import torch
import torch.nn.functional as F

from linconv.benchmarking import compare
from linconv.benchmarking.machine import matmul_work
from linconv.benchmarking.record import run
from linconv.ops.linear import linear

SHAPES = ((768, 768), (1_024, 4_640), (2_048, 1_024))


def check():
    """The kernel's error is at most 1.25 times torch's, root mean square; gradients are checked by the tests."""
    x, weight, bias = torch.randn(300, 1_024), torch.randn(768, 1_024), torch.randn(768)
    exact = F.linear(x.double(), weight.double(), bias.double())
    ours, theirs = ((f(x, weight, bias).double() - exact).norm() for f in (linear, F.linear))
    if not ours <= 1.25 * theirs:
        raise SystemExit(f"error {ours:.2e} against {theirs:.2e} of torch; no speed is reported")


def body(record, lengths):
    check()
    mm, flops = matmul_work()
    for d, columns in SHAPES:
        weight, bias = torch.randn(columns, d) / d**0.5, torch.randn(columns)
        for length in lengths:
            x = torch.randn(length, d)
            works = {
                "mm": mm,
                "linear": lambda x=x, w=weight, b=bias: linear(x, w, b),
                "torch": lambda x=x, w=weight, b=bias: F.linear(x, w, b),
            }
            with torch.no_grad():
                taken = compare(works, min_repeats=9, min_seconds=0.5)
            seconds = {name: latency.median for name, latency in taken.items()}
            floor = 2 * length * d * columns * seconds["mm"] / flops
            record.add(
                length=length, d=d, columns=columns, seconds=seconds["linear"], floor_seconds=floor,
                over_floor=seconds["linear"] / floor, gflops_of_mm=1e-9 * flops / seconds["mm"],
                peer="torch.nn.functional.linear", peer_seconds=seconds["torch"],
                speedup=seconds["torch"] / seconds["linear"],
            )  # fmt: skip


if __name__ == "__main__":
    run("linear", __doc__.splitlines()[0], [1, 64, 499, 2_999, 9_999], body)
