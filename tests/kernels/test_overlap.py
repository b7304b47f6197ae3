"""sde_step refuses buffers that overlap what it reads, or each other, and writes beside them."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from flowgrpo_kernels import flow_sde, sde_step
from support.kernels import oracle

TRANSITIONS = flow_sde(oracle.SIGMAS)
ROWS, SIZE = 2, 8192
LATENTS = ("velocity", "uncond_velocity", "sample", "noise")


def arguments(noise: bool) -> dict:
    """Arguments of a guided step; each latent at the start of a storage twice its size."""
    g = torch.Generator().manual_seed(0)
    call = {
        name: torch.randn(2 * ROWS, SIZE, generator=g)[:ROWS]
        for name in LATENTS
        if noise or name != "noise"
    }
    call |= {"transitions": TRANSITIONS, "step": torch.tensor([3, 5]), "guidance_scale": 3.0}
    return call if noise else {**call, "seeds": torch.tensor([7, 9])}


def beside(x: torch.Tensor, offset: int, shape=(ROWS, SIZE)) -> torch.Tensor:
    """A float32 tensor in the storage of x, `offset` elements of float32 behind its start."""
    flat = x.new_empty(0, dtype=torch.float32).set_(x.untyped_storage())
    start = x.storage_offset() * x.element_size() // 4 + offset
    return (
        flat[start : start + shape[0] * shape[-1]].view(shape)
        if len(shape) > 1
        else (flat[start : start + shape[0]])
    )


@pytest.mark.parametrize("name", LATENTS)
@pytest.mark.parametrize("offset", [0, 1, 64, SIZE, ROWS * SIZE - 1])
def test_out_over_an_input(backend, name, offset):
    """Once the native backend read what it had written, and differed from the reference."""
    call = arguments(noise=name == "noise")
    with pytest.raises(ValueError, match=f"out must not be the memory of {name}, nor overlap"):
        sde_step(**call, out=beside(call[name], offset))


@pytest.mark.parametrize("name", LATENTS)
def test_out_behind_an_input(backend, name):
    """The next rows of one buffer, as a trajectory holds them."""
    call = arguments(noise=name == "noise")
    expected, lp = sde_step(**call)
    before = call[name].clone()
    out, score = sde_step(**call, out=beside(call[name], ROWS * SIZE))
    assert torch.equal(out, expected) and torch.equal(score, lp)
    assert torch.equal(call[name], before)


@pytest.mark.parametrize("name", [*LATENTS, "seeds", "step", "transitions"])
def test_log_prob_out_over_an_input(backend, name):
    call = arguments(noise=name == "noise")
    read = TRANSITIONS.table if name == "transitions" else call[name]
    for offset in (0, 2):
        with pytest.raises(ValueError, match=f"log_prob_out must not be the memory of {name}"):
            sde_step(**call, log_prob_out=beside(read, offset, (ROWS,)))


def test_the_two_buffers_over_each_other(backend):
    call, buffer = arguments(noise=False), torch.zeros(ROWS * SIZE + ROWS)
    for offset in (0, 17, ROWS * SIZE - ROWS):
        with pytest.raises(ValueError, match=r"out must not be the memory of .*out"):
            sde_step(
                **call,
                out=beside(buffer, 0),
                log_prob_out=beside(buffer, offset, (ROWS,)),
            )
    expected, lp = sde_step(**call)
    out = beside(buffer, 0)
    sde_step(**call, out=out, log_prob_out=beside(buffer, ROWS * SIZE, (ROWS,)))
    assert torch.equal(out, expected) and torch.equal(buffer[-ROWS:], lp)


def test_buffers_between_the_rows_of_an_input(backend):
    """An input that is not contiguous is copied first, so a buffer may lie between its rows."""
    call = arguments(noise=False)
    expected, lp = sde_step(**call)
    storage = torch.zeros(ROWS, 3, SIZE)
    # Rows of velocity 0 and 2; between them what one row of a batch is written to.
    storage[:, 0] = call["velocity"]
    call["velocity"] = storage[:, 0]
    row = {
        name: x[:1] if isinstance(x, torch.Tensor) else x
        for name, x in call.items()
        if name != "velocity"
    }
    row["velocity"] = call["velocity"][:1]
    out, score = sde_step(**row, out=storage[0, 1:2])
    assert torch.equal(out, expected[:1]) and torch.equal(score, lp[:1])
    with pytest.raises(ValueError, match="out must not be the memory of velocity"):
        sde_step(**call, out=storage.view(-1)[: ROWS * SIZE].view(ROWS, SIZE))


def test_nothing_to_overlap_in_an_empty_batch(backend):
    call = {
        name: x[:0] if isinstance(x, torch.Tensor) else x
        for name, x in arguments(noise=False).items()
    }
    out, lp = sde_step(**call, out=call["velocity"], log_prob_out=torch.zeros(0))
    assert out.shape == (0, SIZE) and lp.shape == (0,)


def test_a_tracer_whose_tensors_have_no_address(backend):
    """Buffers are compared where they are, not where a call is only written down."""
    call = {**arguments(noise=True), "step": 3}
    expected, lp = sde_step(**call)

    def step(out, score, latents):
        return sde_step(**{**call, **latents}, out=out, log_prob_out=score)

    latents = {name: call[name] for name in LATENTS}
    buffers = torch.zeros(ROWS, SIZE), torch.zeros(ROWS)
    traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*buffers, latents)
    out, score = traced(*buffers, latents)
    assert torch.equal(out, expected) and torch.equal(score, lp)
