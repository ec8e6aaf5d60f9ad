"""linear on CPU against its floor and torch.nn.functional.linear, in one run.

    python benchmarks/bench_linear.py --out benchmarks/results/cpu/linear.json

float32 and bfloat16, without gradients, the products of a layer: 768 to 768, a Linformer's queries; 1,024 to 4,640 and
2,048 to 1,024, a BiMamba2's input and output projections. The floor is the operations over the rate of a 2048 x 2048
torch.mm of the dtype timed in turn with the kernel. What a CPU without AVX512-BF16 would do, in bfloat16, on one that
has it:

    LINCONV_CPU_ISA=v4 ONEDNN_MAX_CPU_ISA=AVX512_CORE python benchmarks/bench_linear.py --out ...
"""

import torch
import torch.nn.functional as F

from linconv.benchmarking import compare
from linconv.benchmarking.machine import matmul_work
from linconv.benchmarking.record import run
from linconv.ops.linear import linear

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((768, 768), (1_024, 4_640), (2_048, 1_024))


def check(dtype):
    """The kernel's error is at most 1.25 times torch's, root mean square; gradients are checked by the tests."""
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((300, 1_024), (768, 1_024), (768,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    ours, theirs = ((f(x, weight, bias).double() - exact).norm() for f in (linear, F.linear))
    if not ours <= 1.25 * theirs:
        raise SystemExit(f"{dtype}: error {ours:.2e} against {theirs:.2e} of torch; no speed is reported")


def body(record, lengths):
    for dtype in DTYPES:
        check(dtype)
        mm, flops = matmul_work(dtype=dtype)
        for d, columns in SHAPES:
            weight, bias = (torch.randn(columns, d) / d**0.5).to(dtype), torch.randn(columns).to(dtype)
            for length in lengths:
                x = torch.randn(length, d).to(dtype)
                works = {
                    "mm": mm,
                    "linear": lambda x=x, w=weight, b=bias: linear(x, w, b),
                    "torch": lambda x=x, w=weight, b=bias: F.linear(x, w, b),
                }
                with torch.no_grad():
                    taken = compare(works, min_repeats=9, min_seconds=0.5)
                seconds = {name: latency.median for name, latency in taken.items()}
                rate = flops / seconds["mm"]
                floor = 2 * length * d * columns / rate
                record.add(
                    dtype=str(dtype)[6:], length=length, d=d, columns=columns, seconds=seconds["linear"],
                    floor_seconds=floor, over_floor=seconds["linear"] / floor, gflops_of_mm=1e-9 * rate,
                    peer="torch.nn.functional.linear", peer_seconds=seconds["torch"],
                    speedup=seconds["torch"] / seconds["linear"],
                )  # fmt: skip


if __name__ == "__main__":
    run("linear", __doc__.splitlines()[0], [1, 64, 499, 2_999, 9_999], body)
