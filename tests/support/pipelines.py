"""Random pipeline folders of diffusers' and transformers' classes, small enough for tests.

`save_pixel_pipeline` has no VAE and one CLIP text encoder, as the embedded model has;
`save_latent_pipeline` has the VAE and the text encoders of SD3.5, `save_flux_pipeline` those of
FLUX.1-dev, with a CLIP and a T5 tokenizer made here, `save_flux2_pipeline` those of
FLUX.2-klein, `save_qwen_pipeline` those of Qwen-Image, `save_zimage_pipeline` those of Z-Image,
`save_wan_pipeline` those of Wan 2.2 TI2V-5B.
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
    folder: Path, *, guidance: bool = True, blocks: int = 2, seed: int = 0, kontext: bool = False
) -> Path:
    """FluxPipeline, or with `kontext` FluxKontextPipeline, with FLUX.1-dev's parts: a double and a
    single block, a VAE of factor 2^(blocks - 1) with 4 latent channels, CLIP and T5, the
    resolution-dependent shift and, with `guidance`, the guidance embedding. Its default resolution,
    256 for 2 blocks, is more than most tests need."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxKontextPipeline,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = (FluxKontextPipeline if kontext else FluxPipeline)(
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


QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""QwenImagePipeline's; what stands before the text is 34 tokens of Qwen's own tokenizer."""


def qwen_tokenizer():
    """A Qwen2Tokenizer: byte-level pairs, trained until each word of this file and of the template
    is one token, as they are in Qwen's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        vocab_size=2000,
    )
    text = QWEN_TEMPLATE
    for word in special:
        text = text.replace(word, "\n")
    lines = [*text.split("\n"), *WORDS, " ".join(WORDS)]
    core.train_from_iterator(lines * 4, trainer)
    trained = json.loads(core.to_str())["model"]
    vocabulary = trained["vocab"]
    return Qwen2Tokenizer(
        vocab=vocabulary | {word: len(vocabulary) + i for i, word in enumerate(special)},
        merges=[tuple(pair) for pair in trained["merges"]],
        additional_special_tokens=special[1:],
        padding_side="right",
    )


def qwen_vl(words: int, width: int = 32):
    """A Qwen2_5_VLForConditionalGeneration of 2 layers over `words` tokens."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": words,
                "hidden_size": width,
                "intermediate_size": width,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
                "bos_token_id": None,
                "eos_token_id": None,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": width,
            },
        )
    )


def save_qwen_pipeline(folder: Path, *, seed: int = 0, **changes) -> Path:
    """QwenImagePipeline with Qwen-Image's parts: two blocks, a VAE of factor 2 with 4 latent
    channels, Qwen2.5-VL and the scheduler's settings of Qwen-Image. Its default resolution is 256.
    `changes` are of the transformer."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    words = qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=1.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                base_image_seq_len=256,
                max_image_seq_len=8192,
                shift_terminal=0.02,
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[-0.7, -0.1, 0.4, 0.9],
                latents_std=[2.8, 1.4, 2.3, 1.1],
            ),
            text_encoder=qwen_vl(len(words)),
            tokenizer=words,
            transformer=QwenImageTransformer2DModel(
                **{
                    "in_channels": 16,
                    "out_channels": 4,
                    "num_layers": 2,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 32,
                    "axes_dims_rope": (4, 4, 8),
                    **changes,
                }
            ),
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's, of messages without tools; what stands before the text is 3 of its own tokens."""


def save_flux2_pipeline(
    folder: Path, *, distilled: bool = False, blocks: int = 2, seed: int = 0
) -> Path:
    """Flux2KleinPipeline with FLUX.2-klein's parts: a double and two single blocks, a VAE of factor
    2^(blocks - 1) with 4 latent channels and statistics of a batch norm, Qwen3 of the 27 layers
    that the pipeline reads, a chat template and the resolution-dependent shift. Its default
    resolution is 256 for 2 blocks."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = qwen_tokenizer()
    words.chat_template = CHAT_TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(8,) * blocks,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
        decoder.bn.running_mean.normal_(0.0, 0.3)
        decoder.bn.running_var.uniform_(1.0, 4.0)
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=decoder,
            text_encoder=Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=len(words),
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=27,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                    bos_token_id=None,
                    eos_token_id=None,
                )
            ),
            tokenizer=words,
            transformer=Flux2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=48,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            ),
            is_distilled=distilled,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


ZIMAGE_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""What Qwen3's chat template makes of messages without tools."""


def save_zimage_pipeline(folder: Path, *, seed: int = 0, shift: float = 6.0, **changes) -> Path:
    """ZImagePipeline with Z-Image's parts: a refiner each and two layers, a VAE of factor 2 with 4
    latent channels, Qwen3 with a chat template, and the scheduler's settings of Z-Image; Turbo's
    `shift` is 3. `changes` are of the transformer."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3Model

    words = qwen_tokenizer()
    words.chat_template = ZIMAGE_TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ZImageTransformer2DModel(
            **{
                "in_channels": 4,
                "dim": 32,
                "n_layers": 2,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": 32,
                "axes_dims": [4, 4, 8],
                "axes_lens": [200, 64, 64],
                **changes,
            }
        )
        for name, parameter in network.named_parameters():
            if name.endswith("pad_token"):
                # A trained model's are no zeros.
                torch.nn.init.normal_(parameter)
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=vae(8),
            text_encoder=Qwen3Model(
                Qwen3Config(
                    vocab_size=len(words),
                    hidden_size=32,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=16,
                    bos_token_id=None,
                    eos_token_id=None,
                )
            ),
            tokenizer=words,
            transformer=network,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def umt5(words: int, width: int = 32):
    """A UMT5EncoderModel of 2 layers over `words` tokens."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=words,
            d_model=width,
            d_kv=8,
            d_ff=width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def save_wan_pipeline(folder: Path, *, seed: int = 0, **changes) -> Path:
    """WanPipeline with Wan 2.2 TI2V-5B's parts: two blocks, a residual VAE of factor 8 in space and
    4 in time with 4 latent channels, UMT5 and the UniPC scheduler with its settings. Its default
    size is 81 frames of 480 x 832. `changes` are of the transformer."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    words = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = WanPipeline(
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
            ),
            vae=AutoencoderKLWan(
                base_dim=8,
                decoder_base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[True, True],
                latents_mean=[-0.2, 0.1, 0.4, -0.3],
                latents_std=[0.5, 0.9, 1.2, 0.7],
                is_residual=True,
                in_channels=12,
                out_channels=12,
                patch_size=2,
                scale_factor_temporal=4,
                scale_factor_spatial=8,
            ),
            text_encoder=umt5(len(words)),
            tokenizer=words,
            transformer=WanTransformer3DModel(
                **{
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "in_channels": 4,
                    "out_channels": 4,
                    "text_dim": 32,
                    "freq_dim": 16,
                    "ffn_dim": 48,
                    "num_layers": 2,
                    "rope_max_seq_len": 64,
                    **changes,
                }
            ),
            expand_timesteps=True,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)
