import pytest
import torch

from linconv.ops import columns

SIZES = ((8, 12, 4), (8, 7, 1))  # all are words in 16 bits, or not


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lead", [(3, 5), (2, 3, 5), (0, 5)])
def test_joined(dtype, sizes, lead):
    parts = [torch.randn(*lead, n).to(dtype) for n in sizes]
    wanted = torch.cat(parts, dim=-1)
    moved = [p.movedim(-2, 0).contiguous().movedim(0, -2) for p in parts]  # as directions are
    of_others = [torch.cat([p, p], dim=-1)[..., p.shape[-1] :] for p in parts]
    for given in (parts, moved, of_others, [p.transpose(-1, -2).contiguous().transpose(-1, -2) for p in parts]):
        for join in (columns.joined, columns._joined_as_words):
            assert torch.equal(join(given), wanted) and join(given).dtype == dtype


def test_types_that_differ_are_promoted():
    parts = [torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 4)]
    assert torch.equal(columns._joined_as_words(parts), torch.ones(2, 8))


@pytest.mark.parametrize("sizes", SIZES)
def test_split(sizes, monkeypatch):
    """As on a GPU, but on this device."""
    monkeypatch.setattr(columns, "joined", columns._joined_as_words)
    rows = torch.randn(2, 3, sum(sizes), requires_grad=True)
    gradients = [torch.randn(2, 3, n) for n in sizes]
    for split in (columns.split, columns._Split.apply):
        parts = split(rows, sizes)
        assert [p.shape[-1] for p in parts] == list(sizes)
        assert all(p.untyped_storage()._cdata == rows.untyped_storage()._cdata for p in parts)
        (got,) = torch.autograd.grad(parts, rows, gradients)
        assert torch.equal(got, torch.cat(gradients, dim=-1))
        (got,) = torch.autograd.grad(split(rows, sizes)[1], rows, gradients[1])  # the others' are zero
        others = [torch.zeros_like(g) if i != 1 else g for i, g in enumerate(gradients)]
        assert torch.equal(got, torch.cat(others, dim=-1))
        (got,) = torch.autograd.grad(
            split(rows, sizes), rows, [torch.stack([g, 2 * g]) for g in gradients], is_grads_batched=True
        )
        assert torch.equal(got[1], 2 * torch.cat(gradients, dim=-1))


def test_split_under_compile():
    rows = torch.randn(3, 12, requires_grad=True)

    def work(rows):
        a, b = columns.split(rows, (4, 8))
        return a.sum() + (2 * b).sum()

    (got,) = torch.autograd.grad(torch.compile(work, fullgraph=True, backend="aot_eager")(rows), rows)
    assert torch.equal(got, torch.tensor([1.0] * 4 + [2.0] * 8).expand(3, 12))
