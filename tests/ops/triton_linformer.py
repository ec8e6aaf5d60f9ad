"""Linformer attention on its Triton kernels; run by test_triton.py."""

import interpreter
import pytest
import torch
from judge import gradients, no_worse_than_torch, same_bits

from linconv.ops import linformer_attention, linformer_self_attention
from linconv.ops.linformer import triton as module


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In the interpreter, which is slow, sequences are cut into splits as soon as on a GPU into blocks."""
    if interpreter.INTERPRETING:
        monkeypatch.setattr(module, "SPLIT_FRAMES", 32)
        monkeypatch.setattr(module, "SPLIT_MULTIPLE", 16)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(interpreter.DEVICE)


def tensors(batch, heads, length, headdim, rank, *, per_head=False, shared=False, dtype=torch.float32):
    lead = (heads,) if per_head else ()
    proj = [random(*lead, length + 3, rank, dtype=dtype) for _ in range(2)]
    q, k, v = (random(batch, length, heads, headdim, dtype=dtype).transpose(1, 2) for _ in range(3))
    return [q, k, v, proj[0], None if shared else proj[1]]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "length, headdim, rank, per_head, shared",
    [(0, 5, 4, False, False), (1, 5, 17, False, True), (75, 20, 37, True, False), (130, 16, 16, False, False)],
)
def test_matches_the_reference_in_fp64(length, headdim, rank, per_head, shared, dropout_p):
    """With lengths and dropout; gradients too."""
    assert_matches_the_reference(length, headdim, rank, per_head, shared, dropout_p)


@interpreter.calls_are_repeated
def test_a_call_seen_before_takes_its_own_tensors():
    """Seen once, noted down, done again (triton_replay.py)."""
    for seed in range(interpreter.CALLS):
        torch.manual_seed(seed)
        assert_matches_the_reference(9, 5, 17, False, False, 0.3)


def assert_matches_the_reference(length, headdim, rank, per_head, shared, dropout_p):
    inputs = tensors(3, 2, length, headdim, rank, per_head=per_head, shared=shared)
    lengths = torch.tensor([length, length // 3, 0], device=interpreter.DEVICE)
    upstream = random(3, 2, length, headdim)
    found = {}
    for backend in ("triton", "reference"):
        double = backend == "reference"
        arguments = [t if t is None or not double else t.double() for t in inputs]
        torch.manual_seed(4)
        found[backend] = gradients(
            lambda *t, backend=backend: linformer_attention(*t, seq_lens=lengths, dropout_p=dropout_p, backend=backend),
            arguments,
            upstream.double() if double else upstream,
        )
    (y, grads), (wanted, wanted_grads) = found["triton"], found["reference"]
    for got, exact in zip((y, *grads), (wanted, *wanted_grads)):
        if exact is not None:
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


def test_float64():
    """To the last bits: the scale, and that of what dropout keeps, too."""
    inputs, upstream = tensors(2, 2, 40, 20, 6, dtype=torch.float64), random(2, 2, 40, 20, dtype=torch.float64)
    found = []
    for backend in ("triton", "reference"):
        torch.manual_seed(4)
        found.append(
            gradients(lambda *t, b=backend: linformer_attention(*t, dropout_p=0.3, backend=b), inputs, upstream)
        )
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_more_heads_than_a_grid_has_rows():
    batch = 3 if interpreter.INTERPRETING else 70_000
    inputs, upstream = tensors(batch, 2, 3, 4, 2), random(batch, 2, 3, 4)
    found = [
        gradients(lambda *t, b=backend: linformer_attention(*t, backend=b), inputs, upstream)
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    inputs = tensors(1, 2, 70, 24, 20, dtype=dtype)
    upstream = random(1, 2, 70, 24, dtype=dtype)

    def in_torch(q, k, v, proj_k, proj_v):
        k, v = (p[:70].mT @ x / 70**0.5 for p, x in ((proj_k, k), (proj_v, v)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    exact, exact_gradients = gradients(in_torch, [t.double() for t in inputs], upstream.double())
    theirs, their_gradients = gradients(in_torch, inputs, upstream)
    ours, our_gradients = gradients(lambda *t: linformer_attention(*t, backend="triton"), inputs, upstream)
    no_worse_than_torch(ours, theirs, exact, 2, "y")
    for name, *parts in zip(["q", "k", "v", "proj_k", "proj_v"], our_gradients, their_gradients, exact_gradients):
        no_worse_than_torch(*parts, 3, f"gradient of {name}")


def test_padded_is_alone():
    """Bit for bit, whatever stands in the padding."""
    lengths, length = [0, 1, 70, 90], 90
    q, k, v, *proj = tensors(4, 1, length, 8, 12)
    upstream = random(4, 1, length, 8)
    padded = [t.clone() for t in (q, k, v, upstream)]
    for row, n in enumerate(lengths):
        for t in padded:
            t[row, :, n:] = torch.nan if row % 2 else torch.inf
    *padded, padded_upstream = padded
    on_device = torch.tensor(lengths, device=interpreter.DEVICE)
    y, grads = gradients(
        lambda *t: linformer_attention(*t, seq_lens=on_device, backend="triton"), [*padded, *proj], padded_upstream
    )
    for row, n in enumerate(lengths):
        alone, alone_grads = gradients(
            lambda *t: linformer_attention(*t, backend="triton"),
            [*(t[row : row + 1, :, :n] for t in (q, k, v)), *proj],
            upstream[row : row + 1, :, :n],
        )
        for got, wanted in zip((y, *grads[:3]), (alone, *alone_grads[:3])):
            same_bits(got[row : row + 1, :, :n], wanted)
            assert not got[row, :, n:].any()


def test_lengths_that_are_apart_in_memory():
    inputs, together = tensors(3, 1, 20, 8, 4), torch.tensor([20, 0, 7], device=interpreter.DEVICE)
    apart = torch.stack([together, together + 100], 1)[:, 0]
    found = [linformer_attention(*inputs, seq_lens=lens, backend="triton") for lens in (apart, together)]
    assert torch.equal(*found)


def test_self_attention():
    hidden, proj = random(2, 40, 12), random(40, 6)
    parameters = [random(*shape) for _ in range(3) for shape in ((12, 12), (12,))]
    lengths = torch.tensor([40, 17], device=interpreter.DEVICE)
    found = [
        linformer_self_attention(
            hidden, *parameters, proj, num_heads=3, seq_lens=lengths, rewrite=True, backend=backend
        )
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(interpreter.INTERPRETING, reason="builds are of compiled kernels")
def test_every_shipped_build_is_listed():
    names = {build.name for build in module.shipped()}
    assert names == {
        "project", "sum_parts", "unproject", "project_weights", "attend", "attend_queries", "attend_keys",
    }  # fmt: skip


@pytest.mark.parametrize(
    "setting, headdim, products",
    [("highest", 64, "ieee"), ("high", 128, "tf32x3"), ("high", 129, "ieee"), ("medium", 256, "tf32")],
)
def test_products_are_as_torch_is_told(setting, headdim, products):
    from linconv.ops.linformer.triton import _options

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert _options(torch.empty(1, 1, 1, headdim, device="meta"))[1]["PRECISION"] == products
    finally:
        torch.set_float32_matmul_precision(before)
