"""NaN, infinity and float16's end outside the update: found, and named as far as they are known."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from flowgrpo import train, update
from flowgrpo.cli import main
from flowgrpo.config import PolicyConfig
from flowgrpo.policies import Policy
from flowgrpo.policies.decoded import Decoded
from flowgrpo.runs import process
from flowgrpo.runs.monitor import DivergedError
from flowgrpo.sampling import rollout
from flowgrpo.sampling.finite import NotFiniteError
from support import setups

NAN = float("nan")


def load(folder, dtype="float32") -> Policy:
    config = PolicyConfig(resolution=16, max_sequence_length=4, text_cache="")
    return Policy.load(str(folder), device="cpu", dtype=dtype, config=config)


def images(policy, steps=4, **options):
    """Three images in chunks of two."""
    return rollout.sample_images(
        policy,
        policy.encode(["a red circle", "two square"]),
        steps=steps,
        groups=torch.tensor([0, 1, 1]),
        seeds=torch.arange(3),
        batch_size=2,
        **options,
    )


def change(module, name, value):
    with torch.no_grad():
        module.get_parameter(name).view(-1)[0] = value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["latent_model", "flux_model"])
def test_weights_that_are_nan(kind, dtype, request):
    policy = load(request.getfixturevalue(kind), dtype)
    change(policy.transformer, "proj_out.weight", NAN)
    message = (
        rf"the velocity is NaN at step 1 of 4 \(sigma 1\) of the deterministic sampler, in {dtype},"
        r" but finite numbers are expected: transformer\.proj_out\.weight holds NaN; "
    )
    with pytest.raises(NotFiniteError, match=message) as caught:
        images(policy)
    assert ("bfloat16 or float32" in str(caught.value)) == (dtype == "float16")
    assert str(caught.value).endswith("restore the model's files.")


def test_weights_that_were_trained_are_not_the_files_fault(latent_model):
    """All weights, without a copy of the model before training."""
    policy = load(latent_model)
    policy.transformer.requires_grad_(True)
    change(policy.transformer, "proj_out.weight", NAN)
    with pytest.raises(NotFiniteError, match=r"weight holds NaN; train with a lower optim\.lr or"):
        images(policy)


def test_the_chunk_with_the_fault_is_the_last_that_is_sampled(latent_model):
    policy = load(latent_model)
    change(policy.transformer, "proj_out.weight", NAN)
    seen = []
    with pytest.raises(NotFiniteError):
        images(policy, on_progress=seen.append)
    assert seen == [2]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_velocity_that_is_nan_at_a_later_step(latent_model, monkeypatch, scale):
    """A fault of no weight and no layer gets no cause."""
    policy = load(latent_model)
    sigmas, inner = policy.sigmas(4).float(), policy._velocity

    def broken(sample, sigma, conditioning):
        bad = (sigma == sigmas[2]).view(-1, 1, 1, 1) & (sample[:, :1] > 1)
        return inner(sample, sigma, conditioning).masked_fill(bad, NAN)

    monkeypatch.setattr(policy, "_velocity", broken)
    uncond = policy.encode([""]) if scale != 1 else None
    with pytest.raises(NotFiniteError) as caught:
        images(policy, uncond=uncond, guidance_scale=scale)
    assert str(caught.value) == (
        f"the velocity is NaN at step 3 of 4 (sigma {float(sigmas[2]):.4g}) of the deterministic "
        "sampler, in float32, but finite numbers are expected; no layer of the transformer "
        "was seen to return what is none."
    )


@pytest.mark.slow
def test_float16s_end_is_told_from_nan(latent_model):
    """Weights that float16 holds, of which one layer's results leave it; bfloat16 takes them."""

    def scaled(dtype):
        policy = load(latent_model, dtype)
        for name in ("ff.net.0.proj", "ff.net.2"):
            policy.transformer.get_parameter(f"transformer_blocks.0.{name}.weight").data.mul_(3e3)
        return policy

    with pytest.raises(NotFiniteError) as caught:
        images(scaled("float16"))
    text = str(caught.value)
    assert text.startswith("the velocity is NaN at step 1 of 4 (sigma 1) of the deterministic")
    assert text.endswith(
        ", in float16, but finite numbers are expected: the first layer to return infinity is "
        "transformer.transformer_blocks.0.ff.net.2, whose results are beyond 65504, the largest "
        "number of float16; set policy.dtype to bfloat16 or float32."
    )
    assert images(scaled("bfloat16")).shape == (3, 3, 16, 16)


