"""Numbers of every op: NumPy's where Python's are taken, nothing else, nothing that overflows."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from flowgrpo_kernels import flow_sde, grpo_loss, initial_noise, log_prob, nft_loss, sde_step
from flowgrpo_kernels.blocks import joint_heads, norm_modulate
from flowgrpo_kernels.compat.dance_grpo import flux_step
from support.kernels import oracle

TRANSITIONS = flow_sde(oracle.SIGMAS)
B = oracle.batch(3, (4, 6))
SCORE = {
    "velocity": B.velocity, "sample": B.sample, "prev_sample": B.old, "transitions": TRANSITIONS,
    "step": 3, "uncond_velocity": B.uncond, "guidance_scale": 2.0,
}  # fmt: skip
STEP = {name: x for name, x in SCORE.items() if name != "prev_sample"} | {"seeds": B.seeds}
LOSS = SCORE | {
    "old_log_prob": torch.zeros(3), "advantages": B.advantages, "ref_velocity": B.ref,
    "kl_weight": 0.25, "clip_range": 0.5, "adv_clip": 1.0,
}  # fmt: skip
HALF = torch.full((3,), 0.5)
NFT = {name: x for name, x in SCORE.items() if name not in ("prev_sample", "transitions", "step")}
NFT |= {
    "x0": B.old, "old_velocity": B.ref, "sigma": HALF, "optimality": HALF, "ref_velocity": B.ref,
    "kl_weight": 0.25, "beta": 0.5, "floor": 0.25,
}  # fmt: skip
ROW = torch.ones(3, 6)
NORM = {"x": B.sample, "scale": ROW, "shift": ROW, "eps": 0.5}
HEADS = {"streams": [B.sample], "weights": [None], "heads": 2, "eps": 0.5}
FLUX = {
    "model_output": B.velocity, "latents": B.sample, "eta": 0.5, "index": 3, "prev_sample": B.old,
    "sigmas": torch.tensor(oracle.SIGMAS), "grpo": True, "sde_solver": True,
}  # fmt: skip
NOISE = {"seeds": B.seeds, "shape": (2, 3)}
FLOATS = [
    (sde_step, STEP, "guidance_scale"),
    (log_prob, SCORE, "guidance_scale"),
    (grpo_loss, LOSS, "guidance_scale"),
    (grpo_loss, LOSS, "kl_weight"),
    (grpo_loss, LOSS, "clip_range"),
    (grpo_loss, LOSS, "adv_clip"),
    (nft_loss, NFT, "guidance_scale"),
    (nft_loss, NFT, "kl_weight"),
    (nft_loss, NFT, "beta"),
    (nft_loss, NFT, "floor"),
    (norm_modulate, NORM, "eps"),
    (joint_heads, HEADS, "eps"),
    (flux_step, FLUX, "eta"),
]
INTEGERS = [
    (sde_step, STEP, "step"),
    (log_prob, SCORE, "step"),
    (grpo_loss, LOSS, "step"),
    (joint_heads, HEADS, "heads"),
    (flux_step, FLUX, "index"),
]


def name_of(value) -> str:
    return getattr(value, "__name__", str(value)) if not isinstance(value, dict) else ""


def same(got, expected) -> None:
    """Equal tensors, in tuples or alone."""
    got, expected = ((x,) if isinstance(x, torch.Tensor) else tuple(x) for x in (got, expected))
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("function", "call", "name"), FLOATS, ids=name_of)
def test_floats(function, call, name):
    expected = function(**call)
    for make in (np.float16, np.float32, np.float64, Fraction):
        same(function(**call | {name: make(call[name])}), expected)
    one = function(**call | {name: 1})
    same(function(**call | {name: np.int64(1)}), one)
    for value in (
        "0.5",
        None,
        True,
        np.bool_(True),
        [0.5, 0.5, 0.5],
        np.array(0.5),
        0.5j,
        B.sample,
    ):
        with pytest.raises(
            TypeError if name != "clip_range" else (TypeError, ValueError), match=name
        ):
            function(**call | {name: value})


@pytest.mark.parametrize(("function", "call", "name"), FLOATS, ids=name_of)
def test_floats_beyond_float32(function, call, name):
    """NaN never is a number that is meant; a bound may be infinite, a factor may not."""
    with pytest.raises(ValueError, match=name if name != "eta" else "noise_level"):
        function(**call | {name: float("nan")})
    for value in (1e39, float("inf"), 10**400):
        if name not in ("adv_clip", "clip_range") or value == 10**400:
            with pytest.raises(ValueError, match=name if name != "eta" else "eta|noise_level|C ="):
                function(**call | {name: value})
            continue
        value = value if name == "adv_clip" else (0.5, value)
        expected = float("inf") if name == "adv_clip" else (0.5, float("inf"))
        same(function(**call | {name: value}), function(**call | {name: expected}))


def test_an_infinite_bound_is_none(backend):
    """adv_clip and clip_high of infinity, and of what float32 rounds to it, clip nothing."""
    call = LOSS | {"advantages": torch.tensor([1e6, -1e6, 3.0]), "clip_range": (1.0, math.inf)}
    for bound in (math.inf, 1e300, 3.0e38):
        out = grpo_loss(**call | {"adv_clip": bound, "kl_weight": 0.0, "ref_velocity": None})
        expected = -(out.ratio.double() * call["advantages"].double()).mean()
        assert out.clip_fraction == 0
        torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("function", "call", "name"), INTEGERS, ids=name_of)
def test_integers(function, call, name):
    expected = function(**call)
    for make in (np.int64, np.int32, np.uint8, np.array):
        same(function(**call | {name: make(call[name])}), expected)
    for value in ("3", None, True, np.bool_(True), 3.0, np.float64(3.0), [3], np.array([3, 3, 3])):
        with pytest.raises(TypeError, match=f"{name} must be"):
            function(**call | {name: value})


def test_shape_of_noise():
    expected = initial_noise(**NOISE)
    for shape in ([np.int64(2), np.int32(3)], torch.Size([2, 3])):
        same(initial_noise(B.seeds, shape), expected)
    for shape in ([2.7, 3], ["2", 3], [True, 3], [torch.tensor(2), 3], 6, "23", None):
        with pytest.raises(TypeError, match="shape must be"):
            initial_noise(B.seeds, shape)
    for shape in ([-1, 3], [2**62, 3], [2**31, 2**31], [2**64]):
        with pytest.raises(ValueError, match="shape must"):
            initial_noise(B.seeds, shape)


def test_uncond_grad_is_a_bool():
    for function, call in ((log_prob, SCORE), (grpo_loss, LOSS), (nft_loss, NFT)):
        for value in (2, "yes", None, 1.0, torch.tensor(True), np.array(True)):
            with pytest.raises(TypeError, match="uncond_grad must be a bool"):
                function(**call, uncond_grad=value)
        for value in (np.bool_(True), 1):
            u = B.uncond.clone().requires_grad_()
            out = function(**call | {"uncond_velocity": u}, uncond_grad=value)
            (out if function is log_prob else out.loss).sum().backward()
            assert u.grad.abs().sum() > 0


def test_sigmas_of_flux_step():
    """A list, a tuple or an array of numbers, as a tensor; DanceGRPO indexes what it is given."""
    for grpo in (True, False):
        call = FLUX | {"grpo": grpo, "prev_sample": None, "seeds": B.seeds}
        expected = flux_step(**call | {"sigmas": torch.tensor(oracle.SIGMAS, dtype=torch.float64)})
        for sigmas in (list(oracle.SIGMAS), oracle.SIGMAS, np.array(oracle.SIGMAS)):
            same(flux_step(**call | {"sigmas": sigmas}), expected)
    # A list that was changed is another schedule.
    sigmas = list(oracle.SIGMAS)
    first = flux_step(**FLUX | {"sigmas": sigmas})
    sigmas[4] = 0.75
    assert not torch.equal(first[2], flux_step(**FLUX | {"sigmas": sigmas})[2])
