"""A tile of one head's tokens on its way to e4m3: loaded in place, rotated, Hadamard-transformed, scaled, rounded.

A tile is two tensors, the lower and the upper half of the (padded) head_dim: [TOKENS, HALF] each. Both the half-split
rotation and the last step of a Hadamard transform combine these halves element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_ROPE = tl.constexpr(0)
HALF_SPLIT = tl.constexpr(1)
"""Every lane turns, and its partner lies in the other half of the tile."""
INTERLEAVED = tl.constexpr(2)
HALF_SPLIT_PARTIAL = tl.constexpr(3)
"""Half-split on some leading lanes, or on a head_dim that is no power of two: partners are loaded once more."""


NO_NORM = tl.constexpr(0)
OF_HEAD = tl.constexpr(1)
"""A token of a head is divided by its root mean square, and weights are the same for all heads."""
OF_TOKEN = tl.constexpr(2)
"""A token is multiplied with a number that is given, and every head has weights of its own."""


@triton.constexpr_function
def turns_whole(rope):
    """Whether there is a rotation for which a tile holds all that it needs."""
    return rope in (HALF_SPLIT.value, INTERLEAVED.value)


E4M3_MAX = tl.constexpr(448.0)

KEPT = tl.constexpr("")
"""For :func:`load_tile`: as the cache has it."""
PASSING = tl.constexpr("evict_first")
"""For :func:`load_tile`: they make room for the angles, which the next head turns by as well."""

QK_FLOOR = tl.constexpr(2.0**-56)
"""Smallest scale of q and k. FlashAttention-3 multiplies the softmax scale and the scales of q and k; a product below
float32's normal range is flushed to zero, and zero times the -inf of a fully masked tile would be NaN."""

V_FLOOR = tl.constexpr(2.0**-126)
"""Smallest scale of v, one over which is finite."""

V_UNIT = tl.constexpr(2.0**0.5)
"""Scales of v are powers of two times this. Values of bfloat16 lie on e4m3's midpoints now and then; less a small
constant, with a power of two for a scale, all of these would be rounded the same way, and a sum over many keys would
show it."""


@triton.jit
def load_tile(x, rows, used, stride_s, stride_d, D: tl.constexpr, HALF: tl.constexpr, LINES: tl.constexpr):
    """Load tokens ``rows`` of a head, from its token 0 at x: two tensors [TOKENS, HALF], zero where not ``used``.

    LINES says what becomes of their lines in the L1 cache: KEPT or PASSING.
    """
    lanes = tl.arange(0, HALF)
    at = x + rows[:, None].to(tl.int64) * stride_s + lanes[None, :] * stride_d
    low_used, high_used = used[:, None] & (lanes < D)[None, :], used[:, None] & (lanes < D - HALF)[None, :]
    low = tl.load(at, mask=low_used, other=0.0, eviction_policy=LINES)
    high = tl.load(at + HALF * stride_d, mask=high_used, other=0.0, eviction_policy=LINES)
    return low, high


@triton.jit
def load_weights(weight, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr):
    """The weights of a norm for :func:`transform_tile`: float32 [1, HALF] twice, ones where there are none."""
    low, high = tl.full((HALF,), 1.0, tl.float32), tl.full((HALF,), 1.0, tl.float32)
    if NORM:
        if weight is not None:
            lanes = tl.arange(0, HALF)
            low = tl.load(weight + lanes, mask=lanes < D, other=0.0).to(tl.float32)
            high = tl.load(weight + HALF + lanes, mask=lanes < D - HALF, other=0.0).to(tl.float32)
    return low[None, :], high[None, :]


@triton.jit
def load_angles(
    cos, sin, rows, used, stride_s, stride_d, HALF: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr
):  # fmt: skip
    """What tokens ``rows`` of a head turn by, from its token 0 at cos and sin, for :func:`transform_tile`.

    They stay in the L1 cache for as long as that can be had: other heads turn by the same.

    Returns:
        Of the lower and of the upper half, cos and sin, float32 [TOKENS, HALF], 1 and 0 where nothing turns; without a
        rotation, ones that nobody reads.
    """
    if ROPE == NO_ROPE:
        return 1.0, 1.0, 1.0, 1.0
    else:
        lanes = tl.arange(0, HALF)
        at = rows[:, None].to(tl.int64) * stride_s + lanes[None, :] * stride_d
        low_turns = used[:, None] & (lanes < ROTARY)[None, :]
        high_turns = used[:, None] & (lanes < ROTARY - HALF)[None, :]
        cos_low = tl.load(cos + at, mask=low_turns, other=1.0, eviction_policy="evict_last").to(tl.float32)
        sin_low = tl.load(sin + at, mask=low_turns, other=0.0, eviction_policy="evict_last").to(tl.float32)
        at += HALF * stride_d
        cos_high = tl.load(cos + at, mask=high_turns, other=1.0, eviction_policy="evict_last").to(tl.float32)
        sin_high = tl.load(sin + at, mask=high_turns, other=0.0, eviction_policy="evict_last").to(tl.float32)
        return cos_low, sin_low, cos_high, sin_high


