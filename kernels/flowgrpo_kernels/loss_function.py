"""Autograd of the losses: a forward op and a backward op, or one op that does both in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .autograd import check_transforms, once_differentiable, readable
from .backends import dispatch


def loss_function(
    name: str, arguments: type, forward_op: Callable, gradient_op: Callable, backward_op: Callable
) -> type[torch.autograd.Function]:
    """Makes the autograd function of a loss, whose `evaluate` the public function calls.

    arguments: the NamedTuple of forward_op's arguments, the two velocities first; its of_backward()
    lists those of backward_op between coefs and uncond_grad. forward_op returns (loss, *others,
    coefs); gradient_op takes grad_loss, a number, and uncond_grad, too, and also returns the
    gradients. Only the loss is differentiable, in the velocities.
    """

    both, sample_at = f"{name}_gradient", arguments._fields.index("sample") - 2

    class LossFunction(torch.autograd.Function):
        # grad_loss of the last backward: a guess at the next one, which changes no result.
        expected = 1.0

        @staticmethod
        def evaluate(velocity: Tensor, uncond: Tensor | None, uncond_grad: bool, *constants):
            """Computes (loss, *others) of checked tensors, with a graph where one is needed."""
            check_transforms(name, velocity, uncond)
            if not (torch.is_grad_enabled() and (velocity.requires_grad or uncond_grad)):
                *results, _coefs = forward_op(velocity.detach(), uncond, *constants)
                return results
            one_pass = dispatch.in_one_pass(both, velocity, constants[sample_at])
            return LossFunction.apply(one_pass, uncond_grad, velocity, uncond, constants)

        @staticmethod
        def forward(ctx, one_pass, uncond_grad, velocity, uncond, constants):
            # The constants come in one tuple: autograd spends time on each argument of its own.
            args = arguments(velocity, uncond, *constants)
            ctx.ready = None
            if one_pass:
                expected = LossFunction.expected
                *results, coefs, dv, du = gradient_op(*args, expected, uncond_grad)
                ctx.ready = expected, dv, du
            else:
                *results, coefs = forward_op(*args)
            tensors, numbers = [coefs], []
            for i, x in enumerate(args.of_backward()):
                if x is None or isinstance(x, Tensor):
                    tensors.append(x)
                else:
                    numbers.append((i, x))
            ctx.save_for_backward(*tensors)
            ctx.numbers, ctx.uncond_grad = numbers, uncond_grad
            _loss, *others = results
            ctx.mark_non_differentiable(*others)
            # The gradients of the other outputs are never used: no zeros are made for them.
            ctx.set_materialize_grads(False)
            return tuple(results)

        @staticmethod
        @once_differentiable(name)
        def backward(ctx, grad_loss, *unused):
            if grad_loss is None:
                return None, None, None, None, None
            # Read even if not needed: autograd then refuses what was changed in place meanwhile.
            coefs, *shared = ctx.saved_tensors
            # Handed out once: whoever gets the gradient may change it in place.
            ready, ctx.ready = ctx.ready, None
            asked = None
            if ready is not None and readable(grad_loss):
                # Not compared through the class, where another thread may write, too.
                asked = LossFunction.expected = grad_loss.item()
            if ready is not None and ready[0] == asked:
                _, dv, du = ready
            else:
                for i, number in ctx.numbers:
                    shared.insert(i, number)
                dv, du = backward_op(grad_loss, coefs, *shared, ctx.uncond_grad)
            return None, None, dv, du if ctx.uncond_grad else None, None

    return LossFunction
