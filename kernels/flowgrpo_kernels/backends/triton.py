"""Triton: availability, launching, and the device functions that the kernels share.

An op's file has its kernels and their launcher, which `launcher(name)` registers here; dispatch.py
asks `find` for it. A launcher takes as its first argument what launches: `launch` of this file, or
that of compiled.py, which has the same kernels compiled ahead. The device functions are the
arithmetic of reference.py and philox.py, one to one; the tests compare bits. Prefixes: `o_`
offsets, `b_` values of a block.

Layout of the work. A row is cut into blocks of BLOCK = 4096 elements, in four chunks of LANES =
1024: with 4 warps a thread owns 8 neighbouring elements of a chunk, which is one 128-bit access in
16-bit dtypes and two in float32. Rows are short (65,536 elements of a latent of 512 pixels), so
that a batch of four of them is no more than 64 blocks. Therefore PARTS = 4 programs share a block,
and none has a loop, in which a load would wait for the store before it:

- Gradients take one chunk a program.
- Sums take a quarter of the lanes of all four chunks. The order of a sum is kept: a lane's chunks
  are in one program, and the sum of a quarter is a whole branch of the pair tree.

Whoever has a whole block instead (sde_step of many rows, where what a program does once would be
done four times; rows of one block, which need no second launch) stores the sums of its quarters,
so the second pass is the same. The grid is one-dimensional, since the other axes stop at 65535.
Offsets inside a block are int32, the block's start is int64.

Widths of the accesses, in bits. D is the number of elements of a row, whose first element is as
aligned as D is round; a batch of one row is as aligned as its tensor.

    D a multiple of        16        8         4         2        1
    float32, full block    128       128       128       64       32
    float32, last block    128       32        32        32       32
    16-bit, full block     128       128       64        32       16
    16-bit, last block     128       16        16        16       16

Every latent in use (16 channels, or 64 a token) is in the first column: a mask is as wide as an
access there, so all have one, and no branch keeps a load waiting. Odd rows are not read in aligned
pieces, which would have to be shifted across threads: no model has them.

Floating-point contraction is off in every launch (LAUNCH): the contract forbids fma.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import torch

from ..philox import INITIAL_STEP, PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1
from ..reference import BLOCK, LANES
from ..transitions import COLUMNS
from .constants import constant

WHY_NOT = ""
"""Why Triton cannot be imported; empty when it can."""
try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = tl = None
    WHY_NOT = f"triton cannot be imported: {error}"
AVAILABLE = not WHY_NOT

launchers: dict[str, Callable] = {}
"""Op -> its launcher: after `launch` the arguments of the op's reference, and its results."""

specialised: dict[str, tuple[str, ...]] = {}
"""Kernel -> arguments that choose its code by being a multiple of 16; dtypes and constants do too.
"""

# Options of every launch. 4 warps: see the module docstring.
PARTS = 4
"""Programs that share a block."""
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
ONE_WARP = {**LAUNCH, "num_warps": 1}
# Integers that reach neither an address nor a mask: no new compilation for their values.
PLAIN = (
    "num_steps", "step_stride", "num_blocks", "rows",
    "sigma_stride", "next_stride", "level_stride", "max_stride", "counter_stride",
)  # fmt: skip
# Pointers whose alignment decides the width of the accesses. The others are read element by
# element, and a view of one step or row may start anywhere: no new compilation for that either.
LATENTS = (
    "v_ptr", "u_ptr", "x_ptr", "x0_ptr", "prev_ptr", "out_ptr", "noise_ptr",
    "ref_ptr", "ref_u_ptr", "old_ptr", "dv_ptr", "du_ptr",
    "mean_ptr", "x0_out_ptr", "grad_mean_ptr", "grad_x0_ptr",
)  # fmt: skip


