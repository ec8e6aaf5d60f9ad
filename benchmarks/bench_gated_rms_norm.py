"""gated_rms_norm on CPU against its floor in bytes and against plain torch, in one run.

    python benchmarks/bench_gated_rms_norm.py --out benchmarks/results/cpu/gated_rms_norm.json

Shape: batch 1, x, z and weight per direction, one group. The floor is bytes (inputs read once, results written once)
over the rate at which torch copies x to another tensor, timed in turn with the kernel. Inputs are taken in rotation
from a pool larger than the last-level cache, for the kernel and for the copy: as in a model, they come from memory.
Results are new tensors at every call: see docs/kernels/short_conv.md for what their pages cost.
"""

import itertools

import torch
import torch.nn.functional as F
from bench_short_conv import rotation

from linconv import ops
from linconv.benchmarking import compare
from linconv.benchmarking.record import run


def plain(x, z, weight):
    """torch's own operators in the input's precision."""
    y = x * F.silu(z)
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * weight.to(x.dtype)[:, None, None]


def check(dtype):
    """The kernel's error is at most twice plain torch's; gradients are checked by the tests."""
    x, z, weight = torch.randn(2, 1, 50, 512).to(dtype), torch.randn(2, 1, 50, 512).to(dtype), torch.randn(2, 512)
    exact = plain(x.double(), z.double(), weight.double())
    ours, theirs = (f(x, z, weight) for f in (ops.gated_rms_norm, plain))
    ours, theirs = ((y.double() - exact).abs().max().item() for y in (ours, theirs))
    if not ours <= 2 * theirs:
        raise SystemExit(f"{dtype}: error {ours:.2e} against {theirs:.2e} of plain torch; no speed is reported")


TENSORS = {"forward": 3, "backward": 5}  # of the size of x that a pass reads or writes


def times(length, d, dtype):
    """Seconds of the kernel, the copy and plain torch, and the bytes of x."""
    weight = torch.randn(2, d)

    def rows():
        return torch.randn(2, 1, length, d).to(dtype)

    x, z, dy = rotation(rows), rotation(rows), rotation(rows)
    backward = torch.ops.linconv.gated_rms_norm_backward

    def plain_training():
        leaves = [t.detach().requires_grad_() for t in (x(), z(), weight)]
        torch.autograd.grad(plain(*leaves), leaves, dy())

    works = {
        "copy": lambda: z().copy_(x()),
        "forward": lambda: ops.gated_rms_norm(x(), z(), weight),
        "backward": lambda: backward(dy(), x(), z(), weight, 1e-5, d, None),
    }
    taken = compare(works, min_repeats=9, min_seconds=0.3)
    peers = {"plain forward": lambda: plain(x(), z(), weight), "plain training": plain_training}
    taken |= compare(peers, min_repeats=3, min_seconds=0.1)
    return {name: latency.median for name, latency in taken.items()}, x().nbytes


def body(record, lengths):
    for dtype in (torch.float32, torch.bfloat16):
        check(dtype)
    for length, d, dtype in itertools.product(lengths, (1024, 2560), (torch.float32, torch.bfloat16)):
        seconds, size = times(length, d, dtype)
        common = dict(length=length, d=d, dtype=str(dtype)[6:])
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
    run("gated_rms_norm", __doc__.splitlines()[0], [1_499, 29_999], body)
