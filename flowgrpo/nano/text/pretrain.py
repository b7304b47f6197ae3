"""Pretrain nano_text, as flowgrpo.nano.pretrain does nano. This command made the weights in
`model/`.

    python -m flowgrpo.nano.text.pretrain --out DIR

    autoencoder   pictures -> 10 x 4 latents of 4 channels -> pictures
    clean         flow matching with true captions
    mistaken      the same; at the rate `mistakes` the caption's word has one character that is not
                  the picture's, so the model draws a wrong character as often

Words are those of the training split, in pictures and in captions. Writes what nano's pretraining
does: DIR/model, DIR/STAGE and DIR/pretrain.jsonl, whose accuracies are RapidOCR's readings of the
tuning words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flowgrpo.config.user_code import import_function
from flowgrpo.nano.pretrain import (
    STAGES,
    encode,
    encode_images,
    flow_matching,
    run_stages,
    train,
)
from flowgrpo.nano.text import prompts, verify
from flowgrpo.nano.text.model import LATENT_SHAPE, build
from flowgrpo.nano.text.scenes import COLORS, SURFACES, paint


@dataclass(frozen=True)
class Pretraining:
    """Pretrain the embedded model that writes."""

    out: Path
    """Folder for the model and the log."""
    init: Path | None = None
    """Folder of an earlier run's stage, DIR/STAGE, to go on from; default: fresh weights."""
    stages: tuple[str, ...] = STAGES
    """Stages to run, of autoencoder, clean and mistaken, in this order."""
    autoencoder_steps: int = 1600
    autoencoder_batch: int = 16
    kl_weight: float = 1e-4
    """Weight of the latents' KL, per latent value, beside the error per pixel value."""
    clean_steps: int = 4000
    mistaken_steps: int = 500
    batch_size: int = 128
    pictures: int = 65536
    """Pictures that are painted and encoded for the last two stages."""
    mistakes: float = 0.4
    """Share of the captions with a wrong character in the last stage."""
    muon_lr: float = 0.02
    adam_lr: float = 1.5e-3
    autoencoder_adam_lr: float = 1.5e-3
    mistaken_rate: float = 0.3
    """Factor of both learning rates in the last stage."""
    warmup: int = 200
    anneal: float = 0.5
    """Last share of a stage's steps, over which both learning rates fall linearly to zero."""
    caption_dropout: float = 0.1
    evaluate_every: int = 400
    eval_images: int = 240
    """Held-out images at the end, for each guidance; half as many tuning images before."""
    seed: int = 0


class Pictures:
    """Encoded pictures of training words, with what is in them."""

    def __init__(self, vae: nn.Module, count: int, rng: np.random.Generator) -> None:
        from tqdm import tqdm

        self.words = [prompts.draw_word(rng) for _ in range(count)]
        self.surfaces = rng.integers(len(SURFACES), size=count)
        self.colors = rng.integers(len(COLORS), size=count)
        chunks = []
        for i in tqdm(range(0, count, 256), desc="encode pictures", mininterval=10):
            part = slice(i, i + 256)
            images = paint(self.words[part], self.surfaces[part], self.colors[part], rng)
            chunks.append(encode_images(vae, images))
        self.latents = torch.cat(chunks)

    def draw(
        self, count: int, mistakes: float, rng: np.random.Generator
    ) -> tuple[Tensor, list[str]]:
        """Draw latents [count, 4, 4, 10] and their captions, wrong at the rate `mistakes`; half of
        them leave the colour open."""
        chosen = rng.integers(len(self.words), size=count)
        captions = []
        for i, wrong, open_color in zip(
            chosen, rng.random(count) < mistakes, rng.random(count) < 0.5, strict=True
        ):
            word = prompts.misread(self.words[i], rng) if wrong else self.words[i]
            color = None if open_color else list(COLORS)[self.colors[i]]
            captions.append(prompts.compose(word, SURFACES[self.surfaces[i]], color))
        return self.latents[chosen], captions


@torch.no_grad()
def sample(pipeline, texts: list[str], steps: int, seed: int, guidance: float = 1.0) -> Tensor:
    """Sample images, uint8 [B, 3, 32, 80], by Euler steps of the probability-flow ODE."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((len(texts), *LATENT_SHAPE), generator=generator)
    context, pooled = encode(pipeline, texts)
    empty, empty_pooled = encode(pipeline, [""] * len(texts))
    pipeline.scheduler.set_timesteps(steps)
    sigmas = pipeline.scheduler.sigmas
    for s, s_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        t = torch.full((len(texts),), 1000 * s)
        v = pipeline.transformer(x, context, pooled, t).sample
        if guidance != 1.0:
            v_empty = pipeline.transformer(x, empty, empty_pooled, t).sample
            v = v_empty + guidance * (v - v_empty)
        x = x + (s_next - s) * v
    vae = pipeline.vae
    x = x / vae.config.scaling_factor + vae.config.shift_factor
    return decode(vae, x)


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Decode latents [B, 4, 4, 10] as the VAE has them into uint8 [B, 3, 32, 80]."""
    pixels = torch.cat([vae.decode(part).sample for part in latents.split(60)])
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@cache
def _rewards() -> list:
    # By name, since rewards know of nano's verifier.
    targets = ("flowgrpo.rewards.ocr:strict", "flowgrpo.rewards.ocr:score")
    return [import_function(target).configured(detect=False) for target in targets]


