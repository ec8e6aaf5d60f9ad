"""What the benchmarks of operators that are bound by bytes share: inputs from memory, floors by a copy, rows.

The floor is bytes (inputs read once, results written once) over the rate at which torch copies x to another tensor,
timed in turn with the kernel. Inputs are taken in rotation from a pool larger than the last-level cache, for the kernel
and for the copy: as in a model, they come from memory. Results are new tensors at every call: see
docs/kernels/short_conv.md for what their pages cost.
"""

import itertools

import torch

from linconv.benchmarking import compare

DTYPES = (torch.float32, torch.bfloat16)
POOL_BYTES = 96 << 20


def rotation(make):
    """A function that returns one of several tensors, none of them recently used."""
    first = make()
    pool = itertools.cycle([first, *(make() for _ in range(POOL_BYTES // first.nbytes))])
    return lambda: next(pool)


def check(function, plain, *tensors):
    """The kernel's error is at most twice plain torch's; gradients are checked by the tests."""
    exact = plain(*(t.double() for t in tensors))
    ours, theirs = ((f(*tensors).double() - exact).abs().max().item() for f in (function, plain))
    if not ours <= 2 * theirs:
        raise SystemExit(
            f"{tensors[0].dtype}: error {ours:.2e} against {theirs:.2e} of plain torch; no speed is reported"
        )


def trained(plain, tensors, upstream):
    """Gradients with plain torch, including forward."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(plain(*leaves), leaves, upstream)


def add(record, common, works, plain, tensors, size):
    """Time a kernel against its floor and against plain torch, and add a row for each.

    works: "copy", of a tensor of ``size`` bytes, "forward" and "backward". plain: "forward" and "training". tensors: of
    that size that each pass reads or writes.
    """
    taken = compare(works, min_repeats=9, min_seconds=0.3)
    seconds = {name: latency.median for name, latency in taken.items()}
    for part, count in tensors.items():
        floor = count / 2 * seconds["copy"]  # a copy reads one and writes one
        record.add(
            **common, part=part, seconds=seconds[part], floor_seconds=floor, over_floor=seconds[part] / floor,
            copy_gigabytes_per_second=2 * size / seconds["copy"] / 1e9,
        )  # fmt: skip
    both = seconds["forward"] + seconds["backward"]
    peers = compare(plain, min_repeats=3, min_seconds=0.1)
    for part, ours in (("forward", seconds["forward"]), ("training", both)):
        peer = peers[part].median
        record.add(**common, peer=f"plain torch, {part}", peer_seconds=peer, seconds=ours, speedup=peer / ours)
