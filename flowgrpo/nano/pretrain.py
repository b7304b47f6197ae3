"""Pretrain nano: flow matching on scenes that the project draws. This script made the weights in
`model/`.

    python -m flowgrpo.nano.pretrain --out DIR [--steps N]

x_sigma = (1 - sigma) x_0 + sigma eps, target velocity eps - x_0, mean squared error (Lipman et al.
2023; SD3's parametrisation). Captions are true: a prompt of the training split, or one of a few
compositions outside the six tasks, and a scene that fulfils it; one caption in ten is empty, for
guidance. With --incomplete, that share of the pictures shows more than the caption says, as
pictures with captions usually do. Muon trains the blocks' matrices, AdamW the rest.

The weights in `model/` come from three runs:

    --steps 6000
    --init FIRST/float32 --steps 6000 --muon-lr 0.015 --adam-lr 7e-4 --anneal 0.7 --seed 1
    --init SECOND/float32 --incomplete 0.5 --steps 800 --muon-lr 0.005 --adam-lr 3e-4 --anneal 0.7

Writes DIR/model (a diffusers folder), DIR/pretrain.jsonl (loss, and accuracy on the tuning prompts
by 20 ODE steps).
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowgrpo.nano import prompts, verify
from flowgrpo.nano.draw import draw, with_more
from flowgrpo.nano.model import build, save
from flowgrpo.nano.scenes import COLORS, RELATIONS, SHAPES


@dataclass(frozen=True)
class Pretraining:
    """Pretrain the embedded model."""

    out: Path
    """Folder for the model and the log."""
    init: Path | None = None
    """Folder `float32` of an earlier run to go on from; default: fresh weights."""
    incomplete: float = 0.0
    """Share of the pictures that show one or two objects more than their captions say."""
    steps: int = 6000
    batch_size: int = 64
    muon_lr: float = 0.02
    adam_lr: float = 1e-3
    warmup: int = 200
    anneal: float = 0.4
    """Last share of the steps, over which both learning rates fall linearly to zero."""
    caption_dropout: float = 0.1
    extra_captions: float = 0.1
    """Share of captions outside the six tasks ("three red circles"), so that sampling them works
    too."""
    evaluate_every: int = 500
    eval_images: int = 240
    """Held-out images at the end, for each guidance; half as many tuning images before."""
    seed: int = 0


def caption(rng: np.random.Generator, extra_share: float) -> dict:
    """Draw a training prompt's metadata: the six tasks evenly, or a composition outside them."""
    if rng.random() < extra_share:
        color = lambda: list(COLORS)[rng.integers(len(COLORS))]  # noqa: E731
        first, second = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
        if rng.random() < 0.5:
            number = ("two", "three", "four")[rng.integers(3)]
            return prompts.parse(f"{number} {color()} {first}s")
        return prompts.parse(
            f"a {color()} {first} {RELATIONS[rng.integers(4)]} a {color()} {second}"
        )
    tag = prompts.TAGS[rng.integers(len(prompts.TAGS))]
    candidates = _train_by_tag()[tag]
    return candidates[rng.integers(len(candidates))]


@cache
def _train_by_tag() -> dict[str, list[dict]]:
    by_tag: dict[str, list[dict]] = {tag: [] for tag in prompts.TAGS}
    for record in prompts.records("train"):
        by_tag[record["tag"]].append(record)
    return by_tag


