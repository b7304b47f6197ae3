"""Models of real size with random weights: diffusers' classes, their real configurations.

Nothing is downloaded. Modules are made on the meta device and filled on the device in the target
dtype, which takes seconds for 12 billion parameters. Weights are normal with variance 1 / fan-in,
biases 0, norms 1, so activations stay finite in 16 bits, and speed does not depend on their values.
`nano` has the package's own weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from models.configurations import TINY_FLUX, TINY_SD3, Model

PROMPTS, EMPTY_PROMPT = 7, 8
"""Seeds of the random embeddings of prompts, and of the empty one."""


def transformer(model: Model, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The transformer of `model`, frozen, in eval mode."""
    if model.name == "nano":
        from diffusers import SD3Transformer2DModel

        from flowgrpo.nano import MODEL_DIR

        folder = MODEL_DIR / "transformer"
        network = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=dtype).to(device)
    else:
        from diffusers import (
            Flux2Transformer2DModel,
            FluxTransformer2DModel,
            QwenImageTransformer2DModel,
            SD3Transformer2DModel,
            WanTransformer3DModel,
            ZImageTransformer2DModel,
        )

        cls = {
            "sd3": SD3Transformer2DModel,
            "flux": FluxTransformer2DModel,
            "flux2": Flux2Transformer2DModel,
            "qwen": QwenImageTransformer2DModel,
            "wan": WanTransformer3DModel,
            "zimage": ZImageTransformer2DModel,
        }[model.family]
        network = random_module(lambda: cls(**model.transformer), device, dtype, seed)
        if model.family == "qwen":
            # Its tables are no buffers, and were lost on the meta device.
            rotary = network.pos_embed
            network.pos_embed = type(rotary)(rotary.theta, rotary.axes_dim, rotary.scale_rope)
    count = sum(p.numel() for p in network.parameters())
    if count != model.parameters:
        raise ValueError(f"{model.name} has {count} parameters, expected {model.parameters}")
    return network.requires_grad_(False).eval()


def vae(model: Model, device: str, dtype: torch.dtype, seed: int = 1) -> nn.Module:
    """The VAE of `model`, frozen, in eval mode."""
    from diffusers import (
        AutoencoderKL,
        AutoencoderKLFlux2,
        AutoencoderKLQwenImage,
        AutoencoderKLWan,
    )

    if model.name == "nano":
        from flowgrpo.nano import MODEL_DIR

        network = AutoencoderKL.from_pretrained(MODEL_DIR / "vae", torch_dtype=dtype).to(device)
        return network.requires_grad_(False).eval()
    classes = {
        "flux2": AutoencoderKLFlux2,
        "qwen": AutoencoderKLQwenImage,
        "wan": AutoencoderKLWan,
    }
    cls = classes.get(model.family, AutoencoderKL)
    network = random_module(lambda: cls(**model.vae), device, dtype, seed)
    return network.requires_grad_(False).eval()


def text_encoders(model: Model, device: str, dtype: torch.dtype) -> list[nn.Module]:
    """CLIP-L, CLIP-G and T5-XXL as the model has them: 11 GB in 16 bits."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    classes = {
        "clip": (CLIPTextModelWithProjection, CLIPTextConfig),
        "t5": (T5EncoderModel, T5Config),
    }
    encoders = []
    for seed, (kind, values) in enumerate(model.encoders, start=2):
        cls, config = classes[kind][0], classes[kind][1](**values)
        module = random_module(lambda cls=cls, c=config: cls(c), device, dtype, seed)
        encoders.append(module.requires_grad_(False).eval())
    return encoders


def pipeline(model: Model, device: str, dtype: torch.dtype, whole: bool = False):
    """The diffusers pipeline of `model`. Without `whole` its text encoders are tiny stand-ins: the
    suites hand over embeddings, and only the memory of the real encoders matters."""
    from diffusers import (
        Flux2KleinPipeline,
        FluxPipeline,
        QwenImagePipeline,
        StableDiffusion3Pipeline,
        WanPipeline,
        ZImagePipeline,
    )

    without_encoders = {
        "flux2": Flux2KleinPipeline,
        "qwen": QwenImagePipeline,
        "wan": WanPipeline,
        "zimage": ZImagePipeline,
    }
    if model.family in without_encoders:
        if whole:
            raise ValueError(f"{model.name}: its text encoder is not among the configurations")
        return without_encoders[model.family](
            transformer=transformer(model, device, dtype),
            scheduler=scheduler(model),
            vae=vae(model, device, dtype),
            text_encoder=None,
            tokenizer=None,
        )
    tiny = TINY_SD3 if model.family == "sd3" else TINY_FLUX
    encoders = text_encoders(model if whole else tiny, device, dtype)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")[: len(encoders)]
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")[: len(encoders)]
    words = stand_in_tokenizer()
    return (StableDiffusion3Pipeline if model.family == "sd3" else FluxPipeline)(
        transformer=transformer(model, device, dtype),
        scheduler=scheduler(model),
        vae=vae(model, device, dtype),
        **dict(zip(names, encoders, strict=True)),
        **dict.fromkeys(tokenizers, words),
    )


def stand_in_tokenizer():
    """A tokenizer of one word: a pipeline has to have one, and nothing is tokenized here."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")


