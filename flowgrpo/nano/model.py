"""nano's networks, all of the classes that SD3.5 is made of, only smaller.

    vae            diffusers.AutoencoderKL, 0.5 M parameters: 64 x 64 RGB -> 4 x 4 latents of 4
                   channels
    transformer    diffusers.SD3Transformer2DModel, 1.0 M parameters: 16 tokens, 3 joint blocks of 3
                   heads
    text_encoder   transformers.CLIPTextModelWithProjection, 0.2 M parameters, over a vocabulary of
                   words
    scheduler      diffusers.FlowMatchEulerDiscreteScheduler

`save` writes an ordinary diffusers folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from flowgrpo.nano.prompts import MAX_WORDS, WORDS
from flowgrpo.nano.scenes import IMAGE_SIZE

WIDTH, HEADS, LAYERS, TEXT_LAYERS = 96, 3, 3, 2
LATENT_SIZE, LATENT_CHANNELS = 4, 4
# Channels at 64, 32, 16, 8 and 4 pixels: each level costs about as much.
VAE_CHANNELS = (8, 16, 32, 64, 64)
# More of the schedule's steps go to high noise, where the layout is decided; SD3.5 uses 3.0 at 512
# x 512.
SHIFT = 2.0


def build(seed: int = 0):
    """Build a fresh `StableDiffusion3Pipeline` with one text encoder, in float32."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    _open_gates(transformer)
    text_encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=tokenizer.model_max_length,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_CHANNELS),
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # Not <eos> at 2, which transformers takes for a sign of CLIP's first, wrong configuration.
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", vocabulary["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=MAX_WORDS + 1,
    )


@torch.no_grad()
def _open_gates(transformer: nn.Module) -> None:
    """Start blocks as plain residual blocks (modulation zero, gates one) and the output at zero.

    AdaLN-zero starts every block as the identity; with gates open a small model learns faster from
    the first step on.
    """
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            norm.linear.weight.zero_()
            norm.linear.bias.zero_()
            if (
                norm.linear.out_features == 6 * WIDTH
            ):  # shift, scale, gate of attention, then of the MLP
                norm.linear.bias.view(6, WIDTH)[2].fill_(1.0)
                norm.linear.bias.view(6, WIDTH)[5].fill_(1.0)
    transformer.norm_out.linear.weight.zero_()
    transformer.norm_out.linear.bias.zero_()
    transformer.proj_out.weight.zero_()
    transformer.proj_out.bias.zero_()


def save(pipeline, folder: Path) -> None:
    """Write the pipeline as a diffusers folder in bfloat16; the modules are converted in place."""
    for module in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        module.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    # transformers 5 writes a class name that transformers 4 does not know; this one is in both.
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
