"""ImageReward: a reward model of human preference (Xu et al., https://arxiv.org/abs/2304.05977;
https://github.com/THUDM/ImageReward, ImageReward-v1.0).

    score = (MLP(BLIP(image, text)) - 0.16717) / 1.03334

BLIP is a ViT-L/16 at 224 pixels and a BERT-base text encoder (35 tokens) with cross-attention to
the image; its first token goes through five linear layers without activations. Both encoders are
transformers' BLIP classes, so neither the authors' package nor its pins are needed. flow_grpo
scores one image after the other, here they go in batches.

The authors' file is a pickle. The default is a copy as safetensors
(https://huggingface.co/RE-N-Y/ImageReward) with the authors' names of the tensors, which `renamed`
turns into transformers'. What else the file holds (BLIP's projection heads) is not used.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowgrpo.rewards import RewardError, clip, models
from flowgrpo.rewards.options import check_numbers, configurable

MEAN = 0.16717362830052426
STD = 1.0333394966054072
TOKENS = 35
HEAD = (0, 2, 4, 6, 7)
"""Numbers of the linear layers in the MLP."""

# Pattern in the authors' names -> what transformers calls it; applied in this order.
NAMES = (
    (r"^(?:module\.)?blip\.", ""),
    (r"^visual_encoder\.patch_embed\.proj", "vision.embeddings.patch_embedding"),
    (r"^visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"^visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"^visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\.encoder\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\.encoder\..*)\.attn\.", r"\1.self_attn."),
    (r"^(vision\.encoder\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^text_encoder\.", "text."),
)


@configurable("imagereward")
def score(
    *,
    model: str = "RE-N-Y/ImageReward",
    tokenizer: str = "google-bert/bert-base-uncased",
    device: str = "auto",
    batch_size: int = 32,
):
    """Build ImageReward, normalised: mean 0 and standard deviation 1 over the authors' data."""
    check_numbers("imagereward", {"batch_size": batch_size})
    on = models.device(device)
    weights = renamed(models.tensors(model))
    vision, text, head = (module.to(on) for module in build(weights, model))
    tokens = models.tokenizer(tokenizer)

    for module in (vision, text, head):
        module.requires_grad_(False)

    def of_pixels(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        rewards = []
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            pixels = clip.pixels(images[rows].to(on), vision.config.image_size)
            seen = vision(pixel_values=pixels).last_hidden_state
            words = tokens(
                list(prompts[rows]),
                padding="max_length",
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            ).to(on)
            out = text(
                input_ids=words.input_ids,
                attention_mask=words.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=on),
            )
            rewards.append((head(out.last_hidden_state[:, 0])[:, 0] - MEAN) / STD)
        return torch.cat(rewards)

    @torch.inference_mode()
    def rate(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return of_pixels(images, prompts, metadata)

    rate.of_pixels = of_pixels
    return rate


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' tensors for the modules of `build`: vision.*, text.*, mlp.*."""
    tensors = {}
    for name, tensor in weights.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor.float()
    return tensors


def build(weights: dict[str, Tensor], source: str) -> tuple[Any, Any, torch.nn.Sequential]:
    """Build vision encoder, text encoder and head; sizes are those of the tensors."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    try:
        patches = weights["vision.embeddings.patch_embedding.weight"]
        width, _, patch, _ = patches.shape
        side = round((weights["vision.embeddings.position_embedding"].shape[1] - 1) ** 0.5)
        words, hidden = weights["text.embeddings.word_embeddings.weight"].shape
        positions = weights["text.embeddings.position_embeddings.weight"].shape[0]
        # The ratio of width to heads is 64 in every ViT and BERT of BLIP.
        vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=_layers(weights, r"vision\.encoder\.layers\.(\d+)\."),
                num_attention_heads=max(1, width // 64),
                image_size=side * patch,
                patch_size=patch,
                # Of timm's ViT, which the authors use; transformers' default differs.
                layer_norm_eps=1e-6,
            )
        )
        text = BlipTextModel(
            BlipTextConfig(
                vocab_size=words,
                hidden_size=hidden,
                encoder_hidden_size=width,
                intermediate_size=weights["text.encoder.layer.0.intermediate.dense.weight"].shape[
                    0
                ],
                num_hidden_layers=_layers(weights, r"text\.encoder\.layer\.(\d+)\."),
                num_attention_heads=max(1, hidden // 64),
                max_position_embeddings=positions,
                is_decoder=True,
            ),
            add_pooling_layer=False,
        )
        head = torch.nn.Sequential(*(Linear(weights, f"mlp.layers.{i}") for i in HEAD))
        _fill(vision, weights, "vision.")
        _fill(text, weights, "text.")
    except (KeyError, RuntimeError, ValueError) as error:
        raise RewardError(
            f"the weights {source} of reward 'imagereward' do not fit ({str(error)[:200]}), but "
            "those of ImageReward-v1.0 as safetensors are expected; name such a file."
        ) from error
    return vision, text, head


class Linear(torch.nn.Module):
    """A linear layer of the head, frozen."""

    def __init__(self, weights: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self.register_buffer("weight", weights[f"{name}.weight"])
        self.register_buffer("bias", weights[f"{name}.bias"])

    def forward(self, values: Tensor) -> Tensor:
        """Map values [..., in] to [..., out]."""
        return functional.linear(values, self.weight, self.bias)


def _layers(weights: dict[str, Tensor], pattern: str) -> int:
    """Count the layers whose number is the group of `pattern`."""
    matches = (re.match(pattern, name) for name in weights)
    return 1 + max(int(match[1]) for match in matches if match)


def _fill(module: torch.nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    """Load all weights of `module`, frozen; a missing one raises, the file may hold more."""
    names = [name for name in module.state_dict() if not name.endswith("position_ids")]
    module.load_state_dict({name: weights[prefix + name] for name in names}, strict=False)
    module.eval().requires_grad_(False)
