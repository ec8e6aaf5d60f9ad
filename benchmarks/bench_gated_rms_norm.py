"""gated_rms_norm on CPU against its floor in bytes and against plain torch, in one run.

    python benchmarks/bench_gated_rms_norm.py --out benchmarks/results/cpu/gated_rms_norm.json

Shape: batch 1, x, z and weight per direction, one group. How it is timed: see benchmarks/streamed.py.
"""

import itertools

import torch
import torch.nn.functional as F
from streamed import DTYPES, add, check, rotation, trained

from linconv import ops
from linconv.benchmarking.record import run

TENSORS = {"forward": 3, "backward": 5}  # of the size of x that a pass reads or writes


def plain(x, z, weight):
    """torch's own operators in the input's precision."""
    y = x * F.silu(z)
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * weight.to(x.dtype)[:, None, None]


def one(record, length, d, dtype):
    weight = torch.randn(2, d)
    x, z, dy = (rotation(lambda: torch.randn(2, 1, length, d).to(dtype)) for _ in range(3))
    backward = torch.ops.linconv.gated_rms_norm_backward
    works = {
        "copy": lambda: z().copy_(x()),
        "forward": lambda: ops.gated_rms_norm(x(), z(), weight),
        "backward": lambda: backward(dy(), x(), z(), weight, 1e-5, d, None),
    }
    peers = {
        "forward": lambda: plain(x(), z(), weight),
        "training": lambda: trained(plain, (x(), z(), weight), dy()),
    }
    add(record, dict(length=length, d=d, dtype=str(dtype)[6:]), works, peers, TENSORS, x().nbytes)


def body(record, lengths):
    for dtype in DTYPES:
        check(ops.gated_rms_norm, plain, *torch.randn(2, 2, 1, 50, 512).to(dtype), torch.randn(2, 512))
    for length, d, dtype in itertools.product(lengths, (1024, 2560), DTYPES):
        one(record, length, d, dtype)


if __name__ == "__main__":
    run("gated_rms_norm", __doc__.splitlines()[0], [1_499, 29_999], body)
