"""The models that are measured: diffusers' real classes, real configurations, random weights.

Nothing is downloaded. Modules are made on the meta device and filled on the device in the target
dtype, which takes seconds for 12 billion parameters. Weights are normal with variance 1 / fan-in,
biases 0, norms 1, so activations stay finite in 16 bits, and speed does not depend on their values.
`TINY` has the same classes with small sizes, for `--smoke`; `nano` is the package's own model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flops
import torch
from torch import nn

SD3_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
"""What flow_grpo adapts in SD3: 191 layers of SD3.5-M, without attn2."""
FLUX_LAYERS = (
    *SD3_ATTENTION,
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TINY_VAE = {**VAE, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
CLIP_G = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}


@dataclass(frozen=True)
class Model:
    """One text-to-image model as configurations of its parts."""

    name: str
    family: str
    """sd3 or flux."""
    transformer: dict[str, Any]
    scheduler: dict[str, Any]
    vae: dict[str, Any] | None
    latent: tuple[int, int, int]
    """C, H, W of a latent, before FLUX packs it."""
    text_tokens: int
    parameters: int
    """Of the transformer."""
    targets: tuple[str, ...] = SD3_ATTENTION
    rank: int = 32
    half: torch.dtype = torch.float16
    """The 16-bit type of flow_grpo's recipe."""
    encoders: tuple[tuple[str, dict[str, Any]], ...] = ()
    """("clip" or "t5", configuration) of the text encoders."""
    distilled_guidance: float | None = None

    @property
    def forward(self) -> flops.Forward:
        """Operations of one forward of one sample."""
        count = flops.sd3 if self.family == "sd3" else flops.flux
        return count(self.transformer, *self.latent[1:], self.text_tokens)

    @property
    def text_width(self) -> tuple[int, int]:
        """Width of a token's and of a prompt's embedding."""
        config = self.transformer
        return config["joint_attention_dim"], config["pooled_projection_dim"]


