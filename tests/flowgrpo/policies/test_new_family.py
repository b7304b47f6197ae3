"""A family that this file alone adds: its classes, its `Policy`, one record. It is trained, saved,
loaded and described by the rest of the trainer as it stands."""

from __future__ import annotations

import math
from dataclasses import replace as changed
from functools import partial
from typing import final

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import CogVideoXLoraLoaderMixin, PeftAdapterMixin
from diffusers.utils import BaseOutput
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from flowgrpo import plan, train
from flowgrpo.cli import targets
from flowgrpo.cli.evaluate import evaluate_run
from flowgrpo.cli.options import EvaluateOptions
from flowgrpo.config import Config, ConfigError
from flowgrpo.evaluation.evaluate import generate_images
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.adapters import add_adapter, load_adapter
from flowgrpo.policies.base import scheduler_sigmas
from flowgrpo.policies.families import FAMILIES
from flowgrpo.policies.family import Architecture, BlockKind, Family, Sizes
from flowgrpo.policies.load import load_policy
from flowgrpo.runs.export import load_trained
from support import setups
from support.cpu_graphs import assert_equal, eager, made

SIZE, PATCH, WIDTH, LAYERS = 8, 2, 16, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class ToyBlock(nn.Module):
    """One head of attention over all patches, and a perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(tokens)
        scores = self.to_q(x) @ self.to_k(x).transpose(1, 2) / math.sqrt(x.shape[-1])
        tokens = tokens + self.to_out(scores.softmax(-1) @ self.to_v(x))
        return tokens + self.down(torch.tanh(self.up(tokens)))


class ToyTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Pixels [B, 3, H, H], times [B] and letters [B, 26] -> velocity of the pixels."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, size: int = SIZE, width: int = WIDTH, depth: int = LAYERS) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.into = nn.Conv2d(3, width, PATCH, PATCH)
        self.prompt = nn.Linear(len(LETTERS) + 1, width)
        self.layers = nn.ModuleList(ToyBlock(width) for _ in range(depth))
        self.out = nn.ConvTranspose2d(width, 3, PATCH, PATCH)

    def forward(self, pixels: Tensor, time: Tensor, letters: Tensor) -> Tensor:
        patches = self.into(pixels)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = (
            tokens + self.prompt(torch.cat([letters, time[:, None]], 1).to(self.dtype))[:, None]
        )
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(layer, tokens)
            else:
                tokens = layer(tokens)
        return self.out(tokens.transpose(1, 2).unflatten(2, patches.shape[2:]))


class ToyPipeline(DiffusionPipeline, CogVideoXLoraLoaderMixin):
    """A transformer and a scheduler; prompts are counts of letters."""

    def __init__(
        self, transformer: ToyTransformer, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt: str, num_inference_steps: int, warmth: float) -> BaseOutput:
        """One image, from the zero noise."""
        self.scheduler.set_timesteps(num_inference_steps)
        x, letters = torch.zeros(1, 3, SIZE, SIZE), count_letters([prompt])
        for time in self.scheduler.timesteps:
            velocity = self.transformer(x, time.view(1) / 1000, letters)
            x = self.scheduler.step(velocity, time, x, return_dict=False)[0]
        pixels = ((x[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        return BaseOutput(images=[Image.fromarray(pixels.numpy())])


def count_letters(texts: list[str]) -> Tensor:
    return torch.tensor([[float(text.count(letter)) for letter in LETTERS] for text in texts])


@final
class ToyPolicy(Policy):
    """`Policy` of a ToyPipeline."""

    def __init__(self, source, device, config, encode) -> None:
        self.pipeline, self.name, self.dtype = source.pipeline, source.name, source.dtype
        self.device = device
        self.transformer, self.scheduler = self.pipeline.transformer, self.pipeline.scheduler
        self.transformer.requires_grad_(False).to(device)
        self.resolution = self.transformer.config.size
        self.latent_shape = (3, self.resolution, self.resolution)
        self._texts = encode or encode_letters

    def encode_texts(self, texts) -> Conditioning:
        return self._texts(texts)

    def check_texts(self, texts) -> None:
        """All texts have letters."""

    def _velocity(self, sample, sigma, conditioning) -> Tensor:
        return self.transformer(sample.to(self.dtype), sigma, conditioning.pooled)

    def pixels(self, latents) -> Tensor:
        return latents

    def latents(self, pixels) -> Tensor:
        return pixels

    def sigmas(self, num_steps) -> Tensor:
        return scheduler_sigmas(self.scheduler, num_steps)


def encode_letters(texts) -> Conditioning:
    counts = count_letters(list(texts))
    return Conditioning(counts[:, None], counts)


BLOCK = BlockKind(stored=(40.0, 8.0), stored_fused=(40.0, 8.0))


def read_sizes(config, vae_config, parameters, encoders, vae) -> Architecture:
    width, depth = config["width"], config["depth"]
    return Architecture(
        parameters,
        encoders,
        vae,
        width,
        blocks=((BLOCK, depth),),
        passing=20.0,
        adapted=((width, width),) * 4 * depth,
        pixels=PATCH,
        channels=3,
        latent_pixels=1,
        text_tokens=0,
        resolution=config["size"],
    )


TOY = Family(
    pipeline="ToyPipeline",
    transformer="ToyTransformer",
    policy=f"{__name__}:ToyPolicy",
    lora_targets=("to_q", "to_k", "to_v", "to_out"),
    library=__name__,
    blocks=("layers",),
    fixed_attention=True,
    sizes=Sizes(read_sizes, {}),
    call_arguments=lambda config: {"warmth": config.sample.guidance_scale},
)


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setitem(FAMILIES, TOY.pipeline, TOY)
    return TOY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline with random weights."""
    path = tmp_path_factory.mktemp("toy")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = ToyTransformer()
    ToyPipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(path)
    return path


