"""What the Triton kernels share: availability, launching, and device functions for the contract.

The device functions are the arithmetic of reference.py and philox.py, one to one; the tests
compare bits. Prefixes: `o_` offsets, `b_` values of a block.

Layout of the work. A program handles one block of BLOCK = 4096 elements of one row, in four chunks
of LANES = 1024: with 4 warps a thread owns 8 neighbouring elements of a chunk, which is one
128-bit access in 16-bit dtypes and two in float32. The grid is one-dimensional (rows * blocks),
since the other axes stop at 65535. Offsets inside a block are int32, the block's start is int64.

Widths of the accesses, in bits. D is the number of elements of a row, whose first element is as
aligned as D is round; a batch of one row is as aligned as its tensor.

    D a multiple of        16        8         4         2        1
    float32, full block    128       128       128       64       32
    float32, last block    128       32        32        32       32
    16-bit, full block     128       128       64        32       16
    16-bit, last block     128       16        16        16       16

Every latent in use (16 channels, or 64 a token) is in the first column. There is no path that
reads odd rows in aligned pieces: which element a lane adds is fixed by the contract, so each piece
would have to be shifted across threads, through shared memory, for shapes that no model has.

Floating-point contraction is off in every launch (LAUNCH): the contract forbids fma, and the three
ops must not differ in it. The kernels move bytes; the few extra instructions are hidden.
"""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor

from . import _ops
from .reference import BLOCK, LANES
from .transitions import NUM_COLUMNS

try:
    import triton
    import triton.language as tl
except ImportError as error:
    AVAILABLE = False
    triton = tl = None
    _ops.triton_missing(f"triton cannot be imported: {error}")
else:
    AVAILABLE = True

# Options of every launch. 4 warps: see the module docstring.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
ONE_WARP = {**LAUNCH, "num_warps": 1}


# Integers that reach neither an address nor a mask: no new compilation for their values.
PLAIN = ("num_steps", "step_stride", "num_blocks", "rows")
# Pointers whose alignment decides the width of the accesses. The others are read element by
# element, and a view of one step or row may start anywhere: no new compilation for that either.
LATENTS = (
    *("v_ptr", "u_ptr", "x_ptr", "prev_ptr", "out_ptr", "noise_ptr"),
    *("ref_ptr", "ref_u_ptr", "old_ptr", "dv_ptr", "du_ptr"),
)


def jit(function):
    """triton.jit; without Triton the function stays as it is, and `launcher` registers nothing."""
    if not AVAILABLE:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function,
        do_not_specialize=[name for name in names if name in PLAIN],
        do_not_specialize_on_alignment=[
            name for name in names if name.endswith("_ptr") and name not in LATENTS
        ],
    )


def launcher(name: str):
    """Registers a launcher with _ops when Triton is there."""
    return _ops.triton_launcher(name) if AVAILABLE else lambda function: function


def on(device: torch.device):
    """Makes `device` current while launching; nothing to do in the common case."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def num_blocks(elements: int) -> int:
    """Blocks of a row; an empty row still has one, whose sum is 0."""
    return max(1, -(-elements // BLOCK))


def alignment(rows: int, elements: int) -> int:
    """The power of two, up to 16, that every row's first element is a multiple of."""
    return 16 if rows == 1 or elements == 0 else min(16, elements & -elements)


def gradients(velocity: Tensor, uncond: Tensor | None, uncond_grad: bool) -> tuple[Tensor, Tensor]:
    """New tensors for the gradients of both halves; the second is empty unless asked for."""
    dv = velocity.new_empty(velocity.shape)
    if not uncond_grad:
        return dv, (velocity if uncond is None else uncond).new_empty(0)
    return dv, uncond.new_empty(uncond.shape)


def second_pass(count: int) -> dict[str, int | bool]:
    """Options of a launch that sums the `count` blocks of a row: LANES wide, or less if enough.

    One warp where that is enough: it needs no barrier. Three widths serve every size of a row, so
    that a new resolution is seldom a new compilation.
    """
    width = 32 if count <= 32 else 128 if count <= 128 else LANES
    return {**LAUNCH, "WIDTH": width, "num_warps": 4 if width == LANES else 1}


def _constant(value: int):
    """A number that kernels may read as a global."""
    return tl.constexpr(value) if AVAILABLE else value


