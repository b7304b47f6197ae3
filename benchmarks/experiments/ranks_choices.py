"""Two choices of several processes, timed with two processes of one machine (gloo).

    python benchmarks ranks-choices    # writes results/ranks-choices.json

`prompts` are encoded by a layer of T5-XXL's sizes, eight of 128 tokens, and every process ends with
all embeddings: `each encodes all`, `one encodes, broadcast`, `each encodes a share` (the trainer).

`update under fsdp` trains adapters on two blocks of SD3.5-medium's sizes, small images and three
steps a sample: `a step a forward`, or `three steps a forward` by optim.split_forward, which gathers
the weights once for three. Both must write the same ratios.

Processes have one thread each. Rounds take turns; a row is the median of the slower process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from reporting import records

PROCESSES = 2
PROMPTS, TOKENS = 8, 128
LIMIT = 1200.0
"""Seconds after which the processes count as hung."""
WINDOW = 3


def encoders(world: Any) -> dict[str, Callable[[], Any]]:
    """Ways to have the embeddings of all prompts in every process, by name."""
    from transformers import T5Config, T5EncoderModel

    from flowgrpo.policies import Policy
    from flowgrpo.policies.text_cache import TextEncoder
    from flowgrpo.records import Conditioning
    from models.configurations import T5_XXL

    torch.manual_seed(0)
    values = {**T5_XXL, "num_layers": 1, "vocab_size": 1000}
    model = T5EncoderModel(T5Config(**values)).eval()

    def encode(text: str) -> Conditioning:
        tokens = (torch.arange(TOKENS) * (1 + int(text)) % 1000)[None]
        embeds = model(tokens).last_hidden_state
        return Conditioning(embeds, embeds[:, 0].contiguous())

    encoder = TextEncoder(encode, [model], torch.device("cpu"))
    # What `Policy.encode_shares` asks of a policy.
    policy = SimpleNamespace(_texts=encoder, encode=lambda texts, images: encoder(texts))
    texts = [str(i) for i in range(PROMPTS)]
    embeds = torch.empty(PROMPTS, TOKENS, T5_XXL["d_model"])

    def by_one() -> Conditioning:
        rows = encoder(texts).embeds if world.first else embeds
        dist.broadcast(rows, src=0)
        return Conditioning(rows, rows[:, 0])

    return {
        "each encodes all": lambda: encoder(texts),
        "one encodes, broadcast": by_one,
        "each encodes a share": lambda: Policy.encode_shares(policy, texts, world),
    }


TRAININGS: dict[str, dict[str, Any]] = {
    "a step a forward": {},
    "three steps a forward": {"optim.steps_per_forward": WINDOW, "optim.split_forward": True},
}
"""Fields of a run, by name."""


def train_in(out: Path, name: str) -> float:
    """Seconds of an update under fsdp: the median of two iterations after the first."""
    from diffusers import SD3Transformer2DModel

    from flowgrpo import train
    from models.cases import Case
    from models.configurations import SD35_MEDIUM
    from providers import ours

    sizes = {**SD35_MEDIUM.transformer, "num_layers": 2, "dual_attention_layers": (0,)}
    # Positions of large images are a gigabyte.
    sizes["pos_embed_max_size"] = 8
    with torch.device("meta"):
        count = sum(p.numel() for p in SD3Transformer2DModel(**sizes).parameters())
    small = dataclasses.replace(
        SD35_MEDIUM, transformer=sizes, parameters=count, latent=(16, 8, 8), text_tokens=16
    )
    case = Case(small, batch=1, steps=WINDOW + 1, window=WINDOW, chunks=2 * PROCESSES)
    fields = {
        "policy.dtype": "float32",
        "sample.share_prefix": False,
        "sample.eval_steps": 1,
        "run.parallel": "fsdp",
        "run.out": str(out),
        "run.steps": 3,
        "run.eval_every": 0,
        "run.eval_prompts": PROCESSES,
        "run.checkpoint_every": 0,
        "run.progress": "none",
        "run.threads": 1,
    }
    config = ours.config(case, "cpu", **fields, **TRAININGS[name])
    train.run(config, **ours.model_in_memory(small, "cpu", "float32", False))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    errors = [line["max_ratio_error"] for line in lines]
    if any(errors):
        raise RuntimeError(f"{name}: the largest |ratio - 1| of the iterations is {errors}")
    return statistics.median(line["seconds"]["update"] for line in lines[1:])


def encode_in(rounds: int) -> dict[str, list[float]]:
    """Seconds until a process has all embeddings, by the way it gets them."""
    from flowgrpo.distributed import world as worlds

    times: dict[str, list[float]] = {}
    first = None
    with torch.no_grad():
        ways = encoders(worlds.join())
        for turn in range(rounds + 1):
            for name, call in ways.items():
                dist.barrier()
                started = time.perf_counter()
                embeds = call().embeds
                seconds = time.perf_counter() - started
                first = embeds.clone() if first is None else first
                if not torch.equal(embeds, first):
                    raise RuntimeError(f"{name}: other embeddings than each process encodes")
                # The first one warms up.
                if turn:
                    times.setdefault(name, []).append(seconds)
    return times


def work(folder: Path, name: str, rounds: int) -> None:
    """Time the prompts, or the training `name`, as one of the processes."""
    times = {name: [train_in(folder / "run", name)]} if name else encode_in(rounds)
    (folder / f"times-{os.environ['RANK']}.json").write_text(json.dumps(times))


def launch(name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of the slower of two processes, by what they did."""
    with tempfile.TemporaryDirectory() as temporary:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = [str(Path(__file__).parents[1] / "__main__.py"), "ranks-choices"]
        options = ["--work", temporary, "--name", name, "--rounds", str(rounds)]
        command = [*launcher, f"--nproc-per-node={PROCESSES}", *script, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, timeout=LIMIT, check=True)
        files = sorted(Path(temporary).glob("times-*.json"))
        ranks = [json.loads(path.read_text()) for path in files]
    return {
        name: [max(p) for p in zip(*(r[name] for r in ranks), strict=True)] for name in ranks[0]
    }


def measure(rounds: int) -> list[dict]:
    """Rows of the record."""
    times = launch("", rounds)
    for _ in range(rounds):
        for training in TRAININGS:
            for name, seconds in launch(training, 1).items():
                times.setdefault(name, []).extend(seconds)
    rows = []
    for name, seconds in times.items():
        case = "update under fsdp" if name in TRAININGS else "prompts"
        value = statistics.median(seconds)
        rows.append(records.row("ranks-choices", case, name, "time", value, "s"))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "ranks-choices.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work is not None:
        torch.set_num_threads(1)
        work(args.work, args.name, args.rounds)
        return 0
    rows = measure(args.rounds)
    records.write(records.record(rows, "cpu"), args.out)
    for row in rows:
        print(f"{row['case']:20} {row['provider']:24} {row['value']:.3f} {row['unit']}")
    return 0
