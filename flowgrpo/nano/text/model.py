"""nano_text's networks: nano's, for pictures of 80 x 32 pixels and words of characters.

vae            diffusers.AutoencoderKL, 0.4 M parameters: 80 x 32 RGB -> 10 x 4 latents of 4
               channels
transformer    diffusers.SD3Transformer2DModel, 1.0 M parameters: 10 tokens of 2 x 2 latents, 3
               joint blocks of 3 heads
text_encoder   transformers.CLIPTextModelWithProjection, 0.2 M parameters; a token is a word of
               the prompt, or a character of the quoted text
scheduler      diffusers.FlowMatchEulerDiscreteScheduler
"""

from __future__ import annotations

import torch

from flowgrpo.nano.model import SHIFT, _open_gates
from flowgrpo.nano.text.glyphs import CHARACTERS
from flowgrpo.nano.text.prompts import MAX_TOKENS, WORDS
from flowgrpo.nano.text.scenes import HEIGHT, WIDTH

HIDDEN, HEADS, LAYERS, TEXT_LAYERS = 96, 3, 3, 2
LATENT_CHANNELS, PATCH = 4, 2
LATENT_SHAPE = (LATENT_CHANNELS, HEIGHT // 8, WIDTH // 8)
# Channels at 1, 2, 4 and 8 pixels. Strokes are thin: at 16 pixels they take far longer to learn.
VAE_CHANNELS = (8, 16, 32, 64)


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
        sample_size=max(LATENT_SHAPE[1:]),
        patch_size=PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HIDDEN // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=HIDDEN,
        caption_projection_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        pos_embed_max_size=max(LATENT_SHAPE[1:]) // PATCH,
        qk_norm="rms_norm",
    )
    _open_gates(transformer)
    text_encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=4 * HIDDEN,
            projection_dim=HIDDEN,
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
        # The trainer makes pictures of this height and width unless told otherwise.
        sample_size=(HEIGHT, WIDTH),
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
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # As in flowgrpo.nano.model: <eos> is not at 2.
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # Words are in lower case, characters to be drawn in capitals: "a" is no "A".
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r'[\s"“”]+'), "removed"),
            pre_tokenizers.Split(Regex("[A-Z0-9]"), "isolated"),
        ]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", vocabulary["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=MAX_TOKENS + 1,
    )