def interpreting() -> bool:
    """Returns whether kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def find(op: str, device_type: str) -> tuple[Callable | None, str]:
    """(function, "") when Triton runs the op on this type of device, else (None, why not)."""
    if not AVAILABLE or op not in launchers:
        return None, WHY_NOT or f"there is no Triton kernel for {op}"
    if device_type != "cuda" and not interpreting():
        return None, f"Triton kernels run on cuda tensors, got {device_type}"
    return functools.partial(launchers[op], launch), ""


def status() -> tuple[bool, str]:
    """(whether there are kernels, how many ops have one or why none has)."""
    if not AVAILABLE:
        return False, WHY_NOT
    return True, f"{len(launchers)} ops{' in the interpreter' if interpreting() else ''}"


def launch(kernel, programs: int, tensors: tuple, numbers: tuple, **constants) -> None:
    """Launches `programs` programs. tensors, numbers: its arguments, in order; None is no tensor.

    constants: those in capitals, and options of the launch.
    """
    kernel[(programs,)](*tensors, *numbers, **constants)


def jit(function):
    """Decorates a kernel with triton.jit; without Triton the function stays as it is."""
    names = arguments(function)
    specialised[function.__name__] = tuple(
        name for name in names if name in LATENTS or name == "elements"
    )
    if not AVAILABLE:
        return function
    return triton.jit(
        function,
        do_not_specialize=[name for name in names if name in PLAIN],
        do_not_specialize_on_alignment=[
            name for name in names if name.endswith("_ptr") and name not in LATENTS
        ],
    )


def arguments(kernel) -> tuple[str, ...]:
    """Lists the names of a kernel's arguments; constants are written in capitals and come last."""
    code = getattr(kernel, "fn", kernel).__code__
    return code.co_varnames[: code.co_argcount]


