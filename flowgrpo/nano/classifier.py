"""Classifier of nano's cells: a small convolutional network whose gradient reaches the pixels, for
learning from the reward's gradient. This command made its weights, `classifier.safetensors`.

    python -m flowgrpo.nano.classifier --out FILE

It reads a picture and gives for each of the four cells the probabilities of `cells.KINDS` and of
the colours. Labels are what the verifier sees, so it learns where the verifier draws its lines: the
object in a cell is the one whose centroid lies there; no known shape, no known colour or more than
one object is junk. Its pictures are renders, decoded latents of renders, decoded latents that were
disturbed (noise, cells mixed with those of another picture), and blends of two pictures. Noise and
shifts of the colours are added while it learns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowgrpo.nano import prompts, verify
from flowgrpo.nano.cells import EMPTY_KIND, JUNK_KIND, KINDS, log_probability
from flowgrpo.nano.draw import draw, mistake
from flowgrpo.nano.scenes import CELL, CELLS, COLORS, EMPTY, IMAGE_SIZE, SHAPES, paint

WEIGHTS = Path(__file__).parent / "classifier.safetensors"
# At 32, 16, 8, 4 and 2 pixels.
CHANNELS = (16, 32, 48, 64, 96)
_NO_COLOR = -100
"""Label of cells without a known object; cross_entropy leaves them out."""


@dataclass(frozen=True)
class ClassifierTraining:
    """Train the classifier of nano's cells."""

    out: Path
    """File for the weights, .safetensors; beside it FILE.json with settings and agreement."""
    pictures: int = 8192
    """Pictures to learn from."""
    steps: int = 1500
    batch_size: int = 96
    lr: float = 3e-3
    smoothing: float = 0.02
    """Share of a label that goes to all classes alike. It bounds log P from below: without it a
    picture that is quite wrong has -40 to -80, and such pictures alone decide the direction."""
    eval_images: int = 960
    """Pictures of each sort for the agreement with the verifier."""
    seed: int = 0


class CellClassifier(nn.Module):
    """Pixels -> log-probabilities of kinds and colours of the four cells; 73,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, *CHANNELS)
        kernels = (5, 3, 3, 3, 2)
        self.layers = nn.ModuleList(
            nn.Conv2d(sizes[i], sizes[i + 1], k, stride=2, padding=k // 2 if k > 2 else 0)
            for i, k in enumerate(kernels)
        )
        self.head = nn.Conv2d(CHANNELS[-1], len(KINDS) + len(COLORS), 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Classify pixels, float32 [B, 3, 64, 64] in 0 ... 255.

        Returns:
            log-probabilities [B, 4, 7] of KINDS and [B, 4, 6] of COLORS, cells in reading order.
        """
        if pixels.ndim != 4 or pixels.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"pixels: expected [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(pixels.shape)}"
            )
        x = pixels / 127.5 - 1
        for layer in self.layers:
            # Smooth, so that the gradient is as well.
            x = functional.silu(layer(x))
        logits = self.head(x).flatten(2).mT
        kinds, colors = logits.split([len(KINDS), len(COLORS)], dim=-1)
        return kinds.log_softmax(-1), colors.log_softmax(-1)


def score(network: CellClassifier, pixels: Tensor, metadata: list[dict]) -> Tensor:
    """Compute log P(fulfilled) [B] of pixels [B, 3, 64, 64] in 0 ... 255; see `cells.py`."""
    return log_probability(*network(pixels), metadata)


@cache
def load(path: Path = WEIGHTS) -> CellClassifier:
    """Load the classifier in float32, without gradients of its weights."""
    from safetensors.torch import load_file

    network = CellClassifier()
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return network.requires_grad_(False).eval()


