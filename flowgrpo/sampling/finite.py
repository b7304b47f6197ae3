"""A search for the reason why velocities, latents or images are no numbers any more.

The check itself costs a pass over what is decoded and no wait (policies/decoded.py). Only once it
has failed is the fault looked for: the first state that is no number, the velocity that made it,
and the first layer that turned numbers into none. The sentence names a cause where the search has
found one, and none where it has not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.adapters import ADAPTER
from flowgrpo.policies.decoded import Figures
from flowgrpo.policies.guidance import guide, velocities
from flowgrpo.sampling.schedule import Schedule

LARGEST = 1e6
"""Largest |number| of a latent that still counts as one: those of images are about 1."""
EXPECTED = "finite numbers are expected"
TRAIN_ANEW = (
    "train with a lower optim.lr or optim.max_grad_norm, or go back to an earlier checkpoint"
)
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class NotFiniteError(RuntimeError):
    """Velocities, latents or images of a model are no finite numbers."""


def is_sound(figures: Figures) -> bool:
    """Check that latents and pixels are finite, and latents not beyond `LARGEST`."""
    # Written so that NaN fails it as well.
    return figures.latent <= LARGEST and math.isfinite(figures.pixel)


@torch.no_grad()
def explain(
    policy: Policy,
    latents: Tensor,
    conditioning: Conditioning,
    uncond: Conditioning | None,
    schedule: Schedule,
    groups: Tensor,
    guidance_scale: float,
    sampler: str,
) -> str | None:
    """Find the first fault of a trajectory and say in one sentence what and where it is.

    Args:
        latents: float32 [T+1, b, ...], all states.
        conditioning: embeddings of the K prompts, as `Policy.encode` returns them; `groups` [b]
            says which one a row has.
        uncond: of the empty prompt; None without guidance.
        sampler: what sampled it, such as "the rollout of iteration 3".

    Returns:
        The sentence; None if nothing is wrong with these rows.
    """
    if policy.sharded:
        return not_looked_for(sampler)
    for texts, embeddings in (("a prompt", conditioning), ("the empty prompt", uncond)):
        if embeddings is not None and not (_good(embeddings.embeds) and _good(embeddings.pooled)):
            return _explain_text(policy, texts, embeddings, sampler)
    bad = ~(latents.abs() <= LARGEST).flatten(2).all(dim=2)
    if bad.any():
        state = int(bad.any(dim=1).nonzero()[0])
        row = int(bad[state].nonzero()[0])
        index = groups[row : row + 1]
        step = max(state - 1, 0)
        inputs = (
            latents[step, row : row + 1],
            schedule.sigmas[step : step + 1].to(latents.device),
            conditioning.rows(index.to(conditioning.embeds.device)),
            uncond,
        )
        where = (
            f"at step {step + 1} of {schedule.steps} (sigma {float(inputs[1]):.4g}) of {sampler}"
        )
        return _explain_step(policy, inputs, latents[state, row], guidance_scale, where)
    for row in range(latents.shape[1]):
        with _tracing(_vae(policy)) as trace:
            pixels = policy.pixels(latents[-1, row : row + 1])
        if not _good(pixels):
            return _explain_pixels(policy, pixels, trace, sampler)
    return None


def not_looked_for(sampler: str) -> str:
    """Say that something of a sharded model's is no number; the other processes run no forwards
    now, without which there is nothing to look at."""
    return (
        f"latents or pixels of {sampler} are no finite numbers or beyond {LARGEST:g}, but "
        f"{EXPECTED}; go on with run.parallel replicate to be told which layer makes them, or "
        f"{TRAIN_ANEW}."
    )


def _explain_text(policy: Policy, texts: str, embeddings: Conditioning, sampler: str) -> str:
    """Say that text embeddings are no numbers."""
    kind = _kind(torch.cat([embeddings.embeds.flatten(), embeddings.pooled.flatten()]))
    fault = (
        f"the text embeddings of {texts} of {sampler} are {kind}, in {_name(policy.dtype)}, but "
        f"{EXPECTED}"
    )
    if policy.custom_encode:
        return f"{fault}; look at what encode= returns."
    for role, component in policy.pipeline.components.items():
        if role.startswith("text_encoder") and isinstance(component, nn.Module):
            weights = _bad_weights(component, role)
            if weights:
                return f"{fault}: {weights}."
    half = policy.dtype == torch.float16
    return (
        f"{fault}, though the weights of its text encoders are finite; set policy.dtype to "
        f"{'bfloat16 or float32' if half else 'float32'}, or delete the folder policy.text_cache."
    )


def _explain_step(
    policy: Policy,
    inputs: tuple[Tensor, Tensor, Conditioning, Conditioning | None],
    state: Tensor,
    guidance_scale: float,
    where: str,
) -> str:
    """Say which velocity, or which step of the sampler, made `state`."""

    def velocity() -> Tensor:
        with policy.frozen_weights():
            return guide(*velocities(policy, *inputs, guidance_scale), guidance_scale)

    # Hooks would have the blocks compiled once more.
    with _tracing(None if policy.compiled else policy.transformer) as trace:
        result = velocity()
    dtype = _name(policy.dtype)
    if _good(result, LARGEST):
        return (
            f"the latents are {_kind(state)} {where}, though the velocity there is finite (at most "
            f"{float(result.abs().amax()):.3g}, in {dtype}), but {EXPECTED}; lower "
            "sample.noise_level."
        )
    fault = f"the velocity is {_kind(result)} {where}, in {dtype}, but {EXPECTED}"
    if _has_reference(policy):
        with policy.reference():
            base = velocity()
        if _good(base, LARGEST):
            half = policy.dtype == torch.float16
            advice = "set policy.dtype to bfloat16 or float32, or " if half else ""
            if not _is_trained(policy):
                return (
                    f"{fault}: the model without its adapter gives them at the same place; {advice}"
                    "name another adapter."
                )
            return (
                f"{fault}: the model before training gives them at the same place; "
                f"{advice}{TRAIN_ANEW}."
            )
    return f"{fault}{_cause(policy.transformer, 'transformer', trace)}."


def _explain_pixels(policy: Policy, pixels: Tensor, trace: Trace, sampler: str) -> str:
    """Say that the decoder made the latents, which are numbers, into none."""
    vae = _vae(policy)
    if vae is None:
        return f"the pixels of {sampler} are {_kind(pixels)}, but {EXPECTED}; look at the model."
    return (
        f"the pixels of {sampler} are {_kind(pixels)} though its latents are finite, decoded in "
        f"{_name(vae.dtype)}, but {EXPECTED}{_cause(vae, 'vae', trace)}."
    )


def _cause(module: nn.Module, name: str, trace: Trace) -> str:
    """Say which weights or which layer it is, as far as it is known, and what to do."""
    if weights := _bad_weights(module, name):
        return f": {weights}"
    if trace.layer is None:
        return f"; no layer of the {name} was seen to return what is none"
    layer = f": the first layer to return {trace.kind} is {name}.{trace.layer}"
    if trace.dtype == torch.float16 and trace.kind == "infinity":
        return (
            f"{layer}, whose results are beyond 65504, the largest number of float16; set "
            "policy.dtype to bfloat16 or float32"
        )
    return f"{layer}, in {_name(trace.dtype)}, from inputs and weights that are finite; " + (
        "look at its weights" if trace.dtype == torch.float32 else "try policy.dtype float32"
    )


def _bad_weights(module: nn.Module, name: str) -> str:
    """Name the first weights of the module `name` that are no numbers, and what to do; "" if all
    are."""
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not _good(tensor):
            advice = "restore the model's files"
            if tensor.requires_grad:
                advice = TRAIN_ANEW
            elif tensor.dtype == torch.float16:
                # A number of the file that is beyond float16 is infinite here.
                advice = f"set policy.dtype to bfloat16 or float32, or {advice}"
            return f"{name}.{key} holds {_kind(tensor)}; {advice}"
    return ""


@dataclass
class Trace:
    """The first layer of a forward that returned what is no number, of inputs that are."""

    layer: str | None = None
    kind: str = ""
    dtype: torch.dtype = torch.float32
    names: dict[nn.Module, str] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """Look at one call of a layer; a layer returns before the ones that it is in."""
        if self.layer is not None or all(_good(t) for t in _tensors(output)):
            return
        if all(_good(t) for t in _tensors((args, kwargs))):
            bad = next(t for t in _tensors(output) if not _good(t))
            self.layer, self.kind, self.dtype = self.names[module], _kind(bad), bad.dtype


@contextmanager
def _tracing(module: nn.Module | None) -> Iterator[Trace]:
    """Look at the result of each layer of `module` inside."""
    trace = Trace()
    handles = []
    for name, layer in () if module is None else module.named_modules():
        trace.names[layer] = name or type(layer).__name__
        handles.append(layer.register_forward_hook(trace, with_kwargs=True))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _vae(policy: Policy) -> nn.Module | None:
    """The pipeline's VAE; None where the latents are the pixels."""
    return getattr(policy.pipeline, "vae", None)


