"""Gradients of operators, registered without torch's reading of the schema at each call."""

import pytest
import torch
from torch.autograd.function import once_differentiable

from linconv import ops
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


def test_a_call_without_gradients_skips_the_formula():
    """Except in a transform, which has to see it."""
    operator = define("_test_autograd_skipped")

    def formula(*_):
        raise AssertionError("the formula")

    torch.library.impl("linconv::_test_autograd_skipped", "Autograd", formula)
    a = torch.ones(2)

    def function(x):
        return autograd.call(operator, x, [x], 2.0, None)[0]

    with pytest.raises(AssertionError, match="the formula"):
        function(a)
    with torch.no_grad():
        assert torch.equal(function(a), 4 * a)
        for transform in (torch.func.jvp, lambda f, x, _: torch.func.grad(lambda a: f(a).sum())(*x)):
            with pytest.raises(AssertionError, match="the formula"):
                transform(function, (a,), (a,))


def test_a_call_without_gradients_leaves_it_to_handlers_to_enable_them():
    operator = define("_test_autograd_handled")
    autograd.register_autograd("_test_autograd_handled", backward, save)

    class Enabling(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            with torch.enable_grad():
                return function(*args, **(kwargs or {}))

    a = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert not autograd.call(operator, a, [a], 2.0, None)[0].requires_grad
        with Enabling():
            assert autograd.call(operator, a, [a], 2.0, None)[0].requires_grad


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


# Of each operator: the call, the shapes of what has gradients, and of what else it takes.
FRAMES, STEPS, GROUPS = (1, 5, 2, 3), (1, 5, 2), (1, 5, 1, 4)
OPERATORS = {
    "ssd": (
        lambda backend, x, dt, A, B, C, D, z, bias, states: ops.ssd(
            x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True, initial_states=states, backend=backend
        ),
        (FRAMES, STEPS, (2,), GROUPS, GROUPS, (2,), FRAMES, (2,), (1, 2, 3, 4)),
        (),
    ),
    "bidirectional_ssd": (
        lambda backend, x, dt, A, B, C, D, bias: ops.bidirectional_ssd(
            x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True, backend=backend
        ),
        (FRAMES, (2, *STEPS), (2, 2), GROUPS, (2, *GROUPS), (2,), (2, 2)),
        (),
    ),
    "selective_scan": (
        lambda backend, x, dt, A, B, C, D, z, bias, states: ops.selective_scan(
            x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True, initial_states=states, backend=backend
        ),
        (STEPS, STEPS, (2, 4), GROUPS, GROUPS, (2,), STEPS, (2,), (1, 2, 4)),
        (),
    ),
    "short_conv": (
        lambda backend, *tensors: ops.short_conv(*tensors, backend=backend),
        ((1, 5, 3), (3, 4), (3,)),
        (),
    ),
    "bidirectional_short_conv": (
        lambda backend, *tensors: ops.bidirectional_short_conv(*tensors, backend=backend),
        ((1, 5, 3), (2, 3, 4), (2, 3)),
        (),
    ),
    "gated_rms_norm": (
        lambda backend, *tensors: ops.gated_rms_norm(*tensors, backend=backend),
        ((2, 4, 6), (4, 6), (2, 6)),
        (),
    ),
    "linformer_attention": (
        lambda backend, *tensors: ops.linformer_attention(*tensors, backend=backend),
        ((1, 2, 5, 3), (1, 2, 5, 3), (1, 2, 5, 3), (6, 4), (6, 4)),
        (),
    ),
    "layerwise_mse": (
        lambda backend, a, b, c, d: ops.layerwise_mse([a, b], [c, d], layer_norm=True, backend=backend),
        ((2, 4, 6), (2, 4, 3), (2, 4, 6), (2, 4, 3)),
        (),
    ),
    "kd_loss": (lambda backend, *tensors: ops.kd_loss(*tensors, backend=backend), ((4, 6), (4, 6)), ()),
    "distillation_loss": (
        lambda backend, s, t, *logits: ops.distillation_loss([s], [t], *logits, backend=backend),
        ((2, 4, 6), (2, 4, 6), (2, 5), (2, 5)),
        (),
    ),
    "linear_kd_loss": (
        lambda backend, *tensors: ops.linear_kd_loss(*tensors, backend=backend),
        ((4, 6), (5, 6)),
        ((4, 3), (5, 3)),
    ),
}


def sum_of_squares(name, backend="cpu"):
    """A function of the operator's arguments, none of whose second derivatives is zero, and these arguments."""
    function, shapes, others = OPERATORS[name]
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    fixed = [torch.randn(shape, dtype=torch.float64) for shape in others]
    return lambda *tensors: function(backend, *tensors, *fixed).square().sum(), leaves


@pytest.mark.parametrize("name", OPERATORS)
def test_first_derivatives_of_which_a_graph_is_made(name):
    function, leaves = sum_of_squares(name)
    found = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    for gradient, plain in zip(found, torch.autograd.grad(function(*leaves), leaves)):
        assert torch.equal(gradient, plain) and gradient.requires_grad and not plain.requires_grad
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        result = function(*leaves)
    for gradient, hooked in zip(found, torch.autograd.grad(result, leaves, create_graph=True)):
        assert torch.equal(gradient, hooked)
    function, leaves = sum_of_squares(name, "reference")
    torch.testing.assert_close(found, torch.autograd.grad(function(*leaves), leaves))


@pytest.mark.parametrize("name", OPERATORS)
def test_results_may_be_changed_in_place(name):
    """As those of torch's functions, whatever order of axes a kernel writes them in."""
    function, shapes, others = OPERATORS[name]
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    fixed = [torch.randn(shape, dtype=torch.float64) for shape in others]
    result, copied = (function("cpu", *leaves, *fixed) for _ in range(2))
    result *= 3
    result.masked_fill_(result > 1, 0).relu_()
    copied = 3 * copied
    copied = copied.masked_fill(copied > 1, 0).relu()
    assert torch.equal(result, copied)
    for gradient, wanted in zip(torch.autograd.grad(result.sum(), leaves), torch.autograd.grad(copied.sum(), leaves)):
        assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_are_refused(name):
    """By each argument, named or not: a gradient without a way to what it depends on would make them zero."""
    refused = pytest.raises(RuntimeError, match='once_differentiable; wanted backend="reference"')
    function, leaves = sum_of_squares(name)
    for i, leaf in enumerate(leaves):
        alone = [t.detach() for t in leaves]

        def of_one(tensor, i=i, alone=alone):
            return function(*alone[:i], tensor, *alone[i + 1 :])

        with refused:
            torch.autograd.functional.hvp(of_one, leaf.detach(), torch.ones_like(leaf))
        loss = of_one(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with refused:
            torch.autograd.grad(loss + gradient.square().sum(), leaf)
        with refused:
            gradient.sum().backward()
    for gradient in torch.autograd.grad(function(*leaves), leaves, create_graph=True):
        for leaf in leaves:
            with refused:
                torch.autograd.grad(gradient.sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_is_differentiable_twice(name):
    function, leaves = sum_of_squares(name, "reference")
    first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), leaves)
    assert all(g.isfinite().all() and g.any() for g in second)


def test_second_derivatives_by_the_incoming_gradient_are_refused():
    x, z, weight = (torch.randn(shape) for shape in ((4, 6), (4, 6), (6,)))
    y = ops.gated_rms_norm(x.requires_grad_(), z, weight)
    incoming = torch.ones_like(y).requires_grad_()
    (gradient,) = torch.autograd.grad(y, x, incoming, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(gradient.sum(), incoming)


def test_a_graph_of_batched_gradients_is_refused():
    """It would not be known to be one, and second derivatives be zero."""
    function, leaves = sum_of_squares("ssd")
    with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::detach"):
        torch.autograd.grad(function(*leaves), leaves, torch.ones(2), is_grads_batched=True, create_graph=True)
    for gradient, plain in zip(
        torch.autograd.grad(function(*leaves), leaves, torch.ones(2), is_grads_batched=True),
        torch.autograd.grad(function(*leaves), leaves),
    ):
        torch.testing.assert_close(gradient, torch.stack([plain, plain]))
