"""bidirectional_short_conv on CPU against its floor in bytes and against plain torch, in one run.

    python benchmarks/bench_short_conv.py --out benchmarks/results/cpu/short_conv.json

Shape: batch 1, x shared by both directions, width 4, bias, SiLU. The floor is bytes (inputs read once, results written
once) over the rate at which torch copies x to another tensor, timed in turn with the kernel. Inputs are taken in
rotation from a pool larger than the last-level cache, for the kernel and for the copy: as in a model, they come from
memory. Results are new tensors at every call: see docs/kernels/short_conv.md for what their pages cost.
"""

import itertools

import torch
import torch.nn.functional as F

from linconv import ops
from linconv.benchmarking import compare
from linconv.benchmarking.record import run

WIDTH = 4
POOL_BYTES = 96 << 20


def rotation(make):
    """A function that gives one of several tensors (or tuples of them), none of which was used a short while ago."""
    first = make()
    size = sum(t.nbytes for t in first) if isinstance(first, tuple) else first.nbytes
    pool = itertools.cycle([first, *(make() for _ in range(POOL_BYTES // size))])
    return lambda: next(pool)


def plain(x, weight, bias):
    """Both directions with torch's own operators, the anti-causal one between two flips."""

    def causal(x, weight, bias):
        padded = F.pad(x.mT, (WIDTH - 1, 0))
        return F.silu(F.conv1d(padded, weight[:, None].to(x.dtype), bias.to(x.dtype), groups=x.shape[2])).mT

    return torch.stack([causal(x, weight[0], bias[0]), causal(x.flip(1), weight[1], bias[1]).flip(1)])


def check(dtype):
    """The kernel's error is at most twice plain torch's; gradients are checked by the tests."""
    x, weight, bias = torch.randn(1, 300, 64).to(dtype), torch.randn(2, 64, WIDTH), torch.randn(2, 64)
    exact = plain(x.double(), weight.double(), bias.double())
    ours, theirs = (f(x, weight, bias) for f in (ops.bidirectional_short_conv, plain))
    ours, theirs = ((y.double() - exact).abs().max().item() for y in (ours, theirs))
    if not ours <= 2 * theirs:
        raise SystemExit(f"{dtype}: error {ours:.2e} against {theirs:.2e} of plain torch; no speed is reported")


TENSORS = {"forward": 3, "backward": 4}  # of the size of x that a pass reads or writes


def times(length, channels, dtype):
    """Seconds of the kernel, the copy and plain torch, and the bytes of x."""
    weight, bias = torch.randn(2, channels, WIDTH), torch.randn(2, channels)

    def frames(*lead):
        return torch.randn(*lead, 1, length, channels).to(dtype)

    x, target, dy = rotation(frames), rotation(frames), rotation(lambda: frames(2))
    backward = torch.ops.linconv.short_conv_backward

    def plain_training():
        leaves = [t.detach().requires_grad_() for t in (x(), weight, bias)]
        torch.autograd.grad(plain(*leaves), leaves, dy())

    works = {
        "copy": lambda: target().copy_(x()),
        "forward": lambda: ops.bidirectional_short_conv(x(), weight, bias),
        "backward": lambda: backward(dy(), x()[None], weight, bias, True, False, 0, None, None),
    }
    taken = compare(works, min_repeats=9, min_seconds=0.3)
    peers = {"plain forward": lambda: plain(x(), weight, bias), "plain training": plain_training}
    taken |= compare(peers, min_repeats=3, min_seconds=0.1)
    return {name: latency.median for name, latency in taken.items()}, x().nbytes


def body(record, lengths):
    for dtype in (torch.float32, torch.bfloat16):
        check(dtype)
    for length, channels, dtype in itertools.product(lengths, (1024, 2560), (torch.float32, torch.bfloat16)):
        seconds, size = times(length, channels, dtype)
        common = dict(length=length, channels=channels, dtype=str(dtype)[6:])
        for part, tensors in TENSORS.items():
            floor = tensors / 2 * seconds["copy"]  # a copy reads one and writes one
            record.add(
                **common,
                part=part,
                seconds=seconds[part],
                floor_seconds=floor,
                over_floor=seconds[part] / floor,
                copy_gigabytes_per_second=2 * size / seconds["copy"] / 1e9,
            )
        both = seconds["forward"] + seconds["backward"]
        for part, ours in (("forward", seconds["forward"]), ("training", both)):
            peer = seconds[f"plain {part}"]
            record.add(**common, peer=f"plain torch, {part}", peer_seconds=peer, seconds=ours, speedup=peer / ours)


if __name__ == "__main__":
    run("short_conv", __doc__.splitlines()[0], [1_499, 29_999], body)