def _is_trained(policy: Policy) -> bool:
    """Tell weights that a run trains, or has trained, from an adapter that was only loaded."""
    adapters = getattr(policy.transformer, "peft_config", None)
    return not adapters or ADAPTER in adapters


def _has_reference(policy: Policy) -> bool:
    """Check that `Policy.reference` has weights to go back to."""
    try:
        with policy.reference():
            return True
    except RuntimeError:
        return False


def _tensors(values: object) -> list[Tensor]:
    """List the floating-point tensors in nested containers."""
    leaves = tree_leaves(values)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _good(values: Tensor, largest: float = math.inf) -> bool:
    """Check that all numbers are finite and at most `largest`."""
    return bool((values.isfinite() & (values.abs() <= largest)).all())


def _kind(values: Tensor) -> str:
    """Say what is wrong with the numbers: NaN, infinity, or how large they are."""
    if values.isnan().any():
        return "NaN"
    if values.isinf().any():
        return "infinity"
    return f"as large as {float(values.abs().amax()):.3g}"


def _name(dtype: torch.dtype) -> str:
    return NAMES.get(dtype, str(dtype))


def raise_if_unsound(figures: Figures, explanation: Callable[[], str | None], sampler: str) -> None:
    """Raise NotFiniteError, with what `explanation` finds, unless the figures are sound."""
    if is_sound(figures):
        return
    kind = "latents" if not figures.latent <= LARGEST else "pixels"
    peak = figures.latent if kind == "latents" else figures.pixel
    raise NotFiniteError(
        explanation()
        or f"the {kind} of {sampler} were as large as {peak:.3g}, but {EXPECTED}, and they are "
        "when the same images are sampled once more; run it again."
    )