def scheduler(model: Model):
    """diffusers' scheduler of `model`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_config(model.scheduler)


def sigmas(model: Model, steps: int) -> torch.Tensor:
    """float32 [steps + 1] on the CPU: the pipeline's own schedule."""
    schedule = scheduler(model)
    if model.family == "flux":
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        tokens = (model.latent[1] // 2) * (model.latent[2] // 2)
        spaced = np.linspace(1.0, 1 / steps, steps)
        schedule.set_timesteps(sigmas=spaced, mu=calculate_shift(tokens))
    else:
        schedule.set_timesteps(steps)
    return schedule.sigmas.float()


def conditioning(
    model: Model, prompts: int, device: str, dtype: torch.dtype, seed: int = PROMPTS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random embeddings of `prompts` prompts: [K, L, D] and [K, P]; a mask is 1."""
    width, pooled = model.text_width
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(prompts, model.text_tokens, width, generator=generator)
    if model.masked:
        vectors = torch.ones(prompts, pooled)
    else:
        vectors = torch.randn(prompts, pooled, generator=generator)
    return tokens.to(device, dtype), vectors.to(device, dtype)


def random_module(
    make: Callable[[], nn.Module], device: str, dtype: torch.dtype, seed: int
) -> nn.Module:
    """The module that `make` makes, filled with random weights on `device` in `dtype`."""
    with torch.device("meta"):
        module = make()
    _materialize(module, device, dtype)
    # On "meta" there is nothing to fill, and no generator.
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            for name, parameter in child.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
                else:
                    parameter.fill_(0.0 if name == "bias" else 1.0)
            for name, buffer in child.named_buffers(recurse=False):
                buffer.copy_(_buffer(child, name, device))
    return module


def _materialize(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Replace parameters and buffers on the meta device by uninitialised ones on `device`. Tensors
    without memory (on_meta.py) cannot be moved by nn.Module's methods."""
    copies: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in copies:
                    kind = dtype if old.is_floating_point() else old.dtype
                    new = torch.empty(old.shape, dtype=kind, device=device)
                    copies[id(old)] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
                if old is not None:
                    tensors[name] = copies[id(old)]


def _buffer(module: nn.Module, name: str, device: str) -> torch.Tensor:
    """Values that a module's constructor gives its buffer, which the meta device lost."""
    if name in ("running_mean", "running_var", "num_batches_tracked"):
        return torch.full_like(getattr(module, name), 1 if name == "running_var" else 0)
    if name == "position_ids":
        return torch.arange(module.position_ids.shape[-1], device=device)[None]
    if name in ("freqs_cos", "freqs_sin"):
        values = type(module)(module.attention_head_dim, module.patch_size, module.max_seq_len)
        return getattr(values, name).to(device)
    if name == "pos_embed":
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        _, tokens, width = module.pos_embed.shape
        values = get_2d_sincos_pos_embed(
            width,
            int(tokens**0.5),
            base_size=module.base_size,
            interpolation_scale=module.interpolation_scale,
            device=device,
            output_type="pt",
        )
        return values.float()[None]
    raise NotImplementedError(f"{type(module).__name__} has the unknown buffer {name}")
