"""What a call launches and what makes it compile again, by Triton's own path without a GPU.

support/kernels/launch_cases.py runs in a process without the interpreter, under the driver of
launch_recorder.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support import torch_fork

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[2]

STREAM, FINISH = "sde_step_kernel", "finish_kernel"
FORWARD = ("grpo_loss_sums_kernel", "grpo_loss_rows_kernel", "grpo_loss_totals_kernel")
BACKWARD = "grpo_loss_backward_kernel"
NFT = ("nft_loss_sums_kernel", "nft_loss_rows_kernel", "nft_loss_totals_kernel")
NFT_BACKWARD = "nft_loss_backward_kernel"
NORM, GATE = "norm_modulate_kernel", "gated_residual_kernel"
# Of every kind of call: what it launches, and what its first call compiles. Further calls of a kind
# differ in the step, the batch, coefficients, strides or addresses, and compile nothing.
KINDS = {
    "sde_step": ([STREAM, FINISH], {STREAM, FINISH}),
    "sde_step guided": ([STREAM, FINISH], {STREAM}),
    "sde_step float32": ([STREAM, FINISH], {STREAM}),
    # Rows that begin anywhere need narrow accesses; a row of one block needs no second launch.
    "sde_step odd": ([STREAM], {STREAM}),
    # The second pass has three widths: for up to 32 blocks, up to 128, and more.
    "sde_step 64 blocks": ([STREAM, FINISH], {FINISH}),
    # From some number of blocks on, a program has a whole one.
    "sde_step 70000 blocks": ([STREAM, FINISH], {STREAM, FINISH}),
    # The number of elements no longer fits 32 bits.
    "sde_step past 2^31": ([STREAM, FINISH], {STREAM, FINISH}),
    "log_prob": (["log_prob_kernel", FINISH], {"log_prob_kernel"}),
    "log_prob with backward": (
        ["log_prob_kernel", FINISH, "log_prob_backward_kernel"],
        {"log_prob_backward_kernel"},
    ),
    "sde_step mean": ([STREAM, FINISH], {STREAM}),
    "log_prob mean": (
        ["log_prob_kernel", FINISH, "log_prob_backward_kernel"],
        {"log_prob_kernel", "log_prob_backward_kernel"},
    ),
    "transition_rows": (["transition_rows_kernel"], {"transition_rows_kernel"}),
    "initial_noise": (["initial_noise_kernel"], {"initial_noise_kernel"}),
    "loss": ([*FORWARD, BACKWARD], {*FORWARD, BACKWARD}),
    "loss KL": ([*FORWARD, BACKWARD], {*FORWARD, BACKWARD}),
    "loss guided KL": ([*FORWARD, BACKWARD], {FORWARD[0], BACKWARD}),
    "loss Guard KL": ([*FORWARD, BACKWARD], {*FORWARD[:2], BACKWARD}),
    "nft": ([*NFT, NFT_BACKWARD], {*NFT, NFT_BACKWARD}),
    "nft KL": ([*NFT, NFT_BACKWARD], {*NFT, NFT_BACKWARD}),
    "nft guided KL": ([*NFT, NFT_BACKWARD], {NFT[0], NFT_BACKWARD}),
    "norm second": ([NORM, "norm_modulate_backward_kernel"], None),
    "gate second": ([GATE, "gated_residual_backward_kernel"], None),
    "heads rotary": (["joint_heads_kernel", "joint_heads_backward_kernel"], None),
}
ONE_WARP = (FINISH, *FORWARD[1:], *NFT[1:], "transition_rows_kernel")


@pytest.fixture(scope="session")
def lines() -> dict[str, dict]:
    code = "from support.kernels.launch_cases import main; main()"
    done = torch_fork.run(code, cwd=TESTS, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.fixture
def calls(lines) -> dict[str, dict]:
    return {case: line for case, line in lines.items() if case != "ahead"}


def kind(case: str) -> str:
    return case.split(",")[0]


def test_every_kind_is_called(calls):
    assert {kind(case) for case in calls} == set(KINDS)
    assert len(calls) > 70


@pytest.mark.parametrize("name", KINDS)
def test_launches(calls, name):
    """The number that docstrings state: a rollout's step 1 or 2, a micro-step 4, a block's op 1."""
    chosen = [call for case, call in calls.items() if kind(case) == name]
    for call in chosen:
        assert [launch["kernel"] for launch in call["kernels"]] == KINDS[name][0], call["case"]
    assert not name.startswith(("loss", "nft")) or len(KINDS[name][0]) == 4


@pytest.mark.parametrize("name", KINDS)
def test_what_compiles(calls, name):
    """The first call of a kind what it needs, the others nothing."""
    launched, first = KINDS[name]
    for case, call in calls.items():
        if kind(case) == name:
            expected = set(launched if first is None else first) if case == name else set()
            assert call["compiled"] == dict.fromkeys(expected, 1), case


def test_pytorch_launches_nothing(calls):
    """No copy, fill or reduction beside the kernels; only rows with gaps are made contiguous."""
    for case, call in calls.items():
        if case.endswith("advantages strided"):
            assert call["torch"].count("aten::copy_") == 1
        # The range of a sigma and an optimality that are CPU tensors is checked, which reads them.
        elif case.startswith("nft"):
            assert set(call["torch"]) <= {"aten::resolve_conj", "aten::resolve_neg"}, case
        # The range of a step that is a CPU tensor is checked, which takes reductions.
        elif not case.endswith(("step 0-dim", "step [B]", "step strided", "step odd")):
            assert call["torch"] == [], case


def test_options(calls):
    """No fused multiply-add; four warps where latents are streamed, one where sums are added up."""
    for case, call in calls.items():
        for launch in call["kernels"]:
            assert launch["fusion"] is False
            one = launch["kernel"] in ONE_WARP and "70000" not in case and "2^31" not in case
            if kind(case).split()[0] in ("sde_step", "log_prob", "loss", "nft", "transition_rows"):
                assert launch["warps"] == (1 if one else 4), (case, launch)
            # Nothing changes its layout through shared memory but a sum, which exchanges the chunks
            # of a quarter at the end. Gradients have none, nor a step with a block a program.
            most = 4096
            if launch["kernel"] in (BACKWARD, NFT_BACKWARD, "log_prob_backward_kernel"):
                most = 0
            elif launch["kernel"] == STREAM and "70000 blocks" in case:
                most = 128
            assert launch["shared"] <= most, (case, launch)


def test_grids(calls):
    """Four programs a block of 4096 elements, or one, or one a row, on the axis with most room."""
    blocks, seen = {"sde_step": 16, "loss KL": 16, "sde_step 70000 blocks": 70_000}, set()
    for case, call in calls.items():
        grids = [launch["grid"] for launch in call["kernels"]]
        assert all(0 < x < 1 << 31 and [y, z] == [1, 1] for x, y, z in grids), case
        name, _, change = case.partition(", ")
        if name in blocks and change.endswith("rows"):
            rows = int(change.split()[0])
            count = rows * blocks[name]
            expected = [count, rows, 1, count] if name == "loss KL" else [count, rows]
            assert [x for x, _, _ in grids] == expected, case
            seen.add(count)
    assert {16, 272, 2080, 140_000} <= seen
    sizes = {case: calls[case]["kernels"][0]["grid"][0] for case in calls}
    assert sizes["sde_step, 16 blocks"] == 3 * 64 and sizes["sde_step odd, 16 rows"] == 16
    # 528 blocks are four for each multiprocessor of an H100.
    assert sizes["sde_step, 130 rows"] == 130 * 16 and sizes["log_prob"] == 2 * 16
    assert sizes["sde_step past 2^31"] == 2 * ((1 << 19) + 1)
    # A token each; of both parts for the heads.
    assert sizes["norm second, 17 x 3"] == 51 and sizes["heads rotary, 17 x 3"] == 17 * 5


def test_numbers_travel_as_they_are(calls):
    """Coefficients and sizes reach the kernel as arguments of the launch."""
    guided = calls["loss guided KL, 7.5"]["kernels"]
    assert guided[0]["scalars"]["scale"] == 7.5 and guided[3]["scalars"]["uncond_scale"] == -6.5
    assert calls["loss KL, kl_weight 0.01"]["kernels"][1]["scalars"]["kl_weight"] == 0.01
    rows = calls["loss KL, clip_range"]["kernels"][1]["scalars"]
    assert (rows["low"], rows["high"]) == (0.8, 2.0)
    strided = calls["sde_step, step strided"]["kernels"][0]["scalars"]
    assert strided["step_stride"] == 2 and strided["elements"] == 16384
    assert calls["sde_step, step 1"]["kernels"][0]["scalars"]["step_stride"] == 0


def test_compiled_ahead_is_what_is_launched(lines):
    """Signatures that aot/variants.py writes by hand give the same PTX, so its checks hold here."""
    assert len(lines["ahead"]["same"]) == 15
    assert all(lines["ahead"]["same"].values()), lines["ahead"]
