"""Pretrain nano: an autoencoder and flow matching on scenes that the project draws. This command
made the weights in `model/`.

    python -m flowgrpo.nano.pretrain --out DIR

Three stages, one after the other:

    autoencoder   pictures -> 4 x 4 latents -> pictures: mean absolute and squared error, KL to a
                  standard normal (Kingma and Welling 2013; Rombach et al. 2022)
    clean         x_sigma = (1 - sigma) x_0 + sigma eps, target velocity eps - x_0, mean squared
                  error (Lipman et al. 2023; SD3's parametrisation) with true captions: a prompt of
                  the training split and a scene that fulfils it
    mistaken      the same with captions that are wrong at the rates `mistakes`, as the captions
                  that text-to-image models learn from often are

The second stage ends with a model that can do the tasks. The third gives it the profile of errors
that SD3.5-M has on GenEval, which reinforcement learning then mends. One caption in ten is empty,
for guidance. Muon trains the matrices inside blocks and the convolutions, AdamW the rest.

Writes DIR/model (a diffusers folder), DIR/STAGE (the same in float32 after each stage) and
DIR/pretrain.jsonl (loss, and accuracy on the tuning prompts by 20 ODE steps).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import combinations, permutations
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor, nn

from flowgrpo.nano import prompts, verify
from flowgrpo.nano.draw import arrange, code, mistake
from flowgrpo.nano.model import LATENT_CHANNELS, LATENT_SIZE, build, save
from flowgrpo.nano.muon import Muon
from flowgrpo.nano.scenes import CELLS, COLORS, EMPTY, SHAPES, paint

STAGES = ("autoencoder", "clean", "mistaken")


@dataclass(frozen=True)
class Pretraining:
    """Pretrain the embedded model."""

    out: Path
    """Folder for the model and the log."""
    init: Path | None = None
    """Folder of an earlier run's stage, DIR/STAGE, to go on from; default: fresh weights."""
    stages: tuple[str, ...] = STAGES
    """Stages to run, of autoencoder, clean and mistaken, in this order."""
    autoencoder_steps: int = 1000
    autoencoder_batch: int = 16
    autoencoder_adam_lr: float = 2e-3
    kl_weight: float = 1e-4
    """Weight of the latents' KL, per latent value, beside the error per pixel value."""
    clean_steps: int = 6500
    mistaken_steps: int = 800
    batch_size: int = 128
    variants: int = 8
    """Pictures painted and encoded for each content of the cells, each with its own jitter."""
    shares: dict[str, float] = field(
        default_factory=lambda: {
            "single_object": 0.5,
            "two_object": 1.5,
            "counting": 2.5,
            "colors": 1.0,
            "position": 3.0,
            "color_attr": 2.0,
        }
    )
    """Parts of the tasks in the clean stage; relations are learnt last, and take the most."""
    mistakes: dict[str, float] = field(
        default_factory=lambda: {
            "single_object": 0.02,
            "two_object": 0.18,
            "counting": 0.4,
            "colors": 0.15,
            "position": 0.6,
            "color_attr": 0.4,
        }
    )
    """Share of the captions of each task that are wrong in the last stage."""
    muon_lr: float = 0.02
    adam_lr: float = 1.5e-3
    mistaken_rate: float = 0.3
    """Factor of both learning rates in the last stage."""
    warmup: int = 200
    anneal: float = 0.5
    """Last share of a stage's steps, over which both learning rates fall linearly to zero."""
    caption_dropout: float = 0.1
    evaluate_every: int = 500
    eval_images: int = 480
    """Held-out images at the end, for each guidance; half as many tuning images before."""
    seed: int = 0


def contents() -> np.ndarray:
    """List all pictures that the captions ask for or mistake: int [N, 4], codes of the cells.

    One to four equal objects, or two of different shapes, in any cells.
    """
    objects = [code(shape, color) for shape in SHAPES for color in COLORS]
    rows = []
    for count in range(1, CELLS + 1):
        for cells in combinations(range(CELLS), count):
            rows += [_row(dict.fromkeys(cells, one)) for one in objects]
    for first, second in combinations(objects, 2):
        if first // len(COLORS) != second // len(COLORS):
            pairs = permutations(range(CELLS), 2)
            rows += [_row({i: first, j: second}) for i, j in pairs]
    return np.array(rows)


