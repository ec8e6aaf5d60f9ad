"""sanitizer.py finds what it is for, in kernels made wrong; run by test_triton.py, in the interpreter only."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from linconv.ops.triton_launch import empty, launch

if not interpreter.INTERPRETING:
    pytest.skip("the sanitizer is one of Triton's interpreter", allow_module_level=True)


@triton.jit
def copy(source, out, first, step, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(out + offset, tl.load(source + first + offset, mask=offset < size, other=0), mask=offset < size)


@triton.jit
def shift(memory, size, by, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """In place: other threads' elements, where ``by`` is not 0."""
    offset = tl.arange(0, BLOCK)
    value = tl.load(memory + offset, mask=offset < size, other=0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(memory + (offset + by) % size, value + 1, mask=offset < size)


@triton.jit
def store_and_load(memory, out, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tl.store(memory + offset, offset.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + offset, tl.load(memory + BLOCK - 1 - offset))


@triton.jit
def step(out, number, OPERATION: tl.constexpr):
    if OPERATION == "add":
        tl.store(out, number + number)
    elif OPERATION == "subtract":
        tl.store(out, -2 - number)
    else:
        tl.store(out, tl.full([2], 1, tl.int32).sum() * number)


@triton.jit
def fold(out, size, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tl.store(out + offset % size, offset.to(tl.float32))


def run(kernel, grid=1, num_warps=1, **arguments):
    launch(kernel, (grid,), arguments, num_warps)


def refused(error, message, kernel, **arguments):
    with pytest.raises(InterpreterError, match=f"{error}.*{message}"):
        run(kernel, **arguments)


def test_copies_are_let_through():
    source, out = torch.arange(300.0), torch.zeros(300)
    run(copy, 3, source=source, out=out, first=0, step=128, size=300, BLOCK=128)
    assert torch.equal(source, out)
    parts = source.view(3, 100).T  # strided, with all of its elements in sight
    run(copy, 1, source=parts, out=out, first=0, step=128, size=300, BLOCK=512)


def test_outside_of_a_tensor():
    whole = torch.zeros(4, 100)
    arguments = dict(out=torch.zeros(100), step=0, BLOCK=128)
    refused("OutOfBounds", "element 100 behind the start of source", copy, source=torch.zeros(100), first=0, size=101,
            **arguments)  # fmt: skip
    refused("OutOfBounds", "stores to element 100 .* of out", copy, source=whole, first=0, size=101, **arguments)
    # Memory of the tensor that it is a view of is not its own: before it, behind it, between its elements.
    for view, first in ((whole[1], -1), (whole[1], 1), (whole[:, :50], 0)):
        refused("OutOfBounds", "of source", copy, source=view, first=first, size=100, **arguments)
    # Nor are half of two elements one.
    refused("OutOfBounds", "of out", copy, source=whole[0], first=0, size=1, step=0, BLOCK=128,
            out=torch.zeros(1, dtype=torch.uint8)[:0])  # fmt: skip


def test_programs_that_share_an_element():
    source, out = torch.zeros(300), torch.zeros(300)
    refused("Race", "another program stores to", copy, grid=2, source=source, out=out, first=0, step=100, size=300,
            BLOCK=128)  # fmt: skip
    # One loads what the other stores, whichever comes first.
    memory = torch.zeros(384)
    for does, source, out in (("stores to", memory, memory[128:]), ("loads", memory[128:], memory)):
        refused("Race", f"another program {does}", copy, grid=2, source=source, out=out, first=0, step=128, size=256,
                BLOCK=128)  # fmt: skip


def test_lanes_that_share_an_element():
    refused("Race", "two lanes", fold, out=torch.zeros(64), size=64, BLOCK=128)
    run(fold, out=torch.zeros(128), size=128, BLOCK=128)


@pytest.mark.parametrize("BARRIER", [False, True])
def test_threads_that_share_an_element(BARRIER):
    def judge(kernel, **arguments):
        if BARRIER:
            run(kernel, **arguments, BARRIER=True)
        else:
            refused("Hazard", "another thread", kernel, **arguments, BARRIER=False)

    judge(shift, memory=torch.zeros(128), size=128, by=1, BLOCK=128)
    judge(store_and_load, memory=torch.zeros(128), out=torch.zeros(128), BLOCK=128)
    # Its own element: each thread's own, unless there are more threads than elements.
    run(shift, memory=torch.zeros(128), size=128, by=0, BARRIER=False, BLOCK=128)
    judge(shift, memory=torch.zeros(128), size=128, by=0, BLOCK=128, num_warps=2)


def test_what_was_never_stored_to():
    memory = empty((128,), torch.zeros(1), torch.float32)
    out = empty((128,), torch.zeros(1), torch.float32)
    run(copy, source=torch.zeros(128), out=memory, first=0, step=0, size=100, BLOCK=128)
    run(copy, source=memory, out=out, first=0, step=0, size=100, BLOCK=128)
    wider = dict(source=memory[50:], out=out, first=0, step=0, size=51, BLOCK=64)
    refused("Uninitialized", "element 50 behind the start of source", copy, **wider)


@pytest.mark.parametrize("OPERATION", ["add", "subtract", "multiply"])
def test_integers_beyond_32_bits(OPERATION):
    out = torch.zeros(1, dtype=torch.int64)
    refused("Overflow", f"{OPERATION} of 32-bit integers", step, out=out, number=2**31 - 1, OPERATION=OPERATION)
    run(step, out=out, number=2**30 - 1, OPERATION=OPERATION)
    run(step, out=out, number=2**31 + 1, OPERATION=OPERATION)  # of 64 bits
