"""A whole Flow-GRPO iteration by flow_grpo's code: the baselines of the suites.

`FlowGrpoBaseline` is flow_grpo's path over diffusers' classes (train_sd3.py, train_flux.py and
their pipelines), in one of two settings:

`eager`: float32 weights under autocast (fp16 for SD3 with a gradient scaler, bf16 for FLUX),
re-cast in every forward since autocast caches only weights that want gradients; PEFT's own forward;
one look-up in the scheduler a step and, in the update, one a row (two host synchronisations each);
outputs cast to float32; the unconditional half detached; the reference by disabled adapters;
a float32 VAE; TF32 for what stays in float32; metrics read at each optimizer step.

`compile`: diffusers at its best: bf16 weights, no autocast, blocks compiled one by one, cuDNN or
flash attention, adapters merged for the rollout (a copy of the weights, rewritten after each
update; PEFT's for the update), the step's arithmetic compiled and its sigmas indexed by integers, a
bf16 channels-last VAE, fused AdamW.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from models import random_weights
from models.cases import Case
from models.configurations import Model
from providers import flow_grpo_ops

NOISE_LEVEL = 0.7
CLIP_RANGE = 1e-4


@contextmanager
def tf32_products(on: bool):
    """Set whether float32 matrix products use TF32, as flow_grpo's scripts do."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def deterministic_algorithms(on: bool):
    """Set torch.use_deterministic_algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@dataclass(frozen=True)
class Setting:
    """Precision and compilation: the differences between the two baselines."""

    weights: torch.dtype
    autocast: torch.dtype | None
    vae: torch.dtype
    compiled: bool = False
    tf32: bool = False

    @property
    def embeds(self) -> torch.dtype:
        """Type of the prompts' embeddings."""
        return self.autocast or self.weights


def setting(provider: str, model: Model, device: str) -> Setting:
    """The setting of "eager" or "compile". A CPU is slow at fp16: there bf16 replaces it."""
    if provider == "compile":
        return Setting(torch.bfloat16, None, torch.bfloat16, compiled=True)
    half = model.half if device == "cuda" else torch.bfloat16
    return Setting(torch.float32, half, torch.float32, tf32=True)


@dataclass
class Rollout:
    """Latents and log-probabilities of one chunk of rows."""

    latents: list[Tensor]
    """T + 1 tensors [B, ...]; FLUX's are packed."""
    log_probs: list[Tensor]
    rows: slice