def _row(objects: dict[int, int]) -> list[int]:
    return [objects.get(cell, EMPTY) for cell in range(CELLS)]


class Latents:
    """Encoded pictures of all contents, looked up by the codes of their cells."""

    def __init__(self, vae: nn.Module, variants: int, rng: np.random.Generator) -> None:
        from tqdm import tqdm

        rows = contents()
        self._base = 1 + len(SHAPES) * len(COLORS)
        self._variants = variants
        self._index = np.full(self._base**CELLS, -1)
        self._index[self._key(rows)] = np.arange(len(rows))
        rows = rows.repeat(variants, axis=0)
        chunks = [
            encode_images(vae, paint(rows[i : i + 256], rng))
            for i in tqdm(range(0, len(rows), 256), desc="encode pictures", mininterval=10)
        ]
        self._latents = torch.cat(chunks)

    def _key(self, cells: np.ndarray) -> np.ndarray:
        return (cells + 1) @ self._base ** np.arange(CELLS)

    def of(self, cells: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Latents [M, 4, 4, 4] of pictures with these cells, int [M, 4]."""
        index = self._index[self._key(cells)]
        if (index < 0).any():
            raise ValueError(f"cells: {cells[index < 0][0].tolist()} were not encoded")
        return self._latents[index * self._variants + rng.integers(self._variants, size=len(cells))]


@torch.no_grad()
def encode_images(vae: nn.Module, images: np.ndarray) -> Tensor:
    """Latents float32 [B, 4, 4, 4] of images uint8 [B, 3, 64, 64], as the transformer sees them."""
    latents = vae.encode(torch.from_numpy(images).float() / 127.5 - 1).latent_dist.mode()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def caption(rng: np.random.Generator, shares: dict[str, float]) -> dict:
    """Draw a training prompt's metadata, the tasks in the parts `shares`."""
    parts = np.array([shares[tag] for tag in prompts.TAGS])
    tag = prompts.TAGS[np.searchsorted(parts.cumsum(), rng.random() * parts.sum(), side="right")]
    candidates = _train_by_tag()[tag]
    return candidates[rng.integers(len(candidates))]


@cache
def _train_by_tag() -> dict[str, list[dict]]:
    by_tag: dict[str, list[dict]] = {tag: [] for tag in prompts.TAGS}
    for record in prompts.records("train"):
        by_tag[record["tag"]].append(record)
    return by_tag


def encode(pipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Encode B texts: token embeddings [B, 9, 96] and pooled embeddings [B, 96]."""
    tokens = pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    out = pipeline.text_encoder(tokens.input_ids)
    return out.last_hidden_state, out.text_embeds


@torch.no_grad()
def sample(pipeline, texts: list[str], steps: int, seed: int, guidance: float = 1.0) -> Tensor:
    """Sample images, uint8 [B, 3, 64, 64], by Euler steps of the probability-flow ODE."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(texts), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    x = torch.randn(shape, generator=generator)
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
    pixels = torch.cat([vae.decode(part).sample for part in x.split(60)])
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def evaluate(pipeline, split: str, count: int, steps: int = 20, guidance: float = 1.0) -> dict:
    """Measure strict accuracy, in all and per task, and quality figures.

    Over `count` prompts of a split, the six tasks evenly. "relation" is the share of the pictures
    of a position prompt with the right objects in which they stand as asked.
    """
    records = prompts.balanced(split, count)
    images = sample(pipeline, [m["prompt"] for m in records], steps, seed=1, guidance=guidance)
    strict = verify.score(images, records)["strict"]
    tags = np.array([m["tag"] for m in records])
    tasks = {tag: round(float(strict[tags == tag].mean()), 3) for tag in prompts.TAGS}
    placed = tags == "position"
    anywhere = [
        {**m, "include": [{k: v for k, v in e.items() if k != "position"} for e in m["include"]]}
        for m in records
        if m["tag"] == "position"
    ]
    objects = verify.score(images.numpy()[placed], anywhere)["strict"]
    return {
        "accuracy": round(float(strict.mean()), 4),
        "tasks": tasks,
        "relation": round(float(strict[placed].sum() / max(objects.sum(), 1)), 3),
        "quality": {k: round(v, 4) for k, v in verify.quality(images, records).items()},
    }


def optimizers(
    modules: list[nn.Module], muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Build Muon for convolutions and the matrices inside blocks, except adaLN's, and AdamW for
    all else."""
    matrices, rest = [], []
    for module in modules:
        for name, p in module.named_parameters():
            inside = "transformer_blocks" in name or "encoder.layers" in name
            matrix = (p.ndim == 2 and inside and "norm" not in name) or (
                p.ndim == 4 and "conv_in" not in name and "conv_out" not in name
            )
            # The patch embedding is a convolution, but an input layer.
            (matrices if matrix and "pos_embed" not in name else rest).append(p)
    return [
        Muon(matrices, lr=muon_lr),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, config: Pretraining) -> float:
    """Compute the learning-rate factor: it rises, stays, and falls over the last `anneal` share."""
    return min(1.0, (step + 1) / config.warmup, (steps - step) / (config.anneal * steps))


def train(
    modules: list[nn.Module],
    steps: int,
    loss_of_step: Callable[[int], Tensor],
    config: Pretraining,
    name: str,
    rate: float = 1.0,
) -> Iterator[dict]:
    """Minimise the loss; yields {"stage", "step", "loss", "seconds"} when it is time to evaluate.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    from tqdm import tqdm

    for module in modules:
        module.requires_grad_(True).train()
    adam_lr = config.autoencoder_adam_lr if name == STAGES[0] else config.adam_lr
    opts = optimizers(modules, config.muon_lr, adam_lr)
    base_lrs = [g["lr"] for o in opts for g in o.param_groups]
    started, losses = time.time(), []
    for step in tqdm(range(steps), desc=name, mininterval=10):
        loss = loss_of_step(step)
        loss.backward()
        factor = rate * schedule(step, steps, config)
        for group, lr in zip((g for o in opts for g in o.param_groups), base_lrs, strict=True):
            group["lr"] = lr * factor
        for o in opts:
            o.step()
            o.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % config.evaluate_every == 0 or step + 1 == steps:
            mean = float(torch.stack(losses).mean())
            losses.clear()
            if not math.isfinite(mean):
                raise FloatingPointError(f"{name}: the loss is {mean} at step {step + 1}")
            seconds = round(time.time() - started, 1)
            yield {"stage": name, "step": step + 1, "loss": round(mean, 5), "seconds": seconds}


def train_autoencoder(pipeline, config: Pretraining) -> Iterator[dict]:
    """Train the VAE, then set its shift and scale so that latents have mean 0 and deviation 1."""
    vae, rng = pipeline.vae, np.random.default_rng((config.seed, 0))
    generator = torch.Generator().manual_seed(config.seed)
    rows = contents()

    def loss(step: int) -> Tensor:
        cells = rows[rng.integers(len(rows), size=config.autoencoder_batch)]
        # Cells of other pictures, so that any objects stand beside each other.
        shuffled = rng.permuted(cells, axis=0)
        cells = np.where(rng.random((len(cells), 1)) < 0.5, cells, shuffled)
        images = torch.from_numpy(paint(cells, rng)).float() / 127.5 - 1
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
        images = torch.from_numpy(paint(rows[rng.integers(len(rows), size=512)], rng))
        latents = vae.encode(images.float() / 127.5 - 1).latent_dist.mode()
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4),
        scaling_factor=round(1 / float(latents.std()), 4),
    )


@torch.no_grad()
def evaluate_autoencoder(vae: nn.Module, config: Pretraining) -> dict:
    """Measure strict accuracy and quality of decoded real pictures of the tuning prompts."""
    rng = np.random.default_rng(1)
    records = prompts.balanced("tune", config.eval_images // 2)
    images = torch.from_numpy(paint(arrange(records, rng), rng)).float() / 127.5 - 1
    pixels = torch.cat(
        [vae.decode(vae.encode(x).latent_dist.mode()).sample for x in images.split(60)]
    )
    decoded = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    strict = verify.score(decoded, records)["strict"].mean()
    return {
        "accuracy": round(float(strict), 4),
        "quality": {k: round(v, 4) for k, v in verify.quality(decoded, records).items()},
    }


def train_transformer(
    pipeline, latents: Latents, config: Pretraining, stage: str
) -> Iterator[dict]:
    """Train transformer and text encoder by flow matching; "mistaken" with wrong captions."""
    rng = np.random.default_rng((config.seed, STAGES.index(stage)))
    generator = torch.Generator().manual_seed(config.seed + STAGES.index(stage))
    mistaken = stage == "mistaken"
    shares = dict.fromkeys(prompts.TAGS, 1.0) if mistaken else config.shares

    def loss(step: int) -> Tensor:
        records = [caption(rng, shares) for _ in range(config.batch_size)]
        texts = ["" if rng.random() < config.caption_dropout else m["prompt"] for m in records]
        if mistaken:
            wrong = rng.random(len(records)) < [config.mistakes[m["tag"]] for m in records]
            records = [mistake(m, rng) if w else m for m, w in zip(records, wrong, strict=True)]
        x0 = latents.of(arrange(records, rng), rng)
        return flow_matching(pipeline, x0, texts, generator)

    modules = [pipeline.transformer, pipeline.text_encoder]
    steps = config.mistaken_steps if mistaken else config.clean_steps
    rate = config.mistaken_rate if mistaken else 1.0
    for record in train(modules, steps, loss, config, stage, rate):
        yield record | evaluate(pipeline, "tune", config.eval_images // 2)


def flow_matching(pipeline, x0: Tensor, texts: list[str], generator: torch.Generator) -> Tensor:
    """Compute the velocity's mean squared error on latents x0 [B, 4, 4, 4] at random noise."""
    # Stratified uniforms, so that every batch covers the noise levels evenly; shifted towards high
    # noise.
    u = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
    sigma = 1.5 * u / (1 + 0.5 * u)
    noise = torch.randn(x0.shape, generator=generator)
    s = sigma[:, None, None, None]
    context, pooled = encode(pipeline, texts)
    v = pipeline.transformer((1 - s) * x0 + s * noise, context, pooled, 1000 * sigma).sample
    return (v - (noise - x0)).square().mean()


def run(config: Pretraining) -> dict:
    """Pretrain, save, evaluate on the held-out prompts; returns the last record of the log."""
    pipeline = build(config.seed)

    @cache
    def latents() -> Latents:
        rng = np.random.default_rng((config.seed, 3))
        return Latents(pipeline.vae, config.variants, rng)

    def train_stage(stage: str) -> Iterator[dict]:
        if stage == "autoencoder":
            return train_autoencoder(pipeline, config)
        return train_transformer(pipeline, latents(), config, stage)

    return run_stages(config, pipeline, train_stage, evaluate)


def run_stages(
    config, pipeline, train_stage: Callable[[str], Iterator[dict]], evaluate: Callable[..., dict]
) -> dict:
    """Run `config.stages` by `train_stage`, a record a line of the log, save, and evaluate on the
    held-out prompts; returns the last record of the log."""
    config.out.mkdir(parents=True, exist_ok=True)
    if config.init is not None:
        load_weights(pipeline, config.init)
    with (config.out / "pretrain.jsonl").open("w") as log:
        for stage in config.stages:
            if stage != "autoencoder":
                pipeline.vae.requires_grad_(False).eval()
            for record in train_stage(stage):
                write(log, record)
                pipeline.save_pretrained(config.out / stage)
            # Once more, since the end of a stage may change a configuration.
            pipeline.save_pretrained(config.out / stage)
        save(pipeline, config.out / "model")
        for module in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
            module.float()
        held_out = {
            f"guidance {guidance}": evaluate(pipeline, "heldout", config.eval_images, 40, guidance)
            for guidance in (1.0, 2.0, 3.5)
        }
        settings = json.loads(json.dumps(asdict(config), default=str))
        return write(log, {"config": settings, "heldout, 40 steps": held_out})


def load_weights(pipeline, folder: Path) -> None:
    """Load the networks' weights, and the VAE's shift and scale, from a stage's folder."""
    for name in ("vae", "transformer", "text_encoder"):
        module = getattr(pipeline, name)
        stored = type(module).from_pretrained(folder / name)
        module.load_state_dict(stored.state_dict())
        if name == "vae":
            keys = ("shift_factor", "scaling_factor")
            module.register_to_config(**{key: stored.config[key] for key in keys})


def write(log: TextIO, record: dict) -> dict:
    """Append a line to the log; returns the record."""
    log.write(json.dumps(record) + "\n")
    log.flush()
    return record


if __name__ == "__main__":
    import tyro

    print(json.dumps(run(tyro.cli(Pretraining)), indent=1))
