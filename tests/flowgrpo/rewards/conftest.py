"""Tiny models of the real classes, saved to disk as their Hub repositories are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

WORDS = (
    "a photo of red orange yellow green blue purple pink brown black white colored object car dog"
)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIPModel of 32 x 32 pixels with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1, "<bos>": 2}
    words |= {word: 3 + i for i, word in enumerate(WORDS.split())}
    words["<eos>"] = len(words)
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(t, words[t]) for t in ("<bos>", "<eos>")]
    )
    layer = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": words["<eos>"]}
    config = CLIPConfig(
        text_config={
            **layer,
            **ids,
            "num_attention_heads": 4,
            "vocab_size": len(words),
            "max_position_embeddings": 12,
        },
        vision_config={**layer, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
        # Larger than at initialisation, so that scores differ visibly.
        for weight in model.parameters():
            weight.data.mul_(3)
        model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures() -> torch.Tensor:
    """uint8 [5, 3, 48, 48]: smooth and different."""
    draw = torch.Generator().manual_seed(3)
    small = torch.rand(5, 3, 6, 6, generator=draw)
    large = torch.nn.functional.interpolate(small, size=(48, 48), mode="bicubic")
    return (large * 255).clamp(0, 255).to(torch.uint8)
