"""A transformer in pieces: FSDP2 on real processes (gloo), its checkpoints, and what is refused."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.distributed import sharding
from flowgrpo.distributed.dealing import deal
from flowgrpo.distributed.world import ALONE, World
from flowgrpo.runs import checkpoints
from support import processes, rank_processes

FULL = {
    "policy.adapter": "full",
    "optim.lr": 1e-5,
    "optim.beta": 0.04,
    "optim.ema_decay": 0.5,
    "optim.updates_per_iteration": 1,
    "sample.batch_size": 2,
    "run.eval_every": 0,
    "run.eval_prompts": 3,
    "run.eval_samples": 1,
    "run.progress": "none",
}
FSDP = {"run.parallel": "fsdp"}


def train_lines(folder) -> list[dict]:
    return [x for x in processes.untimed(folder / "metrics.jsonl") if x["kind"] == "train"]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Full fine-tuning for four iterations in one process, and its configuration."""
    folder = tmp_path_factory.mktemp("alone")
    config = processes.make(folder, **FULL, **{"run.steps": 4, "run.checkpoint_every": 3})
    processes.Fork(folder / "log", processes.run, config).wait()
    return config


def resumed(config: Config, steps: int, **changes) -> Config:
    folder = str(config.out_dir)
    return replace(config, **{"run.resume": folder, "run.steps": steps, **changes})


@pytest.mark.slow
def test_full_fine_tuning_of_pieces(alone, tmp_path):
    """Four ranks in two copies, then two, then one without a launcher: the weights of one process
    that trained all the way, exact ratios, and a transformer that diffusers loads."""
    four = {"run.out": str(tmp_path / "run"), "run.steps": 2, "run.shard_size": 2, **FSDP}
    config = replace(alone, **four)
    rank_processes.run(tmp_path / "four", 4, processes.run, config)
    last = checkpoints.latest(config.out_dir)
    assert checkpoints.is_sharded(last) and not list(last.glob("*.safetensors"))
    assert checkpoints.read_state(last)["iteration"] == 2
    config = resumed(config, 3, **{"run.shard_size": 0})
    rank_processes.run(tmp_path / "two", 2, processes.run, config)
    check_same_weights(weights(config.out_dir), checkpoints.load(step(alone, 3), "ema"))
    config = resumed(config, 4, **{"run.parallel": "replicate"})
    processes.Fork(tmp_path / "one", processes.run, config).wait()
    assert not checkpoints.is_sharded(checkpoints.latest(config.out_dir))
    check_same_weights(weights(config.out_dir), weights(alone.out_dir))
    lines, expected = train_lines(config.out_dir), train_lines(alone.out_dir)
    assert [line["max_ratio_error"] for line in lines] == [0.0] * 4
    for line, other in zip(lines, expected, strict=True):
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    settings = json.loads((config.out_dir / "transformer" / "config.json").read_text())
    assert settings["_class_name"] == "SD3Transformer2DModel"


def step(config: Config, iteration: int):
    return config.out_dir / "checkpoints" / f"step-{iteration:06d}"


def check_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, tensor in other.items():
        assert (one[name] - tensor).abs().max() <= 1e-6, name


@pytest.mark.slow
def test_whole_files_into_pieces(alone, tmp_path):
    """A checkpoint of one process, in whole files, goes on in pieces, which are in host memory."""
    run = shutil.copytree(alone.out_dir, tmp_path / "run")
    # As if it had been killed after the third iteration.
    shutil.rmtree(run / "checkpoints" / "step-000004")
    (run / "summary.json").unlink()
    config = replace(alone, **{"run.out": str(run)})
    config = resumed(config, 4, **FSDP, **{"run.cpu_offload": True})
    rank_processes.run(tmp_path / "two", 2, processes.run, config)
    assert checkpoints.is_sharded(checkpoints.latest(run))
    check_same_weights(weights(run), weights(alone.out_dir))


@pytest.mark.slow
def test_masters(alone, tmp_path):
    """Forwards in bfloat16 with float32 masters: exact ratios, a KL of 0 at the start, and updates
    smaller than bfloat16's steps stay; with blocks that run again for their backward, in parts."""
    changes = {"run.out": str(tmp_path / "run"), "policy.dtype": "bfloat16", "run.steps": 2}
    changes |= {"optim.steps_per_forward": 2, "optim.split_forward": True}
    config = replace(alone, **changes, **FSDP, **{"policy.gradient_checkpointing": True})
    rank_processes.run(tmp_path / "two", 2, processes.run, config)
    lines = train_lines(config.out_dir)
    assert [line["max_ratio_error"] for line in lines] == [0.0, 0.0] and lines[0]["kl"] == 0.0
    before = load_file(f"{config.policy.model}/transformer/diffusion_pytorch_model.safetensors")
    after = checkpoints.load(checkpoints.latest(config.out_dir), "weights")
    # The file has a buffer too.
    moved = torch.cat([(after[n] - before[n]).abs().flatten() for n in after])
    assert 0 < moved.max() <= 2.5e-5


@pytest.mark.slow
def test_adapters_over_pieces(tmp_path):
    """LoRA over a frozen model in pieces: one rank, two pieces, and four ranks in two copies of two
    pieces, write the same bits."""
    changes = {**FULL, **FSDP, "policy.adapter": "lora", "policy.fused": True}
    changes |= {"run.steps": 2, "sample.guidance_scale": 2.0, "optim.lr": 1e-3}
    bits = {}
    for size in (1, 2, 4):
        out = tmp_path / f"run-{size}"
        changes |= {"run.out": str(out), "run.shard_size": 2 if size == 4 else 0}
        config = processes.make(tmp_path, **changes)
        rank_processes.run(tmp_path / f"ranks-{size}", size, processes.run, config)
        last = checkpoints.latest(out)
        bits[size] = (processes.untimed(out / "metrics.jsonl"), processes.bits_of(last))
        assert [line["max_ratio_error"] for line in train_lines(out)] == [0.0, 0.0]
    assert bits[1] == bits[2] == bits[4]


