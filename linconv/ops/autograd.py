"""Autograd formulas of operators, registered with as little Python between a call and its kernel as can be.

``torch.library.register_autograd`` reads the whole schema again at each call, for defaults that linconv's operators do
not have: some 40 us, several times the least time of a scan of 1,000 frames. This is what it does but for that.
"""

import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

__all__ = ["once_differentiable", "register_autograd"]

_library = torch.library.Library("linconv", "FRAGMENT")  # what it registers lives as long as it does
# torch's own registration is made of such parts; a torch that has them no longer is asked to register. Below the
# tracking of views too: a result may be a view of memory that is nobody else's, such as one laid out in another order
# of axes, and a view that an autograd function returns may not be changed in place.
_MADE_OF = ("_AutoDispatchBelowADInplaceOrView", "_after_ADInplaceOrView_keyset", "_any_requires_grad")


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers the gradients of ``linconv::<name>``, as ``torch.library.register_autograd`` does.

    Args:
        name: the operator's, without defaults in its schema, whose results are tensors.
        backward: from ctx and the gradients of results those of the arguments, None where there is none, in lists where
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

    # Of lists an autograd function takes the elements; most operators have none, and are spared the looking.
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


def _refuse_tangents(name: str, inputs: tuple) -> None:
    """An autograd function without a formula for forward mode would be an error; below autograd a tangent is lost."""
    for value in _flat(inputs, _lengths(inputs)):
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"linconv::{name} has no derivative in forward mode (torch.func.jvp, forward_ad), wanted reverse mode: "
                "torch.autograd.grad or backward()"
            )


class _Refused(torch.autograd.Function):
    """Gives back the first ``count`` of its arguments, whose derivative by any argument is an error."""

    @staticmethod
    def forward(ctx, count, *arguments):
        # As torch's does: of gradients batched by vmap it is an error, where what is returned would depend on nothing.
        return tuple(None if x is None else x.detach() for x in arguments[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "a second derivative of one of linconv's operators, whose gradients are once_differentiable; "
            'wanted backend="reference", which is differentiable twice'
        )


def once_differentiable(gradients: Callable) -> Callable:
    """Makes a derivative of gradients an error, by whatever they depend on.

    ``torch.autograd.function.once_differentiable`` gives results that lead to the error, but not from the arguments: a
    second derivative by one of these passes it by, and is zero or lacks a part.

    Args:
        gradients: from ctx and all tensors that the gradients depend on, those of the results and the saved ones, to a
            tuple of gradients, None where there is none.
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


# An autograd function takes tensors as arguments of their own: lists are written out, their lengths beside them, -1
# for what is no list.


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