def encode(pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode B texts: token embeddings [B, 10, 128] and pooled embeddings [B, 128]."""
    tokens = pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    device = pipeline.text_encoder.device
    out = pipeline.text_encoder(tokens.input_ids.to(device))
    return out.last_hidden_state, out.text_embeds


@torch.no_grad()
def sample(
    pipeline, texts: list[str], steps: int, seed: int, guidance: float = 1.0
) -> torch.Tensor:
    """Sample images, uint8 [B, 3, 24, 24], by Euler steps of the probability-flow ODE."""
    device = pipeline.transformer.device
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(texts), 3, 24, 24, generator=generator).to(device)
    context, pooled = encode(pipeline, texts)
    empty, empty_pooled = encode(pipeline, [""] * len(texts))
    pipeline.scheduler.set_timesteps(steps)
    sigmas = pipeline.scheduler.sigmas
    for s, s_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        t = torch.full((len(texts),), 1000 * s, device=device)
        v = pipeline.transformer(x, context, pooled, t).sample
        if guidance != 1.0:
            v_empty = pipeline.transformer(x, empty, empty_pooled, t).sample
            v = v_empty + guidance * (v - v_empty)
        x = x + (s_next - s) * v
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def evaluate(pipeline, split: str, count: int, steps: int = 20, guidance: float = 1.0) -> dict:
    """Measure strict accuracy, in all and per task, and quality figures.

    Over `count` prompts of a split, the six tasks evenly.
    """
    records = prompts.balanced(split, count)
    images = sample(pipeline, [m["prompt"] for m in records], steps, seed=1, guidance=guidance)
    strict = verify.score(images, records)["strict"]
    tasks = {
        tag: round(
            float(np.mean([s for s, m in zip(strict, records, strict=True) if m["tag"] == tag])), 3
        )
        for tag in prompts.TAGS
    }
    quality = {k: round(v, 4) for k, v in verify.quality(images, records).items()}
    return {"accuracy": round(float(strict.mean()), 4), "tasks": tasks, "quality": quality}


def optimizers(modules: list[nn.Module], config: Pretraining) -> list[torch.optim.Optimizer]:
    """Build Muon for the matrices inside blocks, except adaLN's, and AdamW for all else."""
    matrices, rest = [], []
    for module in modules:
        for name, p in module.named_parameters():
            inside = "transformer_blocks" in name or "encoder.layers" in name
            (matrices if p.ndim == 2 and inside and "norm" not in name else rest).append(p)
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def schedule(step: int, config: Pretraining) -> float:
    """Compute the learning-rate factor: it rises, stays, and falls over the last `anneal` share."""
    left = (config.steps - step) / (config.anneal * config.steps)
    return min(1.0, (step + 1) / config.warmup, left)


def run(config: Pretraining) -> dict:
    """Pretrain, save, evaluate on the held-out prompts; returns the last record of the log."""
    from tqdm import tqdm

    config.out.mkdir(parents=True, exist_ok=True)
    pipeline = build(config.seed)
    if config.init is not None:
        for name in ("transformer", "text_encoder"):
            module = getattr(pipeline, name)
            module.load_state_dict(type(module).from_pretrained(config.init / name).state_dict())
    modules = [pipeline.transformer, pipeline.text_encoder]
    opts = optimizers(modules, config)
    base_lrs = [g["lr"] for o in opts for g in o.param_groups]
    rng = np.random.default_rng(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    started, losses = time.time(), []
    with (config.out / "pretrain.jsonl").open("w") as log:
        for step in tqdm(range(config.steps), desc="pretrain", mininterval=10):
            loss = flow_matching(pipeline, config, rng, generator)
            loss.backward()
            factor = schedule(step, config)
            for group, lr in zip((g for o in opts for g in o.param_groups), base_lrs, strict=True):
                group["lr"] = lr * factor
            for o in opts:
                o.step()
                o.zero_grad()
            losses.append(loss.detach())
            if (step + 1) % config.evaluate_every == 0 or step + 1 == config.steps:
                mean = float(torch.stack(losses).mean())
                losses.clear()
                if not math.isfinite(mean):
                    raise FloatingPointError(f"loss is {mean} at step {step + 1}")
                seconds = round(time.time() - started, 1)
                record = {"step": step + 1, "loss": round(mean, 5), "seconds": seconds}
                write(log, record | evaluate(pipeline, "tune", config.eval_images // 2))
                pipeline.save_pretrained(config.out / "float32")
        save(pipeline, config.out / "model")
        for module in modules:
            module.float()
        held_out = {
            f"guidance {guidance}": evaluate(pipeline, "heldout", config.eval_images, 40, guidance)
            for guidance in (1.0, 2.0, 3.5)
        }
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
        return write(log, {"config": settings, "heldout, 40 steps": held_out})


def flow_matching(
    pipeline: object, config: Pretraining, rng: np.random.Generator, generator: torch.Generator
) -> torch.Tensor:
    """Compute the loss of one batch of new pictures: the velocity's squared error."""
    records = [caption(rng, config.extra_captions) for _ in range(config.batch_size)]
    scenes = [with_more(m, rng) if rng.random() < config.incomplete else m for m in records]
    x0 = torch.from_numpy(draw(scenes, rng)).float() / 127.5 - 1
    texts = ["" if rng.random() < config.caption_dropout else m["prompt"] for m in records]
    # Stratified uniforms, so that every batch covers the noise levels evenly; shifted towards high
    # noise.
    u = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
    sigma = 1.5 * u / (1 + 0.5 * u)
    noise = torch.randn(x0.shape, generator=generator)
    s = sigma[:, None, None, None]
    context, pooled = encode(pipeline, texts)
    # PyTorch's fused attention is slow backwards on a CPU in bfloat16; plain matrix products are
    # four times faster.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        v = pipeline.transformer((1 - s) * x0 + s * noise, context, pooled, 1000 * sigma).sample
    return (v.float() - (noise - x0)).square().mean()


def write(log: TextIO, record: dict) -> dict:
    """Append a line to the log; returns the record."""
    log.write(json.dumps(record) + "\n")
    log.flush()
    return record


if __name__ == "__main__":
    import tyro

    print(json.dumps(run(tyro.cli(Pretraining)), indent=1))
