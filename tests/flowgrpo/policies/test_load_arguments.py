"""What `Policy.load` and `Policy.encode` take: names of dtypes, and lists of texts."""

from __future__ import annotations

import pytest
import torch

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Policy

SMALL = PolicyConfig(resolution=16, max_sequence_length=4, text_cache="")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("fp32", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_names_of_dtypes(latent_model, name, dtype):
    policy = Policy.load(str(latent_model), device="cpu", dtype=name, config=SMALL)
    assert policy.dtype == dtype
    assert {p.dtype for p in policy.transformer.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", ["bfloat", "float8", 16, torch.int8, None])
def test_other_dtypes_are_one_sentence(latent_model, dtype):
    with pytest.raises(ConfigError, match=r"dtype is .*, but auto, bfloat16, float16, float32, or"):
        Policy.load(str(latent_model), device="cpu", dtype=dtype, config=SMALL)


@pytest.mark.parametrize("model", ["pixel_model", "latent_model", "flux_model"])
def test_a_text_alone_is_not_its_letters(request, model):
    config = PolicyConfig(max_sequence_length=4, text_cache="", resolution=0)
    if model == "flux_model":
        config = SMALL
    folder = str(request.getfixturevalue(model))
    policy = Policy.load(folder, device="cpu", dtype="fp32", config=config)
    for call in (policy.encode, policy.check_texts):
        with pytest.raises(TypeError, match=r"texts is a str, but a list .* \['a red cat'\]"):
            call("a red circle")
        with pytest.raises(TypeError, match="texts has a int in it"):
            call(["a red circle", 3])
        call(text for text in ["a circle"])
    assert len(policy.encode(["a red circle"])) == len(policy.encode(("a red circle",))) == 1
