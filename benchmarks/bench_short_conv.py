"""bidirectional_short_conv on CPU against its floor in bytes and against plain torch, in one run.

    python benchmarks/bench_short_conv.py --out benchmarks/results/cpu/short_conv.json

Shape: batch 1, x shared by both directions, width 4, bias, SiLU. How it is timed: see benchmarks/streamed.py.
"""

import itertools

import torch
from streamed import DTYPES, add, check, rotation, trained

from linconv import ops
from linconv.benchmarking.record import run
from linconv.benchmarking.suites.conv import WIDTH, in_torch

TENSORS = {"forward": 3, "backward": 4}  # of the size of x that a pass reads or writes


def plain(x, weight, bias):
    return in_torch(x.expand(2, *x.shape), weight, bias)


def one(record, length, channels, dtype):
    weight, bias = torch.randn(2, channels, WIDTH), torch.randn(2, channels)

    def frames(*lead):
        return torch.randn(*lead, 1, length, channels).to(dtype)

    x, target, dy = rotation(frames), rotation(frames), rotation(lambda: frames(2))
    backward = torch.ops.linconv.short_conv_backward
    works = {
        "copy": lambda: target().copy_(x()),
        "forward": lambda: ops.bidirectional_short_conv(x(), weight, bias),
        "backward": lambda: backward(dy(), x()[None], weight, bias, True, False, 0, None, None),
    }
    peers = {
        "forward": lambda: plain(x(), weight, bias),
        "training": lambda: trained(plain, (x(), weight, bias), dy()),
    }
    add(record, dict(length=length, channels=channels, dtype=str(dtype)[6:]), works, peers, TENSORS, x().nbytes)


def body(record, lengths):
    for dtype in DTYPES:
        x, weight, bias = torch.randn(1, 300, 64).to(dtype), torch.randn(2, 64, WIDTH), torch.randn(2, 64)
        check(ops.bidirectional_short_conv, plain, x, weight, bias)
    for length, channels, dtype in itertools.product(lengths, (1024, 2560), DTYPES):
        one(record, length, channels, dtype)


if __name__ == "__main__":
    run("short_conv", __doc__.splitlines()[0], [1_499, 29_999], body)