COLUMNS = _constant(NUM_COLUMNS)
BLOCK_C = _constant(BLOCK)
LANES_C = _constant(LANES)
CHUNKS_C = _constant(BLOCK // LANES)
QUADS_C = _constant(LANES // 4)
# The interpreter's own float32 -> bfloat16 conversion truncates; the GPU's rounds to nearest even.
ROUND_BY_HAND = _constant(os.environ.get("TRITON_INTERPRET", "0") == "1")


@jit
def position(elements, num_blocks, ALIGN: tl.constexpr):
    """(row, start, base, remaining) of this program: its first element in the row and in memory."""
    elements = tl.cast(elements, tl.int64)
    # Unsigned: the division of a signed number costs registers for its sign.
    program = tl.program_id(0).to(tl.uint32)
    row = (program // num_blocks.to(tl.uint32)).to(tl.int32)
    start = (program % num_blocks.to(tl.uint32)).to(tl.int64) * BLOCK_C
    base = tl.multiple_of(row.to(tl.int64) * elements, ALIGN) + start
    return row, start, base, elements - start


@jit
def coefficient(table_ptr, step, num_steps, COLUMN: tl.constexpr):
    """One coefficient of a row; NaN where the step is outside the table."""
    inside = (step >= 0) & (step < num_steps)
    value = tl.load(table_ptr + tl.where(inside, step, 0) * COLUMNS + COLUMN)
    return tl.where(inside, value, float("nan"))


@jit
def load(ptr, o_lane, remaining):
    """Block values as float32; +0 beyond the row's end."""
    # Full blocks go without a mask: then the width of the access hangs on the alignment alone.
    if remaining >= BLOCK_C:
        b_x = tl.load(ptr + o_lane)
    else:
        b_x = tl.load(ptr + o_lane, mask=o_lane < remaining, other=0.0)
    return b_x.to(tl.float32)


@jit
def store(ptr, o_lane, remaining, b_x):
    if remaining >= BLOCK_C:
        tl.store(ptr + o_lane, b_x)
    else:
        tl.store(ptr + o_lane, b_x, mask=o_lane < remaining)


@jit
def narrow(b_x, DTYPE: tl.constexpr):
    """float32 rounded once, to nearest even, to a storage dtype."""
    if ROUND_BY_HAND and tl.bfloat16 == DTYPE:
        bits = b_x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        b_x = tl.where(b_x == b_x, rounded.to(tl.float32, bitcast=True), b_x)
    return b_x.to(DTYPE)


@jit
def guided(v_ptr, u_ptr, base, o_lane, remaining, scale, GUIDED: tl.constexpr):
    """v, or u + w (v - u). u_ptr may be None."""
    b_v = load(v_ptr + base, o_lane, remaining)
    if GUIDED:
        b_u = load(u_ptr + base, o_lane, remaining)
        b_v = b_u + (b_v - b_u) * scale
    return b_v


@jit
def pair_tree(b_x, WIDTH: tl.constexpr):
    """Sum of [WIDTH] by adjacent pairs: a scalar. WIDTH is a power of two."""
    for p in tl.static_range(11):
        if (WIDTH >> p) > 1:
            b_x = tl.sum(tl.reshape(b_x, [WIDTH >> (p + 1), 2]), axis=1)
    return tl.sum(b_x, axis=0)


@jit
def ordered_sum(ptr, count, WIDTH: tl.constexpr):
    """Second pass: `count` float32 values, chunks of WIDTH added in order, then pairs."""
    o_lane = tl.arange(0, WIDTH)
    b_sum = tl.load(ptr + o_lane, mask=o_lane < count, other=0.0)
    # A while loop: the interpreter of Triton 3.6 cannot count to a runtime bound with NumPy 2.4.
    start = tl.full([], WIDTH, tl.int32)
    while start < count:
        o = start + o_lane
        b_sum += tl.load(ptr + o, mask=o < count, other=0.0)
        start += WIDTH
    return pair_tree(b_sum, WIDTH)


@jit
def sum_over_rows(ptr, rows):
    """ordered_sum of a batch, whose size must not choose the compilation: one warp, any `rows`.

    The tree over LANES is one over groups of 128 neighbours and one over their sums; groups beyond
    the batch are 0.
    """
    o_lane, o_group = tl.arange(0, 128), tl.arange(0, LANES_C // 128)
    b_groups = tl.zeros([LANES_C // 128], dtype=tl.float32)
    first = tl.full([], 0, tl.int32)
    while (first < LANES_C) & (first < rows):
        b_sum = tl.zeros([128], dtype=tl.float32)
        start = first
        while start < rows:
            o = start + o_lane
            b_sum += tl.load(ptr + o, mask=o < rows, other=0.0)
            start += LANES_C
        b_groups = tl.where(o_group == first // 128, pair_tree(b_sum, 128), b_groups)
        first += 128
    return pair_tree(b_groups, LANES_C // 128)


@jit
def count(elements):
    """float32 number of elements, at least 1; the cast also takes the constant made of 1."""
    return tl.maximum(tl.cast(elements, tl.int64), 1).to(tl.float32)


@jit
def score(sum_d, elements, k, c0, c):
    """log_prob from the sum of squares; 0 where C = 0."""
    mean = tl.div_rn(sum_d, count(elements))
    return tl.where(c == 0.0, 0.0, -(k * mean) - c0)


@jit
def philox(q_low, q_high, step, key0, key1):
    """Philox4x32-10 of the counter (q_low, q_high, step, 0): four uint32 blocks."""
    c0 = q_low
    c1 = tl.zeros_like(c0) + q_high
    c2 = tl.zeros_like(c0) + step
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        # One 32 x 32 -> 64 bit product a line; its halves are the high and low words.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        key0 = (key0 + 0x9E3779B9).to(tl.uint32)
        key1 = (key1 + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@jit
def box_muller(radius, angle):
    """Two normals from two words; the polynomials of philox.py."""
    b_u = radius.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    bits = b_u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    b_l = f * -0.174446985 + 0.287336797
    b_l = b_l * f + -0.299045354
    b_l = b_l * f + 0.331247866
    b_l = b_l * f + -0.399136662
    b_l = b_l * f + 0.500041485
    b_l = b_l * f + -0.666683733
    b_l = b_l * f + 0.999999762
    b_l = b_l * f + -2.0
    r = tl.sqrt_rn(e.to(tl.float32) * -1.38629436 + f * b_l)

    f = (angle << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    z = f * f
    s = f * (((z * -0.00460165786 + 0.079680033) * z + -0.64596349) * z + 1.57079637)
    c = z * ((z * -0.0204172824 + 0.25360322) * z + -1.23369765) + 1.0
    c = tl.where((angle >> 31) != 0, -c, c)
    swap = ((angle >> 30) & 1) != 0
    return r * tl.where(swap, s, c), r * tl.where(swap, c, s)


@jit
def normals(q_start, seed, step):
    """LANES normals of the quads q_start, q_start + 1, ...; q_start a multiple of QUADS."""
    # The low ten bits of the block's first quad are zero, so adding the lane never carries.
    q_low = q_start.to(tl.uint32) + tl.arange(0, QUADS_C).to(tl.uint32)
    q_high = (q_start >> 32).to(tl.uint32)
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(q_low, q_high, step, key0, key1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    # [quad, 2, 2] in the order z0 z1 z2 z3.
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [LANES_C])


@jit
def residual(
    v_ptr, u_ptr, x_ptr, prev_ptr, base, o_lane, remaining, scale, a, b, GUIDED: tl.constexpr
):
    """(v, d) of one chunk: the velocity and x' - mu."""
    b_v = guided(v_ptr, u_ptr, base, o_lane, remaining, scale, GUIDED)
    b_mu = a * load(x_ptr + base, o_lane, remaining) + b * b_v
    return b_v, load(prev_ptr + base, o_lane, remaining) - b_mu


@jit
def term(c, b_x):
    """c x, 0 where c is 0: there x may be infinite or NaN."""
    return tl.where(c == 0.0, 0.0, c * b_x)


@jit
def store_gradient(
    dv_ptr, du_ptr, base, o_lane, remaining, b_dv, scale, uncond_scale,
    GUIDED: tl.constexpr, UNCOND_GRAD: tl.constexpr,
):  # fmt: skip
    """dv, or w dv and (1 - w) dv, rounded once. du_ptr may be None."""
    if UNCOND_GRAD:
        b_du = narrow(b_dv * uncond_scale, du_ptr.dtype.element_ty)
        store(du_ptr + base, o_lane, remaining, b_du)
    if GUIDED:
        b_dv = b_dv * scale
    store(dv_ptr + base, o_lane, remaining, narrow(b_dv, dv_ptr.dtype.element_ty))


@jit
def finish_kernel(
    sums_ptr,  # [B, blocks]
    log_prob_ptr,  # [B]
    table_ptr,  # [R, COLUMNS]
    step_ptr,  # [B]
    elements,
    num_steps,
    step_stride,
    num_blocks,
    WIDTH: tl.constexpr,
):
    """log_prob of a row from its block sums; one program a row."""
    row = tl.program_id(0)
    step = tl.load(step_ptr + row * step_stride)
    total = ordered_sum(sums_ptr + row.to(tl.int64) * num_blocks, num_blocks, WIDTH)
    k = coefficient(table_ptr, step, num_steps, 3)
    c0 = coefficient(table_ptr, step, num_steps, 4)
    c = coefficient(table_ptr, step, num_steps, 2)
    tl.store(log_prob_ptr + row, score(total, elements, k, c0, c))