def labels(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label the cells of images, uint8 [B, 3, 64, 64], by the verifier: kinds int [B, 4], and
    colours int [B, 4], -100 where there is no known object."""
    objects = verify.find_objects(images)
    kinds = np.full((len(images), CELLS), EMPTY_KIND)
    colors = np.full((len(images), CELLS), _NO_COLOR)
    column, row = (objects.center // CELL).astype(int).clip(0, 1).T
    for image, cell, shape, color in zip(
        objects.image, 2 * row + column, objects.shape, objects.color, strict=True
    ):
        known = kinds[image, cell] == EMPTY_KIND and shape >= 0 and color >= 0
        kinds[image, cell] = shape if known else JUNK_KIND
        colors[image, cell] = color if known else _NO_COLOR
    return kinds, colors


def random_cells(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw contents of cells, int [count, 4]: two of five are empty, the rest any object."""
    codes = rng.integers(len(SHAPES) * len(COLORS), size=(count, CELLS))
    return np.where(rng.random((count, CELLS)) < 0.4, EMPTY, codes)


def pictures(vae: nn.Module, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw pictures to learn from, uint8 [count, 3, 64, 64]: a quarter renders, a quarter decoded,
    three eighths decoded from disturbed latents, the rest blends."""
    from tqdm import tqdm

    chunk = 64
    chunks = [
        _chunk(vae, min(chunk, count - start), rng)
        for start in tqdm(range(0, count, chunk), desc="pictures", mininterval=10)
    ]
    return np.concatenate(chunks)


@torch.no_grad()
def _chunk(vae: nn.Module, count: int, rng: np.random.Generator) -> np.ndarray:
    images = paint(random_cells(count, rng), rng)
    quarter = count // 4
    latents = _encode(vae, images[quarter:])
    last = len(latents)
    disturbed = slice(quarter, last)
    shape = latents[disturbed].shape
    # Latents are 2 x 2 in each cell.
    share = rng.uniform(0, 0.6, (shape[0], 1, 2, 2)) * (rng.random((shape[0], 1, 2, 2)) < 0.4)
    share = torch.from_numpy(share.repeat(2, axis=2).repeat(2, axis=3)).float()
    spread = latents.std() * torch.from_numpy(rng.uniform(0, 0.6, (shape[0], 1, 1, 1))).float()
    noise = torch.from_numpy(rng.standard_normal(shape)).float() * spread
    other = latents[disturbed][torch.from_numpy(rng.permutation(shape[0]))]
    latents[disturbed] = (1 - share) * latents[disturbed] + share * other + noise
    images[quarter:] = _decode(vae, latents)
    blended = count // 8
    weight = rng.uniform(0, 0.5, (blended, 1, 1, 1))
    second = images[rng.integers(count, size=blended)]
    # Of the disturbed ones, which are the most.
    images[count - blended :] = np.rint((1 - weight) * images[count - blended :] + weight * second)
    return images


def _encode(vae: nn.Module, images: np.ndarray) -> Tensor:
    return vae.encode(torch.from_numpy(images).float() / 127.5 - 1).latent_dist.mode()


def _decode(vae: nn.Module, latents: Tensor) -> np.ndarray:
    return ((vae.decode(latents).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def train(images: np.ndarray, config: ClassifierTraining) -> CellClassifier:
    """Train a classifier on images, uint8 [N, 3, 64, 64], by cross-entropy to the verifier."""
    from tqdm import tqdm

    rng = np.random.default_rng((config.seed, 1))
    torch.manual_seed(config.seed)
    network = CellClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=0.01)
    warmup = max(1, config.steps // 20)
    kinds, colors = (torch.from_numpy(values) for values in labels(images))
    for step in tqdm(range(config.steps), desc="classifier", mininterval=10):
        rate = min(1.0, (step + 1) / warmup, (config.steps - step) / (0.6 * config.steps))
        optimizer.param_groups[0]["lr"] = config.lr * rate
        rows = torch.from_numpy(rng.integers(len(images), size=config.batch_size))
        log_kinds, log_colors = network(_jittered(images[rows.numpy()], rng))
        # Of log-probabilities, which its softmax leaves as they are.
        smoothing = {"label_smoothing": config.smoothing}
        loss = functional.cross_entropy(log_kinds.flatten(0, 1), kinds[rows].flatten(), **smoothing)
        known = functional.cross_entropy(
            log_colors.flatten(0, 1), colors[rows].flatten(), reduction="sum", **smoothing
        )
        loss = loss + known / (colors[rows] >= 0).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False).eval()


def _jittered(images: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Add noise and a shift of each channel, both mild: the labels stay."""
    count = len(images)
    spread = rng.uniform(0, 6, (count, 1, 1, 1)).astype(np.float32)
    shift = rng.uniform(-5, 5, (count, 3, 1, 1)).astype(np.float32)
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    return torch.from_numpy((images + spread * noise + shift).clip(0, 255))


@torch.no_grad()
def agreement(
    network: CellClassifier, images: np.ndarray | Tensor, metadata: list[dict]
) -> dict[str, float]:
    """Compare P(fulfilled) > 1/2 with the verifier's strict score.

    Returns:
        agree: share of the pictures with the same answer.
        verifier, classifier: share that each finds right.
    """
    strict = torch.from_numpy(verify.score(images, metadata)["strict"]) > 0
    pixels = torch.as_tensor(images).float()
    right = torch.cat(
        [
            score(network, chunk, metadata[i * 256 : (i + 1) * 256]).exp() > 0.5
            for i, chunk in enumerate(pixels.split(256))
        ]
    )
    shares = {"agree": right == strict, "verifier": strict, "classifier": right}
    return {name: round(float(value.float().mean()), 4) for name, value in shares.items()}


def evaluate(network: CellClassifier, pipeline, count: int, seed: int = 0) -> dict[str, dict]:
    """Measure the agreement on held-out prompts: renders, decoded renders, renders of mistaken
    prompts, and samples of the pipeline."""
    from flowgrpo.nano.pretrain import sample

    rng = np.random.default_rng((seed, 2))
    records = prompts.balanced("heldout", count)
    real = draw(records, rng)
    with torch.no_grad():
        chunks = (real[i : i + 64] for i in range(0, count, 64))
        decoded = np.concatenate([_decode(pipeline.vae, _encode(pipeline.vae, x)) for x in chunks])
    mistaken = draw([mistake(record, rng) for record in records], rng)
    texts = [record["prompt"] for record in records]
    sets = {
        "renders": real,
        "decoded renders": decoded,
        "renders of mistaken prompts": mistaken,
        "samples of the model": sample(pipeline, texts, 20, seed=seed + 1),
    }
    return {name: agreement(network, images, records) for name, images in sets.items()}


def run(config: ClassifierTraining) -> dict:
    """Train, save and evaluate; returns settings and agreement, which FILE.json has as well."""
    from dataclasses import asdict

    from safetensors.torch import save_file

    pipeline = embedded_pipeline()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    images = pictures(pipeline.vae, config.pictures, np.random.default_rng((config.seed, 0)))
    network = train(images, config)
    state = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(state, config.out)
    # As others load it, in half precision.
    load.cache_clear()
    record = {
        "settings": {k: v for k, v in asdict(config).items() if k != "out"},
        "agreement": evaluate(load(config.out), pipeline, config.eval_images, config.seed),
    }
    config.out.with_name(config.out.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def embedded_pipeline():
    """Load the embedded model's pipeline in float32."""
    from flowgrpo.nano import MODEL_DIR
    from flowgrpo.nano.model import build
    from flowgrpo.nano.pretrain import load_weights

    pipeline = build()
    load_weights(pipeline, MODEL_DIR)
    pipeline.vae.requires_grad_(False).eval()
    return pipeline


if __name__ == "__main__":
    import tyro

    print(json.dumps(run(tyro.cli(ClassifierTraining)), indent=1))
