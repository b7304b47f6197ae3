"""Random pipeline folders of diffusers' and transformers' classes, small enough for tests.

`save_pixel_pipeline` has no VAE and one CLIP text encoder, as the embedded model has;
`save_latent_pipeline` has the VAE and the text encoders of SD3.5, `save_flux_pipeline` those of
FLUX.1-dev, with a CLIP and a T5 tokenizer made here.
"""

from __future__ import annotations

import json
import tempfile
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


def clip_tokenizer(length: int = 12):
    """A CLIPTokenizer: byte-pair encoding, trained on the words of this file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    core = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
        vocab_size=400,
    )
    core.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    with tempfile.TemporaryDirectory() as folder:
        core.model.save(folder)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def t5_tokenizer():
    """A T5TokenizerFast: unigrams, the words of this file and single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(f"\u2581{word}", -1.0 - i / 100) for i, word in enumerate(WORDS)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    settings = {
        "tokenizer_class": "T5TokenizerFast",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        core.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
        return T5TokenizerFast.from_pretrained(folder)


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
    dual: tuple[int, ...] = (),
    qk_norm: str | None = "rms_norm",
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
        dual_attention_layers=dual,
        qk_norm=qk_norm,
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
    dual: tuple[int, ...] = (),
    qk_norm: str | None = "rms_norm",
    seed: int = 0,
) -> Path:
    """A pipeline over RGB pixels: no VAE, one text encoder. SD3.5-medium has `dual` blocks, SD3 no
    `qk_norm`."""
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
                dual=dual,
                qk_norm=qk_norm,
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


def t5(width: int = 32, words: int = len(WORDS) + 4):
    """A T5EncoderModel of 2 layers over `words` tokens."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=words,
            d_model=width,
            d_kv=8,
            d_ff=width,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=words - 1,
        )
    )


def vae(size: int, blocks: int = 2):
    """An AutoencoderKL of factor 2^(blocks - 1) with 4 latent channels, made for size x size."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 ** (blocks - 1) * size,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def save_latent_pipeline(
    folder: Path, *, size: int = 8, blocks: int = 2, seed: int = 0, without: tuple[str, ...] = ()
) -> Path:
    """A pipeline with a VAE (factor 2^(blocks - 1), 4 latent channels) and the text encoders of
    SD3.5, less the components named by `without`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder_3 = t5()
        parts = dict(
            transformer=transformer(
                size=size, channels=4, text=32, pooled=24, layers=2, heads=2, head_dim=8, patch=2
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(size, blocks),
            text_encoder=clip(12, 12),
            tokenizer=tokenizer(),
            text_encoder_2=clip(12, 12),
            tokenizer_2=tokenizer(),
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer(),
        )
    pipeline = StableDiffusion3Pipeline(**{**parts, **dict.fromkeys(without)})
    pipeline.save_pretrained(folder)
    return Path(folder)


def save_flux_pipeline(
    folder: Path, *, guidance: bool = True, blocks: int = 2, seed: int = 0
) -> Path:
    """FluxPipeline with FLUX.1-dev's parts: a double and a single block, a VAE of factor
    2^(blocks - 1) with 4 latent channels, CLIP and T5, the resolution-dependent shift and, with
    `guidance`, the guidance embedding. Its default resolution, 256 for 2 blocks, is more than most
    tests need."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae(8, blocks),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(clip_words),
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=clip_words.model_max_length,
                    pad_token_id=clip_words.pad_token_id,
                    bos_token_id=clip_words.bos_token_id,
                    eos_token_id=clip_words.eos_token_id,
                )
            ),
            tokenizer=clip_words,
            text_encoder_2=t5(words=len(t5_words)),
            tokenizer_2=t5_words,
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=16,
                guidance_embeds=guidance,
                axes_dims_rope=(4, 4, 8),
            ),
        )
    pipeline.save_pretrained(folder)
    return Path(folder)