def config_of(folder, tmp_path, **changes) -> Config:
    base = {
        "policy.lora_targets": None,
        # So large that two updates are seen in the pictures.
        "optim.lr": 0.1,
        "optim.ema_every": 1,
        "optim.beta": 0.04,
        "run.steps": 2,
        "run.eval_every": 0,
        "run.checkpoint_every": 1,
        "run.eval_prompts": 2,
        "run.eval_samples": 2,
        "sample.eval_steps": 4,
    }
    return setups.config(folder, tmp_path, **{**base, **changes})


def picture(policy) -> Tensor:
    """uint8 [4, 3, 8, 8]: two images of two prompts."""
    texts = list(setups.TEXTS[:2])
    return generate_images(policy, texts, torch.arange(4), 2, steps=4, batch_size=4)


@pytest.mark.slow
def test_it_is_trained_and_its_adapter_gives_the_same_pictures(folder, tmp_path):
    """In memory, with embeddings of the caller's; the adapter is loaded by diffusers."""
    asked = []

    def encode(texts) -> Conditioning:
        asked.append(list(texts))
        return encode_letters(texts)

    config = config_of("toy", tmp_path)
    pipeline = ToyPipeline.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    summary = train.run(config, pipeline=pipeline, encode=encode)
    assert summary["max_ratio_error"] == 0.0 and summary["iterations"] == 2 and asked
    # q, k, v and output of two blocks; the base weights stay.
    state = pipeline.transformer.state_dict()
    assert len([name for name in state if "lora_A" in name]) == 4 * LAYERS
    for name, tensor in before.items():
        owner, _, last = name.rpartition(".")
        base = f"{owner}.base_layer.{last}"
        assert torch.equal(tensor, state[base if base in state else name])
    trained = load_policy(config, ToyPipeline.from_pretrained(folder))
    load_trained(
        trained.transformer, config.optim, tmp_path / "run" / "checkpoints" / "step-000002"
    )
    base = Policy.load(ToyPipeline.from_pretrained(folder), device="cpu")
    plain = picture(base)
    load_adapter(base, str(tmp_path / "run" / "adapter"))
    assert torch.equal(picture(base), picture(trained)) and not torch.equal(plain, picture(base))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"policy.gradient_checkpointing": True, "sample.guidance_scale": 2.0, "optim.guard": True},
        {"policy.adapter": "full", "policy.dtype": "auto"},
        {"policy.dtype": "bfloat16", "sample.shared_noise": True, "sample.share_prefix": True},
    ],
    ids=["recomputed, guidance and guard", "full", "bfloat16, shared prefix"],
)
def test_its_folder_trains_in_other_ways(folder, tmp_path, changes):
    config = config_of(folder, tmp_path, **changes)
    parts = setups.parts(config)
    for parts.state.iteration in range(2):
        metrics = setups.update(parts, setups.experience(parts, config), config)
        assert metrics["max_ratio_error"] == 0.0 and min(metrics["grad_norm"]) > 0


