"""The distillation losses on their Triton kernels, judged by the operator's own tests; run by test_triton.py."""

import dataclasses

import interpreter
import judge
import pytest
import test_distillation_loss as cases
import torch
from hypothesis import given, settings
from judge import same_bits
from test_distillation_loss import (  # noqa: F401
    random,
    test_any_bool_mask,
    test_huge_logits,
    test_identical_inputs_give_exactly_zero,
    test_linear_oracle,
    test_linear_padded_is_alone,
    test_logits_of_minus_infinity,
    test_only_wanted_gradients_are_made,
    test_oracle_low_precision,
    test_padded_is_alone,
    test_undefined_distributions_give_nan,
    values_and_gradients,
)

from linconv.ops.distillation_loss import distillation_terms, layerwise_mse
from linconv.ops.distillation_loss import triton as module


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """What the tests call the compiled backend is this one, and tensors are made where it wants them."""
    monkeypatch.setattr(judge, "_here", "triton")
    if interpreter.INTERPRETING:  # which is slow for each program: a few of many rows
        shipped = module.choose_tile
        monkeypatch.setattr(module, "choose_tile", lambda *x, **y: dataclasses.replace(shipped(*x, **y), rows=32))
    torch.set_default_device(interpreter.DEVICE)
    yield
    torch.set_default_device(None)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(**cases.CASES)
def test_oracle(**case):
    cases.agrees_with_the_definition(**case)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_rows_longer_than_a_tile(monkeypatch, layer_norm):
    """Read again in pieces rather than held: the same loss and gradients."""
    tensors = [random(1, 3, d).float() for d in (70, 70, 33, 33)]

    def loss(*x):
        terms = distillation_terms(x[::2], x[1::2], layer_norm=layer_norm, mask=torch.tensor([2]), backend="triton")
        return terms.mse.sum() + 0 * terms.cosine.sum()

    whole = values_and_gradients(loss, tensors)
    monkeypatch.setattr(module, "choose_tile", lambda *_, **__: module.Tile(4, 32, 4))
    torch.testing.assert_close(values_and_gradients(loss, tensors), whole)


def test_layers_of_every_dtype_and_stride(monkeypatch):
    """What differs between layers is looked up by each; too many for one launch are shared out."""
    like = [(torch.float32, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)] * 2
    pairs = [[random(2, 3, 12 + 4 * (i % 2), dtype=t) for t in pair] for i, pair in enumerate(like)]
    pairs = [[x.mT.contiguous().mT if i % 4 == 0 else x for x in pair] for i, pair in enumerate(pairs)]
    pairs[1][0] = pairs[1][0][..., ::2].repeat_interleave(2, -1)[..., ::2]
    pairs[1][1] = pairs[1][1][..., ::2]
    student, teacher = zip(*pairs)

    def mse(*x, backend="triton"):
        weights = torch.arange(1.0, 7.0)
        return layerwise_mse(x[:6], x[6:], mask=torch.tensor([3, 2]), layer_norm=True, weights=weights, backend=backend)

    wanted = values_and_gradients(lambda *x: mse(*x, backend="reference"), [*student, *teacher], torch.float64)
    for most in (module.PARAMETER_BYTES, 100):
        monkeypatch.setattr(module, "PARAMETER_BYTES", most)
        got = values_and_gradients(mse, [*student, *teacher])
        for g, w in zip(got, wanted):
            torch.testing.assert_close(g.double(), w, rtol=1e-2 if g.dtype != torch.float32 else 1e-4, atol=1e-5)


def test_more_padding_changes_no_bit_of_a_batch():
    tensors, n = [random(3, 12, d).float() for d in (24, 24, 9, 9)], torch.tensor([11, 12, 4])

    def loss(s, t, a, b):
        mask = dict(mask=n, logits_mask=n)
        return sum(x.sum() for x in distillation_terms([s], [t], a, b, **mask, layer_norm=True, backend="triton")[::2])

    longer = [torch.cat([t, torch.full_like(t, torch.nan)], 1) for t in tensors]
    alone, padded = values_and_gradients(loss, tensors), values_and_gradients(loss, longer)
    same_bits(padded[0], alone[0])
    for got, wanted in zip(padded[1:], alone[1:]):
        same_bits(got[:, :12], wanted)
        assert not got[:, 12:].any()


def test_operators_keep_their_contracts():
    s, t, a, b = (random(1, 3, d).requires_grad_() for d in (6, 6, 5, 5))
    mask, linear = torch.tensor([2]), [random(*shape).requires_grad_() for shape in ((3, 6), (5, 6), (3, 4), (5, 4))]
    for op, arguments in (
        ("distillation_loss_triton", ([s], [t], mask, True, a, b, mask, 2.0)),
        ("linear_kd_loss_triton", (*linear[:2], *(x.detach() for x in linear[2:]), None, 2.0)),
    ):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.linconv, op).default, arguments, test_utils=checks)


def test_second_derivative_is_refused():
    s = random(1, 4, 6).requires_grad_()
    (grad,) = torch.autograd.grad(layerwise_mse([s], [random(1, 4, 6)], backend="triton"), s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