SD35_MEDIUM = Model(
    name="sd3.5-m",
    family="sd3",
    transformer={
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    scheduler={"num_train_timesteps": 1000, "shift": 3.0},
    vae={**VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    latent=(16, 64, 64),
    text_tokens=333,
    parameters=2_243_171_520,
    encoders=(("clip", CLIP_L), ("clip", CLIP_G), ("t5", T5_XXL)),
)
FLUX_DEV = Model(
    name="flux.1-dev",
    family="flux",
    transformer={
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    scheduler={
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
    vae={**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    latent=(16, 64, 64),
    text_tokens=512,
    parameters=11_901_408_320,
    targets=FLUX_LAYERS,
    rank=64,
    half=torch.bfloat16,
    encoders=(("clip", CLIP_L), ("t5", T5_XXL)),
    distilled_guidance=3.5,
)
_TINY_CLIP = {
    **CLIP_L,
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TINY_T5 = {
    **T5_XXL,
    "vocab_size": 64,
    "d_model": 32,
    "d_ff": 32,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 1,
}
TINY_SD3 = Model(
    name="tiny-sd3",
    family="sd3",
    transformer={
        **SD35_MEDIUM.transformer,
        "sample_size": 8,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
    },
    scheduler=SD35_MEDIUM.scheduler,
    vae={**TINY_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    latent=(16, 8, 8),
    text_tokens=5,
    parameters=125_952,
    rank=4,
    encoders=(("clip", _TINY_CLIP), ("clip", _TINY_CLIP), ("t5", _TINY_T5)),
)
TINY_FLUX = Model(
    name="tiny-flux",
    family="flux",
    transformer={
        **FLUX_DEV.transformer,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    },
    scheduler=FLUX_DEV.scheduler,
    vae={**TINY_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    latent=(16, 8, 8),
    text_tokens=5,
    parameters=97_152,
    targets=FLUX_LAYERS,
    rank=4,
    half=torch.bfloat16,
    encoders=(("clip", _TINY_CLIP), ("t5", _TINY_T5)),
    distilled_guidance=3.5,
)


def nano() -> Model:
    """The embedded model, its weights read from the package."""
    from flowgrpo.nano import recipe
    from flowgrpo.policies import Policy

    policy = Policy.load("nano", device="cpu", dtype="float32")
    config, lora = dict(policy.transformer.config), recipe().policy
    config.setdefault("dual_attention_layers", ())
    return Model(
        name="nano",
        family="sd3",
        transformer=config,
        scheduler=dict(policy.scheduler.config),
        vae=None,
        latent=policy.latent_shape,
        text_tokens=policy.encode(["a red circle"]).embeds.shape[1],
        parameters=sum(p.numel() for p in policy.transformer.parameters()),
        targets=lora.lora_targets,
        rank=lora.lora_rank,
        half=torch.bfloat16,
    )


def transformer(model: Model, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The transformer of `model`, frozen, in eval mode."""
    if model.name == "nano":
        from diffusers import SD3Transformer2DModel

        from flowgrpo.nano.model import MODEL_DIR

        made = SD3Transformer2DModel.from_pretrained(MODEL_DIR / "transformer").to(device, dtype)
    else:
        from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

        kind = SD3Transformer2DModel if model.family == "sd3" else FluxTransformer2DModel
        made = random_module(lambda: kind(**model.transformer), device, dtype, seed)
    count = sum(p.numel() for p in made.parameters())
    if count != model.parameters:
        raise ValueError(f"{model.name} has {count} parameters, expected {model.parameters}")
    return made.requires_grad_(False).eval()


def vae(model: Model, device: str, dtype: torch.dtype, seed: int = 1) -> nn.Module | None:
    if model.vae is None:
        return None
    from diffusers import AutoencoderKL

    made = random_module(lambda: AutoencoderKL(**model.vae), device, dtype, seed)
    return made.requires_grad_(False).eval()


def text_encoders(model: Model, device: str, dtype: torch.dtype) -> list[nn.Module]:
    """CLIP-L, CLIP-G and T5-XXL as the model has them: 11 GB in 16 bits."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    kinds = {
        "clip": (CLIPTextModelWithProjection, CLIPTextConfig),
        "t5": (T5EncoderModel, T5Config),
    }
    made = []
    for seed, (kind, values) in enumerate(model.encoders, start=2):
        cls, config = kinds[kind][0], kinds[kind][1](**values)
        module = random_module(lambda cls=cls, c=config: cls(c), device, dtype, seed)
        made.append(module.requires_grad_(False).eval())
    return made


def pipeline(model: Model, device: str, dtype: torch.dtype, whole: bool = False):
    """The diffusers pipeline of `model`. Without `whole` its text encoders are tiny stand-ins: the
    suites hand over embeddings, and only the memory of the real ones matters."""
    from diffusers import FluxPipeline, StableDiffusion3Pipeline

    tiny = TINY_SD3 if model.family == "sd3" else TINY_FLUX
    encoders = text_encoders(model if whole else tiny, device, dtype)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")[: len(encoders)]
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")[: len(encoders)]
    words = tokenizer()
    return (StableDiffusion3Pipeline if model.family == "sd3" else FluxPipeline)(
        transformer=transformer(model, device, dtype),
        scheduler=scheduler(model),
        vae=vae(model, device, dtype),
        **dict(zip(names, encoders, strict=True)),
        **dict.fromkeys(tokenizers, words),
    )


def tokenizer():
    """A stand-in: a pipeline has to have one, and nothing is tokenized here."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")


def scheduler(model: Model):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_config(model.scheduler)


def sigmas(model: Model, steps: int) -> torch.Tensor:
    """float32 [steps + 1] on the CPU: the pipeline's own schedule."""
    made = scheduler(model)
    if model.family == "flux":
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        tokens = (model.latent[1] // 2) * (model.latent[2] // 2)
        spaced = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).numpy()
        made.set_timesteps(sigmas=spaced, mu=calculate_shift(tokens))
    else:
        made.set_timesteps(steps)
    return made.sigmas.float()


def conditioning(
    model: Model, prompts: int, device: str, dtype: torch.dtype, seed: int = 7
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random embeddings of `prompts` prompts: [K, L, D] and [K, P]."""
    width, pooled = model.text_width
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(prompts, model.text_tokens, width, generator=generator)
    return tokens.to(device, dtype), torch.randn(prompts, pooled, generator=generator).to(
        device, dtype
    )


def random_module(
    make: Callable[[], nn.Module], device: str, dtype: torch.dtype, seed: int
) -> nn.Module:
    """The module that `make` makes, filled with random weights on `device` in `dtype`."""
    with torch.device("meta"):
        module = make()
    # Not the library's `to`, which warns about loading; there is nothing loaded here.
    module = nn.Module.to(module, dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            for name, parameter in child.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
                else:
                    parameter.fill_(0.0 if name == "bias" else 1.0)
            for name, buffer in child.named_buffers(recurse=False):
                buffer.copy_(_buffer(child, name, device))
    return module


def _buffer(module: nn.Module, name: str, device: str) -> torch.Tensor:
    """The values that a module's constructor gives its buffer, which the meta device lost."""
    if name == "position_ids":
        return torch.arange(module.position_ids.shape[-1], device=device)[None]
    if name == "pos_embed":
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        _, tokens, width = module.pos_embed.shape
        values = get_2d_sincos_pos_embed(
            width,
            int(tokens**0.5),
            base_size=module.base_size,
            interpolation_scale=module.interpolation_scale,
            device=device,
            output_type="pt",
        )
        return values.float()[None]
    raise NotImplementedError(f"{type(module).__name__} has the unknown buffer {name}")
