"""What the reference must do for its bits to be the same on every device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo_kernels import flow_sde, grpo_loss, log_prob, nft_loss, sde_step
from flowgrpo_kernels.backends import dispatch
from support.kernels import block_cases as cases
from support.kernels import oracle


class Divisors(TorchDispatchMode):
    """The divisors of every division, those inside our ops, too."""

    def __init__(self):
        super().__init__()
        self.found: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div.Tensor:
            self.found.append(args[1])
        space, name = func._schema.name.split("::")
        if space == dispatch.NAMESPACE:
            with self:
                return dispatch.OPS[name].reference(*args)
        return func(*args, **(kwargs or {}))


def test_the_reference_divides_by_tensors():
    """By a number, PyTorch multiplies with its reciprocal on a GPU: other bits than the CPU's."""
    with dispatch.use_backend("reference"), Divisors() as mode:
        b, transitions = oracle.batch(3, (3, 5, 7)), flow_sde(oracle.SIGMAS)
        v = b.velocity.requires_grad_()
        out, lp = sde_step(v.detach(), b.sample, transitions, b.step, seeds=b.seeds)
        log_prob(v, b.sample, out, transitions, b.step).sum().backward()
        grpo_loss(
            v, b.sample, out, lp, b.advantages, transitions, b.step, ref_velocity=b.ref,
            kl_weight=0.1, old_velocity=b.old, row_weight=b.weight,
        ).loss.backward()  # fmt: skip
        n = oracle.nft_batch(3, (2, 5))
        nft_loss(
            n.velocity.requires_grad_(), *n.args[1:], ref_velocity=n.ref, row_weight=n.weight
        ).loss.backward()
        for op in ("norm second", "heads rotary"):
            cases.gradients(cases.ours, op, cases.leaves(cases.inputs(op, torch.float32)))
    assert len(mode.found) > 15 and all(isinstance(d, torch.Tensor) for d in mode.found)
