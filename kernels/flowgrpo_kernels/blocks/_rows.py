"""What the blocks' kernels share: rows of a token in registers, ordered sums, launch sizes.

Layout of the work. A program handles one token, all D elements of it, as chunks of W = lanes(D)
(reference.py): 8 neighbouring elements a thread and chunk, which is one 128-bit access in 16-bit
dtypes and two in float32. 1536 elements are 3 chunks over 2 warps, 3072 are 3 over 4 warps: no lane
idles, and 24 values a thread are held. What a program reads it asks for before its first sum and
store: a load that follows a store would wait for it, since the two might overlap. Rows that tokens
share (scale, shift, gate) are read again by every token, out of L1. D is a compile-time constant, a
model's own; B, N and strides are not, so nothing is compiled again when they change.

ALIGN, a power of two up to 16, divides every stride: with it and 16-byte pointers all accesses are
128 bits wide. Offsets of a row are int64, inside it int32. Contraction is off as in ../_triton.py.
"""

from __future__ import annotations

from torch import Tensor

from .. import _triton
from .._triton import narrow, pair_tree, tl, triton
from .reference import lanes

MAX_WIDTH = 8192
"""A program holds a whole row: 64 values a thread at this width."""


def jit(function):
    """triton.jit without specialisation of integers: their values choose no code."""
    if not _triton.AVAILABLE:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    plain = [name for name in names if not name.endswith("_ptr") and not name.isupper()]
    return triton.jit(function, do_not_specialize=plain)


def dense(x: Tensor | None) -> Tensor | None:
    """x, copied only where its last dimension is not contiguous."""
    if x is None or x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    return x.contiguous()


def strides(*tensors: Tensor | tuple[Tensor | None, int]) -> list[int]:
    """The strides of all dimensions but the last; 0 where there is nothing to step over.

    (tensor, n) for a tensor of n such dimensions that may be None.
    """
    found: list[int] = []
    for x in tensors:
        x, count = x if isinstance(x, tuple) else (x, 0)
        if x is None:
            found += [0] * count
        else:
            # Not strict: the last dimension is left out, and slices of a shape take their time.
            pairs = zip(x.shape, x.stride()[:-1], strict=False)
            found += [0 if size == 1 else step for size, step in pairs]
    return found


def alignment(width: int, *steps: int) -> int:
    """The power of two, up to 16, that divides the width and every stride."""
    bits = width | 16
    for step in steps:
        bits |= step
    return bits & -bits


def check_width(name: str, width: int) -> None:
    if width > MAX_WIDTH:
        raise ValueError(
            f"{name} must have at most {MAX_WIDTH} elements a token for the Triton kernels, got "
            f"{width}; FLOWGRPO_KERNELS=reference runs any width"
        )


def options(width: int, *steps: int) -> dict[str, int | bool]:
    """Constants and options of a launch over rows of `width` elements."""
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
    """(sample, token in it) of this program, int64."""
    # Unsigned: the division of a signed number costs registers for its sign.
    program, tokens = tl.program_id(0).to(tl.uint32), tl.cast(tokens, tl.uint32)
    return (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)


# The hint of an offset's alignment sits in the function that computes the offset: on an argument it
# would be lost.
@jit
def sample_at(ptr, batch, batch_step, ALIGN: tl.constexpr):
    """ptr at a sample."""
    return ptr + tl.multiple_of(batch * batch_step, ALIGN)


@jit
def token_at(ptr, batch, batch_step, token, token_step, ALIGN: tl.constexpr):
    """ptr at a token of a sample."""
    return ptr + tl.multiple_of(batch * batch_step + token * token_step, ALIGN)


@jit
def appended(row, b_x):
    """A tuple with one more chunk. Unpacking, as in (*row, b_x), is not in Triton's Python."""
    return row + (b_x,)  # noqa: RUF005


@jit
def load_chunk(ptr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Chunk CHUNK of a row as float32; +0 beyond the row's end."""
    o_lane = CHUNK * LANES + tl.arange(0, LANES)
    if (CHUNK + 1) * LANES <= WIDTH:
        b_x = tl.load(ptr + o_lane)
    else:
        b_x = tl.load(ptr + o_lane, mask=o_lane < WIDTH, other=0.0)
    return b_x.to(tl.float32)


@jit
def store_chunk(ptr, b_x, CHUNK: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Rounds once, to the pointer's dtype."""
    o_lane = CHUNK * LANES + tl.arange(0, LANES)
    b_x = narrow(b_x, ptr.dtype.element_ty)
    if (CHUNK + 1) * LANES <= WIDTH:
        tl.store(ptr + o_lane, b_x)
    else:
        tl.store(ptr + o_lane, b_x, mask=o_lane < WIDTH)


@jit
def load_row(ptr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """A tuple of the row's chunks."""
    row = ()
    for i in tl.static_range((WIDTH + LANES - 1) // LANES):
        row = appended(row, load_chunk(ptr, i, WIDTH, LANES))
    return row


@jit
def inside(b_x, CHUNK: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """b_x, or +0 beyond the row's end."""
    if (CHUNK + 1) * LANES > WIDTH:
        b_x = tl.where(CHUNK * LANES + tl.arange(0, LANES) < WIDTH, b_x, 0.0)
    return b_x


@jit
def row_sum(row, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Chunks in order, then pairs of lanes: a scalar."""
    b_sum = row[0]
    for i in tl.static_range(1, (WIDTH + LANES - 1) // LANES):
        b_sum += row[i]
    return pair_tree(b_sum, LANES)


@jit
def divided(x, COUNT: tl.constexpr):
    """x / COUNT, correctly rounded."""
    return tl.div_rn(x, tl.zeros_like(x) + COUNT)


@jit
def inverse_root(x):
    """1 / sqrt(x), both correctly rounded."""
    return tl.div_rn(tl.zeros_like(x) + 1.0, tl.sqrt_rn(x))
