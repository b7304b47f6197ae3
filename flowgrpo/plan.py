"""What a run takes, before it starts: its group arithmetic and the GPU memory that it needs.

The memory is an estimate for one GPU with 16-bit frozen weights and LoRA: what is always there, and
the largest of what comes and goes.

    always     weights      2 bytes (4 in float32) for each parameter of transformer, VAE and text
                            encoders; the encoders not if they are offloaded
               adapters     20 bytes a parameter: itself, its gradient, AdamW's two moments and the
                            average
               trajectory   T + 1 latents of each of the K G rows in float32; with Guard the
                            velocities too
               rewards      float32 weights of the reward models that run in this process
               overhead     CUDA context and workspaces of the libraries, 1.5 GiB
    update     activations  what autograd keeps: c_d width + c_r rank bytes a token and block, as
                            counted on blocks of diffusers' classes in bfloat16, plain and with
                            policy.fused; twice as many rows under guidance
               passing      what one block has alive beside that
               copies       [W, s B] and A of the adapted layers in 16 bits, see policies/lora.py;
                            with recomputed activations too, since they are held for an update;
                            with captured rollouts they are one piece that stays
    rollout    copies and what one block has alive, or the VAE's feature maps
    encode     text encoders that are offloaded

Not in it: the pools of captured and compiled graphs, and what fragmentation costs; so at most 80 %
of the memory is planned with. Of the peaks of iterations of the real SD3.5-medium and FLUX.1-dev,
counted tensor by tensor on torch's meta device, the estimate is 0.97 to 1.07
(tests/flowgrpo/test_on_device_memory.py). No figure has been compared with a GPU yet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flowgrpo.config import Config, replace

GIB = 2**30
FILL = 0.8
"""Share of the memory that is planned with."""
MOST_ROWS = 12
"""Rows of a forward, at most: 12 images of 512 pixels are about 15,000 tokens, enough for a GPU."""
OVERHEAD = 1.5 * GIB
BYTES_A_TRAINED = 20

# Bytes that one token leaves behind in one block: (times the width, times the rank). Of two rows or
# more: with one, image and text are split without a copy. Where query, key and value are slices of
# one product, all three stay if one does.
STORED = {
    "joint": (38.25, 8.0),
    "dual": (20.2, 0.0),
    "double": (42.1, 12.0),
    "single": (28.1, 6.0),
}
"""Kind of block -> bytes a token. "dual" is the second attention of SD3.5-M's first blocks, on the
image's tokens only, on top of "joint"."""

STORED_FUSED = {
    "joint": (30.1, 8.0),
    "dual": (12.1, 0.0),
    "double": (40.05, 12.0),
    "single": (24.05, 6.0),
}
"""The same with policy.fused: norms keep their input and two numbers a token, not what lies between
LayerNorm, scale and shift; a gate keeps neither its product nor its residual."""

PASSING = {"joint": 25.0, "double": 40.0}
"""Kind of a model's first blocks -> bytes a token, times the width, that a forward has alive beside
what is stored."""

