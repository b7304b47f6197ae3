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
import gc
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
    policy = SimpleNamespace(_texts=encoder, encode=encoder)
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


def trainings(folder: Path) -> dict[str, Callable[[], Any]]:
    """Runs of three iterations under fsdp, by name; each returns its update's seconds and ratio."""
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

    def run(name: str, **changes: Any) -> tuple[float, float]:
        out = folder / name
        config = ours.config(
            case,
            "cpu",
            **{
                "policy.dtype": "float32",
                "sample.share_prefix": False,
                "run.parallel": "fsdp",
                "run.out": str(out),
                "run.steps": 3,
                "run.eval_every": 0,
                "run.eval_prompts": PROCESSES,
                "sample.eval_steps": 1,
                "run.checkpoint_every": 0,
                "run.progress": "none",
                "run.threads": 1,
                **changes,
            },
        )
        train.run(config, **ours.model_in_memory(small, "cpu", "float32", False))
        gc.collect()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["kind"] == "train"]
        seconds = statistics.median(line["seconds"]["update"] for line in lines[1:])
        return seconds, max(line["max_ratio_error"] for line in lines)

    split = {"optim.steps_per_forward": WINDOW, "optim.split_forward": True}
    return {
        "a step a forward": lambda: run("one"),
        "three steps a forward": lambda: run("three", **split),
    }


def work(folder: Path, rounds: int) -> None:
    """Time everything as one of the processes."""
    from flowgrpo.distributed import world as worlds

    world = worlds.join()
    times: dict[str, list[float]] = {}
    first = None
    ways = encoders(world)
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, call in ways.items():
                dist.barrier()
                started = time.perf_counter()
                embeds = call().embeds
                seconds = time.perf_counter() - started
                first = embeds.clone() if first is None else first
                assert torch.equal(embeds, first), name
                # The first one warms up.
                if turn:
                    times.setdefault(name, []).append(seconds)
    # The encoder's memory.
    del ways, call
    for turn in range(rounds):
        for name, call in trainings(folder / f"round-{turn}").items():
            seconds, error = call()
            assert error == 0.0, f"{name}: ratio off by {error}"
            times.setdefault(name, []).append(seconds)
    (folder / f"times-{world.rank}.json").write_text(json.dumps(times))


def measure(rounds: int) -> list[dict]:
    """Rows of the record."""
    with tempfile.TemporaryDirectory() as temporary:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = [str(Path(__file__).parents[1] / "__main__.py"), "ranks-choices"]
        options = ["--work", temporary, "--rounds", str(rounds)]
        command = [*launcher, f"--nproc-per-node={PROCESSES}", *script, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, timeout=LIMIT, check=True)
        files = sorted(Path(temporary).glob("times-*.json"))
        ranks = [json.loads(path.read_text()) for path in files]
    rows = []
    for name in ranks[0]:
        # All wait for the slower one.
        slower = [max(pair) for pair in zip(*(rank[name] for rank in ranks), strict=True)]
        case = "prompts" if "encode" in name else "update under fsdp"
        value = statistics.median(slower)
        rows.append(records.row("ranks-choices", case, name, "time", value, "s"))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "ranks-choices.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work is not None:
        torch.set_num_threads(1)
        work(args.work, args.rounds)
        return 0
    rows = measure(args.rounds)
    records.write(records.record(rows, "cpu"), args.out)
    for row in rows:
        print(f"{row['case']:20} {row['provider']:24} {row['value']:.3f} {row['unit']}")
    return 0
