"""Configurations of the models that are measured, written out as their repositories have them.

SD3.5-medium and FLUX.1-dev, their schedulers, VAEs and text encoders; FLUX.2-klein, Qwen-Image,
Z-Image and Wan 2.2 TI2V-5B without their text encoders, for what is counted; and tiny ones of the
first two's classes for `--smoke`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from models import flops

SD3_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
"""Layers that flow_grpo adapts in SD3: 191 of SD3.5-M, without attn2."""
FLUX_LAYERS = (
    *SD3_ATTENTION,
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
FLUX2_LAYERS = (
    *SD3_ATTENTION,
    *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    "attn.to_qkv_mlp_proj",
)
QWEN_LAYERS = (
    *SD3_ATTENTION,
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
ZIMAGE_LAYERS = (
    *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
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
    """One text-to-image model: the configurations of its networks, and how flow_grpo adapts it."""

    name: str
    family: str
    """sd3, flux, flux2, qwen, zimage or wan."""
    transformer: dict[str, Any]
    scheduler: dict[str, Any]
    vae: dict[str, Any]
    latent: tuple[int, int, int]
    """C, H, W of a latent, before FLUX, FLUX.2 or Qwen-Image packs it."""
    text_tokens: int
    parameters: int
    """Parameters of the transformer."""
    targets: tuple[str, ...] = SD3_ATTENTION
    rank: int = 32
    half: torch.dtype = torch.float16
    """16-bit type of flow_grpo's recipe."""
    encoders: tuple[tuple[str, dict[str, Any]], ...] = ()
    """("clip" or "t5", configuration) of the text encoders."""
    distilled_guidance: float | None = None
    frames: int = 0
    """Frames of a video; 0: an image."""

    @property
    def forward(self) -> flops.Forward:
        """Operations of one forward of one sample."""
        if self.family == "wan":
            return flops.wan(
                self.transformer, (self.frames - 1) // 4 + 1, *self.latent[1:], self.text_tokens
            )
        count = getattr(flops, self.family)
        return count(self.transformer, *self.latent[1:], self.text_tokens)

    @property
    def masked(self) -> bool:
        """True: a prompt's second embedding is the mask of its tokens."""
        return self.family in ("qwen", "zimage")

    @property
    def text_width(self) -> tuple[int, int]:
        """Width of a token's and of a prompt's embedding, which may be a mask, or nothing as in
        FLUX.2."""
        config = self.transformer
        if self.family == "wan":
            return config["text_dim"], 1
        pooled = config.get("pooled_projection_dim", self.text_tokens)
        return config.get("joint_attention_dim") or config["cap_feat_dim"], pooled


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
FLUX2_KLEIN_4B = Model(
    name="flux.2-klein-4b",
    family="flux2",
    transformer={
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32),
        "rope_theta": 2000,
        "guidance_embeds": False,
    },
    scheduler=FLUX_DEV.scheduler,
    # The class's defaults are the model's.
    vae={},
    latent=(32, 64, 64),
    text_tokens=512,
    parameters=3_875_544_576,
    targets=FLUX2_LAYERS,
    rank=64,
    half=torch.bfloat16,
)
FLUX2_KLEIN_9B = replace(
    FLUX2_KLEIN_4B,
    name="flux.2-klein-9b",
    transformer={
        **FLUX2_KLEIN_4B.transformer,
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
    },
    parameters=9_078_581_248,
)
QWEN_IMAGE = Model(
    name="qwen-image",
    family="qwen",
    transformer={
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": (16, 56, 56),
    },
    scheduler={
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "shift_terminal": 0.02,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
    },
    # The class's defaults are the model's.
    vae={},
    latent=(16, 64, 64),
    text_tokens=128,
    parameters=20_430_401_088,
    targets=QWEN_LAYERS,
    rank=64,
    half=torch.bfloat16,
)
Z_IMAGE = Model(
    name="z-image",
    family="zimage",
    transformer={
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "cap_feat_dim": 2560,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1024, 512, 512],
    },
    scheduler={"num_train_timesteps": 1000, "shift": 6.0},
    vae={**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    latent=(16, 64, 64),
    text_tokens=128,
    parameters=6_154_908_736,
    targets=ZIMAGE_LAYERS,
    rank=64,
    half=torch.bfloat16,
)
WAN22_TI2V_5B = Model(
    name="wan2.2-ti2v-5b",
    family="wan",
    transformer={
        "patch_size": (1, 2, 2),
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "in_channels": 48,
        "out_channels": 48,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 14336,
        "num_layers": 30,
    },
    scheduler={"num_train_timesteps": 1000, "shift": 5.0},
    vae={
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 16,
        # The model has 48 numbers of each; what is counted does not depend on them.
        "latents_mean": (0.0,) * 48,
        "latents_std": (1.0,) * 48,
    },
    latent=(48, 16, 26),
    frames=33,
    text_tokens=512,
    parameters=4_999_787_712,
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    rank=32,
    half=torch.bfloat16,
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
    """The embedded model, as the package's files have it."""
    from flowgrpo.nano import recipe
    from flowgrpo.policies import Policy
    from flowgrpo.runs.process import quiet_loading

    quiet_loading()
    policy = Policy.load("nano", device="cpu", dtype="float32")
    config, lora = dict(policy.transformer.config), recipe().policy
    config.setdefault("dual_attention_layers", ())
    return Model(
        name="nano",
        family="sd3",
        transformer=config,
        scheduler=dict(policy.scheduler.config),
        vae=dict(policy.pipeline.vae.config),
        latent=policy.latent_shape,
        text_tokens=policy.encode(["a red circle"]).embeds.shape[1],
        parameters=sum(p.numel() for p in policy.transformer.parameters()),
        targets=lora.lora_targets,
        rank=lora.lora_rank,
        half=torch.bfloat16,
    )
