"""Derivatives that the ops do not have, refused with an error: second ones, torch.func's."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def once_differentiable(name: str) -> Callable[[Callable], Callable]:
    """Decorates the backward of an autograd.Function: no gradient flows through it.

    torch's own once_differentiable raises only when the upstream gradient requires a gradient.
    Here the result also depends on saved inputs, so with create_graph=True it would drop their
    part in silence: a penalty on the gradient would train nothing. This one always raises in the
    second backward, which it is reached by from the upstream gradient and from every saved input.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapped(ctx, *grads):
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                outputs = backward(ctx, *grads)
            message = (
                f"{name} can be differentiated once: its backward was asked for a gradient. "
                "Compute the term that needs it from the velocities in plain PyTorch"
            )
            # Without these a second backward to the velocities alone would pass by the error.
            tensors = (*grads, *ctx.saved_tensors)
            inputs = [x for x in tensors if x is not None and x.requires_grad]
            fail = torch._C._functions.DelayedError(message, len(outputs) + len(inputs))
            # The node returns all that it takes; the gradients come first.
            returned = fail(*(_leaf(value) for value in outputs), *inputs)
            return returned[: len(outputs)]

        return wrapped

    return decorate


def check_transforms(name: str, *tensors: Tensor | None) -> None:
    """Checks that no derivative is asked for that is not reached by backward().

    torch would drop the tangents of forward mode in silence, and say of the transforms of
    torch.func what the author of an autograd.Function has to write.
    """
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad); use torch.autograd.grad or backward()"
        )
    if (
        torch.is_grad_enabled()
        and torch._C._functorch.peek_interpreter_stack() is not None
        and any(x is not None and x.requires_grad for x in tensors)
    ):
        raise NotImplementedError(
            f"{name} is not differentiable under the transforms of torch.func (grad, vjp, jacrev, "
            "vmap of a gradient); use torch.autograd.grad or backward()"
        )


def readable(x: Tensor) -> bool:
    """Tells whether x has one value: not under vmap or tracing, maybe of the backward alone."""
    # autograd.grad(is_grads_batched=True) has a vmap of its own.
    kinds = torch._C._functorch
    batched = kinds.is_functorch_wrapped_tensor(x) or kinds.is_legacy_batchedtensor(x)
    return type(x) is Tensor and not batched


def _leaf(value: Tensor | None) -> Tensor | None:
    """Detaches a gradient and makes it a leaf, so that the error node gets an edge from it."""
    return None if value is None else value.detach().requires_grad_()
