"""Variants: every kernel, with the dtypes, constants and hints that it is compiled with.

A variant's types and hints are those that Triton derives from a real launch; tests compare the PTX
of both. The rules that derive them here go by the names of a kernel's arguments: `op_variant` for
the kernels of the package, `block_variant` for those of blocks/.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..backends.triton import LATENTS, LAUNCH, ONE_WARP, finish_kernel
from ..blocks import rows
from ..blocks.gated_residual import gated_residual_backward_kernel, gated_residual_kernel
from ..blocks.joint_heads import (
    joint_heads_backward_kernel,
    joint_heads_kernel,
    launch_options,
)
from ..blocks.norm_modulate import norm_modulate_backward_kernel, norm_modulate_kernel
from ..grpo_loss import (
    grpo_loss_backward_kernel,
    grpo_loss_rows_kernel,
    grpo_loss_sums_kernel,
    grpo_loss_totals_kernel,
)
from ..log_prob import log_prob_backward_kernel, log_prob_kernel
from ..nft_loss import (
    nft_loss_backward_kernel,
    nft_loss_rows_kernel,
    nft_loss_sums_kernel,
    nft_loss_totals_kernel,
)
from ..noise import initial_noise_kernel
from ..row_laws import LAWS
from ..sde_step import sde_step_kernel
from ..transition_rows import transition_rows_kernel

DTYPES = ("fp32", "bf16", "fp16")
# Pointers of the velocity's dtype and of the sample's; every other pointer is float32 but two.
_VELOCITY = ("v_ptr", "u_ptr", "ref_ptr", "ref_u_ptr", "old_ptr", "dv_ptr", "du_ptr")
_SAMPLE = ("x_ptr", "x0_ptr", "prev_ptr", "out_ptr")
_INT64 = ("step_ptr", "seeds_ptr")
_FLOATS = (
    "scale", "uncond_scale", "kl_weight", "low", "high", "adv_clip", "beta", "floor", "near_one",
)  # fmt: skip
# Of a schedule in float32 with a noise level of the host.
_ROW_INPUTS = {
    "sigma_ptr": "*fp32", "next_ptr": "*fp32", "level_ptr": "*fp64", "max_ptr": "*fp32",
    "counter_ptr": "*i64",
}  # fmt: skip
# Pointers of the blocks' kernels that are float32 whatever the dtype of x.
_BLOCK_FLOAT32 = ("mean_ptr", "rstd_ptr", "cos_ptr", "sin_ptr")
# (width, heads of it, whether there is a second output or branch, rotary)
_MODELS = {"sd3.5-m": (1536, 24, True, False), "flux.1-dev": (3072, 24, False, True)}
# (kernel, arguments it lacks without a second output or branch)
_BLOCK_ROWS = {
    "norm_modulate": (norm_modulate_kernel, ("scale2_ptr", "shift2_ptr", "y2_ptr")),
    "norm_modulate backward": (norm_modulate_backward_kernel, ("dy2_ptr", "scale2_ptr")),
    "gated_residual": (gated_residual_kernel, ("gate2_ptr", "y2_ptr")),
    "gated_residual backward": (gated_residual_backward_kernel, ("gate2_ptr", "dy2_ptr")),
}
_BLOCK_HEADS = {
    "joint_heads": joint_heads_kernel,
    "joint_heads backward": joint_heads_backward_kernel,
}


@dataclass(frozen=True)
class Variant:
    """One kernel with all that chooses its machine code.

    velocity, sample: dtypes that tell variants of one name apart. types: the Triton type of each
    argument, "constexpr" for constants and for what is absent (None). aligned: arguments that are
    multiples of 16. options: those of the launch. vectorised: it streams latents, so its accesses
    must be wide.
    """

    name: str
    kernel: Any
    velocity: str
    sample: str
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]
    vectorised: bool = True


def all_variants(dtypes: tuple[str, ...] = DTYPES) -> Iterator[Variant]:
    """Lists every kernel of the package and of its blocks."""
    yield from op_variants(dtypes)
    yield from block_variants(dtypes)


def op_variants(dtypes: tuple[str, ...] = DTYPES, align: int = 16) -> Iterator[Variant]:
    """Lists the ops' kernels, for every pair of velocity and sample dtype and the main switches.

    align: the power of two, up to 16, that the number of elements of a row is a multiple of.
    """
    for v, s in itertools.product(dtypes, dtypes):
        for guided in (False, True):
            yield from _streaming_variants(v, s, guided, align)
        yield from _moment_variants(v, s, align)
    for s in dtypes:
        yield op_variant("initial_noise", initial_noise_kernel, s, s, {"ALIGN": align})
    # Rows of up to 32 blocks: every latent of SD3.5 and FLUX at 512 pixels.
    weights = {"WEIGHT": True, "KL_WEIGHT": True}
    flags = {"REF": True, "OLD": True, **weights}
    for name, kernel, constants in (
        ("finish", finish_kernel, {"WIDTH": 32}),
        ("grpo_loss rows", grpo_loss_rows_kernel, {"WIDTH": 32, **flags}),
        ("grpo_loss totals", grpo_loss_totals_kernel, {"REF": True}),
        ("nft_loss rows", nft_loss_rows_kernel, {"WIDTH": 32, "REF": True, **weights}),
        ("nft_loss totals", nft_loss_totals_kernel, {"REF": True}),
    ):
        yield op_variant(
            name, kernel, "fp32", "fp32", constants, options=ONE_WARP, vectorised=False
        )
    yield op_variant(
        "transition_rows", transition_rows_kernel, "fp32", "fp32",
        {"LAW": LAWS.index("precise"), "FLAGS": 3}, types=_ROW_INPUTS, options=ONE_WARP,
        vectorised=False,
    )  # fmt: skip


def _streaming_variants(v: str, s: str, guided: bool, align: int) -> Iterator[Variant]:
    """Lists the kernels that stream latents, for one pair of dtypes."""
    tag = "guided" if guided else "plain"
    flags = {"ALIGN": align, "GUIDED": guided}
    grad = {**flags, "UNCOND_GRAD": guided}
    no_moments = {"MEAN": False, "X0": False}
    # With the KL, both its halves under guidance; without, also Guard: the widest kernel.
    loss = {"REF": True, "REF_GUIDED": guided, "OLD": not guided}
    no_uncond = () if guided else ("u_ptr",)
    no_uncond_grad = () if guided else ("u_ptr", "du_ptr")
    nft = {"REF": True, "REF_GUIDED": guided}
    no_nft = () if guided else ("u_ptr", "ref_u_ptr")
    no_nft_grad = () if guided else ("u_ptr", "ref_u_ptr", "du_ptr")
    no_loss = ("old_ptr",) if guided else ("u_ptr", "ref_u_ptr")
    no_loss_grad = ("old_ptr",) if guided else ("u_ptr", "ref_u_ptr", "du_ptr")
    for name, kernel, constants, absent in (
        (
            "sde_step", sde_step_kernel,
            {**flags, "NOISE": "seeds", "SINGLE": False, "SPLIT": False, **no_moments},
            (*no_uncond, "noise_ptr", "mean_ptr", "x0_out_ptr"),
        ),
        # A full block has a multiple of 16 elements.
        (
            "sde_step split", sde_step_kernel,
            {**flags, "ALIGN": 16, "NOISE": "seeds", "SINGLE": False, "SPLIT": True, **no_moments},
            (*no_uncond, "noise_ptr", "mean_ptr", "x0_out_ptr"),
        ),
        (
            "log_prob", log_prob_kernel, {**flags, "SINGLE": False, **no_moments},
            (*no_uncond, "mean_ptr", "x0_out_ptr"),
        ),
        (
            "log_prob_backward", log_prob_backward_kernel, grad,
            (*no_uncond_grad, "grad_mean_ptr", "grad_x0_ptr"),
        ),
        ("grpo_loss sums", grpo_loss_sums_kernel, {**flags, **loss}, no_loss),
        ("grpo_loss backward", grpo_loss_backward_kernel, {**grad, **loss}, no_loss_grad),
        ("nft_loss sums", nft_loss_sums_kernel, {**flags, **nft}, no_nft),
        ("nft_loss backward", nft_loss_backward_kernel, {**grad, **nft}, no_nft_grad),
    ):  # fmt: skip
        yield op_variant(f"{name} {tag}", kernel, v, s, constants, absent)


def _moment_variants(v: str, s: str, align: int) -> Iterator[Variant]:
    """Lists the kernels that also write mean and x0, or read their gradients."""
    flags = {"ALIGN": align, "GUIDED": False}
    both = {**flags, "SINGLE": False, "MEAN": True, "X0": True}
    for name, kernel, constants, absent in (
        (
            "sde_step mean", sde_step_kernel, {**both, "NOISE": "seeds", "SPLIT": True},
            ("u_ptr", "noise_ptr"),
        ),
        ("log_prob mean", log_prob_kernel, both, ("u_ptr",)),
        (
            "log_prob_backward mean", log_prob_backward_kernel,
            {**flags, "UNCOND_GRAD": False}, ("u_ptr", "du_ptr"),
        ),
    ):  # fmt: skip
        yield op_variant(name, kernel, v, s, constants, absent)


def op_variant(
    name: str,
    kernel: Any,
    velocity: str,
    sample: str,
    constants: dict[str, Any],
    absent: tuple[str, ...] = (),
    *,
    types: dict[str, str] | None = None,
    options: dict[str, Any] = LAUNCH,
    vectorised: bool = True,
) -> Variant:
    """Makes a variant of a kernel that names its arguments as the ops' kernels do.

    absent: arguments that are None. types: of arguments that the rule here does not know.
    """
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants or argument in absent:
            signature[argument] = "constexpr"
        elif types and argument in types:
            signature[argument] = types[argument]
        elif argument in _VELOCITY:
            signature[argument] = f"*{velocity}"
        elif argument in _SAMPLE:
            signature[argument] = f"*{sample}"
        elif argument in _INT64:
            signature[argument] = "*i64"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32"
        else:
            signature[argument] = "fp32" if argument in _FLOATS else "i32"
    aligned = [n for n, kind in signature.items() if kind.startswith("*") and n in LATENTS]
    if "elements" in signature and constants.get("ALIGN", 16) == 16:
        aligned.append("elements")
    return Variant(
        name, kernel, velocity, sample, signature, {**constants, **dict.fromkeys(absent)},
        tuple(aligned), options, vectorised,
    )  # fmt: skip


def block_variants(dtypes: tuple[str, ...] = DTYPES) -> Iterator[Variant]:
    """Lists the blocks' kernels for each dtype, at the sizes of SD3.5-medium and FLUX.1-dev."""
    for dtype, (model, sizes) in itertools.product(dtypes, _MODELS.items()):
        width, heads, second, rotary = sizes
        for name, (kernel, optional) in _BLOCK_ROWS.items():
            absent = () if second else optional
            yield block_variant(f"{name} {model}", kernel, dtype, rows.options(width), absent)
        options = launch_options(heads, width // heads, [])
        for name, kernel in _BLOCK_HEADS.items():
            absent = () if rotary else ("cos_ptr", "sin_ptr")
            yield block_variant(f"{name} {model}", kernel, dtype, options, absent)


def block_variant(
    name: str, kernel: Any, dtype: str, options: dict[str, Any], absent: tuple[str, ...] = ()
) -> Variant:
    """Makes a variant of a block's kernel.

    options: constants and options of a launch, as `rows.options` and `launch_options` give them.
    absent: arguments that are None.
    """
    constants = {key: value for key, value in options.items() if key.isupper()}
    launch = {key: value for key, value in options.items() if not key.isupper()}
    types = {}
    for argument in kernel.arg_names:
        if argument in constants or argument in absent:
            types[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            types[argument] = "*fp32" if argument in _BLOCK_FLOAT32 else f"*{dtype}"
        else:
            types[argument] = "fp32" if argument == "eps" else "i32"
    return Variant(
        name, kernel, dtype, dtype, types, {**constants, **dict.fromkeys(absent)},
        tuple(n for n, kind in types.items() if kind.startswith("*")), launch,
    )  # fmt: skip