def launcher(op: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as the launcher of an op."""

    def register(function: Callable) -> Callable:
        launchers[op] = function
        return function

    return register


def on(device: torch.device):
    """Makes `device` current while launching; nothing to do in the common case."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def num_blocks(elements: int) -> int:
    """Counts the blocks of a row; an empty row still has one, whose sum is 0."""
    return max(1, -(-elements // BLOCK))


def partial_sums(like: torch.Tensor, rows: int, blocks: int) -> torch.Tensor:
    """Allocates what a row's blocks leave for a second pass: the sums of their quarters."""
    return like.new_empty(rows * blocks * PARTS)


def alignment(rows: int, elements: int) -> int:
    """Computes the power of two, up to 16, that divides the offset of every row's first element."""
    divisor = min(16, elements & -elements) or 16
    return max(8, divisor) if rows == 1 else divisor  # 16 promises `load` where the row ends


def second_pass(count: int) -> dict[str, int | bool]:
    """Returns the options of a launch that sums the `count` blocks of a row.

    LANES wide, or less if that is enough. One warp where that is enough: it needs no barrier. Three
    widths serve every size of a row, so that a new resolution is seldom a new compilation.
    """
    if count <= 32:
        width = 32
    elif count <= 128:
        width = 128
    else:
        width = LANES
    return {**LAUNCH, "WIDTH": width, "num_warps": 4 if width == LANES else 1}


BLOCK_C = constant(BLOCK)
LANES_C = constant(LANES)
CHUNKS_C = constant(BLOCK // LANES)
PARTS_C = constant(PARTS)
QUARTER_C = constant(LANES // PARTS)
INITIAL_STEP_C = constant(INITIAL_STEP)
ROUNDS_C = constant(PHILOX_ROUNDS)
M0_C, M1_C = constant(PHILOX_M0), constant(PHILOX_M1)
W0_C, W1_C = constant(PHILOX_W0), constant(PHILOX_W1)
# Columns of the transition table, as numbers for `coefficient`. K is the scale of the KL, k that of
# the log-probability.
NUM_COLUMNS_C = constant(len(COLUMNS))
COL_A = constant(COLUMNS.index("A"))
COL_B = constant(COLUMNS.index("B"))
COL_C = constant(COLUMNS.index("C"))
COL_K = constant(COLUMNS.index("k"))
COL_C0 = constant(COLUMNS.index("c0"))
COL_BIG_K = constant(COLUMNS.index("K"))
COL_ABS_DT = constant(COLUMNS.index("abs_dt"))
COL_NOISE_STEP = constant(COLUMNS.index("noise_step"))
COL_SIGMA = constant(COLUMNS.index("sigma"))
# The interpreter's own float32 -> bfloat16 conversion truncates; the GPU's rounds to nearest even.
ROUND_BY_HAND = constant(interpreting())


@jit
def position(parts, elements, num_blocks, ALIGN: tl.constexpr):
    """Locates this program, one of `parts` of a block: (row, part, start, base, remaining).

    start: the block's first element in the row; base: the same in the tensor; remaining: the
    elements of the row from there on.
    """
    elements = tl.cast(elements, tl.int64)
    # Unsigned: the division of a signed number costs registers for its sign.
    program = tl.program_id(0).to(tl.uint32)
    part = (program % parts).to(tl.int32)
    program = program // parts
    row = (program // num_blocks.to(tl.uint32)).to(tl.int32)
    start = (program % num_blocks.to(tl.uint32)).to(tl.int64) * BLOCK_C
    base = tl.multiple_of(row.to(tl.int64) * elements, ALIGN) + start
    return row, part, start, base, elements - start


@jit
def chunk_lanes(chunk, SIZE: tl.constexpr = 1, FOUR: tl.constexpr = False):
    """Offsets in the block of one chunk, [LANES], or of its groups of SIZE elements.

    FOUR: a thread takes four neighbours, not what the widest access of the dtypes would give it.
    """
    o_lane = tl.arange(0, LANES_C // SIZE) + chunk * (LANES_C // SIZE)
    if FOUR:
        o_lane = tl.max_contiguous(o_lane, 4)
    return o_lane


@jit
def quarter_lanes(part, SIZE: tl.constexpr = 1, FOUR: tl.constexpr = False):
    """Offsets of a quarter of each chunk's lanes, one chunk after the other; else as above."""
    o_lane = tl.arange(0, LANES_C // SIZE)
    o_chunk = o_lane // (QUARTER_C // SIZE) * (LANES_C // SIZE)
    o_lane = o_chunk + part * (QUARTER_C // SIZE) + o_lane % (QUARTER_C // SIZE)
    if FOUR:
        o_lane = tl.max_contiguous(o_lane, 4)
    return o_lane


@jit
def coefficient(table_ptr, step, num_steps, COLUMN: tl.constexpr):
    """Loads one coefficient of a table row; NaN where the step is outside the table."""
    inside = (step >= 0) & (step < num_steps)
    value = tl.load(table_ptr + tl.where(inside, step, 0) * NUM_COLUMNS_C + COLUMN)
    return tl.where(inside, value, float("nan"))


@jit
def load(ptr, o_lane, remaining, ALIGN: tl.constexpr):
    """Loads values of a block as float32; +0 beyond the row's end."""
    # Otherwise a mask would narrow the access: full blocks go without one.
    if ALIGN == 16:
        b_x = tl.load(ptr + o_lane, mask=o_lane < remaining, other=0.0)
    elif remaining >= BLOCK_C:
        b_x = tl.load(ptr + o_lane)
    else:
        b_x = tl.load(ptr + o_lane, mask=o_lane < remaining, other=0.0)
    return b_x.to(tl.float32)


@jit
def store(ptr, o_lane, remaining, b_x, ALIGN: tl.constexpr):
    """Stores values of a block that lie in the row; masks as in `load`."""
    if ALIGN == 16:
        tl.store(ptr + o_lane, b_x, mask=o_lane < remaining)
    elif remaining >= BLOCK_C:
        tl.store(ptr + o_lane, b_x)
    else:
        tl.store(ptr + o_lane, b_x, mask=o_lane < remaining)


@jit
def narrow(b_x, DTYPE: tl.constexpr):
    """Rounds float32 once, to nearest even, to a storage dtype."""
    if ROUND_BY_HAND and tl.bfloat16 == DTYPE:
        bits = b_x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        b_x = tl.where(b_x == b_x, rounded.to(tl.float32, bitcast=True), b_x)
    return b_x.to(DTYPE)


@jit
def guided(v_ptr, u_ptr, base, o_lane, remaining, scale, ALIGN: tl.constexpr, GUIDED: tl.constexpr):
    """Loads a velocity: v, or u + w (v - u) under guidance. u_ptr may be None."""
    b_v = load(v_ptr + base, o_lane, remaining, ALIGN)
    if GUIDED:
        b_u = load(u_ptr + base, o_lane, remaining, ALIGN)
        b_v = b_u + (b_v - b_u) * scale
    return b_v


@jit
def pair_tree(b_x, WIDTH: tl.constexpr):
    """Sums [WIDTH] by adjacent pairs: a scalar. WIDTH is a power of two."""
    for p in tl.static_range(11):
        if (WIDTH >> p) > 1:
            b_x = tl.sum(tl.reshape(b_x, [WIDTH >> (p + 1), 2]), axis=1)
    return tl.sum(b_x, axis=0)


@jit
def store_quarters(ptr, b_x):
    """Stores the sums of the quarters of [LANES], a whole block's lanes."""
    for p in tl.static_range(8):
        b_x = tl.sum(tl.reshape(b_x, [LANES_C >> (p + 1), 2]), axis=1)
    tl.store(ptr + tl.arange(0, PARTS_C), b_x)


@jit
def quarter_sum(b_x):
    """Sums the lanes of quarter_lanes: a lane's chunks in order, then lanes by adjacent pairs."""
    b_x = tl.reshape(tl.trans(tl.reshape(b_x, [CHUNKS_C, QUARTER_C])), [QUARTER_C, 2, 2])
    even, odd = tl.split(b_x)
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    return pair_tree(((c0 + c1) + c2) + c3, QUARTER_C)


@jit
def load_block_sums(ptr, o_block, num_blocks):
    """Loads sums of blocks, each from its quarters; 0 beyond the last block."""
    inside = o_block < num_blocks
    p_sum = ptr + o_block * PARTS_C
    b_low = tl.load(p_sum, mask=inside, other=0.0) + tl.load(p_sum + 1, mask=inside, other=0.0)
    b_high = tl.load(p_sum + 2, mask=inside, other=0.0) + tl.load(p_sum + 3, mask=inside, other=0.0)
    return b_low + b_high


@jit
def ordered_sum(ptr, num_blocks, WIDTH: tl.constexpr):
    """Sums a row's blocks, the second pass: chunks of WIDTH added in order, then pairs."""
    o_lane = tl.arange(0, WIDTH)
    b_sum = load_block_sums(ptr, o_lane, num_blocks)
    # second_pass chooses less only where it is enough.
    if WIDTH == LANES_C:
        # Not a for loop: Triton 3.6's interpreter cannot count to a runtime bound with NumPy 2.4.
        start = tl.full([], WIDTH, tl.int32)
        while start < num_blocks:
            b_sum += load_block_sums(ptr, start + o_lane, num_blocks)
            start += WIDTH
    return pair_tree(b_sum, WIDTH)


@jit
def row_sum(sums_ptr, index, num_blocks, WIDTH: tl.constexpr):
    """Adds up this program's row of one of the sums [sums, B * blocks * PARTS]."""
    at = (index * tl.num_programs(0).to(tl.int64) + tl.program_id(0)) * num_blocks
    return ordered_sum(sums_ptr + at * PARTS_C, num_blocks, WIDTH)


@jit
def sum_over_rows(ptr, rows):
    """Sums over a batch as ordered_sum does, in one warp and without compiling for its size.

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
    """Returns the float32 number of elements, at least 1."""
    # The cast also takes the constant that Triton makes of an argument of 1.
    return tl.maximum(tl.cast(elements, tl.int64), 1).to(tl.float32)


@jit
def score(sum_d, elements, k, c0, c):
    """Returns log_prob from the sum of squares; 0 where C and k are 0."""
    mean = tl.div_rn(sum_d, count(elements))
    return tl.where((c == 0.0) & (k == 0.0), 0.0, -(k * mean) - c0)


@jit
def power_of_two(n):
    """Returns 2^n as float32 of an int32 n in [-126, 127]."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@jit
def exponential(x):
    """Returns exp of float32, by the polynomial of reference.py."""
    # Comparisons, since minimum and maximum need not keep a NaN; it is put back at the end.
    number = tl.where(x > 89.0, 89.0, tl.where(x > -104.0, x, -104.0))
    # floor, without the library's, which flushes subnormal numbers.
    scaled = number * 1.44269504 + 0.5
    n = scaled.to(tl.int32)
    n -= tl.where(n.to(tl.float32) > scaled, 1, 0)
    whole = n.to(tl.float32)
    r = (number - whole * 0.693359375) - whole * -0.00021219444
    p = (r * 0.000197882517 + 0.00139468687) * r + 0.00833351072
    p = ((p * r + 0.0416662656) * r + 0.166666657) * r + 0.5
    result = ((p * (r * r) + r) + 1.0) * power_of_two(n >> 1) * power_of_two(n - (n >> 1))
    return tl.where(x == x, result, x)


@jit
def philox(q_low, q_high, step, key0, key1):
    """Computes Philox4x32-10 of the counter (q_low, q_high, step, 0): four uint32 blocks."""
    c0 = q_low
    c1 = tl.zeros_like(c0) + q_high
    c2 = tl.zeros_like(c0) + step
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(ROUNDS_C):
        # One 32 x 32 -> 64 bit product a line; its halves are the high and low words.
        p0 = c0.to(tl.uint64) * M0_C
        p1 = c2.to(tl.uint64) * M1_C
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        key0 = (key0 + W0_C).to(tl.uint32)
        key1 = (key1 + W1_C).to(tl.uint32)
    return c0, c1, c2, c3


@jit
def box_muller(radius, angle):
    """Makes two normals of two words, by the polynomials of philox.py."""
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
def normals(start, o_quad, seed, step):
    """Draws LANES normals of the block that begins at start; o_quad: numbers of quads in it."""
    q_start = start // 4
    # The low ten bits of the block's first quad are zero, so adding the lane never carries.
    q_low = q_start.to(tl.uint32) + o_quad.to(tl.uint32)
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
    v_ptr, u_ptr, x_ptr, prev_ptr, base, o_lane, remaining, scale, a, b,
    ALIGN: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    """Loads one chunk and returns (v, d): the velocity and x' - mu."""
    b_v = guided(v_ptr, u_ptr, base, o_lane, remaining, scale, ALIGN, GUIDED)
    b_mu = a * load(x_ptr + base, o_lane, remaining, ALIGN) + b * b_v
    return b_v, load(prev_ptr + base, o_lane, remaining, ALIGN) - b_mu


@jit
def store_moments(
    mean_ptr, x0_out_ptr, base, o_lane, remaining, b_v, b_x, b_mu, sigma,
    ALIGN: tl.constexpr, MEAN: tl.constexpr, X0: tl.constexpr,
):  # fmt: skip
    """Stores mu and x0 in float32, those that are asked for."""
    if MEAN:
        store(mean_ptr + base, o_lane, remaining, b_mu, ALIGN)
    if X0:
        store(x0_out_ptr + base, o_lane, remaining, b_x - sigma * b_v, ALIGN)


@jit
def term(c, b_x):
    """Returns c x, and 0 where c is 0: there x may be infinite or NaN."""
    return tl.where(c == 0.0, 0.0, c * b_x)


@jit
def store_gradient(
    dv_ptr, du_ptr, base, o_lane, remaining, b_dv, scale, uncond_scale,
    ALIGN: tl.constexpr, GUIDED: tl.constexpr, UNCOND_GRAD: tl.constexpr,
):  # fmt: skip
    """Stores dv, or w dv and (1 - w) dv, rounded once. du_ptr may be None."""
    if UNCOND_GRAD:
        b_du = narrow(b_dv * uncond_scale, du_ptr.dtype.element_ty)
        store(du_ptr + base, o_lane, remaining, b_du, ALIGN)
    if GUIDED:
        b_dv = b_dv * scale
    store(dv_ptr + base, o_lane, remaining, narrow(b_dv, dv_ptr.dtype.element_ty), ALIGN)


@jit
def store_three(ptr, stride, x, y, z):
    """Stores three scalars, `stride` elements apart."""
    tl.store(ptr, x)
    tl.store(ptr + stride, y)
    tl.store(ptr + 2 * stride, z)


@jit
def finish_kernel(
    sums_ptr,  # [B, blocks, PARTS]
    log_prob_ptr,  # [B]
    table_ptr,  # [R, columns]
    step_ptr,  # [B]
    elements,
    num_steps,
    step_stride,
    num_blocks,
    WIDTH: tl.constexpr,
):
    """Writes log_prob of a row from its block sums; one program a row."""
    row = tl.program_id(0)
    step = tl.load(step_ptr + row * step_stride)
    total = row_sum(sums_ptr, 0, num_blocks, WIDTH)
    k = coefficient(table_ptr, step, num_steps, COL_K)
    c0 = coefficient(table_ptr, step, num_steps, COL_C0)
    c = coefficient(table_ptr, step, num_steps, COL_C)
    tl.store(log_prob_ptr + row, score(total, elements, k, c0, c))