@triton.jit
def transform_tile(
    low, high, x, rows, used, stride_s, stride_d, weight, weight_low, weight_high, eps, rstd, angles, transforms,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr,
    HADAMARD: tl.constexpr,
):  # fmt: skip
    """Normalize, rotate and Hadamard-transform a loaded tile.

    Returns:
        (low, high, of_rows): two float32 tensors [TOKENS, HALF], and one [TOKENS, 1] that they are still to be
        multiplied with, since a caller may have more numbers per row.

    Args:
        low, high, x, rows, used, stride_s, stride_d: of :func:`load_tile`.
        weight: of this head, or None, where NORM compiles a norm.
        eps: OF_HEAD: of the norm; a negative one leaves the rows as they are.
        rstd: OF_TOKEN: what tokens are multiplied with, from token 0 on.
        weight_low, weight_high: of :func:`load_weights`.
        angles: of :func:`load_angles`.
        transforms: whether this tensor is transformed, where HADAMARD compiles that.
    """
    dtype: tl.constexpr = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    lanes = tl.arange(0, HALF)
    TOKENS: tl.constexpr = low.shape[0]
    of_rows = tl.full((TOKENS, 1), 1.0, tl.float32)
    if NORM:
        if NORM == OF_TOKEN:
            of_rows = tl.load(rstd + rows[:, None], mask=used[:, None], other=0.0)
        else:
            # Lanes past D are zeros.
            mean_square = tl.sum(low * low + high * high, 1) * (1.0 / D)
            of_rows = tl.where(eps < 0.0, 1.0, tl.rsqrt(mean_square + eps))[:, None]
        low, high = low * weight_low, high * weight_high
    if ROPE != NO_ROPE:
        cos_low, sin_low, cos_high, sin_high = angles
        if ROPE == HALF_SPLIT:
            turned_low, turned_high = -high, low
        elif ROPE == INTERLEAVED:
            turned_low, turned_high = _swap_pairs(low), _swap_pairs(high)
            if ROTARY < 2 * HALF:
                # A sine of 0 would not do: 0 times what is inf or NaN beside a lane is NaN.
                turned_low = tl.where((lanes < ROTARY)[None, :], turned_low, 0.0)
                turned_high = tl.where((lanes < ROTARY - HALF)[None, :], turned_high, 0.0)
        else:
            start = x + rows[:, None].to(tl.int64) * stride_s
            low_turns = used[:, None] & (lanes < ROTARY)[None, :]
            turned_low = _partner(start, lanes, low_turns, stride_d, weight, NORM, ROTARY)
            high_turns = used[:, None] & (lanes < ROTARY - HALF)[None, :]
            turned_high = _partner(start, lanes + HALF, high_turns, stride_d, weight, NORM, ROTARY)
        low = low * cos_low + turned_low * sin_low
        high = high * cos_high + turned_high * sin_high
    if HADAMARD:
        if transforms:
            # Before, since the transform takes values in a dtype that they might not fit into.
            low, high = hadamard(low * of_rows, high * of_rows, dtype, HALF)
            of_rows = tl.full((TOKENS, 1), 1.0, tl.float32)
    return low, high, of_rows


