"""Gradients of operators, registered without torch's reading of the schema at each call."""

import pytest
import torch
from torch.autograd.function import once_differentiable

from linconv.ops import autograd, dispatch

pytestmark = pytest.mark.skipif(
    not dispatch.compiled("ssd"), reason="needs the compiled library, which has the namespace"
)


def define(name):
    """An operator with a list: scale * (a + sum of others), and one result more that has no gradient."""
    torch.library.define(f"linconv::{name}", "(Tensor a, Tensor[] others, float scale, Tensor? b) -> (Tensor, Tensor)")

    def run(a, others, scale, b):
        total = scale * sum(others, a)
        return total if b is None else total * b, torch.ones(1)

    torch.library.impl(f"linconv::{name}", "CompositeExplicitAutograd", run)
    return getattr(torch.ops.linconv, name)


needed = []


def save(ctx, inputs, output):
    a, others, ctx.scale, b = inputs
    assert isinstance(others, list) and len(output) == 2
    ctx.others = len(others)
    ctx.save_for_backward(a, *others, b)


def backward(ctx, grad, _):
    needed.append(ctx.needs_input_grad)
    return gradients(ctx, grad, *ctx.saved_tensors)


@once_differentiable
def gradients(ctx, grad, a, *rest):
    *others, b = rest
    each = ctx.scale * grad * (1 if b is None else b)
    return each, [2 * each for _ in others], None, None if b is None else grad * ctx.scale * sum(others, a)


@pytest.mark.parametrize("made_of", [autograd._MADE_OF, ("not in this torch",)], ids=["own", "torch's"])
@pytest.mark.parametrize("with_b", [True, False])
def test_lists_and_absent_tensors(made_of, with_b, monkeypatch):
    """As torch's own registration, which stands in where torch's parts are gone."""
    monkeypatch.setattr(autograd, "_MADE_OF", made_of)
    name = f"_test_autograd_{len(made_of)}_{with_b}"
    operator = define(name)
    autograd.register_autograd(name, backward, save)
    a, first, second, b = torch.randn(4, 3).unbind()
    a.requires_grad_(), second.requires_grad_(), b.requires_grad_()
    with torch.no_grad():
        assert not operator(a, [first, second], 2.0, b)[0].requires_grad
    result, _ = operator(a, [first, second], 2.0, b if with_b else None)
    wanted = [a, second, *([b] if with_b else [])]
    found = torch.autograd.grad(result.sum(), wanted)
    factor = b.detach() if with_b else torch.ones(3)
    torch.testing.assert_close(found[0], 2 * factor)
    torch.testing.assert_close(found[1], 4 * factor)  # the formula's, not the sum's
    if with_b:
        torch.testing.assert_close(found[2], 2 * (a + first + second).detach())
    assert [needed[-1][0], needed[-1][1][1]] == [True, True] and not needed[-1][1][0]


def test_nothing_is_recorded_where_no_argument_needs_it():
    operator = define("_test_autograd_plain")
    autograd.register_autograd("_test_autograd_plain", backward, save)
    assert operator(torch.ones(2), [torch.ones(2)], 1.0, None)[0].grad_fn is None


def test_forward_mode_is_refused():
    """Below autograd a tangent would be lost, and the derivative be zero."""
    operator = define("with_tangent")
    autograd.register_autograd("with_tangent", backward, save)
    a, one = torch.randn(3), torch.ones(3)

    def function(x):
        return operator(a, [x], 2.0, None)[0]

    with pytest.raises(NotImplementedError, match="linconv::with_tangent has no derivative in forward mode"):
        torch.func.jvp(function, (a,), (one,))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(function(a), 4 * a)  # nothing is asked for
        for leaf in (a, a.clone().requires_grad_()):
            with pytest.raises(NotImplementedError, match="forward mode"):
                function(torch.autograd.forward_ad.make_dual(leaf, one))


def test_derivatives_in_torch_func_are_refused():
    operator = define("in_torch_func")
    autograd.register_autograd("in_torch_func", backward, save)
    a = torch.randn(3)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match=r"linconv::in_torch_func has no derivative in torch\.func"):
            transform(lambda a: operator(a, [a], 2.0, None)[0].sum())(a)
