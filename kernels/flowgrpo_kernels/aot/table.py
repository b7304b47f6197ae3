"""Table of what is shipped compiled: recorded from the public ops, so it is what is launched.

    for key, variant in shipped().items():
        ...

`shipped` runs the ops over the grid of their options, on small CPU tensors, with a `launch` that
notes a launch instead of starting it. So a new option, argument or kernel of an op cannot be
forgotten in a list elsewhere; only the grid below says which options, dtypes and sizes are meant.
What is outside the grid is compiled by Triton when it is called.

In the grid: rows of a multiple of 16 elements; velocities and samples in PAIRS; GRPO-Guard's
old_velocity in the velocity's dtype, and under guidance in float32, as trainers keep what they
combined; vectors [B] in float32; the blocks of MODELS in bfloat16 and float16. Recording needs
neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import grpo_loss, initial_noise, log_prob, nft_loss, sde_step
from ..backends import dispatch, triton
from ..backends.images import KINDS, launch_key
from ..blocks import gated_residual, joint_heads, norm_modulate
from ..row_laws import GAUSSIAN, LAWS, NORMALIZER
from ..transition_rows import transition_rows_op
from ..transitions import flow_sde, ode
from .variants import Variant

# Dtypes of (velocity, sample): a 16-bit model with states in float32, as trainers have it, or with
# states of its own dtype, as the pipelines of flow_grpo have them; and float32.
PAIRS = (
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)
# Model -> (width, heads, dual attention, rotary). SD3.5-medium, SD3.5-large, FLUX.1.
MODELS = {
    "sd3.5-m": (1536, 24, True, False),
    "sd3.5-l": (2432, 38, False, False),
    "flux.1": (3072, 24, False, True),
}
BLOCK_DTYPES = (torch.bfloat16, torch.float16)
# Elements of a row: one block, several, several of which one is not full; and for the three widths
# of a second pass.
ONE_BLOCK, BLOCKS, CUT_OFF = 16, 8192, 8208
SECOND_PASSES = (ONE_BLOCK, 4096 * 33, 4096 * 129)
ROWS = 2
_TRANSITIONS = flow_sde([1.0, 0.5, 0.0])
_ODE = ode([1.0, 0.5, 0.0])


def shipped() -> dict[str, Variant]:
    """Records the table: key of a launch (as compiled.py makes it) -> what to compile."""
    return {key: variant for key, (variant, _) in recorded(grid()).items()}


def grid() -> Iterator[Callable[[], Any]]:
    """Lists the calls of the public ops that make the table."""
    for velocity, sample in PAIRS:
        yield from _rollout_calls(velocity, sample)
        yield from _loss_calls(velocity, sample)
    for dtype in dict.fromkeys(sample for _, sample in PAIRS):
        seeds = torch.zeros(ROWS, dtype=torch.int64)
        yield functools.partial(initial_noise, seeds, (ONE_BLOCK,), dtype=dtype)
    yield from _second_passes()
    yield from _row_calls()
    for model, dtype in itertools.product(MODELS, BLOCK_DTYPES):
        yield from _block_calls(dtype, *MODELS[model])


def recorded(calls) -> dict[str, tuple[Variant, tuple]]:
    """Runs calls and returns what they launch: key -> (variant, arguments of its first launch)."""
    launches: dict[str, tuple[Variant, tuple]] = {}

    def launch(kernel, programs: int, tensors: tuple, numbers: tuple, **constants) -> None:
        key = launch_key(kernel, tensors, constants)
        if key not in launches:
            args = (*tensors, *numbers)
            launches[key] = _variant(key, kernel, args, constants), args

    with dispatch.use_launch(launch), torch.enable_grad():
        for call in calls:
            call()
    return launches


def _variant(key: str, kernel, args: tuple, constants: dict[str, Any]) -> Variant:
    """Makes the variant of a launch, with the hints that Triton would derive from it."""
    names = triton.arguments(kernel)
    options = {name: constants[name] for name in ("num_warps", "enable_fp_fusion")}
    fixed = {name: value for name, value in constants.items() if name not in options}
    types = dict.fromkeys(names, "constexpr")
    for name, value in zip(names, args, strict=False):
        if value is None:
            fixed[name] = None
        elif isinstance(value, Tensor):
            types[name] = f"*{KINDS[value.dtype]}"
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    chooses = triton.specialised[kernel.__name__]
    aligned = tuple(name for name in chooses if types[name] != "constexpr")
    return Variant(key, kernel, "", "", types, fixed, aligned, options)


def _latents(count: int, elements: int, dtype: torch.dtype) -> list[Tensor]:
    """`count` tensors [ROWS, elements] at addresses that are multiples of 16."""
    return [torch.zeros(ROWS, elements, dtype=dtype) for _ in range(count)]


def _guidance(uncond: Tensor) -> list[dict[str, Any]]:
    """Options of an op with and without guidance."""
    return [{}, {"uncond_velocity": uncond, "guidance_scale": 2.0}]


def _rollout_calls(v_dtype: torch.dtype, dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Lists sde_step and log_prob: guidance, noise, gradients, rows of one block and of several."""
    seeds = torch.zeros(ROWS, dtype=torch.int64)
    # First what is used first: a pack is unpacked as far as a kernel lies in it.
    for elements in (BLOCKS, CUT_OFF, ONE_BLOCK):
        v, u, noise = _latents(3, elements, v_dtype)
        x, x_next = _latents(2, elements, dtype)
        for guided in _guidance(u):
            noises = [{"seeds": seeds}, {"noise": noise}, {"noise": x_next}]
            for drawn in noises:
                yield functools.partial(sde_step, v, x, _TRANSITIONS, 0, **drawn, **guided)
            yield functools.partial(sde_step, v, x, _ODE, 0, **guided)
            yield functools.partial(_score, v, x, x_next, guided)
        # Trainers that ask for the mean guide before they call.
        mean, x0 = _latents(2, elements, torch.float32)
        for moments in ({"mean_out": mean}, {"mean_out": mean, "x0_out": x0}):
            for drawn in noises:
                yield functools.partial(sde_step, v, x, _TRANSITIONS, 0, **drawn, **moments)
            with_x0 = "x0_out" in moments
            yield functools.partial(_score_and_mean, v, x, x_next, with_x0)


