"""The float32 buffer in which the passes tell each other what they found. Host and device compute its sections alike.

For G = batch * num_kv_heads groups, and head_dim padded to LANES:

* [3, G]: the descales of q, k and v;
* [3, G, LANES]: what was subtracted from q (nothing), k and v;
* [3, 2, G], int32: per group of q, k and v the programs that are done (of those that take several groups, in
  the first), and the largest magnitude beyond the scale;
* [parts, 2] and [parts, LANES]: of every sampled part of a head (q's, then k's, then v's) the largest magnitude and the
  sum of squares / n, and per channel the sum / n.
"""

from __future__ import annotations

import triton
import triton.language as tl

PART = tl.constexpr(128)
"""Tokens that are looked at together. A part is one or more times as many and has one writer, and parts are added in
order: no two runs differ."""

FEW = tl.constexpr(256)
"""Least number of tokens in a sample. A sixteenth of them all is better where that is more, up to ``_MOST``."""

ALL = tl.constexpr(2**30)
"""As the least number: no sample, but all tokens."""

EXACT_FROM = 8192
"""Number of keys from which on V's constant is its exact mean, at the price of a second look at V. What the mean of a
sample leaves is lost in the sums of a kernel with one accumulator per row, the more the longer they are: see
tests/quantize/fused/test_long_sums.py."""

_MOST = tl.constexpr(4096)


def parts(length: int, least: int, most: int) -> int:
    """Number of parts that :func:`sample_size` tokens make, ``most`` of them at most: see :func:`part_size`."""
    tokens = min(length, max(min(length // 16 // PART.value * PART.value, _MOST.value), least))
    tiles = -(-tokens // PART.value)
    each = max(-(-tiles // most), 1)
    return -(-tiles // each)


@triton.jit
def sample_size(length, least):
    """Tokens that are looked at, for ``least`` FEW or ALL."""
    return tl.minimum(length, tl.maximum(tl.minimum(length // 16 // PART * PART, _MOST), least))


@triton.jit
def part_size(room, least, parts):
    """Tokens of each of the ``parts``, the last one of which may be short.

    It is the same however many of the ``room`` tokens are used.
    """
    return tl.maximum(tl.cdiv(tl.cdiv(sample_size(room, least), PART), parts), 1) * PART


def size(groups: int, lanes: int, all_parts: int) -> int:
    """Number of floats in the buffer."""
    return groups * (3 + 3 * lanes + 6) + all_parts * (2 + lanes)


@triton.jit
def descales(buffer, groups, which):
    """[G]: of q (0), k (1) or v (2)."""
    return buffer + which * groups


@triton.jit
def constants(buffer, groups, which, LANES: tl.constexpr):
    """[G, LANES]: of q (0), k (1) or v (2)."""
    return buffer + (3 + which * LANES) * groups


@triton.jit
def counters(buffer, groups, which, LANES: tl.constexpr):
    """int32 [2, G]: of q (0), k (1) or v (2)."""
    ints = (buffer + (3 + 3 * LANES) * groups).to(tl.pointer_type(tl.int32))
    return ints + 2 * which * groups


@triton.jit
def maxima(buffer, groups, LANES: tl.constexpr):
    """[parts, 2]: largest magnitude, sum of squares / n."""
    return buffer + (9 + 3 * LANES) * groups


@triton.jit
def sums(buffer, groups, all_parts, LANES: tl.constexpr):
    """[parts, LANES]: sum / n."""
    return maxima(buffer, groups, LANES) + 2 * all_parts
