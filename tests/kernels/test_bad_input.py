"""Bad input raises TypeError or ValueError naming the argument; unknowable steps give NaN."""

from __future__ import annotations

import os

import pytest
import torch

from flowgrpo_kernels import (
    Transitions,
    checks,
    cps,
    flow_sde,
    grpo_loss,
    log_prob,
    nft_loss,
    ode,
    sde_step,
)
from flowgrpo_kernels.backends import dispatch
from support import torch_fork
from support.kernels import oracle

TRANSITIONS = flow_sde(oracle.SIGMAS)
B = oracle.batch(3, (4, 5))
STEP = {"velocity": B.velocity, "sample": B.sample, "transitions": TRANSITIONS, "step": B.step}
SCORE = {**STEP, "prev_sample": B.old}
LOSS = {**SCORE, "old_log_prob": torch.zeros(3), "advantages": B.advantages}
N = oracle.nft_batch(3, (4, 5))
NFT = dict(
    zip(("velocity", "sample", "x0", "old_velocity", "sigma", "optimality"), N.args, strict=True)
)
CALLS = {
    "sde_step": (sde_step, {**STEP, "seeds": B.seeds}),
    "log_prob": (log_prob, SCORE),
    "grpo_loss": (grpo_loss, LOSS),
}
meta = B.velocity.to("meta")
# Batches whose rows lie one row apart in the same memory.
ROWS = torch.zeros(4, 4, 5)
ROWS_ABOVE = ROWS[1:]

EVERY = [
    ("velocity", B.velocity.tolist(), TypeError),
    ("velocity", B.velocity.int(), TypeError),
    ("velocity", B.velocity.double(), TypeError),
    ("velocity", B.velocity[:2], ValueError),
    ("velocity", B.velocity[:, :, :1], ValueError),
    ("velocity", meta, ValueError),
    ("sample", B.sample.to(torch.complex64), TypeError),
    ("sample", torch.ones(3), ValueError),
    ("transitions", TRANSITIONS.table, TypeError),
    ("transitions", TRANSITIONS.to("meta"), ValueError),
    ("step", 9, ValueError),
    ("step", -1, ValueError),
    ("step", True, TypeError),
    ("step", 1.0, TypeError),
    ("step", torch.tensor(1.0), TypeError),
    ("step", torch.tensor([0, 1]), ValueError),
    ("step", torch.tensor([0, 1, 9]), ValueError),
    ("step", torch.tensor([[0, 1, 2]]), ValueError),
    ("step", torch.tensor([0, 1, 2], dtype=torch.int32), TypeError),
    ("step", torch.tensor([0, 1, 2], device="meta"), ValueError),
    ("uncond_velocity", B.velocity[:1], ValueError),
    ("guidance_scale", 4.5, ValueError),
    ("guidance_scale", torch.tensor(4.5), TypeError),
]
OWN = [
    ("sde_step", "seeds", None, ValueError),
    ("sde_step", "seeds", [1, 2, 3], TypeError),
    ("sde_step", "seeds", B.seeds.int(), TypeError),
    ("sde_step", "seeds", B.seeds[:2], ValueError),
    ("sde_step", "noise", B.velocity, ValueError),
    ("sde_step", "out", torch.zeros(3, 4, 5, dtype=torch.bfloat16), ValueError),
    ("sde_step", "out", torch.zeros(3, 5, 4).mT, ValueError),
    ("sde_step", "out", B.sample, ValueError),
    ("sde_step", "out", ROWS_ABOVE, ValueError),
    ("sde_step", "log_prob_out", torch.zeros(2), ValueError),
    ("sde_step", "log_prob_out", torch.zeros(3, dtype=torch.float16), ValueError),
    ("log_prob", "prev_sample", B.old[:2], ValueError),
    ("log_prob", "prev_sample", None, TypeError),
    ("log_prob", "uncond_grad", True, ValueError),
    ("grpo_loss", "old_log_prob", None, TypeError),
    ("grpo_loss", "old_log_prob", torch.zeros(3, dtype=torch.int64), TypeError),
    ("grpo_loss", "advantages", torch.zeros(3, 1), ValueError),
    ("grpo_loss", "row_weight", torch.zeros(2), ValueError),
    ("grpo_loss", "kl_row_weight", torch.zeros(3, device="meta"), ValueError),
    ("grpo_loss", "kl_weight", 0.1, ValueError),
    ("grpo_loss", "kl_weight", float("nan"), ValueError),
    ("grpo_loss", "clip_range", -1e-4, ValueError),
    ("grpo_loss", "clip_range", (0.1,), ValueError),
    ("grpo_loss", "clip_range", (1.1, 0.1), ValueError),
    ("grpo_loss", "clip_range", float("nan"), ValueError),
    ("grpo_loss", "adv_clip", 0.0, ValueError),
    ("grpo_loss", "adv_clip", torch.tensor(5.0), TypeError),
    ("grpo_loss", "kl_weight", torch.tensor(0.0), TypeError),
    ("grpo_loss", "clip_range", torch.tensor(0.1), TypeError),
    ("grpo_loss", "clip_range", (0.1, torch.tensor(0.1)), TypeError),
    ("grpo_loss", "ref_velocity", B.ref[:1], ValueError),
    ("grpo_loss", "ref_uncond_velocity", B.ref, ValueError),
]
OF_NFT = [
    *[case for case in EVERY if case[0] not in ("transitions", "step")],
    ("x0", None, TypeError),
    ("x0", N.x0[:, :1], ValueError),
    ("x0", N.x0.clone().requires_grad_(), ValueError),
    ("old_velocity", None, TypeError),
    ("old_velocity", N.old.clone().requires_grad_(), ValueError),
    ("sigma", None, TypeError),
    ("sigma", 0.5, TypeError),
    ("sigma", 1000 * N.sigma, ValueError),
    ("sigma", torch.tensor([0.5, -1e-6, 0.5]), ValueError),
    ("sigma", torch.tensor([0, 1, 0]), TypeError),
    ("sigma", N.sigma[:2], ValueError),
    ("optimality", torch.tensor([0.5, 1.5, 0.0]), ValueError),
    ("optimality", torch.tensor([0.5, 0.5, -0.5]), ValueError),
    ("optimality", torch.zeros(3, 1), ValueError),
    ("optimality", torch.zeros(3, device="meta"), ValueError),
    ("row_weight", torch.zeros(2), ValueError),
    ("kl_row_weight", torch.zeros(3, dtype=torch.int64), TypeError),
    ("beta", 0.0, ValueError),
    ("beta", -1.0, ValueError),
    ("beta", float("nan"), ValueError),
    ("beta", torch.tensor(1.0), TypeError),
    ("floor", 0, ValueError),
    ("floor", 1e-40, ValueError),
    ("floor", float("inf"), ValueError),
    ("kl_weight", 0.1, ValueError),
    ("kl_weight", -0.1, ValueError),
    ("ref_velocity", N.ref[:1], ValueError),
    ("ref_uncond_velocity", N.ref, ValueError),
    ("uncond_grad", True, ValueError),
]
CASES = [(op, *case) for op in CALLS for case in EVERY] + OWN
CASES += [("nft_loss", *case) for case in OF_NFT]
CALLS["nft_loss"] = (nft_loss, NFT)