class FlowGrpoBaseline:
    """flow_grpo on one model; `prepare` sets the case."""

    def __init__(self, model: Model, setting: Setting, device: str) -> None:
        self.model, self.setting, self.device = model, setting, device
        self.vae = random_weights.vae(model, device, setting.vae)
        if setting.compiled:
            self.vae.to(memory_format=torch.channels_last)
        self.encoders: list[nn.Module] = []
        scaled = setting.autocast == torch.float16 and device == "cuda"
        self.scaler = torch.amp.GradScaler(device, enabled=scaled)
        self.guided = flow_grpo_ops.guided
        self.loss = flow_grpo_ops.micro_step
        if setting.compiled:
            self.guided = torch.compile(flow_grpo_ops.guided, fullgraph=True, dynamic=False)
            self.loss = torch.compile(flow_grpo_ops.micro_step, fullgraph=True, dynamic=False)

    @cached_property
    def trained(self) -> nn.Module:
        """The transformer with PEFT's adapters; merged rollouts do without it."""
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=self.model.rank,
            lora_alpha=2 * self.model.rank,
            init_lora_weights="gaussian",
            target_modules=list(self.model.targets),
        )
        base = random_weights.transformer(self.model, self.device, self.setting.weights)
        adapted = get_peft_model(base, lora)
        # Adapters are trained in float32, also over 16-bit weights.
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self._compile(adapted.base_model.model, fullgraph=False)
        return adapted

    @cached_property
    def serving(self) -> nn.Module:
        """The transformer of the rollout."""
        if not self.setting.compiled:
            return self.trained
        merged = random_weights.transformer(self.model, self.device, self.setting.weights)
        self._compile(merged, fullgraph=True)
        return merged

    @cached_property
    def optimizer(self) -> torch.optim.AdamW:
        trained = [p for p in self.trained.parameters() if p.requires_grad]
        fused = True if self.setting.compiled else None
        return torch.optim.AdamW(trained, lr=3e-4, weight_decay=1e-4, fused=fused)

    def _compile(self, transformer: nn.Module, fullgraph: bool) -> None:
        if self.setting.compiled:
            # Kinds of blocks, with and without gradients and adapters: past dynamo's default of 8
            # graphs a function, it would go on without compiling.
            torch._dynamo.config.recompile_limit = 64
            singles = getattr(transformer, "single_transformer_blocks", [])
            for block in (*transformer.transformer_blocks, *singles):
                block.compile(fullgraph=fullgraph, dynamic=False)

    def prepare(self, case: Case) -> None:
        """Embeddings and schedule of a case, made before anything is timed."""
        self.case = case
        self.sigmas = random_weights.sigmas(self.model, case.steps).to(self.device)
        self.scheduler = flow_grpo_ops.Scheduler(self.sigmas)
        self.second_sigma = float(self.sigmas[1])
        like = (self.device, self.setting.embeds)
        tokens, pooled = random_weights.conditioning(self.model, case.groups, *like)
        # As in flow_grpo every row has a copy of its prompt's embeddings.
        order = torch.arange(case.rows, device=self.device) // case.group_size
        self.embeds, self.pooled = tokens[order], pooled[order]
        self.empty = random_weights.conditioning(self.model, 1, *like, random_weights.EMPTY_PROMPT)
        self.advantages = torch.linspace(-1, 1, case.rows, device=self.device)

    @contextmanager
    def _precision(self):
        """Set torch's switches as flow_grpo has them; ours, in the same process, asks for
        deterministic algorithms."""
        with ExitStack() as stack:
            stack.enter_context(deterministic_algorithms(False))
            stack.enter_context(tf32_products(self.setting.tf32))
            if self.setting.compiled and self.device == "cuda":
                from torch.nn.attention import SDPBackend, sdpa_kernel

                order = (
                    *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
                    *(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
                )
                stack.enter_context(sdpa_kernel(list(order), set_priority=True))
            yield

    def _velocity(self, network: nn.Module, sample: Tensor, timestep: Tensor, rows: slice):
        """(velocity, unconditional velocity or None), float32, of one batch."""
        embeds, pooled, guided = self.embeds[rows], self.pooled[rows], self.case.guided
        if guided:
            sample, timestep = torch.cat([sample] * 2), torch.cat([timestep] * 2)
            count = len(embeds)
            embeds = torch.cat([self.empty[0].expand(count, -1, -1), embeds])
            pooled = torch.cat([self.empty[1].expand(count, -1), pooled])
        if not self.setting.autocast:
            sample = sample.to(self.setting.weights)
        if self.model.family == "sd3":
            call = partial(network, hidden_states=sample, timestep=timestep)
        else:
            call = partial(network, **self._flux_inputs(sample, timestep))
        # accelerate enters autocast in the forward that it patches, once a call, and casts back.
        cast = self.setting.autocast
        with torch.autocast(self.device, dtype=cast, enabled=cast is not None):
            (out,) = call(
                encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False
            )
        if not guided:
            return out.float(), None
        uncond, velocity = out.float().chunk(2)
        return velocity, uncond

    def _flux_inputs(self, sample: Tensor, timestep: Tensor) -> dict[str, Any]:
        from diffusers import FluxPipeline

        _, height, width = self.model.latent
        ids = FluxPipeline._prepare_latent_image_ids(
            len(sample), height // 2, width // 2, self.device, sample.dtype
        )
        scale = torch.full([1], self.model.distilled_guidance, device=self.device)
        return {
            "hidden_states": sample,
            "timestep": timestep / 1000,
            "guidance": scale.expand(len(sample)),
            "txt_ids": torch.zeros(
                self.model.text_tokens, 3, device=self.device, dtype=sample.dtype
            ),
            "img_ids": ids,
        }

    def _initial(self, count: int) -> Tensor:
        latents = torch.randn(count, *self.model.latent, device=self.device)
        if self.model.family == "sd3":
            return latents
        from diffusers import FluxPipeline

        # FLUX's latents are in the type of the embeddings, before and after every step.
        packed = FluxPipeline._pack_latents(latents, count, *self.model.latent)
        return packed.to(self.setting.embeds)

    def _sigmas(self, i: int, ndim: int) -> flow_grpo_ops.Sigmas:
        """Sigmas of step i for the compiled step: slices, no look-up."""
        shape = (-1, *([1] * (ndim - 1)))
        now, then = self.sigmas[i : i + 1], self.sigmas[i + 1 : i + 2]
        return flow_grpo_ops.Sigmas(now.view(shape), then.view(shape), self.second_sigma)

    @property
    def window(self) -> range:
        """Trained steps."""
        return range(self.case.trained_steps)

    @torch.no_grad()
    def rollout(self, noise=None) -> list[Rollout]:
        """T steps of every chunk. noise(rows, i): normals; 0 the initial ones, i + 1 step i's."""
        batch = self.case.batch
        with self._precision():
            return [
                self._denoise(slice(at, at + batch), noise)
                for at in range(0, self.case.rows, batch)
            ]

    def _denoise(self, rows: slice, noise) -> Rollout:
        latents = self._initial(rows.stop - rows.start) if noise is None else noise(rows, 0)
        out = Rollout([latents], [], rows)
        for i, t in enumerate(self.scheduler.timesteps):
            timestep = t.expand(latents.shape[0])
            velocity, uncond = self._velocity(self.serving, latents, timestep, rows)
            if self.setting.compiled:
                sigmas = self._sigmas(i, latents.ndim)
            else:
                sigmas = self.scheduler.lookup(t.unsqueeze(0), latents.ndim)
            # A window's other steps get no noise; their log-probability is NaN and thrown away.
            level = NOISE_LEVEL if not self.case.window or i in self.window else 0.0
            drawn = None if noise is None else noise(rows, i + 1)
            dtype = latents.dtype
            latents, log_prob, _, _ = self.guided(
                sigmas, velocity, uncond, self.case.guidance, latents, level, drawn
            )
            if self.model.family == "flux":
                latents = latents.to(dtype)
            out.latents.append(latents)
            out.log_probs.append(log_prob)
        return out

    @torch.no_grad()
    def decode(self, rollouts: list[Rollout]) -> Tensor:
        """float images in [0, 1]: [B, 3, H, W]."""
        with self._precision():
            return torch.cat([self._images(rollout) for rollout in rollouts])

    def _images(self, rollout: Rollout) -> Tensor:
        latents = rollout.latents[-1]
        if self.model.family == "flux":
            from diffusers import FluxPipeline

            _, height, width = self.model.latent
            latents = FluxPipeline._unpack_latents(latents, height * 8, width * 8, 8)
        config = self.vae.config
        latents = latents / config.scaling_factor + config.shift_factor
        if self.setting.compiled:
            latents = latents.contiguous(memory_format=torch.channels_last)
        latents = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (latents / 2 + 0.5).clamp(0, 1)

    def micro_step(self, rollout: Rollout, j: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of one chunk at one trained step; backward is the caller's."""
        sample, after = rollout.latents[j], rollout.latents[j + 1]
        timestep = self.scheduler.timesteps[j].repeat(len(sample))
        reference = None
        if self.case.beta:
            with torch.no_grad(), self.trained.disable_adapter():
                velocity, uncond = self._velocity(self.trained, sample, timestep, rollout.rows)
                reference = self._combine(velocity, uncond)
        velocity, uncond = self._velocity(self.trained, sample, timestep, rollout.rows)
        args = (
            self._combine(velocity, uncond), sample, after, rollout.log_probs[j],
            self.advantages[rollout.rows],
        )  # fmt: skip
        if self.setting.compiled:
            sigmas = self._sigmas(j, sample.ndim)
            return self.loss(sigmas, *args, sigmas, reference, self.case.beta)
        velocity, sample, after, old, advantages = args
        return flow_grpo_ops.loss(
            self.scheduler, velocity, timestep, sample, after, old, advantages, reference,
            self.case.beta, self.loss,
        )  # fmt: skip

    def _combine(self, velocity: Tensor, uncond: Tensor | None) -> Tensor:
        if uncond is None:
            return velocity
        uncond = uncond.detach()
        return uncond + self.case.guidance * (velocity - uncond)

    def update(self, rollouts: list[Rollout]) -> float:
        """One optimizer step over all chunks and trained steps; the largest |ratio - 1| in it."""
        count = len(rollouts) * len(self.window)
        infos: dict[str, list[Tensor]] = {}
        with self._precision():
            for rollout in rollouts:
                for j in self.window:
                    loss, metrics = self.micro_step(rollout, j)
                    self.scaler.scale(loss / count).backward()
                    for name, value in metrics.items():
                        infos.setdefault(name, []).append(value.detach())
            ratios = torch.stack(infos.pop("ratio"))
            self.scaler.unscale_(self.optimizer)
            parameters = self.optimizer.param_groups[0]["params"]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            for values in infos.values():
                torch.stack(values).mean().item()
            if self.setting.compiled and "serving" in vars(self):
                self._merge()
        return float((ratios - 1).abs().max())

    @torch.no_grad()
    def _merge(self) -> None:
        """Write W + s B A into the weights that the rollout uses, from the untouched W."""
        layers = dict(self.serving.named_modules())
        for name, module in self.trained.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                delta = torch.mm(b, a) * module.scaling["default"]
                layers[name].weight.copy_(module.base_layer.weight.float() + delta)

    def iteration(self) -> float:
        """Rollout, images, a light reward, advantages, one update; the largest |ratio - 1|."""
        rollouts = self.rollout()
        images = self.decode(rollouts)
        scores = images.float().mean((1, 2, 3)).cpu().double()
        groups = scores.view(self.case.groups, self.case.group_size)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        self.advantages = advantages.flatten().float().to(self.device)
        return self.update(rollouts)