def test_a_layer_that_makes_nan_of_numbers(latent_model, monkeypatch):
    policy = load(latent_model, "bfloat16")
    layer = policy.transformer.transformer_blocks[1].norm2
    monkeypatch.setattr(layer, "forward", lambda x: torch.full_like(x, NAN))
    message = (
        r"in bfloat16, .*: the first layer to return NaN is transformer\.transformer_blocks\.1\."
        r"norm2, in bfloat16, from inputs and weights that are finite; try policy.dtype float32\."
    )
    with pytest.raises(NotFiniteError, match=message):
        images(policy)


def test_latents_that_no_image_has(latent_model):
    policy = load(latent_model)
    policy.transformer.proj_out.weight.data.mul_(1e9)
    with pytest.raises(NotFiniteError, match=r"velocity is as large as \d.*e\+.* at step 1 of 4"):
        images(policy)


def test_a_decoder_that_is_nan(latent_model):
    policy = load(latent_model, "float16")
    change(policy.pipeline.vae, "decoder.conv_out.weight", NAN)
    message = (
        "the pixels of the deterministic sampler are NaN though its latents are finite, decoded in "
        r"float32, but .*: vae\.decoder\.conv_out\.weight holds NaN; restore the model's files\."
    )
    with pytest.raises(NotFiniteError, match=message):
        images(policy)


def test_text_encoders_that_are_nan(latent_model):
    policy = load(latent_model)
    change(policy.pipeline.text_encoder_3, "encoder.final_layer_norm.weight", NAN)
    message = (
        r"the text embeddings of a prompt of the deterministic sampler are NaN, in float32, but "
        r".*: text_encoder_3\.encoder\.final_layer_norm\.weight holds NaN; restore the model's "
        r"files\.$"
    )
    with pytest.raises(NotFiniteError, match=message):
        images(policy)


def test_embeddings_that_are_infinite_of_finite_weights(latent_model, monkeypatch):
    policy = load(latent_model)
    layer = policy.pipeline.text_encoder_3.encoder.final_layer_norm
    monkeypatch.setattr(layer, "forward", lambda x: x / 0)
    with pytest.raises(NotFiniteError, match=r"though the weights of its text encoders are finite"):
        images(policy)


def test_embeddings_of_the_callers_are_not_the_text_encoders_fault(latent_model):
    """One number of one prompt."""
    donor = load(latent_model)

    def encode(texts):
        conditioning = donor.encode(texts)
        conditioning.pooled[-1, 0] = NAN
        return conditioning

    config = PolicyConfig(resolution=16, max_sequence_length=4, text_cache="")
    policy = Policy.load(
        str(latent_model), device="cpu", dtype="float32", config=config, encode=encode
    )
    with pytest.raises(NotFiniteError, match=r"are NaN, .*; look at what encode= returns\.$"):
        images(policy)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_adapter_that_was_loaded_is_not_trained_anew(latent_model, dtype):
    """Its matrices are finite, and what they give is not."""
    policy = load(latent_model, dtype)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["ff.net.2"], init_lora_weights=False)
    policy.transformer.add_adapter(config, adapter_name="default_0")
    for name, parameter in policy.transformer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.full_like(parameter.data, 1e30 if dtype == "float32" else 6e4)
    message = "the model without its adapter gives them at the same place; {}name another adapter."
    half = "set policy.dtype to bfloat16 or float32, or "
    with pytest.raises(NotFiniteError) as caught:
        images(policy)
    assert str(caught.value).endswith(message.format(half if dtype == "float16" else ""))


@pytest.mark.slow
def test_nan_of_a_layer_that_no_longer_is_there(latent_model, monkeypatch):
    """A fault that does not come a second time is said to be one, and nothing else."""
    policy = load(latent_model)
    inner, calls = policy._velocity, []

    def once(*inputs):
        calls.append(1)
        return inner(*inputs) * (NAN if len(calls) == 3 else 1)

    monkeypatch.setattr(policy, "_velocity", once)
    with pytest.raises(
        NotFiniteError, match=r"as large as nan, but .*, and they are when the same"
    ):
        images(policy)


