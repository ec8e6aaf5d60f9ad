"""linear on CPU against its floor and torch's products, in one run.

    python benchmarks/bench_linear.py --out benchmarks/results/cpu/linear.json

float32 and bfloat16, the products of a layer: 768 to 768, a Linformer's queries; 1,024 to 4,640 and 2,048 to 1,024, a
BiMamba2's input and output projections; and the gradients of their weights, which are summed over the rows. The floor
is the operations over the rate of a 2048 x 2048 torch.mm of the dtype timed in turn with the kernel. What a CPU without
AVX512-BF16 would do, in bfloat16, on one that has it:

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


def of_weight(upstream, x):
    """The gradient of the weight, by the operator that the backward pass calls."""
    return torch.ops.linconv.linear(upstream.mT, x.mT, None, None)


def of_weight_by_torch(upstream, x):
    return upstream.mT @ x


def check(dtype):
    """The kernel's error is at most 1.25 times torch's, root mean square; in the gradient of the weight twice."""
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((3_000, 1_024), (768, 1_024), (768,)))
    upstream = torch.randn(3_000, 768).to(dtype)
    for factor, functions, inputs in (
        (1.25, (linear, F.linear), (x, weight, bias)),
        (2, (of_weight, of_weight_by_torch), (upstream, x)),
    ):
        exact = functions[1](*(t.double() for t in inputs))
        ours, theirs = ((f(*inputs).double() - exact).norm() for f in functions)
        if not ours <= factor * theirs:
            raise SystemExit(f"{dtype}: error {ours:.2e} against {theirs:.2e} of torch; no speed is reported")


def body(record, lengths):
    for dtype in DTYPES:
        check(dtype)
        mm, flops = matmul_work(dtype=dtype)
        for d, columns in SHAPES:
            weight, bias = (torch.randn(columns, d) / d**0.5).to(dtype), torch.randn(columns).to(dtype)
            for length in lengths:
                x, upstream = torch.randn(length, d).to(dtype), torch.randn(length, columns).to(dtype)
                works = {
                    "mm": mm,
                    "linear": lambda x=x, w=weight, b=bias: linear(x, w, b),
                    "torch.nn.functional.linear": lambda x=x, w=weight, b=bias: F.linear(x, w, b),
                    "gradient of weight": lambda x=x, dy=upstream: of_weight(dy, x),
                    "torch's product": lambda x=x, dy=upstream: of_weight_by_torch(dy, x),
                }
                with torch.no_grad():
                    taken = compare(works, min_repeats=9, min_seconds=0.5)
                seconds = {name: latency.median for name, latency in taken.items()}
                rate = flops / seconds["mm"]
                floor = 2 * length * d * columns / rate
                for ours, peer in (("linear", "torch.nn.functional.linear"), ("gradient of weight", "torch's product")):
                    record.add(
                        op=ours, dtype=str(dtype)[6:], length=length, d=d, columns=columns, seconds=seconds[ours],
                        floor_seconds=floor, over_floor=seconds[ours] / floor, gflops_of_mm=1e-9 * rate, peer=peer,
                        peer_seconds=seconds[peer], speedup=seconds[peer] / seconds[ours],
                    )  # fmt: skip


if __name__ == "__main__":
    run("linear", __doc__.splitlines()[0], [1, 64, 499, 2_999, 9_999], body)
