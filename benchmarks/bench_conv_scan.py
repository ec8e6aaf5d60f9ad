"""conv_scan on CPU against calls of the two operators that it is made of, in one run.

    python benchmarks/bench_conv_scan.py --out benchmarks/results/cpu/conv_scan.json

Batch 1, 12 heads of 64, dstate 128; 64 if two directions share x. Kernels are the same and so are the bits, which is
checked first. The differences are Python, autograd, copies of gradients, the convolution computed twice, and what is
kept for the backward pass. Two frames are almost no work: their time is the time until kernels start.
"""

import functools
import itertools

import torch

from linconv import ops
from linconv.benchmarking import compare
from linconv.benchmarking.record import run
from linconv.ops.conv_scan import reference
from linconv.ops.conv_scan.layout import Layout

HEADS, HEADDIM = 12, 64
FORMS = ("one direction", "two directions", "two directions of one x")


def case(form, length, dtype):
    """Both ways to compute it, the leaves and the upstream gradient."""
    shared, both = form == FORMS[2], (2,) if form == FORMS[1] else ()
    dstate, taps, lookahead = (64, 7, 3) if shared else (128, 4, 0)
    channels = HEADS * HEADDIM + Layout.states(shared) * dstate
    leaves = [
        torch.randn(*both, 1, length, channels).to(dtype),
        torch.randn(*(both or ((2,) if shared else ())), 1, length, HEADS).to(dtype),
        torch.randn(*both, channels, taps).to(dtype) / taps,
        torch.randn(*both, channels).to(dtype),
        -torch.rand(*both, HEADS) - 0.1,
        *(torch.randn(*both, HEADS) for _ in range(2)),
    ]
    diagonal = "shifted" if shared else "both"
    one = functools.partial(ops.conv_scan, dstate=dstate, diagonal=diagonal, lookahead=lookahead)
    layout = Layout.of(*leaves[:2], 1, dstate)

    def two(*tensors):
        return reference.conv_scan(layout, *tensors, diagonal, lookahead, None, None)

    upstream = torch.randn(*both, 1, length, HEADS, HEADDIM).to(dtype)
    return one, two, [t.requires_grad_() for t in leaves], upstream


def trained(function, leaves, upstream):
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, upstream)


def kept(function, leaves):
    """Bytes kept for the backward pass beside the arguments."""
    memory = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        memory[storage.data_ptr()] = (storage.nbytes(), tensor)  # keep the tensor, so that its memory is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        function(*leaves)
    for leaf in leaves:
        memory.pop(leaf.untyped_storage().data_ptr(), None)
    return sum(size for size, _ in memory.values())


def body(record, lengths):
    for form, dtype, length in itertools.product(FORMS, (torch.float32, torch.bfloat16), lengths):
        one, two, leaves, upstream = case(form, length, dtype)
        row = dict(form=form, dtype=str(dtype)[6:], length=length)
        if not all(map(torch.equal, trained(one, leaves, upstream), trained(two, leaves, upstream))):
            raise SystemExit(f"{row}: other bits than two operators; no time is reported")
        plain = [t.detach() for t in leaves]
        for part, work in (
            ("forward", lambda f, inputs=plain: f(*inputs)),
            ("training", functools.partial(trained, leaves=leaves, upstream=upstream)),
        ):
            works = {"one": functools.partial(work, one), "two": functools.partial(work, two)}
            taken = {n: t.median for n, t in compare(works, min_repeats=25, min_seconds=0.7).items()}
            of_part = dict(part=part, seconds=taken["one"], peer="two operators", peer_seconds=taken["two"])
            of_part |= dict(speedup=taken["two"] / taken["one"])
            if part == "training":
                of_part |= dict(kept_bytes=kept(one, leaves), peer_kept_bytes=kept(two, leaves))
            record.add(**row, **of_part)


if __name__ == "__main__":
    run("conv_scan", __doc__.splitlines()[0], [2, 499, 2_999], body)
