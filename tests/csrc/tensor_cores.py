"""csrc/common/tensor_cores.h on the host against plain loops; run by test_cuda_on_host.py, with its library.

Layouts are written down here as the PTX ISA gives them ("Matrix Fragments for mma.m16n8k16 with floating point type",
"ldmatrix"), not as our sources put them: lane = 4 group + part.
"""

import ctypes
import os

import pytest
import torch

library = ctypes.CDLL(os.path.join(os.environ["LINCONV_LIBRARY_PATH"], "liblinconv_cpu.so"))
library.probe_unpack.restype = ctypes.c_float
library.probe_first_slot.restype = ctypes.c_int64
LANES = range(32)
DTYPES = (torch.bfloat16, torch.float16)


def A(lane, i):
    """(row, column) of the 16 x 16 left factor that is a_i of a lane."""
    return lane // 4 + (0 if i < 2 or 4 <= i < 6 else 8), lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def B(lane, i):
    """The same of b_i of the 16 x 8 right factor."""
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def D(lane, i):
    """The same of c_i and d_i of the 16 x 8 sum."""
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def held(matrix, place, count):
    """(32, count): what the lanes hold of a matrix."""
    return torch.stack([torch.stack([matrix[place(lane, i)] for i in range(count)]) for lane in LANES])


def spread(values, place, *shape):
    """The matrix that the lanes hold; every element once."""
    out = torch.full(shape, float("nan"), dtype=values.dtype)
    for lane in LANES:
        for i in range(values.shape[1]):
            assert out[place(lane, i)].isnan()
            out[place(lane, i)] = values[lane, i]
    assert not out.isnan().any()
    return out


def sum_place(lane, k):
    """Of an Accumulator: two sums of 16 x 8 side by side."""
    row, column = D(lane, k % 4)
    return row, column + k // 4 * 8


def call(name, *arguments):
    pointers = [ctypes.c_void_p(t.data_ptr()) if isinstance(t, torch.Tensor) else t for t in arguments]
    return getattr(library, name)(*pointers)


def integers(*shape, dtype=torch.float32):
    """Of which bfloat16 and float32 lose none, nor do sums of 16 products."""
    return torch.randint(-8, 9, shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma(dtype):
    a, b, d = integers(16, 16, dtype=dtype), integers(16, 8, dtype=dtype), integers(16, 8)
    values = held(d, D, 4).contiguous()
    call("probe_mma", held(a, A, 8), held(b, B, 4), values, dtype == torch.bfloat16)
    assert torch.equal(spread(values, D, 16, 8), d + a.float() @ b.float())


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    starts = torch.randperm(32)  # rows in any order of memory
    memory = torch.zeros(32, 8, dtype=torch.int16)
    memory[starts] = matrices.view(32, 8)
    out = torch.zeros(32, 8, dtype=torch.int16)
    call("probe_ldmatrix", memory, (starts * 8).int(), out, transposed)
    for lane in LANES:
        for i in range(4):
            matrix = matrices[i].T if transposed else matrices[i]
            assert torch.equal(out[lane, 2 * i : 2 * i + 2], matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])


def test_copies():
    source = torch.randint(1, 128, (32, 16), dtype=torch.uint8)
    early, late = torch.zeros_like(source), torch.zeros_like(source)
    count = torch.tensor([(0, 4, 8, 16)[lane % 4] for lane in LANES], dtype=torch.int32)
    call("probe_copy", source, count, early, late)
    assert (early == 255).all()  # shared memory as it was before
    for lane in LANES:
        assert torch.equal(late[lane, : count[lane]], source[lane, : count[lane]])
        assert not late[lane, count[lane] :].any()


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_fragments_of_a_tile(columns, transposed, right):
    matrix = torch.arange(64 * columns, dtype=torch.int16).view(64, columns)
    for row in range(0, 64, 16):
        for column in range(0, columns, 16):
            out = torch.zeros(32, 8, dtype=torch.int16)
            call("probe_load", matrix, columns, row, column, transposed, right, out)
            part = matrix[row : row + 16, column : column + 16]
            assert torch.equal(out, held(part.T if transposed else part, A, 8))


@pytest.mark.parametrize("columns", [64, 128])
def test_pieces_of_a_tile_do_not_meet(columns):
    where = torch.tensor([[library.probe_piece(columns, r, p) for p in range(columns // 8)] for r in range(64)])
    assert torch.equal(where.flatten().sort().values, torch.arange(64 * columns // 8))
    banks = where % 8  # of 16 bytes
    for r in range(0, 64, 8):
        for p in range(columns // 8):
            assert len(set(banks[r : r + 8, p].tolist())) == 8
            assert len(set(banks[r, p // 8 * 8 : p // 8 * 8 + 8].tolist())) == 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply(dtype):
    a, b, d = integers(16, 16, dtype=dtype), integers(16, 16, dtype=dtype), integers(16, 16)
    values = held(d, sum_place, 8).contiguous()
    call("probe_multiply", held(a, A, 8), held(b, A, 8), values, dtype == torch.bfloat16)
    assert torch.equal(spread(values, sum_place, 16, 16), d + a.float() @ b.float().T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("right", [False, True])
def test_sums_are_factors(dtype, right):
    """Rounded to the nearest, each in its place; and what unpack finds there."""
    d = torch.randn(16, 16)
    out = torch.zeros(32, 8, dtype=dtype)
    values = held(d, sum_place, 8).contiguous()
    call("probe_fragment_of", values, ctypes.c_float(0.25), out, dtype == torch.bfloat16, right)
    assert torch.equal(spread(out, A, 16, 16), (d * 0.25).to(dtype))
    for half in (0, 1):
        word = out.view(torch.int32)[0, 0].item() & 0xFFFFFFFF
        got = library.probe_unpack(ctypes.c_uint32(word), half, dtype == torch.bfloat16)
        assert got == out[0, half].item()


@pytest.mark.parametrize("bounds, packed", [([0, 0, 63, 64, 300], True), ([0], True), ([5, 300, 0], False)])
def test_slots(bounds, packed):
    """Each sequence has its chunks' slots for itself."""
    frames, count, chunk = 300, len(bounds) - packed, 64
    lengths = [b - a for a, b in zip(bounds, bounds[1:])] if packed else bounds
    slots, taken = ctypes.c_int64(-1), []
    values = torch.tensor(bounds)
    for i in range(count):
        first = library.probe_first_slot(
            ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(count), ctypes.c_int64(frames), packed,
            ctypes.c_int64(i), ctypes.c_int64(chunk), ctypes.byref(slots),
        )  # fmt: skip
        taken += range(first, first + -(-lengths[i] // chunk))
    assert len(set(taken)) == len(taken) and all(0 <= slot < slots.value for slot in taken)
