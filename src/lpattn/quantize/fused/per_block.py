"""The pass for scales per query token and per block of keys, in the layout that lpattn's own kernels read.

Nothing about a scale lies outside of its tile, so that one pass over the tokens is enough; only the constants that are
subtracted from k and v come from a sample (:func:`.per_head.sample_heads`, of k and v alone).

V in e4m3 is stored transposed, [D, BLOCK] per block, and the keys of each group of 16 are permuted: slot 4c + 2b + e
holds key 8b + 2c + e. That is the order in which the accumulator of a product of q and k holds its columns, so that P
becomes an operand of the next product without leaving its registers. V in float16 is stored as it comes: a product of
16-bit operands reads either order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lpattn.quantize.fused import layout
from lpattn.quantize.fused.layout import ALL, FEW
from lpattn.quantize.fused.per_head import QK_FLOOR, V_FLOOR, VARYING
from lpattn.quantize.fused.sample import smoothing_constant
from lpattn.quantize.fused.tile import (
    E4M3_MAX,
    NO_ROPE,
    inverse_power_of_two,
    load_tile,
    scale_for,
    store_tile,
    to_e4m3,
    to_int8,
    transform_tile,
)

_V_SPREAD = tl.constexpr(2.0**-60)
"""How far below a head's largest possible scale of v its smallest one may lie. A kernel may then keep its accumulator
in the units of the block at hand: neither the ratio of two scales nor what it multiplies can overflow."""

_INT8_MAX = tl.constexpr(127.0)

_VARYING = [*VARYING, "qk_max", "flag_b", "flag_h", "flag_s", "q_all", "k_all"]


@triton.jit(do_not_specialize=_VARYING)
def quantize_blocks(
    q, k, v, keys, key_counts, cos_q, sin_q, cos_k, sin_k, flags, buffer,
    q_out, k_out, v_out, q_scale, k_scale, v_scale, lse_shift,
    batch, heads, kv_heads, q_len, kv_len, q_parts, k_parts, v_parts,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    turn_q_b, turn_q_h, turn_q_s, turn_q_d, turn_k_b, turn_k_h, turn_k_s, turn_k_d,
    flag_b, flag_h, flag_s, q_all, k_all, factor, qk_max,
    UNIT: tl.constexpr, DENSE: tl.constexpr, TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr,
    HADAMARD_QK: tl.constexpr, HADAMARD_V: tl.constexpr, D_OUT: tl.constexpr, D_V_OUT: tl.constexpr,
    PACKED: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK tokens of a head of q (``q_all`` of them), then of k (``k_all``), then of v.

    With OVERLAPS it may start while ``sample_heads`` still runs. ``keys`` and ``key_counts`` say which tokens of k and
    v are used; with PACKED these come first in the output, otherwise ``flags`` says so of each, in its place.
    """
    HALF: tl.constexpr = LANES // 2
    program = tl.program_id(0)
    groups = batch * kv_heads
    # The tensor that the program reads, and which block of which head.
    x, stride_b, stride_h, stride_s, stride_d = q, q_b, q_h, q_s, q_d
    cos, sin, turn_b, turn_h, turn_s, turn_d = cos_q, sin_q, turn_q_b, turn_q_h, turn_q_s, turn_q_d
    index, in_batch, length, least, which, floor, limit = program, heads, q_len, FEW, 0, QK_FLOOR, qk_max
    if program >= q_all + k_all:
        x, stride_b, stride_h, stride_s, stride_d = v, v_b, v_h, v_s, v_d
        index, in_batch, length, least, which = program - q_all - k_all, kv_heads, kv_len, ALL, 2
        floor, limit = V_FLOOR, E4M3_MAX
    elif program >= q_all:
        x, stride_b, stride_h, stride_s, stride_d = k, k_b, k_h, k_s, k_d
        cos, sin, turn_b, turn_h, turn_s, turn_d = cos_k, sin_k, turn_k_b, turn_k_h, turn_k_s, turn_k_d
        index, in_batch, length, least, which = program - q_all, kv_heads, kv_len, FEW, 1
    blocks = tl.cdiv(length, BLOCK)
    block, row = index % blocks, index // blocks
    b, h = (row // in_batch).to(tl.int64), (row % in_batch).to(tl.int64)
    kv_used = kv_len
    if key_counts is not None:
        kv_used = tl.load(key_counts + b)
    slots = tl.arange(0, BLOCK)
    rows = block * BLOCK + slots
    if v_out.dtype.element_ty == tl.float8e4nv:
        permuted = slots // 16 * 16 + slots // 2 % 2 * 8 + slots // 4 % 4 * 2 + slots % 2
        rows = block * BLOCK + tl.where(which == 2, permuted, slots)
    used = rows < length
    tokens = rows
    if PACKED:
        if which > 0:
            used = rows < kv_used
            tokens = tl.load(keys + b * kv_len + rows, mask=used, other=0)
    if flags is not None:
        if which > 0:
            at = flags + b * flag_b + h * flag_h + rows.to(tl.int64) * flag_s
            used = tl.load(at, mask=used, other=0) != 0
    x += (b * stride_b + h * stride_h) * UNIT
    stride_s, stride_d = stride_s * UNIT, 1 if DENSE else stride_d
    low, high = load_tile(x, tokens, used, stride_s, stride_d, D, HALF)
    low, high = transform_tile(
        low, high, x, tokens, used, stride_s, stride_d,
        None if ROPE == NO_ROPE else cos + (b * turn_b + h * turn_h) * TURN_UNIT,
        None if ROPE == NO_ROPE else sin + (b * turn_b + h * turn_h) * TURN_UNIT,
        turn_s * TURN_UNIT, 1 if TURN_DENSE else turn_d, which < 2, True if HADAMARD_QK else which == 2,
        D, HALF, ROPE, ROTARY, HADAMARD_V,
    )  # fmt: skip

    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    maxima = layout.maxima(buffer, groups, LANES)
    sums = layout.sums(buffer, groups, groups * (k_parts + v_parts), LANES)
    low_c = tl.zeros((HALF,), tl.float32)
    high_c = tl.zeros((HALF,), tl.float32)
    if which > 0:
        first = tl.where(which == 1, row * k_parts, groups * k_parts + row * v_parts)
        low_c, high_c, bound = smoothing_constant(
            maxima + 2 * first, sums + first.to(tl.int64) * LANES, kv_used, kv_len, least, True, D, HALF
        )
        if which == 2:
            floor = tl.maximum(floor, bound * (_V_SPREAD / E4M3_MAX))
        if block == 0:
            constant = layout.constants(buffer, groups, which, LANES) + row * LANES + tl.arange(0, HALF)
            tl.store(constant, low_c)
            tl.store(constant + HALF, high_c)
    factor = tl.where(which == 0, factor, 1.0)
    low = tl.where(used[:, None], low * factor - low_c[None, :], 0.0)
    high = tl.where(used[:, None], high * factor - high_c[None, :], 0.0)
    if lse_shift is not None:
        if which == 0:
            first = (b * kv_heads + h // (heads // kv_heads)) * k_parts
            low_k, high_k, _ = smoothing_constant(
                maxima + 2 * first, sums + first * LANES, kv_used, kv_len, FEW, True, D, HALF
            )
            products = tl.sum(low * low_k[None, :] + high * high_k[None, :], 1)
            tl.store(lse_shift + row.to(tl.int64) * q_len + rows, products, mask=used)

    low_size = tl.where(tl.abs(low) < float("inf"), tl.abs(low), 0.0)
    high_size = tl.where(tl.abs(high) < float("inf"), tl.abs(high), 0.0)
    largest = tl.max(tl.maximum(low_size, high_size), 1)
    if which > 0:
        largest = tl.zeros_like(largest) + tl.max(largest)
    at_head = row.to(tl.int64) * blocks
    if which == 2:
        scale = scale_for(largest / E4M3_MAX, floor)
        inverse = inverse_power_of_two(scale)[:, None]
        tl.store(v_scale + at_head + block, tl.max(scale))
        if v_out.dtype.element_ty == tl.float8e4nv:
            lanes = tl.arange(0, HALF)[:, None]
            at = v_out + ((at_head + block) * D_V_OUT + lanes) * BLOCK + slots[None, :]
            low_out, high_out = to_e4m3(low * inverse, INTERPRETED), to_e4m3(high * inverse, INTERPRETED)
            tl.store(at, tl.trans(low_out), mask=lanes < D_V_OUT)
            tl.store(at + HALF * BLOCK, tl.trans(high_out), mask=lanes < D_V_OUT - HALF)
        else:
            low_out, high_out = (low * inverse).to(tl.float16), (high * inverse).to(tl.float16)
            at = v_out + at_head * BLOCK * D_V_OUT
            store_tile(at, rows, rows >= 0, D_V_OUT, low_out, high_out, D_V_OUT, HALF)
    else:
        if q_out.dtype.element_ty == tl.float8e4nv:
            scale = scale_for(largest / limit, floor)
            inverse = inverse_power_of_two(scale)[:, None]
            low_out, high_out = to_e4m3(low * inverse, INTERPRETED), to_e4m3(high * inverse, INTERPRETED)
        else:
            scale = tl.maximum(largest / _INT8_MAX, floor)
            inverse = (1.0 / scale)[:, None]
            low_out, high_out = to_int8(low * inverse), to_int8(high * inverse)
            # An integer cannot be NaN: the scale is, for all that share it.
            spoiled = tl.max(((low * 0.0 != 0.0) | (high * 0.0 != 0.0)).to(tl.int32), 1)
            if which == 1:
                spoiled = tl.zeros_like(spoiled) + tl.max(spoiled)
            scale = tl.where(spoiled != 0, float("nan"), scale)
        if which == 0:
            store_tile(q_out + row.to(tl.int64) * q_len * D_OUT, rows, used, D_OUT, low_out, high_out, D_OUT, HALF)
            tl.store(q_scale + row.to(tl.int64) * q_len + rows, scale, mask=used)
        else:
            # The last block is whole, its tail zeros.
            store_tile(k_out + at_head * BLOCK * D_OUT, rows, rows >= 0, D_OUT, low_out, high_out, D_OUT, HALF)
            tl.store(k_scale + at_head + block, tl.sum(tl.where(slots == 0, scale, 0.0)))
