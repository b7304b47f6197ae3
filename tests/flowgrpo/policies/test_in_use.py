"""Pipelines in memory that somebody, or an earlier run, has used: the same bits as a fresh one, or
a sentence."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from peft import LoraConfig, get_peft_model

from flowgrpo import train
from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Policy, in_use
from support import setups

KINDS = {"pixel_model": 0, "latent_model": 0, "flux_model": 16}
TEXTS = ["a red circle", "two square"]


def loaded(folder):
    index = DiffusionPipeline.load_config(folder)
    absent = [name for name, value in index.items() if value == [None, None]]
    return DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))


def config_of(kind, **fields) -> PolicyConfig:
    sizes = {"resolution": KINDS[kind], "max_sequence_length": 4, "text_cache": ""}
    return PolicyConfig(**sizes, **fields)


def gradients(policy) -> list[torch.Tensor]:
    """A velocity, an image, and gradients of a velocity in all weights and in the sample."""
    conditioning = policy.encode(TEXTS)
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    image = policy.decode(x)
    policy.transformer.requires_grad_(True)
    velocity = policy.velocity(x.requires_grad_(), torch.tensor([0.9, 0.2]), conditioning)
    velocity.square().sum().backward()
    names = dict(policy.transformer.named_parameters())
    return [velocity, image, x.grad, *(p.grad for p in names.values() if p.grad is not None)]


def compile_whole(pipeline):
    pipeline.transformer = torch.compile(pipeline.transformer)


def compile_in_place(pipeline):
    pipeline.transformer.compile()


def compile_blocks(pipeline):
    for block in pipeline.transformer.transformer_blocks:
        block.compile()


def fuse(pipeline):
    pipeline.transformer.fuse_qkv_projections()


def checkpoint(pipeline):
    pipeline.transformer.enable_gradient_checkpointing()


def offload(pipeline):
    pipeline.enable_sequential_cpu_offload(device="cpu")


USES = [compile_whole, compile_in_place, compile_blocks, fuse, checkpoint, offload]


# A transformer is one of two classes; without a VAE there is less to take off.
PAIRS = [(kind, use) for kind in ("latent_model", "flux_model") for use in USES]
PAIRS += [("pixel_model", offload)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "use"), PAIRS)
def test_it_computes_what_a_fresh_one_does(request, kind, use, caplog):
    folder, config = request.getfixturevalue(kind), config_of(kind)
    pipeline = loaded(folder)
    use(pipeline)
    with caplog.at_level(logging.WARNING, "flowgrpo"):
        policy = Policy.load(pipeline, device="cpu", config=config)
    fresh = Policy.load(str(folder), device="cpu", dtype="float32", config=config)
    assert type(policy.transformer) is type(fresh.transformer)
    assert policy.transformer is pipeline.transformer
    names = [dict(p.transformer.named_modules()).keys() for p in (policy, fresh)]
    assert names[0] == names[1]
    results = list(zip(gradients(policy), gradients(fresh), strict=True))
    assert len(results) > 20 and all(torch.equal(a, b) for a, b in results)
    said = [r.message for r in caplog.records if "was compiled by torch.compile" in r.message]
    assert len(said) == ("compile" in use.__name__)


@pytest.mark.parametrize("kind", ["latent_model", "flux_model"])
def test_fused_projections_of_other_weights(request, kind):
    pipeline = loaded(request.getfixturevalue(kind))
    fuse(pipeline)
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[0].attn.to_added_qkv.weight[0, 0] += 1
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn\.to_added_qkv has other weights than"):
        Policy.load(pipeline, device="cpu", config=config_of(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latent_model", "flux_model"])
def test_rewrites_of_an_earlier_policy_do_not_stay(request, kind):
    """Blocks that were fused or compiled are so again only where the new settings say it."""
    folder = request.getfixturevalue(kind)
    pipeline = loaded(folder)
    Policy.load(pipeline, device="cpu", config=config_of(kind, fused=True))
    assert "forward" in vars(pipeline.transformer.transformer_blocks[0])
    Policy.load(pipeline, device="cpu", config=config_of(kind, compile=True))
    policy = Policy.load(pipeline, device="cpu", config=config_of(kind))
    assert "forward" not in vars(pipeline.transformer.transformer_blocks[0])
    fresh = Policy.load(str(folder), device="cpu", dtype="float32", config=config_of(kind))
    assert policy.describe() == fresh.describe()
    results = zip(gradients(policy), gradients(fresh), strict=True)
    assert all(torch.equal(a, b) for a, b in results)


def wrap(pipeline):
    lora = LoraConfig(r=2, target_modules=["to_q"])
    pipeline.transformer = get_peft_model(pipeline.transformer, lora)


def leave_out(pipeline):
    pipeline.transformer = None


def cache(pipeline):
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))


def store_in_8_bits(pipeline):
    types = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}
    pipeline.transformer.enable_layerwise_casting(**types)


def offload_groups(pipeline):
    pipeline.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    )


def quantize(pipeline):
    pipeline.transformer.hf_quantizer = object()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (wrap, "is a PeftModel, but a FluxTransformer2DModel is expected; put the module itself"),
        (leave_out, "is a NoneType, but a FluxTransformer2DModel is expected"),
        (
            cache,
            "has the hooks fbc_block_hook, fbc_leader_block_hook.* of diffusers, but one without",
        ),
        (store_in_8_bits, "has the hooks layerwise_casting.* of diffusers"),
        (offload_groups, "has the hooks group_offloading.* of diffusers"),
        (quantize, "has quantized weights, but floating-point ones are expected"),
    ],
)
def test_what_cannot_be_taken_off_is_one_sentence(flux_model, use, message):
    pipeline = loaded(flux_model)
    use(pipeline)
    with pytest.raises(ConfigError, match=message):
        Policy.load(pipeline, device="cpu", config=config_of("flux_model"))


def run(kind, folder, out, pipeline=None, **changes):
    sizes = {"policy.resolution": KINDS[kind], "policy.max_sequence_length": 4, "run.steps": 1}
    rest = {
        "run.eval_prompts": 1,
        "run.eval_samples": 2,
        "sample.group_size": 3,
        "sample.steps": 4,
        "sample.eval_steps": 2,
        "optim.ema_decay": 0.0,
        "policy.text_cache": "",
    }
    out.mkdir(exist_ok=True)
    config = setups.config(folder, out, **{**sizes, **rest, **changes})
    train.run(config, pipeline=pipeline)
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.slow
def test_two_runs_on_one_pipeline(pixel_model, tmp_path):
    pipeline = loaded(pixel_model)
    first = run("pixel_model", pixel_model, tmp_path / "1", pipeline)
    with pytest.raises(ConfigError, match=r"has LoRA layers already \(default\), but .* unload_"):
        run("pixel_model", pixel_model, tmp_path / "2", pipeline)
    assert not (tmp_path / "2" / "run").exists()
    pipeline.unload_lora_weights()
    again = run("pixel_model", pixel_model, tmp_path / "3", pipeline)
    assert again == first == run("pixel_model", pixel_model, tmp_path / "4")


@pytest.mark.parametrize("kind", ["latent_model", "flux_model"])
def test_a_policy_whose_pipeline_was_taken_over(request, kind):
    """By one of other settings: its velocities are what they were, from other forwards."""
    pipeline = loaded(request.getfixturevalue(kind))
    policy = Policy.load(pipeline, device="cpu", config=config_of(kind))
    conditioning, sigmas = policy.encode(TEXTS), policy.sigmas(3).float()
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))

    def velocity():
        ready = policy.prepare(conditioning, sigmas).at(1)
        with torch.no_grad():
            return policy.velocity(x, sigmas[1].expand(2), ready)

    before = velocity()
    for changes in ({"height": 8, "width": 8}, {"compile": True}, {"fused": True}):
        Policy.load(pipeline, device="cpu", config=config_of(kind, **changes))
        if "compile" in changes:
            # What it would compile at its first call is another matter.
            in_use.restore(pipeline, type(pipeline.transformer).__name__, policy.device)
            assert "a later policy" in policy.describe()
        torch.testing.assert_close(velocity(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_pipeline_with_an_adapter(pixel_model, tmp_path):
    """Refused as it is; merged into the weights, it is the base of the new one."""
    run("pixel_model", pixel_model, tmp_path / "1")
    pipeline = loaded(pixel_model)
    pipeline.load_lora_weights(str(tmp_path / "1" / "run" / "adapter"))
    for adapter in ("lora", "full"):
        with pytest.raises(ConfigError, match=r"has LoRA layers already \(default_0\)"):
            run("pixel_model", pixel_model, tmp_path / "2", pipeline, **{"policy.adapter": adapter})
    base = {k: v.clone() for k, v in loaded(pixel_model).transformer.state_dict().items()}
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    merged = pipeline.transformer.state_dict()
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    assert run("pixel_model", pixel_model, tmp_path / "3", pipeline)


@pytest.mark.slow
def test_full_fine_tuning_goes_on_where_the_first_run_ended(pixel_model, tmp_path):
    pipeline = loaded(pixel_model)
    changes = {"policy.adapter": "full", "policy.gradient_checkpointing": True}
    run("pixel_model", pixel_model, tmp_path / "1", pipeline, **changes)
    after = {name: w.clone() for name, w in pipeline.transformer.state_dict().items()}
    policy = Policy.load(pipeline, device="cpu", config=config_of("pixel_model"))
    assert not policy.transformer.is_gradient_checkpointing
    weights = policy.transformer.state_dict()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    base = loaded(pixel_model).transformer.state_dict()
    assert any(not torch.equal(base[name], weights[name]) for name in base)