@pytest.mark.parametrize(("op", "name", "value", "error"), CASES)
def test_names_the_argument(op, name, value, error):
    function, kwargs = CALLS[op]
    if value is ROWS_ABOVE:
        kwargs = {**kwargs, "sample": ROWS[:3]}
    function(**kwargs)
    with pytest.raises(error, match=name):
        function(**{**kwargs, name: value})


def test_guard_needs_a_gaussian():
    with pytest.raises(ValueError, match=r"old_velocity.*cps"):
        grpo_loss(**{**LOSS, "transitions": cps(oracle.SIGMAS)}, old_velocity=B.old)


def test_gradients_are_not_lost_in_silence():
    for op in ("log_prob", "grpo_loss"):
        function, kwargs = CALLS[op]
        for name in ("sample", "prev_sample"):
            with pytest.raises(ValueError, match=f"{name} is a constant"):
                function(**{**kwargs, name: kwargs[name].clone().requires_grad_()})
    call = {**STEP, "noise": B.old}
    new = {"out": torch.zeros_like(B.sample), "log_prob_out": torch.zeros(3)}
    for name in ("velocity", "sample", "noise", "out", "log_prob_out"):
        value = (call | new)[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"{name} requires one.*log_prob"):
            sde_step(**{**call, name: value})
        with torch.no_grad():
            sde_step(**{**call, name: value})


def test_no_noise_for_an_ode():
    deterministic = {**STEP, "transitions": ode(oracle.SIGMAS)}
    bare, drawn = sde_step(**deterministic), sde_step(**deterministic, seeds=B.seeds)
    assert torch.equal(bare[0], drawn[0])
    mixed = Transitions.cat(TRANSITIONS, ode(oracle.SIGMAS))
    with pytest.raises(ValueError, match="seeds or noise"):
        sde_step(**{**STEP, "transitions": mixed})


def test_unknowable_step_gives_nan(backend):
    """What a GPU tensor could hold: checked on the device, never read out of bounds."""
    step = torch.tensor([3, 9, -1])
    table, out, lp = TRANSITIONS.table, torch.zeros(3, 4, 5), torch.zeros(3)
    plain = (B.velocity, None, 1.0, B.sample)
    dispatch.op("sde_step")(*plain, table, step, B.seeds, None, out, lp)
    assert lp.isnan().tolist() == [False, True, True]
    assert out.isnan().all(-1).all(-1).tolist() == [False, True, True]
    assert dispatch.op("log_prob")(*plain, B.old, table, step).isnan().tolist() == [
        False,
        True,
        True,
    ]
    grad, _ = dispatch.op("log_prob_backward")(torch.ones(3), *plain, B.old, table, step, False)
    assert grad.isnan().all(-1).all(-1).tolist() == [False, True, True]


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))


def test_debug_switch_looks_at_steps_on_the_device(monkeypatch):
    sample = B.sample.as_subclass(Elsewhere)
    step = torch.tensor([3, 9, -1]).as_subclass(Elsewhere)
    monkeypatch.setattr(checks, "DEBUG", False)
    assert checks.resolve_step(step, TRANSITIONS, sample).tolist() == [3, 9, -1]
    monkeypatch.setattr(checks, "DEBUG", True)
    with pytest.raises(ValueError, match=r"step must be in \[0, 8\], got values from -1 to 9"):
        checks.resolve_step(step, TRANSITIONS, sample)
    assert checks.resolve_step(step[:1], TRANSITIONS, sample[:1]).tolist() == [3]


def test_debug_switch_is_read_from_the_environment():
    code = "from flowgrpo_kernels import checks; print(checks.DEBUG)"
    for value in ("0", "1"):
        done = torch_fork.run(code, env={**os.environ, "FLOWGRPO_DEBUG": value})
        assert done.stdout.strip() == str(value == "1")
