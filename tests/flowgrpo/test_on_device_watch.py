"""The watch over the meta device: what it takes for waiting, and how it counts."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
import torch.nn.functional as F

from measuring import on_meta
from models import configurations
from models.cases import Case
from providers import ours


def device(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


WAITING = {
    "item": lambda x: x[0].item(),
    "if": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "from host": lambda x: torch.zeros(4).to("meta"),
    "copy_": lambda x: x.copy_(torch.zeros(4)),
    "of numbers": lambda x: torch.tensor([1, 2], device="meta"),
    "as_tensor": lambda x: torch.as_tensor([1, 2], device="meta"),
    "list index": lambda x: x[[0, 1]],
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x.masked_fill(x > 0, 0).gt(0).equal(x),
}
SILENT = {
    "arithmetic": lambda x: (x * 2 + 1).exp().sum(),
    "number on the host": lambda x: x * torch.tensor(2.0),
    "index": lambda x: x[device(2, dtype=torch.int64)],
    "slice": lambda x: x[1:, None].expand(3, 5),
    "where": lambda x: torch.where(x > 0, x, 0),
    "arange": lambda x: torch.arange(4, device="meta") + torch.full([4], 3.0, device="meta"),
}


@pytest.mark.parametrize("name", [*WAITING, *SILENT])
def test_waits(name):
    with on_meta.watching() as watch:
        {**WAITING, **SILENT}[name](device(4))
    assert len(watch.waits) == (name in WAITING), watch.waits


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.zeros(4),
        lambda x: x[torch.zeros(2, dtype=torch.int64)],
        lambda x: torch.zeros(4)[device(2, dtype=torch.int64)],
        lambda x: torch.cat([x, torch.zeros(4)]),
        lambda x: x.view(2, 2) @ torch.zeros(2, 2),
        lambda x: x.gather(0, torch.tensor([0])),
    ],
    ids=["add", "host index", "device index", "cat", "matmul", "gather"],
)
def test_tensors_of_host_and_device_do_not_mix(mixed):
    with on_meta.watching(), pytest.raises(on_meta.MixedDevices, match="cpu"):
        mixed(device(4))


@pytest.mark.slow
def test_bytes_alive_and_at_most():
    with on_meta.watching() as watch:
        a = device(1000)
        assert watch.live == 4096
        b = a[:10].view(5, 2)
        c = a + 1
        assert watch.live == watch.most == 2 * 4096
        del a, c
        assert watch.live == 4096, "a view keeps its memory"
        del b
        gc.collect()
        assert watch.live == 0 and watch.most == 2 * 4096
        watch.restart()
        assert watch.most == 0


def test_bytes_that_autograd_keeps():
    with on_meta.watching() as watch:
        weight = device(256, 256).requires_grad_()
        x = device(128, 256)
        watch.restart()
        base = watch.live
        y = F.gelu(x @ weight)
        assert watch.live - base == 2 * 128 * 256 * 4
        y.sum().backward()
        del y
        assert watch.live - base == 256 * 256 * 4, "the gradient alone"


def test_launches_are_operations_that_compute():
    with on_meta.watching() as watch:
        x = device(8, 8)
        (x.t().reshape(64)[None] + 1).mul_(2)
        torch.empty_like(x)
    assert dict(watch.operations) == {"aten.clone": 1, "aten.add": 1, "aten.mul_": 1}


def test_attention_has_no_matrix_of_scores():
    with on_meta.watching() as watch:
        q, k, v = (device(1, 2, 4096, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert watch.most < 4096 * 4096 * 2
    assert watch.operations["aten._scaled_dot_product_flash_attention_backward"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", ["velocity", "loss"])
def test_a_wait_in_the_trainers_own_code_is_found(monkeypatch, place):
    """The mutations that test_on_device.py is there for."""

    provider_case = Case(configurations.TINY_SD3, 2, 3, window=1)
    with on_meta.watching() as watch:
        provider = ours.Ours(provider_case, "meta")
        policy = provider.components.policy
        own = type(policy)._velocity

        def reading(self, sample, sigma, conditioning):
            float(sigma[0])
            return own(self, sample, sigma, conditioning)

        def mixing(schedule, experience, rows, turns):
            batch = gather(schedule, experience, rows, turns)
            return type(batch)(**{**vars(batch), "weights": torch.ones(len(batch.weights))})

        if place == "velocity":
            monkeypatch.setattr(type(policy), "_velocity", reading)
            watch.restart()
            provider.rollout()
            assert sum("_local_scalar_dense" in line for line in watch.waits) == 3
            return
        micro_step = provider.components.micro_step
        gather = micro_step.objective.gather
        trajectory = provider.rollout()
        objective = dataclasses.replace(micro_step.objective, gather=mixing)
        monkeypatch.setattr(micro_step, "objective", objective)
        with pytest.raises((on_meta.MixedDevices, ValueError), match="cpu"):
            provider.update(trajectory)