def judge(images: Tensor, records: list[dict]) -> dict:
    """Read the pictures and measure them: strict accuracy, in all and for each length, the paper's
    score, and quality."""
    texts = [m["prompt"] for m in records]
    strict, score = (np.array(reward(images, texts, records)) for reward in _rewards())
    tags = np.array([m["tag"] for m in records])
    return {
        "accuracy": round(float(strict.mean()), 4),
        "score": round(float(score.mean()), 4),
        "tasks": {t: round(float(strict[tags == t].mean()), 3) for t in prompts.TAGS.values()},
        "quality": {k: round(v, 4) for k, v in verify.quality(images, records).items()},
    }


def evaluate(pipeline, split: str, count: int, steps: int = 20, guidance: float = 1.0) -> dict:
    """Judge samples for the first `count` prompts of a split."""
    records = list(prompts.records(split)[:count])
    texts = [m["prompt"] for m in records]
    return judge(sample(pipeline, texts, steps, seed=1, guidance=guidance), records)


def train_autoencoder(pipeline, config: Pretraining) -> Iterator[dict]:
    """Train the VAE, then set its shift and scale so that latents have mean 0 and deviation 1."""
    vae, rng = pipeline.vae, np.random.default_rng((config.seed, 0))
    generator = torch.Generator().manual_seed(config.seed)

    def pictures(count: int) -> Tensor:
        words = [prompts.draw_word(rng) for _ in range(count)]
        surfaces, colors = (
            rng.integers(len(SURFACES), size=count),
            rng.integers(len(COLORS), size=count),
        )
        return torch.from_numpy(paint(words, surfaces, colors, rng)).float() / 127.5 - 1

    def loss(step: int) -> Tensor:
        images = pictures(config.autoencoder_batch)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - images
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + error.square().mean() + config.kl_weight * kl

    for record in train([vae], config.autoencoder_steps, loss, config, "autoencoder"):
        vae.eval()
        yield record | evaluate_autoencoder(vae, config)
        vae.train()
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(pictures(512)).latent_dist.mode()
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4),
        scaling_factor=round(1 / float(latents.std()), 4),
    )


@torch.no_grad()
def evaluate_autoencoder(vae: nn.Module, config: Pretraining) -> dict:
    """Judge decoded real pictures of the tuning prompts."""
    rng = np.random.default_rng(1)
    records = list(prompts.records("tune")[: config.eval_images // 2])
    surfaces = np.array([SURFACES.index(m["surface"]) for m in records])
    names = list(COLORS)
    colors = np.array(
        [names.index(m["color"]) if "color" in m else rng.integers(len(names)) for m in records]
    )
    images = torch.from_numpy(paint([m["word"] for m in records], surfaces, colors, rng))
    latents = vae.encode(images.float() / 127.5 - 1).latent_dist.mode()
    return judge(decode(vae, latents), records)


def train_transformer(
    pipeline, pictures: Pictures, config: Pretraining, stage: str
) -> Iterator[dict]:
    """Train transformer and text encoder by flow matching; "mistaken" with wrong captions."""
    rng = np.random.default_rng((config.seed, STAGES.index(stage)))
    generator = torch.Generator().manual_seed(config.seed + STAGES.index(stage))
    mistaken = stage == "mistaken"

    def loss(step: int) -> Tensor:
        x0, texts = pictures.draw(config.batch_size, config.mistakes * mistaken, rng)
        empty = rng.random(len(texts)) < config.caption_dropout
        texts = ["" if e else text for e, text in zip(empty, texts, strict=True)]
        return flow_matching(pipeline, x0, texts, generator)

    modules = [pipeline.transformer, pipeline.text_encoder]
    steps = config.mistaken_steps if mistaken else config.clean_steps
    rate = config.mistaken_rate if mistaken else 1.0
    for record in train(modules, steps, loss, config, stage, rate):
        yield record | evaluate(pipeline, "tune", config.eval_images // 2)


def run(config: Pretraining) -> dict:
    """Pretrain, save, evaluate on the held-out prompts; returns the last record of the log."""
    pipeline = build(config.seed)

    @cache
    def pictures() -> Pictures:
        rng = np.random.default_rng((config.seed, 3))
        return Pictures(pipeline.vae, config.pictures, rng)

    def train_stage(stage: str) -> Iterator[dict]:
        if stage == "autoencoder":
            return train_autoencoder(pipeline, config)
        return train_transformer(pipeline, pictures(), config, stage)

    return run_stages(config, pipeline, train_stage, evaluate)


if __name__ == "__main__":
    import tyro

    print(json.dumps(run(tyro.cli(Pretraining)), indent=1))