@pytest.mark.slow
def test_an_old_policy_of_pieces(tmp_path):
    """nft, whose rollouts are an old policy's, and the KL of evaluations: as in one process."""
    changes = {**FULL, "optim.objective": "nft", "optim.kl": "std_dev", "run.steps": 2}
    changes |= {"optim.old_decay_rise": 0.2, "run.eval_kl": 0.7, "run.eval_prompts": 5}
    one = processes.make(tmp_path, **changes)
    processes.Fork(tmp_path / "log", processes.run, one).wait()
    two = replace(one, **FSDP, **{"run.out": str(tmp_path / "two")})
    rank_processes.run(tmp_path / "ranks", 2, processes.run, two)
    check_same_weights(weights(two.out_dir), weights(one.out_dir))
    last = [checkpoints.load(checkpoints.latest(c.out_dir), "old") for c in (one, two)]
    check_same_weights(*last)
    ends = [processes.untimed(c.out_dir / "metrics.jsonl")[-1] for c in (one, two)]
    assert ends[0]["images"] == ends[1]["images"] == 5
    assert ends[1]["kl"] == pytest.approx(ends[0]["kl"], rel=1e-3) and ends[0]["kl"] > 0


@pytest.mark.slow
def test_a_reward_that_fails_in_one_process(tmp_path):
    """All end with its sentence, and the iterations before are saved, in pieces, by all."""
    changes = {
        **FULL,
        **FSDP,
        "reward.weights": {"support.rank_processes:red_until_rank_one_errs": 1.0},
    }
    config = processes.make(tmp_path, **changes)
    forks = rank_processes.start(tmp_path / "two", 2, rank_processes.run_watched, config)
    for fork in forks:
        assert "one score an image" in fork.wait(code=1)
    last = checkpoints.latest(config.out_dir)
    assert checkpoints.is_sharded(last) and checkpoints.read_state(last)["iteration"] == 1
    checkpoints.verify(last)


def fields(config: Config) -> tuple:
    sample, updates = config.sample, config.optim.updates_per_iteration
    steps = [
        (slice(i, i + sample.batch_size), range(1))
        for i in range(0, sample.rows, sample.batch_size)
    ]
    return steps, updates, sample.rows, sample.batch_size


@pytest.mark.parametrize(
    ("size", "batch_size", "sentence"),
    [
        (2, 12, None),
        (4, 12, None),
        (3, 12, "start 2 or 4 processes, or set sample.batch_size to 8."),
        (3, 4, None),
        (1, 12, None),
    ],
)
def test_all_run_as_many_forwards(size, batch_size, sentence):
    config = replace(Config(), **{"sample.batch_size": batch_size, "sample.group_size": 12})
    steps, updates, rows, _ = fields(config)
    dealing = deal(steps, updates, rows, batch_size, size, 0)
    world = World(0, size, joined=True)
    arguments = (world, dealing, rows, updates, batch_size)
    if sentence is None:
        sharding.check_even(*arguments)
    else:
        with pytest.raises(ConfigError, match=sentence):
            sharding.check_even(*arguments)


def test_one_process_needs_a_launcher():
    steps, updates, rows, batch_size = fields(Config())
    dealing = deal(steps, updates, rows, batch_size)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 1"):
        sharding.check_even(ALONE, dealing, rows, updates, batch_size)


def test_shard_size_divides_the_processes():
    with pytest.raises(ConfigError, match=r"run\.shard_size is 3, but it must divide the 8"):
        sharding.make_mesh(World(0, 8, joined=True), torch.device("cpu"), 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optim.capture": "on"}, r"optim\.capture is on with run\.parallel fsdp"),
        ({"sample.capture": "on"}, r"sample\.capture is on with run\.parallel fsdp"),
        ({"policy.compile": True}, r"policy\.compile is on with run\.parallel fsdp"),
        ({"policy.adapter": "full", "policy.dtype": "float16"}, "before their scale"),
        ({"optim.teacher": "there"}, r"optim\.teacher is 'there' with run\.parallel fsdp"),
        ({"optim.sft_weight": 0.1}, r"optim\.sft_weight is 0\.1 with run\.parallel fsdp"),
        ({"sample.shared_noise": True, "sample.window_size": 2}, r"set sample\.share_prefix"),
    ],
)
def test_what_does_not_go_together(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replace(Config(), **FSDP, **changes)


@pytest.mark.parametrize("changes", [{"run.shard_size": 2}, {"run.cpu_offload": True}])
def test_fields_of_fsdp_alone(changes):
    with pytest.raises(ConfigError, match=r"set run\.parallel to fsdp"):
        replace(Config(), **changes)


def test_helpers_leave_plain_tensors():
    """One code for pieces and for whole tensors."""
    tensor = torch.tensor([1.0, -3.0, 2.0])
    assert sharding.piece(tensor) is tensor and sharding.whole(tensor) is tensor
    assert sharding.like(tensor, tensor) is tensor and not sharding.is_sharded(tensor)
    assert sharding.largest([tensor, torch.empty(0)]) == 3
    assert sharding.largest([tensor, torch.tensor([float("nan")])]).isnan()
    model = torch.nn.Linear(1, 1)
    assert sharding.original_class(model) is torch.nn.Linear
    assert sharding.gather(model, ALONE)["weight"].equal(model.weight)
    assert sharding.gather(model, SimpleNamespace(first=False, exchanging=ALONE.exchanging)) is None