@pytest.mark.slow
def test_its_rollout_is_captured(folder, tmp_path):
    parts, config = made(folder, tmp_path, **{"policy.lora_targets": None})
    conditioning = parts.policy.encode(setups.TEXTS[:2])
    rollout = partial(train.collect, parts, conditioning, config)
    assert_equal(rollout(), eager(parts.policy, rollout))
    assert parts.policy.graphs.recorder.captures == 1


@pytest.mark.slow
def test_its_run_is_evaluated_and_its_card_loads_it(folder, tmp_path):
    config = config_of(folder, tmp_path)
    summary = train.run(config)
    report = evaluate_run(
        EvaluateOptions(str(tmp_path / "run"), out=str(tmp_path / "out"), device="cpu"),
        Console(quiet=True),
    )["reports"]["iteration 2"]
    assert report["scores"] == summary["after"]["scores"]
    card = ModelCard.load(tmp_path / "run" / "adapter" / "README.md")
    assert "| Trained | rank 4, alpha 8, on to_q, to_k, to_v, to_out |" in card.text
    assert "| Guidance | none |" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    code = code.replace('.to("cuda")', "").replace("bfloat16", "float32")
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(tmp_path / "run" / "adapter")), names)
    assert names["image"].size == (SIZE, SIZE)
    assert names["pipe"].transformer.peft_config["default_0"].r == 4


def test_its_memory_is_planned_by_its_own_sizes(folder, tmp_path, monkeypatch):
    config = config_of(folder, tmp_path)
    sizes = plan.sizes_of(str(folder))
    count = sum(p.numel() for p in ToyTransformer().parameters())
    assert (sizes.parameters, sizes.vae, sizes.width) == (count, 0, WIDTH)
    memory = plan.expected_memory(config, sizes)
    # 16 tokens of 2 blocks, 3 rows; [W, s B] and A of 8 layers.
    activations = 16 * (2 * (40 * WIDTH + 8 * 4) + 20 * WIDTH) * 3
    copies = 8 * ((WIDTH + 4) * WIDTH + 4 * WIDTH)
    assert memory["update"] * plan.GIB == pytest.approx((activations + 2 * copies) * 2)
    assert memory["trajectory"] * plan.GIB == pytest.approx(12 * 3 * SIZE**2 * 4 * 7)
    assert plan.plan_lines(config, 24.0)["memory"].startswith("about 2 GiB of 24 (overhead 1.5;")
    monkeypatch.setitem(FAMILIES, TOY.pipeline, changed(TOY, sizes=None))
    assert plan.sizes_of(str(folder)) is None and "memory" not in plan.plan_lines(config)


def test_techniques_that_it_has_no_hook_for(folder, tmp_path):
    policy = targets.load_base(config_of(folder, tmp_path))
    add_adapter(policy.transformer, config_of(folder, tmp_path).policy)
    assert policy.describe() == (
        "attention the model's only, blocks diffusers', modulation in every forward "
        "(ToyTransformer names no norms of the time alone)"
    )
    text = policy.encode(["a"])
    assert policy.prepare(text, torch.tensor([1.0, 0.5, 0.0])) is text
    for field, value, message in (
        (
            "attention",
            "native",
            r"policy.attention is native, but the attention of ToyTransf.*auto",
        ),
        ("fused", True, "the blocks of ToyTransformer have no fused forward; set policy.fused to"),
        ("height", 2 * SIZE, rf"policy.height is {2 * SIZE}, but .* images of {SIZE} x {SIZE}"),
    ):
        config = config_of(folder, tmp_path, **{f"policy.{field}": value})
        with pytest.raises(ConfigError, match=message):
            targets.load_base(config)


def test_without_its_record_it_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.delitem(FAMILIES, TOY.pipeline)
    names = ", ".join(FAMILIES)
    with pytest.raises(ConfigError, match=f"is a ToyPipeline, but one of {names} is expected"):
        Policy.load(str(folder), device="cpu")
    with pytest.raises(ConfigError, match=f"is a ToyPipeline, but a name or one of {names}"):
        train.run(config_of("toy", tmp_path), pipeline=ToyPipeline.from_pretrained(folder))
    assert not (tmp_path / "run").exists()
