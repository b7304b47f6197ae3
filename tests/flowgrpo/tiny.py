"""Random StableDiffusion3 pipeline folders of the real classes, small enough for tests.

`save_pixel_pipeline` has no VAE and one CLIP text encoder, as the embedded model has;
`save_latent_pipeline` has the VAE and the three text encoders of SD3.5.
"""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = (
    *("a", "an", "the", "one", "two", "three", "dark", "bright"),
    *("red", "green", "blue", "yellow", "circle", "square", "triangle"),
)


def tokenizer(length: int = 8):
    """A word-level tokenizer that pads to `length` tokens and ends each text with <eos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 1, "<bos>": 2, **{w: 3 + i for i, w in enumerate(WORDS)}}
    # CLIP pools at the end-of-text token, which it finds as the largest id.
    vocabulary["<eos>"] = len(vocabulary)
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def clip(width: int, projection: int, length: int = 8):
    """A CLIPTextModelWithProjection of 2 layers over the words of this file."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    last = len(WORDS) + 3
    config = CLIPTextConfig(
        vocab_size=last + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=last,
    )
    return CLIPTextModelWithProjection(config)


def transformer(
    *,
    size: int,
    channels: int,
    text: int,
    pooled: int,
    layers: int,
    heads: int,
    head_dim: int,
    patch: int,
):
    """An SD3Transformer2DModel whose output layer is small but not zero, as a trained one's."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=size,
        patch_size=patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=pooled,
        pos_embed_max_size=size // patch,
        qk_norm="rms_norm",
    )
    return model


def save_pixel_pipeline(
    folder: Path,
    *,
    size: int = 8,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 8,
    patch: int = 2,
    text: int = 16,
    shift: float = 3.0,
    seed: int = 0,
) -> Path:
    """A pipeline over RGB pixels: no VAE, one text encoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    # Only the initial weights use the global generator; the caller's state is kept.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer(
                size=size,
                channels=3,
                text=text,
                pooled=text,
                layers=layers,
                heads=heads,
                head_dim=head_dim,
                patch=patch,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=None,
            text_encoder=clip(text, text),
            tokenizer=tokenizer(),
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def save_latent_pipeline(folder: Path, *, size: int = 8, seed: int = 0) -> Path:
    """A pipeline with a VAE (factor 2, 4 latent channels) and the text encoders of SD3.5."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t5 = T5Config(
            vocab_size=len(WORDS) + 4,
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=len(WORDS) + 3,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer(
                size=size, channels=4, text=32, pooled=24, layers=2, heads=2, head_dim=8, patch=2
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderKL(
                in_channels=3,
                out_channels=3,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=2 * size,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=clip(12, 12),
            tokenizer=tokenizer(),
            text_encoder_2=clip(12, 12),
            tokenizer_2=tokenizer(),
            text_encoder_3=T5EncoderModel(t5),
            tokenizer_3=tokenizer(),
        )
    pipeline.save_pretrained(folder)
    return Path(folder)
