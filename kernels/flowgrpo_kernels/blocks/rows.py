"""Rows of a token in registers, ordered sums and launch sizes, shared by the blocks' kernels.

Layout of the work. A program handles one token, all D elements of it, as chunks of W = lanes(D)
(reference.py): 8 neighbouring elements a thread and chunk, which is one 128-bit access in 16-bit
dtypes and two in float32. 1536 elements are 3 chunks over 2 warps, 3072 are 3 over 4 warps: no lane
idles, and 24 values a thread are held. What a program reads it asks for before its first sum and
store: a load that follows a store would wait for it, since the two might overlap. Rows that tokens
share (scale, shift, gate) are read again by every token, out of L1. D is a compile-time constant, a
model's own; B, N and strides are not, so nothing is compiled again when they change.

ALIGN, a power of two up to 16, divides every stride: with it and 16-byte pointers all accesses are
128 bits wide. Offsets of a row are int64, inside it int32. Contraction is off as in
../backends/triton.py.
"""

from __future__ import annotations

from torch import Tensor

from ..backends.triton import AVAILABLE, arguments, narrow, pair_tree, specialised, tl, triton
from .reference import lanes

MAX_WIDTH = 8192
"""A program holds a whole row: 64 values a thread at this width."""


def jit(function):
    """Decorates a kernel with triton.jit; no integer is specialised, so none chooses the code."""
    names = arguments(function)
    specialised[function.__name__] = tuple(name for name in names if name.endswith("_ptr"))
    if not AVAILABLE:
        return function
    plain = [name for name in names if not name.endswith("_ptr") and not name.isupper()]
    return triton.jit(function, do_not_specialize=plain)


def dense(x: Tensor | None) -> Tensor | None:
    """Returns x, copied only where its last dimension is not contiguous."""
    if x is None or x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    return x.contiguous()


def strides(*tensors: Tensor | tuple[Tensor | None, int]) -> list[int]:
    """Lists the strides of all dimensions but the last; 0 where there is nothing to step over.

    (tensor, n) for a tensor of n such dimensions that may be None.
    """
    steps: list[int] = []
    for x in tensors:
        x, count = x if isinstance(x, tuple) else (x, 0)
        if x is None:
            steps += [0] * count
        else:
            # Not strict: the last dimension is left out, and slices of a shape take their time.
            pairs = zip(x.shape, x.stride()[:-1], strict=False)
            steps += [0 if size == 1 else step for size, step in pairs]
    return steps


def alignment(width: int, *steps: int) -> int:
    """Computes the power of two, up to 16, that divides the width and every stride."""
    bits = width | 16
    for step in steps:
        bits |= step
    return bits & -bits


def check_width(name: str, width: int) -> None:
    """Checks that a program can hold a row of `width` elements."""
    if width > MAX_WIDTH:
        raise ValueError(
            f"{name} must have at most {MAX_WIDTH} elements a token for the Triton kernels, got "
            f"{width}; FLOWGRPO_KERNELS=reference runs any width"
        )


def options(width: int, *steps: int) -> dict[str, int | bool]:
    """Returns constants and options of a launch over rows of `width` elements."""
    check_width("x", width)
    count = lanes(width)
    return {
        "WIDTH": width,
        "LANES": count,
        "ALIGN": alignment(width, *steps),
        "num_warps": max(1, count // 256),
        "enable_fp_fusion": False,
    }


@jit
def token_of(tokens):
    """Locates this program: (sample, token in it), int64."""
    # Unsigned: the division of a signed number costs registers for its sign.
    program, tokens = tl.program_id(0).to(tl.uint32), tl.cast(tokens, tl.uint32)
    return (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)


# The hint of an offset's alignment sits in the function that computes the offset: on an argument it
# would be lost.
@jit
def sample_at(ptr, batch, batch_step, ALIGN: tl.constexpr):
    """Moves ptr to a sample."""
    return ptr + tl.multiple_of(batch * batch_step, ALIGN)


@jit
def token_at(ptr, batch, batch_step, token, token_step, ALIGN: tl.constexpr):
    """Moves ptr to a token of a sample."""
    return ptr + tl.multiple_of(batch * batch_step + token * token_step, ALIGN)


@jit
def appended(row, b_x):
    """Appends a chunk to a tuple."""
    # Unpacking, as in (*row, b_x), is not in Triton's Python.
    return row + (b_x,)  # noqa: RUF005


@jit
def load_chunk(ptr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Loads chunk CHUNK of a row as float32; +0 beyond the row's end."""
    o_lane = CHUNK * LANES + tl.arange(0, LANES)
    if (CHUNK + 1) * LANES <= WIDTH:
        b_x = tl.load(ptr + o_lane)
    else:
        b_x = tl.load(ptr + o_lane, mask=o_lane < WIDTH, other=0.0)
    return b_x.to(tl.float32)


@jit
def store_chunk(ptr, b_x, CHUNK: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Stores chunk CHUNK of a row, rounded once to the pointer's dtype."""
    o_lane = CHUNK * LANES + tl.arange(0, LANES)
    b_x = narrow(b_x, ptr.dtype.element_ty)
    if (CHUNK + 1) * LANES <= WIDTH:
        tl.store(ptr + o_lane, b_x)
    else:
        tl.store(ptr + o_lane, b_x, mask=o_lane < WIDTH)


@jit
def load_row(ptr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Loads a row as a tuple of its chunks."""
    row = ()
    for i in tl.static_range((WIDTH + LANES - 1) // LANES):
        row = appended(row, load_chunk(ptr, i, WIDTH, LANES))
    return row


@jit
def inside(b_x, CHUNK: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Sets what lies beyond the row's end to +0."""
    if (CHUNK + 1) * LANES > WIDTH:
        b_x = tl.where(CHUNK * LANES + tl.arange(0, LANES) < WIDTH, b_x, 0.0)
    return b_x


@jit
def row_sum(row, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Sums a row, chunks in order, then pairs of lanes: a scalar."""
    b_sum = row[0]
    for i in tl.static_range(1, (WIDTH + LANES - 1) // LANES):
        b_sum += row[i]
    return pair_tree(b_sum, LANES)


@jit
def divided(x, COUNT: tl.constexpr):
    """Divides by COUNT, correctly rounded."""
    return tl.div_rn(x, tl.zeros_like(x) + COUNT)


@jit
def inverse_root(x):
    """Computes 1 / sqrt(x), both correctly rounded."""
    return tl.div_rn(tl.zeros_like(x) + 1.0, tl.sqrt_rn(x))