@triton.jit
def _swap_pairs(x):
    """(x0, x1, x2, x3, ...) to (-x1, x0, -x3, x2, ...) along the last dimension."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(-odd, even), (x.shape[0], x.shape[1]))


@triton.jit
def _partner(start, lanes, turns, stride_d, weight, NORM: tl.constexpr, ROTARY: tl.constexpr):
    """The lane that the half-split rotation turns each lane towards, with its sign."""
    first = lanes < ROTARY // 2
    partner = tl.where(first, lanes + ROTARY // 2, lanes - ROTARY // 2)
    x = tl.load(start + partner[None, :] * stride_d, mask=turns, other=0.0).to(tl.float32)
    if NORM:
        if weight is not None:
            # One load per element, as for tables: those of a row alone would go through shared memory to where x is.
            at = weight + tl.zeros_like(x).to(tl.int32) + partner[None, :]
            x *= tl.load(at, mask=((partner >= 0) & (partner < ROTARY))[None, :], other=0.0).to(tl.float32)
    return tl.where(first[None, :], -x, x)


@triton.jit
def hadamard(low, high, dtype: tl.constexpr, HALF: tl.constexpr):
    """Orthonormal Hadamard transform of the 2 * HALF lanes (natural order) of float32 tiles, in ``dtype``, to float32.

    H_2n = [[H_n, H_n], [H_n, -H_n]]: two products with H_n, whose entries are 1 and -1, then sums and differences.
    """
    i = tl.arange(0, HALF)
    parity = i[:, None] & i[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    signs = 1 - 2 * (parity & 1)
    norm: tl.constexpr = (2 * HALF) ** -0.5
    if dtype == tl.float32:
        # As the sum of two numbers of float16, in rows with a largest value of 1: the tf32 that takes float32 as it is
        # would fill the shared memory.
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
        unit = power_of_two_above(tl.maximum(largest, 2.0**-100))[:, None]
        low *= inverse_power_of_two(unit)
        high *= inverse_power_of_two(unit)
        coarse_low, coarse_high = low.to(tl.float16), high.to(tl.float16)
        signs = signs.to(tl.float16)
        a = tl.dot((low - coarse_low).to(tl.float16), signs, tl.dot(coarse_low, signs))
        b = tl.dot((high - coarse_high).to(tl.float16), signs, tl.dot(coarse_high, signs))
        unit *= norm
        return (a + b) * unit, (a - b) * unit
    else:
        a = tl.dot(low.to(dtype), signs.to(dtype))
        b = tl.dot(high.to(dtype), signs.to(dtype))
        return (a + b) * norm, (a - b) * norm


@triton.jit
def power_of_two_above(x):
    """The smallest power of two that is not below x, for normal positive float32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power_of_two(x):
    """1 / x, exactly, for x = 2^e with -126 <= e <= 126."""
    bits = x.to(tl.int32, bitcast=True)
    return ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def scale_for(x, floor):
    """The scale of values whose 448th part is at most x: a power of two, at least ``floor``."""
    return power_of_two_above(tl.maximum(x, floor))


@triton.jit
def nan_for_inf(x):
    """X, with NaN where it is inf; ``tl.maximum`` leaves NaN out."""
    return x + x * 0.0


@triton.jit
def round_e4m3(x, INTERPRETED: tl.constexpr):
    """Round to e4m3, saturating at 448; NaN stays NaN."""
    if INTERPRETED:
        # The interpreter's cast loses carries into the next power of two and does not saturate: round first. It takes a
        # NaN for a number: 0x7FC00000, the usual one, becomes 384. e4m3's has all three bits of its mantissa set.
        x = tl.where(tl.abs(x) > E4M3_MAX, tl.where(x > 0, E4M3_MAX, -E4M3_MAX), x)
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        # Adding 1.5 * 2^14 leaves multiples of 2^-9, the spacing below 2^-6.
        small = (x + 24576.0) - 24576.0
        nan = tl.where(x != x, 0x7FF00000, 0).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 0.015625, small, tl.where(x != x, nan, normal))
    return x.to(tl.float8e4nv)


@triton.jit
def to_int8(x):
    """Round to the nearest integer, ties to even, for |x| <= 127; NaN becomes anything."""
    # Adding 1.5 * 2^23 leaves integers.
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def zero_bits_from(codes, lanes, D: tl.constexpr):
    """Codes of e4m3 [TOKENS, HALF] of ``lanes``, with zero bits from lane D on, where zeros were rounded.

    ptxas 12.8 gets the cast of zeros wrong that it knows to be equal: two of four become what was in a register.
    """
    bits = codes.to(tl.int8, bitcast=True)
    return tl.where((lanes < D)[None, :], bits, 0).to(codes.dtype, bitcast=True)


@triton.jit
def store_tile(
    out, rows, written, stride_s, low, high, D: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr
):  # fmt: skip
    """Store two halves [TOKENS, HALF] as tokens ``rows`` of a head with contiguous lanes, which ROPE turned."""
    lanes = tl.arange(0, HALF)
    # A thread loads the lanes that it stores, 16 of 8 bits unless told otherwise. These are 64 bytes of a table of
    # float32, which it would fetch 16 at a time, while its neighbours fetch from other lines.
    AT_ONCE: tl.constexpr = 8 if turns_whole(ROPE) else 16
    at = out + rows[:, None].to(tl.int64) * stride_s + lanes[None, :]
    low_at, high_at = tl.max_contiguous(at, (1, AT_ONCE)), tl.max_contiguous(at + HALF, (1, AT_ONCE))
    tl.store(low_at, low, mask=written[:, None] & (lanes < D)[None, :])
    tl.store(high_at, high, mask=written[:, None] & (lanes < D - HALF)[None, :])