def test_figures():
    """Reference: the same by torch's own functions."""
    decoded, generator = Decoded(), torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 4, 3, 3, generator=generator) for _ in range(3)]
    for part in parts:
        decoded.add(part, 2 * part[:, :3])
    figures = decoded.read()
    assert figures.latent == max(part.abs().max() for part in parts)
    assert figures.pixel == max(2 * part[:, :3].abs().max() for part in parts)
    assert figures.std == pytest.approx(float(torch.stack([p.std() for p in parts]).mean()))
    for bad in (NAN, -float("inf")):
        parts[0][1, 0, 2, 2] = bad
        decoded.begin()
        for part in parts:
            decoded.add(part, part[:, :3])
        figures = decoded.read()
        for peak in (figures.latent, figures.pixel):
            assert peak != peak if bad != bad else peak == float("inf")


FAST = {
    "sample.eval_steps": 2,
    "sample.group_size": 3,
    "optim.ema_every": 1,
    "run.steps": 2,
    "run.eval_every": 0,
    "run.checkpoint_every": 0,
    "run.eval_prompts": 2,
    "run.eval_samples": 1,
}


@pytest.mark.slow
def test_a_rollout_that_is_nan_ends_before_its_update(pixel_model, tmp_path, monkeypatch):
    """In the second iteration; the trained weights are not blamed, as the base has it too."""
    config = setups.config(pixel_model, tmp_path, **FAST)
    collect, updates = train.collect, []

    def broken(components, *rest):
        if components.state.iteration == 1:
            change(components.policy.transformer, "norm_out.linear.weight", NAN)
        updates.append(components.state.updates)
        return collect(components, *rest)

    monkeypatch.setattr(train, "collect", broken)
    message = (
        r"the velocity is NaN at step 1 of 6 \(sigma 1\) of the rollout of iteration 2, in float32,"
        r" .*: transformer\.norm_out\.linear\.weight holds NaN; restore the model's files\."
    )
    with pytest.raises(NotFiniteError, match=message):
        train.run(config)
    assert updates == [0, 2] and not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
def test_a_model_that_is_nan_is_not_scored_by_any_command(latent_model, tmp_path, capsys):
    folder = shutil.copytree(latent_model, tmp_path / "model")
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["proj_out.weight"].fill_(NAN)
    save_file(tensors, file, {"format": "pt"})
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\ntwo square\n")
    words = f"--policy.model {folder} --sample.prompts {prompts} --run.out {tmp_path / 'run'}"
    words += " --policy.text-cache= --reward.weights jpeg_compressibility 1"
    words += " --reward.report jpeg_compressibility"
    words += " --sample.prompts-per-iteration 2 --sample.group-size 2 --sample.batch-size 2"
    words += " --run.eval-prompts 2 --run.eval-samples 1 --sample.eval-steps 2"
    evaluation = f"--prompt-set {prompts} --rewards jpeg_compressibility --samples 1 --steps 2"
    out = tmp_path / "out"
    for command in (
        ["sample", "a red circle", "--model", folder, "--steps", 2, "--out", out / "x.png"],
        ["train", *words.split()],
        ["evaluate", folder, *evaluation.split(), "--out", out],
    ):
        assert main.main([str(word) for word in command]) == 1, command
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if line.startswith("error: ")]
        assert len(lines) == 1 and "transformer.proj_out.weight holds NaN" in lines[0]
    assert not list(out.glob("*")) and not (tmp_path / "run" / "evaluations").exists()


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", [False, True])
def test_weights_that_the_last_update_blows_up_are_not_exported(
    interrupted, pixel_model, tmp_path, monkeypatch
):
    changes = {"optim.lr": 1e30, "optim.updates_per_iteration": 1, "optim.ema_decay": 0.0}
    config = setups.config(pixel_model, tmp_path, **{**FAST, **changes, "run.steps": 1})
    if interrupted:
        config = setups.replace(config, **{"run.steps": 2})
        step = update.update

        def stopping(*arguments):
            metrics = step(*arguments)
            process.signal.raise_signal(process.signal.SIGINT)
            return metrics

        monkeypatch.setattr(train, "update", stopping)
    message = "the model before training gives them at the same place; train with a"
    with pytest.raises(NotFiniteError, match=message):
        train.run(config)
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "checkpoints" / "step-000001").exists()


@pytest.mark.slow
def test_weights_that_are_no_numbers_after_an_update(pixel_model, tmp_path):
    changes = {"optim.lr": 1e38, "optim.weight_decay": 1e9, "optim.updates_per_iteration": 1}
    config = setups.config(pixel_model, tmp_path, **{**FAST, **changes})
    with pytest.raises(DivergedError, match=r"largest of the trained weights is (inf|nan) after"):
        train.run(config)
