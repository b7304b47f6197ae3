"""A copy of flowgrpo_kernels for Hugging Face's Hub beside the package, by the real `kernels`: what
test_hub_copy.py runs in a process of its own."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

import flowgrpo_kernels
from flowgrpo.policies import attention
from flowgrpo.policies import blocks as blocks_of_trainer
from flowgrpo.policies.families import family_of
from flowgrpo_kernels import layers
from support import pipelines

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hub.md"
BLOCKS = ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")
NORMS = ("AdaLayerNormZero", "AdaLayerNormZeroSingle", "SD35AdaLayerNormZeroX")
NORM_OUT = "AdaLayerNormContinuous"


def run(installed: str, repository: str) -> None:
    """Check all of it; `installed` is the folder of `kernels`, or empty."""
    if installed:
        sys.path.insert(0, installed)
        # A folder of that name without an __init__.py, found by a library that looked for it.
        if getattr(sys.modules.get("kernels"), "__file__", "") is None:
            del sys.modules["kernels"]
    import kernels

    assert not installed or Path(kernels.__file__).is_relative_to(installed)
    check_files(kernels, Path(repository))
    copy_of_hub = kernels.get_local_kernel(Path(repository))
    assert copy_of_hub is not flowgrpo_kernels
    check_two_copies(copy_of_hub)
    check_old_layout(copy_of_hub, Path(repository))
    for transformer, inputs in (sd3(), flux(), qwen()):
        check_kernelize(kernels, Path(repository), transformer, inputs)
    check_snippets(Path(repository))


def snippets() -> list[str]:
    """Code of docs/hub.md that needs the library."""
    fences = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [text for text in fences if "from kernels import" in text]


def check_snippets(repository: Path) -> None:
    """Run them where the page has the repository, on this device."""
    kernelized, functions = snippets()
    os.chdir(repository.parent)
    transformer, inputs = sd3()
    theirs = transformer(**inputs, return_dict=False)[0]
    scope = {"pipeline": SimpleNamespace(transformer=transformer)}
    exec(kernelized.replace('"cuda"', '"cpu"'), scope)
    assert all(
        "forward" in vars(m) for m in (*transformer.transformer_blocks, transformer.norm_out)
    )
    torch.testing.assert_close(transformer(**inputs, return_dict=False)[0], theirs)
    script = ModuleType("script")
    script.sde_step_with_logprob = sde_step_with_logprob
    names = {"sigmas": [1.0, 0.5, 0.0], "step": 0, "seeds": torch.arange(2)}
    names |= {"x": torch.randn(2, 3), "velocity": torch.randn(2, 3), "Path": Path}
    exec(functions, names | {"their_module": script})
    assert script.sde_step_with_logprob is not sde_step_with_logprob


def sde_step_with_logprob(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None):
    """flow_grpo's."""


def check_files(kernels, repository: Path) -> None:
    """The library's own parsers take build.toml and metadata.json, and find every digest right."""
    from kernels._rust import Backend, Build, Digest, DigestAlgorithm

    settings = Build.open(repository)
    assert settings.general.backends == [Backend.CPU, Backend.CUDA, Backend.ROCm]
    for backend in ("cpu", "cuda"):
        variant = repository / "build" / f"torch-{backend}"
        metadata = kernels.Metadata.read_from_file(variant / "metadata.json")
        assert str(metadata.name) == "flowgrpo-kernels" and metadata.version == 0
        assert metadata.python_depends == [] and metadata.id.startswith("_flowgrpo_kernels_")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def check_two_copies(hub) -> None:
    """Ops in a namespace of its own, and the bits of the installed package."""
    name = hub.__name__
    assert name in sys.modules and name != "flowgrpo_kernels"
    for op in ("sde_step", "log_prob"):
        assert getattr(getattr(torch.ops, name), op) is not getattr(torch.ops.flowgrpo, op)
    ours, theirs = (module.backend_info()["ops"]["cpu"] for module in (flowgrpo_kernels, hub))
    if not list(Path(hub.__file__).parent.glob("*.so")):
        # Built beside a tree without the native library.
        ours = dict.fromkeys(ours, "reference")
    assert {op: ours[op] for op in theirs} == theirs and "sde_step" in theirs
    for mine, other in zip(step_and_loss(flowgrpo_kernels), step_and_loss(hub), strict=True):
        assert torch.equal(mine, other) and mine.isfinite().all()
    # A drop-in reached through the copy computes by the copy's ops.
    assert hub.compat.dance_grpo.__name__ == f"{name}.compat.dance_grpo"
    assert hub.compat.dance_grpo.take_step.__globals__["sde_step_op"].name().startswith(name)
    try:
        _ = hub.no_such_name
    except AttributeError as error:
        assert "no_such_name" in str(error)
    else:
        raise AssertionError("an unknown name was found")


