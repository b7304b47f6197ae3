"""Suite kernels: its baseline computes what the fused ops compute; records have their format.

A smoke run of it is in the rehearsal of test_run_all.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

import bench_kernels
from flowgrpo_kernels import flow_sde, grpo_loss, nft_loss, sde_step
from providers import diffusion_nft_ops, flow_grpo_ops
from reporting import records

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROW = {"suite", "case", "provider", "metric", "value", "unit"}
RECORD = {"device", "driver", "versions", "commit", "command", "date", "rows"}


def test_the_baseline_computes_what_we_compute():
    """Same step, log_prob, loss and gradient as ours up to float32 rounding: a fair comparison."""
    sigmas = torch.linspace(1, 0, 11, dtype=torch.float64)
    scheduler, transitions = flow_grpo_ops.Scheduler(sigmas), flow_sde(sigmas, 0.7)
    torch.manual_seed(1)
    v, x, ref = torch.randn(3, 5, 4, 8, 8)
    steps = torch.tensor([0, 2, 4, 6, 8])
    timestep = scheduler.timesteps[steps]
    torch.manual_seed(2)
    prev, score, _, _ = flow_grpo_ops.step(scheduler, v, timestep, x)
    torch.manual_seed(2)
    noise = torch.randn(v.shape)
    ours, lp = sde_step(v, x, transitions, steps, noise=noise)
    torch.testing.assert_close(ours, prev, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lp, score, rtol=2e-5, atol=2e-5)

    old, adv = lp + torch.tensor([0.2, -0.2, 0.01, 0.0, 0.3]), torch.linspace(-3, 7, 5)
    a, b = v.clone().requires_grad_(), v.clone().requires_grad_()
    theirs, metrics = flow_grpo_ops.loss(scheduler, a, timestep, x, ours, old, adv, ref, beta=0.04)
    out = grpo_loss(b, x, ours, old, adv, transitions, steps, ref_velocity=ref, kl_weight=0.04)
    theirs.backward()
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), theirs.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.kl, metrics["kl_loss"].detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6)


def test_the_baseline_of_nft_computes_what_we_compute():
    """DiffusionNFT's loss with its factor adv_clip / beta as row_weight, and its gradient."""
    torch.manual_seed(1)
    v, x, x0, old, ref = torch.randn(5, 4, 4, 8, 8)
    sigma, advantages = torch.linspace(0.1, 0.9, 4), torch.tensor([-9.0, -1.0, 0.5, 7.0])
    # Its normaliser is float64, and what is divided by it.
    close = {"rtol": 1e-5, "atol": 0, "check_dtype": False}
    for beta in (1.0, 0.1):
        a, b = v.clone().requires_grad_(), v.clone().requires_grad_()
        theirs, metrics = diffusion_nft_ops.micro_step(
            a, x, x0, old, sigma, advantages, ref, kl_weight=0.3, beta=beta
        )
        weight, r = torch.full((4,), 5.0 / beta), (advantages / 5 / 2 + 0.5).clamp(0, 1)
        out = nft_loss(
            b, x, x0, old, sigma, r, beta=beta, ref_velocity=ref, kl_weight=0.3,
            row_weight=weight, kl_row_weight=torch.ones(4),
        )  # fmt: skip
        theirs.backward()
        out.loss.backward()
        torch.testing.assert_close(out.loss.detach(), theirs.detach(), **close)
        torch.testing.assert_close(out.kl, metrics["kl_div"], **close)
        moved = out.old_deviation.mean()
        torch.testing.assert_close(moved, metrics["old_deviate"], **close)
        policy = out.positive_loss + out.negative_loss
        torch.testing.assert_close(policy, metrics["policy_loss"], **close)
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-7)


def test_cases_are_chosen_by_parts_of_their_names():
    chosen = bench_kernels.cases(bench_kernels.SHAPES, "loss sd3-512 b1 ,nft flux-512 b4")
    assert [case.name for case in chosen] == [
        "loss sd3-512 b1 float32/float32", "nft flux-512 b4 float32/float32"
    ]  # fmt: skip
    assert len(bench_kernels.cases(bench_kernels.SHAPES, "")) == 66


def test_bytes_of_one_call(tmp_path):
    """The loss makes one gradient; the step writes where it is told. 16 KiB and more, so that the
    handful of floats a row does not show."""
    out = tmp_path / "memory.json"
    case = ["--cases", "sd3-512 b1 ", "--device", "cpu", "--out", str(out)]
    assert bench_kernels.main(["--smoke", "--memory", *case]) == 0
    rows = json.loads(out.read_text())["rows"]
    elements = 16 * 64 * 64
    found = {(r["case"].split()[0], r["provider"]): r["value"] / elements for r in rows}
    assert {r["suite"] for r in rows} == {"memory"} and {r["unit"] for r in rows} == {"bytes"}
    for op in ("loss", "loss-kl", "nft", "nft-kl"):
        assert 4 <= found[op, "ours"] < 4.1 and found[op, "eager"] >= 16
    for op in ("step", "step-cfg"):
        assert found[op, "ours"] < 0.1 and found[op, "eager"] >= 16


def test_a_smoke_run_is_no_record():
    args = argparse.Namespace(out=None, smoke=True, device="cpu")
    assert records.RESULTS not in records.output_path("kernels", args).parents
    args.smoke = False
    assert records.output_path("kernels", args) == records.RESULTS / "kernels-cpu.json"
    args.out = Path("mine.json")
    assert records.output_path("kernels", args) == Path("mine.json")


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("kernels-*.json")))
def test_recorded_files_have_the_format(path):
    record = json.loads(path.read_text())
    assert set(record) >= RECORD
    assert all(set(row) - {"clocks", "throttled"} == ROW for row in record["rows"])
