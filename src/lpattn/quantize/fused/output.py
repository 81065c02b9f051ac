"""The pass over the output: adds V's constant, undoes V's Hadamard transform, casts to the caller's dtype."""

from __future__ import annotations

import triton
import triton.language as tl

from lpattn.quantize.fused import layout
from lpattn.quantize.fused.tile import NO_ROPE, hadamard, store_tile


@triton.jit(do_not_specialize=["batch", "heads", "kv_heads", "q_len", "each", "limit"])
def restore(
    out, to, buffer, batch, heads, kv_heads, q_len, each, limit,
    D: tl.constexpr, LANES: tl.constexpr, HADAMARD: tl.constexpr, TOKENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program per ``each`` tiles of TOKENS tokens of a head. out and to are [B, S, H, D]-contiguous, perhaps one.

    With OVERLAPS it may be launched before what is in front of it in the stream has ended.
    """
    HALF: tl.constexpr = LANES // 2
    tiles = tl.cdiv(q_len, TOKENS)
    programs = tl.cdiv(tiles, each)
    program = tl.program_id(0)
    chunk, row = program % programs, program // programs
    b, h = (row // heads).to(tl.int64), row % heads
    group = b * kv_heads + h // (heads // kv_heads)
    lanes = tl.arange(0, HALF)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    constant = layout.constants(buffer, batch * kv_heads, 2, LANES) + group * LANES + lanes
    low_c, high_c = tl.load(constant), tl.load(constant + HALF)
    # In place and with nothing to add, there is nothing to do.
    IN_PLACE: tl.constexpr = out.dtype == to.dtype
    if (not IN_PLACE) | HADAMARD | (tl.max(tl.maximum(tl.abs(low_c), tl.abs(high_c))) > 0.0):
        start = (b * q_len * heads + h) * D
        for tile in tl.range(chunk * each, tl.minimum(chunk * each + each, tiles)):
            rows = tile * TOKENS + tl.arange(0, TOKENS)
            at = out + start + rows[:, None].to(tl.int64) * (heads * D) + lanes[None, :]
            there = (rows < q_len)[:, None]
            low = tl.load(at, mask=there & (lanes < D)[None, :], other=0.0)
            high = tl.load(at + HALF, mask=there & (lanes < D - HALF)[None, :], other=0.0)
            low = low.to(tl.float32) + low_c[None, :]
            high = high.to(tl.float32) + high_c[None, :]
            if HADAMARD:
                low, high = hadamard(low, high, out.dtype.element_ty, HALF)
            if limit > 0.0:
                # A clamp alone would turn NaN into the limit.
                low = tl.where(low == low, tl.clamp(low, -limit, limit), low)
                high = tl.where(high == high, tl.clamp(high, -limit, limit), high)
            dtype: tl.constexpr = to.dtype.element_ty
            store_tile(to + start, rows, rows < q_len, heads * D, low.to(dtype), high.to(dtype), D, HALF, NO_ROPE)