def step_and_loss(kernels) -> tuple[Tensor, ...]:
    """x', log_prob, loss, ratio and gradient of a small batch."""
    transitions = kernels.flow_sde([1.0, 0.7, 0.4, 0.0], noise_level=0.7)
    seeds = torch.arange(3)
    x = kernels.initial_noise(seeds, (3, 5))
    velocity = torch.linspace(-1, 1, 45).view(3, 3, 5).requires_grad_()
    x_next, score = kernels.sde_step(velocity.detach(), x, transitions, 1, seeds=seeds)
    advantages = torch.tensor([1.0, -1.0, 0.5])
    out = kernels.grpo_loss(velocity, x, x_next, score - 1e-4, advantages, transitions, 1)
    out.loss.backward()
    assert velocity.grad.abs().sum() > 0
    return x_next, score, out.loss.detach(), out.ratio, velocity.grad


def check_old_layout(hub, repository: Path) -> None:
    """Importing the folder inside the variant, as older versions did, gives the same names."""
    file = repository / "build" / "torch-cpu" / "flowgrpo_kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("old_layout", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.sde_step is hub.sde_step and module.layers is hub.layers


def sd3() -> tuple[nn.Module, dict]:
    """A transformer with a dual block and SD3.5's head norms."""
    torch.manual_seed(0)
    model = pipelines.transformer(
        size=8, channels=3, text=16, pooled=16, layers=3, heads=2, head_dim=8, patch=2, dual=(0,)
    )
    inputs = {
        "hidden_states": torch.randn(2, 3, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([900.0, 300.0]),
    }
    return model, inputs


def flux() -> tuple[nn.Module, dict]:
    """A transformer with a block of two streams and one of one."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": torch.randn(2, 9, 16),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([0.9, 0.3]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.stack(torch.meshgrid(*map(torch.arange, (1, 3, 3))), -1).view(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, inputs


def qwen() -> tuple[nn.Module, dict]:
    """A transformer whose second text has two tokens of padding."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    inputs = {
        "hidden_states": torch.randn(2, 9, 16),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.9, 0.3]),
        "img_shapes": [[(1, 3, 3)]] * 2,
    }
    return model, inputs


def check_kernelize(kernels, repository: Path, transformer: nn.Module, inputs: dict) -> None:
    """kernelize gives the bits of `fuse` and of the trainer's fused path, and diffusers' results to
    rounding: outputs and gradients."""
    expected = output_and_gradients(transformer, inputs)
    fused = copy.deepcopy(transformer)
    names = layers.fuse(fused)
    bits = output_and_gradients(fused, inputs)
    assert_close(bits, expected)
    if type(transformer).__name__ != "QwenImageTransformer2DModel":
        # The trainer hands that one its mask and rotary tables in another form.
        trained = copy.deepcopy(transformer)
        attention.pin(trained, family_of(trained), "native", torch.device("cpu"), torch.float32)
        blocks_of_trainer.fuse(trained, family_of(trained))
        of_trainer = output_and_gradients(trained, inputs)
        assert all(torch.equal(x, y) for x, y in zip(of_trainer, bits, strict=True))
    kinds = {type(m).__name__: type(m) for m in transformer.modules()}
    blocks = [k for k in kinds if k in (*BLOCKS, "QwenImageTransformerBlock")]
    for chosen in ([*blocks, NORM_OUT], [k for k in kinds if k in (*NORMS, NORM_OUT)]):
        model = copy.deepcopy(transformer)
        kernelize(kernels, repository, model, {name: kinds[name] for name in chosen})
        changed = [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert changed
        found = output_and_gradients(model, inputs)
        assert_close(found, expected)
        if blocks[0] in chosen:
            assert set(names) <= set(changed)
            assert all(torch.equal(x, y) for x, y in zip(found, bits, strict=True))
    # A module that the layer does not compute keeps its forward.
    block = next(m for m in transformer.modules() if type(m).__name__ == blocks[0])
    block.attn.processor = type("OtherProcessor", (), {})()
    kernelize(kernels, repository, transformer, {blocks[0]: kinds[blocks[0]]})
    assert "forward" not in vars(block)


def kernelize(kernels, repository: Path, model: nn.Module, kinds: dict[str, type]) -> None:
    """The lines of docs/hub.md, with a local repository in place of one of the Hub."""
    mapping = {}
    for name, kind in kinds.items():
        kernels.replace_kernel_forward_from_hub(kind, name, condition=layers.fits)
        repo = kernels.LocalLayerRepository(repository, layer_name=name)
        mapping[name] = {"cpu": {kernels.Mode.TRAINING: repo}}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    for kind in kinds.values():
        del kind.kernel_layer_name, kind.kernel_condition


def output_and_gradients(model: nn.Module, inputs: dict) -> list[Tensor]:
    """The model's output and the gradients of its parameters for a fixed cotangent."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs, return_dict=False)[0]
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weight).sum().backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Outputs within 1e-5, gradients within 2e-5 of their largest value."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=5e-6)
    assert len(found) == len(expected) > 10
    for x, y in zip(found[1:], expected[1:], strict=True):
        scale = max(y.abs().max().item(), 1e-2)
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5 * scale)
