"""Autograd formulas of operators, registered with as little Python as possible between a call and its kernel.

``torch.library.register_autograd`` reads the whole schema at each call, for defaults that linconv's operators do
not have: about 40 us, several times the shortest time of a scan of 1,000 frames. This module does the rest of its work.
"""

import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

__all__ = ["call", "once_differentiable", "register_autograd"]

_library = torch.library.Library("linconv", "FRAGMENT")  # registrations live as long as this object
# Parts that torch's own registration uses; if a torch lacks them, its registration is used. Operators also run below
# the tracking of views: a result may be a view of memory that nothing else uses, such as one with another order of
# axes, and a view that an autograd function returns must not be changed in place.
_MADE_OF = ("_AutoDispatchBelowADInplaceOrView", "_after_ADInplaceOrView_keyset", "_any_requires_grad")
_below = getattr(torch._C, _MADE_OF[0], None)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Register the gradients of ``linconv::<name>``, as ``torch.library.register_autograd`` does.

    Args:
        name: name of an operator whose schema has no defaults and whose results are tensors.
        backward: maps ctx and the gradients of the results to those of the arguments: None if there is none, a list if
            the argument is a list.
        setup_context: called with ctx, inputs and output, by position.
    """
    if not all(hasattr(torch._C, part) for part in _MADE_OF):
        torch.library.register_autograd(
            f"linconv::{name}", backward, setup_context=lambda ctx, inputs, output: setup_context(ctx, inputs, output)
        )
        return
    operator = getattr(torch.ops.linconv, name).default
    below, after, any_requires_grad = (getattr(torch._C, part) for part in _MADE_OF)

    # An autograd function takes the elements of lists; most operators have no lists and skip the search.
    lists = any(isinstance(argument.type, torch.ListType) for argument in operator._schema.arguments)

    class Gradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, lengths, *flat):
            inputs = _nested(flat, lengths) if lists else flat
            ctx.lengths = lengths
            with below():
                output = operator.redispatch(keyset & after, *inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            needed = ctx.needs_input_grad
            ctx.needs_input_grad = _nested(needed[2:], ctx.lengths) if lists else needed[2:]
            try:
                results = backward(ctx, *grads)
            finally:
                ctx.needs_input_grad = needed
            results = results if isinstance(results, tuple) else (results,)
            return None, None, *(_flat(results, ctx.lengths) if lists else results)

    def differentiable(keyset, *inputs):
        if getattr(forward_ad, "_current_level", -1) >= 0:
            _refuse_tangents(name, inputs)
        if torch.is_grad_enabled() and any_requires_grad(*inputs):
            lengths = _lengths(inputs) if lists else None
            try:
                return Gradients.apply(keyset, lengths, *(_flat(inputs, lengths) if lists else inputs))
            except RuntimeError as error:
                if "functorch transforms" not in str(error):
                    raise
                raise NotImplementedError(
                    f"linconv::{name} has no derivative in torch.func (grad, vjp, jacrev), wanted torch.autograd.grad "
                    "or backward()"
                ) from error
        with below():
            return operator.redispatch(keyset & after, *inputs)

    _library.impl(name, differentiable, "Autograd", with_keyset=True)


def call(operator: Callable, *inputs):
    """``operator(*inputs)``, which without gradients skips the autograd formula: Python that would only call it."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", -1) >= 0
    plain = plain or _below is None or torch._C._functorch.maybe_current_level() is not None
    if plain or torch.overrides.has_torch_function(inputs):  # whose handlers may enable gradients
        return operator(*inputs)
    with _below():
        return operator(*inputs)


def _refuse_tangents(name: str, inputs: tuple) -> None:
    """Raise an error for tangents: below autograd they are lost, and the autograd function has no forward mode."""
    for value in _flat(inputs, _lengths(inputs)):
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"linconv::{name} has no derivative in forward mode (torch.func.jvp, forward_ad), wanted reverse mode: "
                "torch.autograd.grad or backward()"
            )


class _Refused(torch.autograd.Function):
    """Returns the first ``count`` of its arguments; their derivative by any argument is an error."""

    @staticmethod
    def forward(ctx, count, *arguments):
        # As torch's. An error for gradients batched by vmap: returned unchanged, they would depend on nothing.
        return tuple(None if x is None else x.detach() for x in arguments[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "a second derivative of one of linconv's operators, whose gradients are once_differentiable; "
            'wanted backend="reference", which is differentiable twice'
        )


def once_differentiable(gradients: Callable) -> Callable:
    """Make any derivative of gradients an error.

    ``torch.autograd.function.once_differentiable`` does not connect its results, which raise the error, to the
    arguments: a second derivative by one of these does not raise it, and is zero or incomplete.

    Args:
        gradients: maps ctx and all tensors that the gradients depend on (gradients of the results, saved tensors) to a
            tuple of gradients, None if there is none.
    """

    @functools.wraps(gradients)
    def refusing(ctx, *arguments):
        with torch.no_grad():
            found = gradients(ctx, *arguments)
        if not torch.is_grad_enabled():
            return found
        depended_on = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        return _Refused.apply(len(found), *found, *depended_on)

    return refusing


# An autograd function takes tensors only as separate arguments: lists are flattened, with their lengths passed beside
# them, -1 for what is not a list.


def _lengths(values: tuple) -> tuple:
    return tuple(len(value) if isinstance(value, list | tuple) else -1 for value in values)


def _flat(values: tuple, lengths: tuple) -> tuple:
    return tuple(x for value, length in zip(values, lengths) for x in ((value,) if length < 0 else value))


def _nested(flat: tuple, lengths: tuple) -> tuple:
    values, at = [], 0
    for length in lengths:
        values.append(flat[at] if length < 0 else list(flat[at : at + length]))
        at += 1 if length < 0 else length
    return tuple(values)
