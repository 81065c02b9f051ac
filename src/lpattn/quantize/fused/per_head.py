"""The passes for scales per (batch, KV head), as FlashAttention-3 takes them.

A scale for all tokens of a head depends on all of them, and reading them twice would cost as much again. So the first
pass looks at a sample, and the second quantizes with the scale that follows from it, and headroom. Where a token turns
out to be larger still, whoever finishes the last tile of the group quantizes the group again with the scale that fits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lpattn.quantize.fused import layout
from lpattn.quantize.fused.layout import FEW, PART, part_size, sample_size
from lpattn.quantize.fused.sample import estimated_scale, sampled_tokens, smoothing_constant
from lpattn.quantize.fused.tile import (
    E4M3_MAX,
    KEPT,
    NO_NORM,
    NO_ROPE,
    inverse_power_of_two,
    load_angles,
    load_tile,
    load_weights,
    scale_for,
    store_tile,
    to_e4m3,
    transform_tile,
)

QK_FLOOR = tl.constexpr(2.0**-56)
"""Smallest scale of q and k. FlashAttention-3 multiplies the softmax scale and the scales of q and k; a product below
float32's normal range is flushed to zero, and zero times the -inf of a fully masked tile would be NaN."""

V_FLOOR = tl.constexpr(2.0**-126)