def _score(v: Tensor, x: Tensor, x_next: Tensor, guided: dict[str, Any]) -> None:
    """log_prob with its gradient, and under guidance with that of both halves."""
    log_prob(v, x, x_next, _TRANSITIONS, 0, **guided)
    for halves in (False, True) if guided else (False,):
        arguments = guided
        if halves:
            arguments = guided | {
                "uncond_velocity": _leaf(guided["uncond_velocity"]),
                "uncond_grad": True,
            }
        log_prob(_leaf(v), x, x_next, _TRANSITIONS, 0, **arguments).sum().backward()


def _score_and_mean(v: Tensor, x: Tensor, x_next: Tensor, with_x0: bool) -> None:
    """log_prob with the mean, and x0, from one pass, and the gradient of all of them."""
    options = {"return_mean": True, "return_x0": with_x0}
    log_prob(v, x, x_next, _TRANSITIONS, 0, **options)
    outputs = log_prob(_leaf(v), x, x_next, _TRANSITIONS, 0, **options)
    sum(output.sum() for output in outputs).backward()


def _row_calls() -> Iterator[Callable[[], Any]]:
    """Lists rows of a table from tensors: laws, normaliser, noise levels of the host or a row."""
    sigma, pair = torch.full((ROWS,), 0.5), torch.full((ROWS,), 0.25)
    number, steps = torch.zeros((), dtype=torch.float64), torch.zeros(ROWS, dtype=torch.int64)
    for law, name in enumerate(LAWS):
        gaussian = 0 if name == "cps" else GAUSSIAN
        choices = [gaussian + NORMALIZER, gaussian]
        choices += [GAUSSIAN + NORMALIZER] if name == "cps" else []
        largest = [number, sigma[:1]] if name in ("flow_sde", "sigma_linear") else [number]
        for level, m, counter, flags in itertools.product(
            (number, sigma), largest, (None, steps), choices
        ):
            yield functools.partial(
                transition_rows_op, sigma, pair, level, m, counter, ROWS, law, flags, 0.0
            )


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _with_gradients(loss: Callable[..., Any], v: Tensor, options: dict[str, Any]) -> None:
    """A loss with its gradient, and under guidance with that of both halves."""
    guided = "uncond_velocity" in options
    for halves in (False, True) if guided else (False,):
        arguments = dict(options)
        if halves:
            arguments |= {
                "uncond_velocity": _leaf(arguments["uncond_velocity"]),
                "uncond_grad": True,
            }
        loss(_leaf(v), **arguments).loss.backward()