REWARD_MODELS = {
    "pickscore": {"CLIP-H": 986e6},
    "hpsv2": {"HPSv2": 986e6},
    "imagereward": {"ImageReward": 446e6},
    "clipscore": {"CLIP-L": 428e6},
    "aesthetic": {"CLIP-L": 428e6},
    "geneval": {"CLIP-L": 428e6, "Mask2Former": 69e6},
    "geneval_strict": {"CLIP-L": 428e6, "Mask2Former": 69e6},
}
"""Reward -> its models -> about how many parameters; equal models are loaded once."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a pipeline that its memory follows from."""

    parameters: int
    """Of the transformer."""
    encoders: int
    """Parameters of all text encoders."""
    vae: int
    width: int
    """Of a token."""
    joint: int = 0
    """Joint blocks of SD3: image and text in two streams."""
    dual: int = 0
    """How many of them have a second attention."""
    double: int = 0
    """Blocks of FLUX with two streams."""
    single: int = 0
    """Blocks of FLUX with one stream."""
    pixels: int = 16
    """Pixels on a side of the square that one image token stands for."""
    channels: int = 16
    """Of a latent."""
    clip_tokens: int = 77
    """Text tokens before those of T5."""

    def adapted(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers that flow_grpo's lists of targets name."""
        w = self.width
        # The last joint block has no output for the text.
        layers = [(w, w)] * max(8 * self.joint - 1, 0)
        layers += ([(w, w)] * 8 + [(w, 4 * w), (4 * w, w)] * 2) * self.double
        return layers + [(w, w)] * 3 * self.single


T5_XXL = 4_762_310_656
CLIP_L, CLIP_G = 123_650_304, 694_659_840
VAE = 83_819_683

KNOWN = {
    "stabilityai/stable-diffusion-3.5-medium": Architecture(
        2_243_171_520, CLIP_L + CLIP_G + T5_XXL, VAE, 1536, joint=24, dual=13
    ),
    "stabilityai/stable-diffusion-3.5-large": Architecture(
        8_056_627_520, CLIP_L + CLIP_G + T5_XXL, VAE, 2432, joint=38
    ),
    # FLUX's CLIP-L comes without its projection.
    "black-forest-labs/FLUX.1-dev": Architecture(
        11_901_408_320,
        CLIP_L - 768 * 768 + T5_XXL,
        VAE,
        3072,
        double=19,
        single=38,
        clip_tokens=0,
    ),
}
"""Hub id -> sizes."""


def sizes_of(model: str) -> Architecture | None:
    """The sizes of a pipeline, known by its Hub id or read from its folder; None if neither."""
    if model in KNOWN:
        return KNOWN[model]
    folder = Path(model)
    try:
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        sd3 = config["_class_name"] == "SD3Transformer2DModel"
        blocks = (
            {"joint": config["num_layers"], "dual": len(config.get("dual_attention_layers", ()))}
            if sd3
            else {"double": config["num_layers"], "single": config["num_single_layers"]}
        )
        found = Architecture(
            parameters=_parameters(folder / "transformer"),
            encoders=sum(_parameters(part) for part in folder.glob("text_encoder*")),
            vae=_parameters(folder / "vae"),
            width=config["num_attention_heads"] * config["attention_head_dim"],
            clip_tokens=77 if sd3 else 0,
            **blocks,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.vae else None


def _parameters(folder: Path) -> int:
    """Numbers in the .safetensors files of a component, from their headers; 0 without files."""
    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        # A second set of files in another type, as Hub repositories have them.
        if ".fp16." in file.name:
            continue
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                size = 1
                for side in tensors.get_slice(name).get_shape():
                    size *= side
                count += size
    return count


def expected_memory(config: Config, arch: Architecture) -> dict[str, float]:
    """GiB of each part at its largest, and under "total" the expected peak."""
    policy, sample, optim = config.policy, config.sample, config.optim
    size = 4 if policy.dtype == "float32" else 2
    resolution = policy.resolution or 1024
    image = (resolution // arch.pixels) ** 2
    text = arch.clip_tokens + (policy.max_sequence_length or 128)
    latent = arch.channels * (resolution // 8) ** 2
    adapted, rank = arch.adapted(), policy.lora_rank
    rows = sample.batch_size * (2 if sample.guidance_scale != 1 else 1)
    encoders = size * arch.encoders
    always = {
        "weights": size * (arch.parameters + arch.vae)
        + (0 if policy.offload_text_encoders else encoders),
        "adapters": BYTES_A_TRAINED * sum(rank * (i + o) for i, o in adapted),
        "trajectory": sample.rows * latent * 4 * (sample.steps + 1),
        "rewards": 4 * sum(_reward_models(config).values()),
        "overhead": OVERHEAD,
    }
    if optim.guard:
        always["trajectory"] += sample.rows * latent * size * sample.steps
    copies = size * sum((i + rank) * o + rank * i for i, o in adapted)
    stored_by = STORED_FUSED if policy.fused else STORED
    one = {kind: a * arch.width + b * rank for kind, (a, b) in stored_by.items()}
    blocks = arch.joint * one["joint"] + arch.double * one["double"] + arch.single * one["single"]
    stored = (image + text) * blocks + image * arch.dual * one["dual"]
    count = max(arch.joint + arch.double + arch.single, 1)
    if policy.gradient_checkpointing:
        # The inputs of the blocks, and one block whole.
        stored = stored / count + 2 * arch.width * (image + text) * count
    passing = PASSING["joint" if arch.joint else "double"] * arch.width * (image + text)
    # At full resolution the decoder works on 256 channels. Three such maps are alive at a time; a
    # fourth is the copy that a GPU's group norm makes of a channels-last one.
    images = 1 if policy.vae_slicing else sample.batch_size
    decoding = 4 * 256 * resolution**2 * size * images
    moving = {
        "update": copies + (stored + passing) * rows * optim.steps_per_forward * (size / 2),
        "rollout": max(copies + passing * rows * (size / 2), decoding),
        "encode": encoders if policy.offload_text_encoders else 0,
    }
    found = {name: value / GIB for name, value in {**always, **moving}.items()}
    return {**found, "total": (sum(always.values()) + max(moving.values())) / GIB}


def _reward_models(config: Config) -> dict[str, float]:
    names = (*config.reward.weights, *config.reward.report)
    return {model: n for name in names for model, n in REWARD_MODELS.get(name, {}).items()}


def fit_batch_size(config: Config, available: float | None = None) -> Config:
    """`config` with as many rows a forward as `available` GiB allow (default: this machine's GPU,
    or else 80): a divisor of the rows of one update, at most MOST_ROWS; 1 where none fits."""
    available = available or gpu_memory() or 80.0
    arch, sample = sizes_of(config.policy.model), config.sample
    share = sample.rows // config.optim.updates_per_iteration
    best = config
    for rows in range(1, MOST_ROWS + 1):
        if share % rows == 0:
            trial = replace(config, **{"sample.batch_size": rows})
            if (
                rows == 1
                or arch is None
                or expected_memory(trial, arch)["total"] <= FILL * available
            ):
                best = trial
    return best


def gpu_memory() -> float | None:
    """GiB of the first GPU, or None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / GIB


def plan_lines(config: Config, available: float | None = None) -> dict[str, str]:
    """The group arithmetic and the expected memory of a run, a line each."""
    sample, optim = config.sample, config.optim
    lines = {
        "images": f"{sample.prompts_per_iteration} prompts x {sample.group_size} = {sample.rows} "
        "an iteration",
        "updates": f"{optim.updates_per_iteration} an iteration, each of "
        f"{config.chunks_per_update} micro-batches of {sample.batch_size} images x "
        f"{sample.trained_steps} steps",
    }
    arch = sizes_of(config.policy.model)
    if arch is None or config.policy.adapter == "full":
        return lines
    found = expected_memory(config, arch)
    parts = ", ".join(f"{n} {v:.1f}" for n, v in found.items() if n != "total" and v >= 0.05)
    text = f"about {found['total']:.0f} GiB"
    if available is not None:
        text += f" of {available:.0f}"
        if found["total"] > available:
            text += ", which is more than there is: lower sample.batch_size"
    lines["memory"] = f"{text} ({parts}; of update, rollout and encode the largest counts)"
    return lines