# Numbers of which every call has others: to compile anew for a length would stall it.
VARYING = [
    "batch", "heads", "kv_heads", "q_len", "kv_len", "q_parts", "k_parts", "v_parts", "each", "factor",
    "q_b", "q_h", "q_s", "q_d", "k_b", "k_h", "k_s", "k_d", "v_b", "v_h", "v_s", "v_d",
    "turn_q_b", "turn_q_h", "turn_q_s", "turn_q_d", "turn_k_b", "turn_k_h", "turn_k_s", "turn_k_d", "eps_q", "eps_k",
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def sample_heads(
    q, k, v, keys, key_counts, cos_q, sin_q, cos_k, sin_k, weight_q, weight_k, buffer,
    batch, heads, kv_heads, q_len, kv_len, q_parts, k_parts, v_parts,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    turn_q_b, turn_q_h, turn_q_s, turn_q_d, turn_k_b, turn_k_h, turn_k_s, turn_k_d, eps_q, eps_k,
    UNIT: tl.constexpr, DENSE: tl.constexpr, TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr,
    HADAMARD_QK: tl.constexpr, HADAMARD_V: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Sample all heads: one program per part of a head of q, then of k, then of v. It also clears the counters.

    With OVERLAPS it may be launched before what is in front of it in the stream has ended.
    """
    HALF: tl.constexpr = LANES // 2
    program = tl.program_id(0)
    groups = batch * kv_heads
    q_all = batch * heads * q_parts
    kv_all = q_all + groups * k_parts
    if OVERLAPS:
        # In this order: the next kernel reads the inputs before it waits for this one.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # The tensor that the program reads, and which part of which head.
    x, stride_b, stride_h, stride_s, stride_d = q, q_b, q_h, q_s, q_d
    cos, sin, turn_b, turn_h, turn_s, turn_d = cos_q, sin_q, turn_q_b, turn_q_h, turn_q_s, turn_q_d
    norm_weight, eps = weight_q, eps_q
    index, parts, in_batch, length, least, which = program, q_parts, heads, q_len, FEW, 0
    if program >= kv_all:
        x, stride_b, stride_h, stride_s, stride_d = v, v_b, v_h, v_s, v_d
        index, parts, in_batch, length, which = program - kv_all, v_parts, kv_heads, kv_len, 2
        least = layout.least_of_v(k_parts, v_parts)
    elif program >= q_all:
        x, stride_b, stride_h, stride_s, stride_d = k, k_b, k_h, k_s, k_d
        cos, sin, turn_b, turn_h, turn_s, turn_d = cos_k, sin_k, turn_k_b, turn_k_h, turn_k_s, turn_k_d
        norm_weight, eps = weight_k, eps_k
        index, parts, in_batch, length, least, which = program - q_all, k_parts, kv_heads, kv_len, FEW, 1
    part, row = index % parts, index // parts
    b, h = (row // in_batch).to(tl.int64), (row % in_batch).to(tl.int64)
    if part == 0:
        done = layout.counters(buffer, groups, which, LANES) + b * kv_heads + h // (in_batch // kv_heads)
        tl.store(done, 0)
        tl.store(done + groups, 0)
    each = part_size(length, least)
    if key_counts is not None:
        if which > 0:
            length = tl.load(key_counts + b)
    scalars = layout.maxima(buffer, groups, LANES) + 2 * program
    sums = layout.sums(buffer, groups, kv_all + groups * v_parts, LANES) + program.to(tl.int64) * LANES
    x += (b * stride_b + h * stride_h) * UNIT
    cos = None if ROPE == NO_ROPE else cos + (b * turn_b + h * turn_h) * TURN_UNIT
    sin = None if ROPE == NO_ROPE else sin + (b * turn_b + h * turn_h) * TURN_UNIT
    stride_s, stride_d = stride_s * UNIT, 1 if DENSE else stride_d
    turn_s, turn_d = turn_s * TURN_UNIT, 1 if TURN_DENSE else turn_d
    # A branch within the loop over the tokens would keep it from loading ahead.
    if (ROPE != NO_ROPE) | (HADAMARD_QK != HADAMARD_V) | (NORM != NO_NORM):
        if which == 2:
            _sample_part(
                x, keys, None, 0.0, None, None, scalars, sums, which, part, each, b, kv_len, length, least,
                stride_s, stride_d, turn_s, turn_d, D, HALF, NO_NORM, NO_ROPE, 0, HADAMARD_V,
            )  # fmt: skip
        else:
            _sample_part(
                x, keys, norm_weight, eps, cos, sin, scalars, sums, which, part, each, b, kv_len, length, least,
                stride_s, stride_d, turn_s, turn_d, D, HALF, NORM, ROPE, ROTARY, HADAMARD_QK,
            )  # fmt: skip
    else:
        _sample_part(
            x, keys, None, 0.0, None, None, scalars, sums, which, part, each, b, kv_len, length, least,
            stride_s, stride_d, turn_s, turn_d, D, HALF, NO_NORM, NO_ROPE, 0, HADAMARD_V,
        )  # fmt: skip


@triton.jit
def _sample_part(
    x, keys, norm_weight, eps, cos, sin, scalars, sums, which, part, each, b, kv_len, length, least,
    stride_s, stride_d, turn_s, turn_d,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr,
    HADAMARD: tl.constexpr,
):  # fmt: skip
    """Sample tokens ``part * each`` and on of a head, whose token 0 is at x, cos and sin."""
    size = sample_size(length, least)
    # Dividing first keeps the sum of large values finite.
    weight = 1.0 / tl.maximum(size, 1).to(tl.float32)
    largest, square = 0.0, 0.0
    low_sum = tl.zeros((HALF,), tl.float32)
    high_sum = tl.zeros((HALF,), tl.float32)
    # Tiles that are loaded ahead do not fit into shared memory beside those of a Hadamard transform or of cos and sin.
    light: tl.constexpr = 2 * HALF * x.dtype.element_ty.primitive_bitwidth <= 4096
    weight_low, weight_high = load_weights(norm_weight, D, HALF, NORM)
    STAGES: tl.constexpr = 3 if light and ROPE == NO_ROPE and not HADAMARD else 1
    for first in tl.range(part * each, tl.minimum(part * each + each, size), PART, num_stages=STAGES):
        tokens, used = sampled_tokens(first, size, length)
        if keys is not None:
            if which > 0:
                tokens = tl.load(keys + b * kv_len + tokens, mask=used, other=0).to(tl.int64)
        low, high = load_tile(x, tokens, used, stride_s, stride_d, D, HALF, KEPT)
        low, high, of_rows = transform_tile(
            low, high, x, tokens, used, stride_s, stride_d, norm_weight, weight_low, weight_high, eps, None,
            load_angles(cos, sin, tokens, used, turn_s, turn_d, HALF, ROPE, ROTARY), True,
            D, HALF, NORM, ROPE, ROTARY, HADAMARD,
        )  # fmt: skip
        low, high = low * of_rows, high * of_rows
        low = tl.where(tl.abs(low) < float("inf"), low, 0.0)
        high = tl.where(tl.abs(high) < float("inf"), high, 0.0)
        largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(low), tl.abs(high))))
        square += tl.sum(low * low * weight + high * high * weight)
        low_sum += tl.sum(low * weight, 0)
        high_sum += tl.sum(high * weight, 0)
    tl.store(scalars, largest)
    tl.store(scalars + 1, square)
    to = sums + tl.arange(0, HALF)
    tl.store(to, low_sum)
    tl.store(to + HALF, high_sum)


@triton.jit(do_not_specialize=VARYING)
def quantize_heads(
    q, k, v, keys, key_counts, cos_q, sin_q, cos_k, sin_k, weight_q, weight_k, buffer, q_out, k_out, v_out, lse_shift,
    batch, heads, kv_heads, q_len, kv_len, q_parts, k_parts, v_parts,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    turn_q_b, turn_q_h, turn_q_s, turn_q_d, turn_k_b, turn_k_h, turn_k_s, turn_k_d, eps_q, eps_k, each, factor,
    UNIT: tl.constexpr, DENSE: tl.constexpr, TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr,
    HADAMARD_QK: tl.constexpr, HADAMARD_V: tl.constexpr,
    TOKENS: tl.constexpr, Q_ROWS: tl.constexpr, OVERLAPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Quantize all heads: one program per ``each`` tiles of TOKENS tokens of a head of q, then of k, then of v.

    With OVERLAPS it may start while ``sample_heads`` still runs.
    """
    program = tl.program_id(0)
    groups = batch * kv_heads
    q_all, kv_all = (
        batch * heads * tl.cdiv(tl.cdiv(q_len, TOKENS), each),
        groups * tl.cdiv(tl.cdiv(kv_len, TOKENS), each),
    )
    # The tensor that the program reads, and which tile of which head.
    x, out, stride_b, stride_h, stride_s, stride_d = q, q_out, q_b, q_h, q_s, q_d
    cos, sin, turn_b, turn_h, turn_s, turn_d = cos_q, sin_q, turn_q_b, turn_q_h, turn_q_s, turn_q_d
    norm_weight, eps = weight_q, eps_q
    index, in_batch, length, least, which, floor = program, heads, q_len, FEW, 0, QK_FLOOR
    if program >= q_all + kv_all:
        x, out, stride_b, stride_h, stride_s, stride_d = v, v_out, v_b, v_h, v_s, v_d
        index, in_batch, length, which, floor = program - q_all - kv_all, kv_heads, kv_len, 2, V_FLOOR
        least = layout.least_of_v(k_parts, v_parts)
    elif program >= q_all:
        x, out, stride_b, stride_h, stride_s, stride_d = k, k_out, k_b, k_h, k_s, k_d
        cos, sin, turn_b, turn_h, turn_s, turn_d = cos_k, sin_k, turn_k_b, turn_k_h, turn_k_s, turn_k_d
        norm_weight, eps = weight_k, eps_k
        index, in_batch, length, least, which = program - q_all, kv_heads, kv_len, FEW, 1
    factor = tl.where(which == 0, factor, 1.0)
    room = length
    b = (index // (tl.cdiv(tl.cdiv(room, TOKENS), each) * in_batch)).to(tl.int64)
    if key_counts is not None:
        if which > 0:
            length = tl.load(key_counts + b)
    x += b * stride_b * UNIT
    out += b * in_batch * room * D
    stride_h, stride_s, stride_d = stride_h * UNIT, stride_s * UNIT, 1 if DENSE else stride_d
    # A branch within the loop over the tiles would keep it from loading ahead.
    if (ROPE != NO_ROPE) | (HADAMARD_QK != HADAMARD_V) | (NORM != NO_NORM):
        if which == 2:
            _quantize_tiles(
                x, out, keys, None, 0.0, None, None, buffer, lse_shift, which, index, b, length, room, least, floor,
                batch, heads, kv_heads, in_batch, q_len, kv_len, q_parts, k_parts, v_parts,
                stride_h, stride_s, stride_d, turn_b, turn_h, turn_s, turn_d, each, factor, key_counts,
                TURN_UNIT, TURN_DENSE, D, LANES, NO_NORM, NO_ROPE, 0, HADAMARD_V, TOKENS, Q_ROWS, OVERLAPS,
                INTERPRETED,
            )  # fmt: skip
        else:
            _quantize_tiles(
                x, out, keys, norm_weight, eps, cos, sin, buffer, lse_shift, which, index, b, length, room, least,
                floor, batch, heads, kv_heads, in_batch, q_len, kv_len, q_parts, k_parts, v_parts,
                stride_h, stride_s, stride_d, turn_b, turn_h, turn_s, turn_d, each, factor, key_counts,
                TURN_UNIT, TURN_DENSE, D, LANES, NORM, ROPE, ROTARY, HADAMARD_QK, TOKENS, Q_ROWS, OVERLAPS, INTERPRETED,
            )  # fmt: skip
    else:
        _quantize_tiles(
            x, out, keys, None, 0.0, None, None, buffer, lse_shift, which, index, b, length, room, least, floor,
            batch, heads, kv_heads, in_batch, q_len, kv_len, q_parts, k_parts, v_parts,
            stride_h, stride_s, stride_d, turn_b, turn_h, turn_s, turn_d, each, factor, key_counts,
            TURN_UNIT, TURN_DENSE, D, LANES, NO_NORM, NO_ROPE, 0, HADAMARD_V, TOKENS, Q_ROWS, OVERLAPS, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _quantize_tiles(
    x, out, keys, norm_weight, eps, cos, sin, buffer, lse_shift, which, index, b, length, room, least, floor,
    batch, heads, kv_heads, in_batch, q_len, kv_len, q_parts, k_parts, v_parts,
    stride_h, stride_s, stride_d, turn_b, turn_h, turn_s, turn_d, each, factor, key_counts,
    TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr, HADAMARD: tl.constexpr,
    TOKENS: tl.constexpr, Q_ROWS: tl.constexpr, OVERLAPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Quantize the ``index``-th chunk of tiles of a tensor; x and out are at batch entry b of it.

    Args:
        which: q (0), k (1) or v (2).
        length: tokens that are used, of ``room``.
        in_batch: heads of this tensor per batch entry.
    """
    HALF: tl.constexpr = LANES // 2
    groups = batch * kv_heads
    q_part_rows, k_part_rows = batch * heads * q_parts, groups * k_parts
    tiles = tl.cdiv(room, TOKENS)
    programs = tl.cdiv(tiles, each)
    chunk, h = index % programs, index // programs % in_batch
    group_heads = in_batch // kv_heads
    group = (b * kv_heads + h // group_heads).to(tl.int32)
    # Some tiles of the group; the first of them is on its way while the sample is looked at.
    first_head = h // group_heads * group_heads
    start = h % group_heads * tiles + chunk * each
    end = h % group_heads * tiles + tl.minimum(chunk * each + each, tiles)
    low_next, high_next = _load(
        x, keys, which, b, kv_len, first_head, start, end, tiles, length, stride_h, stride_s, stride_d, TOKENS, D, HALF
    )
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    maxima = layout.maxima(buffer, groups, LANES)
    sums = layout.sums(buffer, groups, q_part_rows + k_part_rows + groups * v_parts, LANES)
    low_c = tl.zeros((HALF,), tl.float32)
    high_c = tl.zeros((HALF,), tl.float32)
    if which == 0:
        at = tl.arange(0, Q_ROWS)
        q_rows = group_heads * q_parts
        largest = tl.max(tl.load(maxima + 2 * (group * q_rows + at), mask=at < q_rows, other=0.0)) * tl.abs(factor)
    else:
        first = tl.where(which == 1, q_part_rows + group * k_parts, q_part_rows + k_part_rows + group * v_parts)
        low_c, high_c, largest = smoothing_constant(
            maxima + 2 * first, sums + first.to(tl.int64) * LANES, length, room, least, which == 1, D, HALF
        )
        if chunk == 0:
            constant = layout.constants(buffer, groups, which, LANES) + group * LANES + tl.arange(0, HALF)
            tl.store(constant, low_c)
            tl.store(constant + HALF, high_c)
    scale = estimated_scale(largest, length, least, floor)

    if lse_shift is not None:
        low_k, high_k = low_c, high_c
        if which == 0:
            first = q_part_rows + group * k_parts
            kv_used = kv_len
            if key_counts is not None:
                kv_used = tl.load(key_counts + b)
            low_k, high_k, _ = smoothing_constant(
                maxima + 2 * first, sums + first.to(tl.int64) * LANES, kv_used, kv_len, FEW, True, D, HALF
            )

    done = layout.counters(buffer, groups, which, LANES) + group
    weight_low, weight_high = load_weights(norm_weight, D, HALF, NORM)
    # These tiles; then, where they were the group's last ones and its scale does not fit, all of the group's once more.
    again = False
    while start < end:
        # Scales are powers of two, so that one multiplication and addition is as exact as a difference that is scaled.
        inverse = inverse_power_of_two(scale)
        low_shift, high_shift = -low_c * inverse, -high_c * inverse
        magnitudes = tl.zeros((TOKENS, HALF), tl.float32)
        for tile in range(start, end):
            low, high = low_next, high_next
            low_next, high_next = _load(
                x, keys, which, b, kv_len, first_head, tile + 1, end, tiles, length,
                stride_h, stride_s, stride_d, TOKENS, D, HALF,
            )  # fmt: skip
            head = (first_head + tile // tiles).to(tl.int64)
            rows = tile % tiles * TOKENS + tl.arange(0, TOKENS)
            used = rows < length
            tokens = _tokens(keys, which, b, kv_len, rows, used)
            angles = load_angles(
                None if ROPE == NO_ROPE else cos + (b * turn_b + head * turn_h) * TURN_UNIT,
                None if ROPE == NO_ROPE else sin + (b * turn_b + head * turn_h) * TURN_UNIT,
                tokens, used, turn_s * TURN_UNIT, 1 if TURN_DENSE else turn_d, HALF, ROPE, ROTARY,
            )  # fmt: skip
            low, high, of_rows = transform_tile(
                low, high, x + head * stride_h, tokens, used, stride_s, stride_d,
                norm_weight, weight_low, weight_high, eps, None, angles, True, D, HALF, NORM, ROPE, ROTARY, HADAMARD,
            )  # fmt: skip
            if lse_shift is not None:
                products = tl.sum((low * low_k[None, :] + high * high_k[None, :]) * (of_rows * factor), 1)
                tl.store(lse_shift + (b * heads + head) * q_len + rows, products, mask=used & (which == 0))
            low = low * (of_rows * (inverse * factor)) + low_shift[None, :]
            high = high * (of_rows * (inverse * factor)) + high_shift[None, :]
            if key_counts is not None:
                # Tokens past the used ones are written too: zeros, since 0 * NaN would reach the output.
                low, high = tl.where(used[:, None], low, 0.0), tl.where(used[:, None], high, 0.0)
            store_tile(
                out + head * room * D, rows, rows < room, D,
                to_e4m3(low, INTERPRETED), to_e4m3(high, INTERPRETED), D, HALF, ROPE,
            )  # fmt: skip
            # inf times 0 is NaN, which a maximum leaves out.
            finite_or_nan = tl.maximum(tl.abs(low + low * 0.0), tl.abs(high + high * 0.0))
            magnitudes = tl.maximum(magnitudes, finite_or_nan)
        start = end
        if not again:
            most = tl.max(magnitudes)
            if most > E4M3_MAX:
                # The order of positive floats is that of their bits.
                tl.atomic_max(done + groups, (most * scale).to(tl.int32, bitcast=True), sem="relaxed")
            # All of the program's stores come before its signal.
            tl.debug_barrier()
            if tl.atomic_add(done, 1, sem="acq_rel") == programs * group_heads - 1:
                most = tl.atomic_max(done + groups, 0, sem="relaxed").to(tl.float32, bitcast=True)
                if most > 0.0:
                    scale = scale_for(most / E4M3_MAX, floor)
                    start, end, again = tl.zeros_like(start), tiles * group_heads, True
                    low_next, high_next = _load(
                        x, keys, which, b, kv_len, first_head, start, end, tiles, length,
                        stride_h, stride_s, stride_d, TOKENS, D, HALF,
                    )  # fmt: skip
                tl.store(layout.descales(buffer, groups, which) + group, scale)


@triton.jit
def _tokens(keys, which, b, kv_len, rows, used):
    """Where in the input the rows of the output are: k and v may be packed."""
    tokens = rows
    if keys is not None:
        if which > 0:
            tokens = tl.load(keys + b * kv_len + rows, mask=used, other=0)
    return tokens


@triton.jit
def _load(
    x, keys, which, b, kv_len, first_head, index, end, tiles, length, stride_h, stride_s, stride_d,
    TOKENS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Load the group's tile ``index``, or zeros from ``end`` on."""
    rows = index % tiles * TOKENS + tl.arange(0, TOKENS)
    used = rows < tl.where(index < end, length, 0)
    tokens = _tokens(keys, which, b, kv_len, rows, used)
    return load_tile(
        x + (first_head + index // tiles).to(tl.int64) * stride_h, tokens, used, stride_s, stride_d, D, HALF, KEPT
    )