def _references(ref: Tensor, guided: dict[str, Any]) -> list[dict[str, Any]]:
    """Options of the KL term: none, a combined reference velocity, or both its halves."""
    options = [{}, {"ref_velocity": ref, "kl_weight": 0.1}]
    return [*options, options[1] | {"ref_uncond_velocity": ref}] if guided else options


def _loss_calls(v_dtype: torch.dtype, dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Lists both losses: guidance, KL, Guard, gradients."""
    v, u, ref, old = _latents(4, ONE_BLOCK, v_dtype)
    x, x_next = _latents(2, ONE_BLOCK, dtype)
    rows = torch.zeros(ROWS)

    def grpo(v: Tensor, **options):
        return grpo_loss(v, x, x_next, rows, rows, _TRANSITIONS, 0, **options)

    def nft(v: Tensor, **options):
        return nft_loss(v, x, x_next, old, rows, rows, **options)

    for guided in _guidance(u):
        guard = {"old_velocity": old.float() if guided else old}
        for reference in _references(ref, guided):
            options = guided | reference
            yield functools.partial(_with_gradients, nft, v, options)
            yield functools.partial(_with_gradients, grpo, v, options)
            yield functools.partial(_with_gradients, grpo, v, options | guard)


def _second_passes() -> Iterator[Callable[[], Any]]:
    """Lists what happens once per row: widths, weights, KL, Guard."""
    for elements in SECOND_PASSES:
        x = torch.zeros(1, elements)
        rows = torch.zeros(1)
        yield functools.partial(log_prob, x, x, x, _TRANSITIONS, 0)
        weights = [{}, {"row_weight": rows}, {"kl_row_weight": rows}]
        references = [{}, {"ref_velocity": x, "kl_weight": 0.1}]
        for weight, reference in itertools.product(weights, references):
            options = weight | reference
            for guard in ({}, {"old_velocity": x}):
                yield functools.partial(
                    grpo_loss, x, x, x, rows, rows, _TRANSITIONS, 0, **options, **guard
                )
            yield functools.partial(nft_loss, x, x, x, x, rows, rows, **options)


def _block_calls(
    dtype: torch.dtype, width: int, heads: int, dual: bool, rotary: bool
) -> Iterator[Callable[[], Any]]:
    """Lists the ops of a model's blocks, with the gradients of their activations."""
    x, y = (torch.zeros(1, ROWS, width, dtype=dtype) for _ in range(2))
    row, weight = torch.zeros(1, width, dtype=dtype), torch.zeros(width // heads, dtype=dtype)

    def norm(x: Tensor, second) -> Tensor:
        out = norm_modulate(x, row, row, second=second)
        return out if second is None else out[0] + out[1]

    def gate(y: Tensor, second) -> Tensor:
        return gated_residual(x, row, y, second=second)

    for second in (False, True) if dual else (False,):
        yield functools.partial(norm, x, (row, row) if second else None)
        yield functools.partial(_backward, norm, x, (row, row) if second else None)
        yield functools.partial(_backward, gate, y, (row, y) if second else None)
    streams = [((x, y), True), ((x, y), False)]
    # One stream alone: SD3.5-medium's second attention, FLUX's single blocks.
    if dual or rotary:
        streams.append(((x,), True))
    for inputs, normed in streams:
        tokens = ROWS * len(inputs)
        tables = [torch.zeros(tokens, width // heads) for _ in range(2)]
        options = {
            "weights": [weight if normed else None] * len(inputs),
            "heads": heads,
            "rotary": tables if rotary and normed else None,
        }
        yield functools.partial(_heads_backward, inputs, options)


def _backward(op: Callable, x: Tensor, second) -> None:
    """An op and the gradient of its activation."""
    op(_leaf(x), second).sum().backward()


def _heads_backward(streams: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    """joint_heads and the gradient of its streams, laid out as attention leaves it."""
    out = joint_heads([_leaf(stream) for stream in streams], **options)
    out.backward(torch.zeros_like(out.transpose(1, 2)).transpose(1, 2))
