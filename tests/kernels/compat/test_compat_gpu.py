"""The drop-ins on a GPU: no synchronisation, and the bits of the CPU's reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flowgrpo_kernels import transition_rows
from flowgrpo_kernels.backends import dispatch
from flowgrpo_kernels.compat import (
    dance_grpo,
    flow_factory,
    flow_grpo,
    miles,
    mixgrpo,
    precise,
    unirl,
    verl_omni,
)
from flowgrpo_kernels.row_laws import LAWS
from support.kernels import oracle

pytestmark = pytest.mark.gpu
STEP = torch.tensor([0, 3, 5, 7])


def calls(device: str) -> dict:
    """A replay and a rollout of every drop-in, at latents and a schedule on a device."""
    b = oracle.batch(4, (3, 5, 7), torch.bfloat16, torch.float32)
    v, x, x_next, seeds = (y.to(device) for y in (b.velocity, b.sample, b.old.float(), b.seeds))
    sigmas = torch.tensor(oracle.SIGMAS, device=device)
    timesteps, step = sigmas[:-1] * 1000, STEP.to(device)
    t, s, p = timesteps[step], sigmas[step], sigmas[step + 1]
    level = torch.tensor([0.7, 0.3, 0.5, 0.0], device=device)
    own = SimpleNamespace(
        sigmas=sigmas, timesteps=timesteps, is_eval=False, dynamics_type="Flow-SDE", step_index=3
    )
    strategy, backend = SimpleNamespace(canonical_name="cps"), miles.FlowSdeStepBackend(own)
    pair = {"noise_level": level, "return_dict": False}
    return {
        "flow_grpo": lambda: flow_grpo.sde_step_with_logprob(own, v, t, x, 0.7, x_next),
        "flow_grpo, a rollout": lambda: flow_grpo.sde_step_with_logprob(
            own, v, t, x, seeds=seeds, storage=torch.bfloat16
        ),
        "flow_grpo, a number": lambda: flow_grpo.sde_step_with_logprob(
            own, v, float(oracle.SIGMAS[3]) * 1000, x, 0.7, x_next
        ),
        "dance_grpo": lambda: dance_grpo.flux_step(v, x, 0.3, sigmas, step[1], x_next, True, True),
        "flow_factory": lambda: flow_factory.step(own, v, t, x, x_next, **pair),
        "flow_factory, a pair": lambda: flow_factory.step(own, v, t, x, x_next, p * 1000, **pair),
        "verl_omni": lambda: verl_omni.sample_previous_step(
            own, x, v, t, noise_level=level, prev_sample=x_next
        ),
        "unirl": lambda: unirl.denoise(
            strategy, v, x, s, p, eta=0.8, prev_sample=x_next, sigma_max=sigmas[1]
        ),
        "mixgrpo": lambda: mixgrpo.flow_grpo_step(v, x, 0.7, sigmas, 3, None, seeds=seeds),
        "miles": lambda: backend.sde_step_logprob(
            v, x, prev_sample=x_next, noise_level=0.7, sigmas=s, next_sigmas=p,
            sigma_max=sigmas[1],
        ),
        "precise": lambda: precise.sde_step_with_logprob(
            own, v, t, x, 1.0, x_next, sde_type="precise"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", calls("cpu"))
def test_no_synchronisation(name):
    with dispatch.use_backend("reference"):
        expected = calls("cpu")[name]()
    call = calls("cuda")[name]
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("law", LAWS)
def test_rows_are_the_bits_of_the_reference(law):
    g = torch.Generator().manual_seed(0)
    pairs = torch.rand(100, 2, generator=g, dtype=torch.float64).sort(1, descending=True).values
    level = 2 * torch.rand(100, generator=g)
    args = (*pairs.unbind(1), level)
    with dispatch.use_backend("reference"):
        want = transition_rows(law, *args, sigma_max=0.9).table
    got = transition_rows(law, *(x.cuda() for x in args), sigma_max=0.9).table
    assert torch.equal(got.cpu(), want)
