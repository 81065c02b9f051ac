"""What a sample of a head's tokens says about the others: a constant to subtract, and how large the values are."""

from __future__ import annotations

import triton
import triton.language as tl

from lpattn.quantize.fused.layout import PART, part_size, sample_size
from lpattn.quantize.fused.tile import scale_for

HEADROOM = tl.constexpr(16.0)
"""How far a token may exceed the sampled ones before its head is quantized once more. e4m3 is floating point: this
costs four of the 15 powers of two below the largest value, not precision."""

_SIGNIFICANT = tl.constexpr(2.0)
_SIGNIFICANT_CHANNEL = tl.constexpr(30.0)
"""V has a mean if the square of the sampled one, in units of what chance would give, is larger: over all channels, or
in one of them."""

_ROWS = tl.constexpr(16)


@triton.jit
def sampled_tokens(first, size, length):
    """PART tokens of a sample from its ``first`` on, and which of them exist: one from each of ``size`` strata.

    Token 0, a frequent outlier, is always there. The place within a stratum is scattered, so that the sample has no
    period that the tokens might have too.
    """
    i = first + tl.arange(0, PART)
    # Fixed point, since a division for every token would take longer than to load it.
    stride = (length.to(tl.int64) << 16) // tl.maximum(size, 1)
    start = (i * stride) >> 16
    width = ((i + 1) * stride >> 16) - start
    return start + (((i * 40503) & 0xFFFF) * width >> 16), i < size


@triton.jit
def smoothing_constant(maxima, sums, length, room, least, parts, always, D: tl.constexpr, HALF: tl.constexpr):
    """The mean of a head's sample, to be subtracted, or 0 where it is not significant and not ``always`` wanted.

    ``length`` of the head's ``room`` tokens are used; the sample has ``parts``.

    Returns:
        (lower half, upper half [HALF], a bound on the magnitudes that it leaves in the sample)
    """
    size = sample_size(length, least)
    low = tl.zeros((HALF,), tl.float32)
    high = tl.zeros((HALF,), tl.float32)
    square = 0.0
    largest = 0.0
    lanes = tl.arange(0, HALF)[None, :]
    tokens = part_size(room, least, parts)
    for first in range(0, tl.cdiv(size, tokens), _ROWS):
        row = first + tl.arange(0, _ROWS)
        there = row * tokens < size
        largest = tl.maximum(largest, tl.max(tl.load(maxima + 2 * row, mask=there, other=0.0)))
        square += tl.sum(tl.load(maxima + 2 * row + 1, mask=there, other=0.0))
        at = sums + row[:, None] * (2 * HALF) + lanes
        low += tl.sum(tl.load(at, mask=there[:, None], other=0.0), 0)
        high += tl.sum(tl.load(at + HALF, mask=there[:, None], other=0.0), 0)
    mean_square = tl.sum(low * low) + tl.sum(high * high)
    most = tl.maximum(tl.max(tl.abs(low)), tl.max(tl.abs(high)))
    variance = (square - mean_square) / tl.maximum(size, 1).to(tl.float32)
    small = (mean_square < _SIGNIFICANT * variance) & (most * most * D < _SIGNIFICANT_CHANNEL * variance)
    if small & (not always):
        low = tl.zeros((HALF,), tl.float32)
        high = tl.zeros((HALF,), tl.float32)
        most = 0.0
    return low, high, largest + most


@triton.jit
def estimated_scale(largest, length, least, floor):
    """A power of two that maps ``largest``, with headroom for the tokens that were not sampled, to at most 448."""
    headroom = tl.where(sample_size(length, least) < length, HEADROOM, 1.0)
    return scale_for(largest * (headroom / 448.0), floor)
