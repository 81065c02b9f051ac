"""The passes for scales per (batch, KV head), as FlashAttention-3 takes them.

A scale for all tokens of a head depends on all of them, and reading them twice would cost as much again. So the first
pass looks at a sample, and the second quantizes with the scale that follows from it, and headroom. Where a token turns
out to be larger still, the last program that has tiles of the group quantizes it again with the scale that fits.
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
    PASSING,
    inverse_power_of_two,
    load_angles,
    load_tile,
    load_weights,
    nan_for_inf,
    round_e4m3,
    scale_for,
    store_tile,
    transform_tile,
    turns_whole,
)

QK_FLOOR = tl.constexpr(2.0**-56)
"""Smallest scale of q and k. FlashAttention-3 multiplies the softmax scale and the scales of q and k; a product below
float32's normal range is flushed to zero, and zero times the -inf of a fully masked tile would be NaN."""

V_FLOOR = tl.constexpr(2.0**-126)

# Numbers of which every call has others: to compile anew for a length would stall it.
VARYING = [
    "batch", "heads", "kv_heads", "q_len", "kv_len", "q_parts", "k_parts", "v_parts", "v_least",
    "each", "q_each", "k_each", "factor",
    "q_b", "q_h", "q_s", "q_d", "k_b", "k_h", "k_s", "k_d", "v_b", "v_h", "v_s", "v_d",
    "turn_q_b", "turn_q_h", "turn_q_s", "turn_q_d", "turn_k_b", "turn_k_h", "turn_k_s", "turn_k_d", "eps_q", "eps_k",
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def sample_heads(
    q, k, v, keys, key_counts, cos_q, sin_q, cos_k, sin_k, weight_q, weight_k, buffer,
    batch, heads, kv_heads, q_len, kv_len, q_parts, k_parts, v_parts, v_least,
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
        index, parts, in_batch, length, least, which = program - kv_all, v_parts, kv_heads, kv_len, v_least, 2
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
    each = part_size(length, least, parts)
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
    batch, heads, kv_heads, q_len, kv_len, q_parts, k_parts, v_parts, v_least,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    turn_q_b, turn_q_h, turn_q_s, turn_q_d, turn_k_b, turn_k_h, turn_k_s, turn_k_d, eps_q, eps_k,
    each, q_each, k_each, factor,
    UNIT: tl.constexpr, DENSE: tl.constexpr, TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr,
    HADAMARD_QK: tl.constexpr, HADAMARD_V: tl.constexpr,
    TOKENS: tl.constexpr, TURNED_TOKENS: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Quantize all heads of q, then of k, then of v.

    One program per ``each`` tiles of TOKENS tokens of a head. With a rotation, q and k have one per TURNED_TOKENS
    tokens of ``q_each`` and ``k_each`` heads, which turn by the same angles.

    With OVERLAPS it may start while ``sample_heads`` still runs.
    """
    program = tl.program_id(0)
    groups = batch * kv_heads
    if ROPE == NO_ROPE:
        q_all = batch * heads * tl.cdiv(tl.cdiv(q_len, TOKENS), each)
        kv_all = q_all + groups * tl.cdiv(tl.cdiv(kv_len, TOKENS), each)
    else:
        q_all = batch * tl.cdiv(heads, q_each) * tl.cdiv(q_len, TURNED_TOKENS)
        kv_all = q_all + batch * tl.cdiv(kv_heads, k_each) * tl.cdiv(kv_len, TURNED_TOKENS)
    # The tensor that the program reads, and which tiles of it.
    x, out, stride_b, stride_h, stride_s, stride_d = q, q_out, q_b, q_h, q_s, q_d
    cos, sin, turn_b, turn_h, turn_s, turn_d = cos_q, sin_q, turn_q_b, turn_q_h, turn_q_s, turn_q_d
    norm_weight, eps, heads_each = weight_q, eps_q, q_each
    index, in_batch, room, parts, which, floor = program, heads, q_len, q_parts, 0, QK_FLOOR
    if program >= kv_all:
        x, out, stride_b, stride_h, stride_s, stride_d = v, v_out, v_b, v_h, v_s, v_d
        index, in_batch, room, parts, which, floor = program - kv_all, kv_heads, kv_len, v_parts, 2, V_FLOOR
    elif program >= q_all:
        x, out, stride_b, stride_h, stride_s, stride_d = k, k_out, k_b, k_h, k_s, k_d
        cos, sin, turn_b, turn_h, turn_s, turn_d = cos_k, sin_k, turn_k_b, turn_k_h, turn_k_s, turn_k_d
        norm_weight, eps, heads_each = weight_k, eps_k, k_each
        index, in_batch, room, parts, which = program - q_all, kv_heads, kv_len, k_parts, 1
    factor = tl.where(which == 0, factor, 1.0)
    # Batch entries and heads may begin beyond 2^31 elements.
    stride_b, stride_h = tl.cast(stride_b, tl.int64) * UNIT, tl.cast(stride_h, tl.int64) * UNIT
    turn_b, turn_h = tl.cast(turn_b, tl.int64) * TURN_UNIT, tl.cast(turn_h, tl.int64) * TURN_UNIT
    stride_s, turn_s = stride_s * UNIT, turn_s * TURN_UNIT
    stride_d, turn_d = 1 if DENSE else stride_d, 1 if TURN_DENSE else turn_d
    # A branch within the loop over the tiles would keep it from loading ahead.
    if (ROPE != NO_ROPE) | (HADAMARD_QK != HADAMARD_V) | (NORM != NO_NORM):
        if which == 2:
            _quantize_tiles(
                x, out, keys, key_counts, None, 0.0, buffer, lse_shift, which, index, room, parts, floor,
                batch, heads, kv_heads, in_batch, kv_len, q_parts, k_parts, v_parts, v_least,
                stride_b, stride_h, stride_s, stride_d, each, factor,
                D, LANES, NO_NORM, HADAMARD_V, TOKENS, Q_ROWS, OVERLAPS, INTERPRETED,
            )  # fmt: skip
        elif ROPE != NO_ROPE:
            _quantize_turned(
                x, out, keys, key_counts, norm_weight, eps, cos, sin, buffer, lse_shift, which, index, room, floor,
                batch, heads, kv_heads, in_batch, kv_len, q_parts, k_parts, v_parts,
                stride_b, stride_h, stride_s, stride_d, turn_b, turn_h, turn_s, turn_d, heads_each, factor,
                D, LANES, NORM, ROPE, ROTARY, HADAMARD_QK, TURNED_TOKENS, Q_ROWS, K_ROWS, OVERLAPS, INTERPRETED,
            )  # fmt: skip
        else:
            _quantize_tiles(
                x, out, keys, key_counts, norm_weight, eps, buffer, lse_shift, which, index, room, parts, floor,
                batch, heads, kv_heads, in_batch, kv_len, q_parts, k_parts, v_parts, v_least,
                stride_b, stride_h, stride_s, stride_d, each, factor,
                D, LANES, NORM, HADAMARD_QK, TOKENS, Q_ROWS, OVERLAPS, INTERPRETED,
            )  # fmt: skip
    else:
        _quantize_tiles(
            x, out, keys, key_counts, None, 0.0, buffer, lse_shift, which, index, room, parts, floor,
            batch, heads, kv_heads, in_batch, kv_len, q_parts, k_parts, v_parts, v_least,
            stride_b, stride_h, stride_s, stride_d, each, factor,
            D, LANES, NO_NORM, HADAMARD_V, TOKENS, Q_ROWS, OVERLAPS, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _quantize_tiles(
    x, out, keys, key_counts, norm_weight, eps, buffer, lse_shift, which, index, room, parts, floor,
    batch, heads, kv_heads, in_batch, kv_len, q_parts, k_parts, v_parts, v_least,
    stride_b, stride_h, stride_s, stride_d, each, factor,
    D: tl.constexpr, LANES: tl.constexpr, NORM: tl.constexpr, HADAMARD: tl.constexpr,
    TOKENS: tl.constexpr, Q_ROWS: tl.constexpr, OVERLAPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Quantize the ``index``-th chunk of tiles of a tensor, one tile of a head after the other.

    Args:
        which: q (0), k (1) or v (2).
        room: tokens, of which ``key_counts`` says how many are used.
        parts: into which the sample of a head was divided.
        in_batch: heads of this tensor per batch entry.
    """
    HALF: tl.constexpr = LANES // 2
    groups = batch * kv_heads
    tiles = tl.cdiv(room, TOKENS)
    programs = tl.cdiv(tiles, each)
    chunk, h = index % programs, index // programs % in_batch
    b = (index // (programs * in_batch)).to(tl.int64)
    length = _length(key_counts, b, room, which)
    x += b * stride_b
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
    q_part_rows, k_part_rows = batch * heads * q_parts, groups * k_parts
    maxima = layout.maxima(buffer, groups, LANES)
    sums = layout.sums(buffer, groups, q_part_rows + k_part_rows + groups * v_parts, LANES)
    low_c = tl.zeros((HALF,), tl.float32)
    high_c = tl.zeros((HALF,), tl.float32)
    least = tl.where(which == 2, v_least, FEW)
    if which == 0:
        at = tl.arange(0, Q_ROWS)
        q_rows = group_heads * q_parts
        largest = tl.max(tl.load(maxima + 2 * (group * q_rows + at), mask=at < q_rows, other=0.0)) * tl.abs(factor)
    else:
        first = tl.where(which == 1, q_part_rows + group * k_parts, q_part_rows + k_part_rows + group * v_parts)
        low_c, high_c, largest = smoothing_constant(
            maxima + 2 * first, sums + first.to(tl.int64) * LANES, length, room, least, parts, which == 1, D, HALF
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
            low_k, high_k, _ = smoothing_constant(
                maxima + 2 * first, sums + first.to(tl.int64) * LANES,
                _length(key_counts, b, kv_len, 1), kv_len, FEW, k_parts, True, D, HALF,
            )  # fmt: skip
        low_k, high_k = low_k[None, :], high_k[None, :]
    else:
        low_k, high_k = None, None

    done = layout.counters(buffer, groups, which, LANES) + group
    weight_low, weight_high = load_weights(norm_weight, D, HALF, NORM)
    # These tiles; then, where they were the group's last ones and its scale does not fit, all of the group's once more.
    again = False
    while start < end:
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
            low, high, of_rows = transform_tile(
                low, high, x + head * stride_h, tokens, used, stride_s, stride_d,
                norm_weight, weight_low, weight_high, eps, None, None, True, D, HALF, NORM, NO_ROPE, 0, HADAMARD,
            )  # fmt: skip
            found, _ = _store_scaled(
                low, high, of_rows * factor, low_c[None, :], high_c[None, :], scale, low_k, high_k,
                out, lse_shift, which, b * in_batch + head, rows, used, rows < room, room, key_counts,
                D, HALF, NO_ROPE, INTERPRETED,
            )  # fmt: skip
            magnitudes = tl.maximum(magnitudes, found)
        start = end
        if not again:
            _exceeds(done + groups, tl.max(magnitudes), scale)
            if _all_done(done, programs * group_heads):
                wanted = _wanted_scale(done + groups, scale, floor)
                if wanted > scale:
                    scale = wanted
                    start, end, again = tl.zeros_like(start), tiles * group_heads, True
                    low_next, high_next = _load(
                        x, keys, which, b, kv_len, first_head, start, end, tiles, length,
                        stride_h, stride_s, stride_d, TOKENS, D, HALF,
                    )  # fmt: skip
                tl.store(layout.descales(buffer, groups, which) + group, scale)


@triton.jit
def _quantize_turned(
    x, out, keys, key_counts, norm_weight, eps, cos, sin, buffer, lse_shift, which, index, room, floor,
    batch, heads, kv_heads, in_batch, kv_len, q_parts, k_parts, v_parts,
    stride_b, stride_h, stride_s, stride_d, turn_b, turn_h, turn_s, turn_d, each, factor,
    D: tl.constexpr, LANES: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr,
    HADAMARD: tl.constexpr, TOKENS: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Quantize the ``index``-th tile of q or k, one head after the other: ``each`` of them, which share their angles.

    These are whole groups, or an equal part of one. The sample of a head has few parts, K_ROWS at most: to add up many
    for every head of every tile would take as long as to load the tile.

    Args:
        which, room, in_batch: of :func:`_quantize_tiles`.
    """
    HALF: tl.constexpr = LANES // 2
    LINES: tl.constexpr = PASSING if turns_whole(ROPE) else KEPT
    groups = batch * kv_heads
    tiles, shares = tl.cdiv(room, TOKENS), tl.cdiv(in_batch, each)
    tile, share = index % tiles, index // tiles % shares
    b = (index // (tiles * shares)).to(tl.int64)
    length = _length(key_counts, b, room, which)
    x += b * stride_b
    first_head = share * each
    rows = tile * TOKENS + tl.arange(0, TOKENS)
    used = rows < length
    tokens = _tokens(keys, which, b, kv_len, rows, used)
    start = x + first_head.to(tl.int64) * stride_h
    low_next, high_next = load_tile(start, tokens, used, stride_s, stride_d, D, HALF, LINES)
    at = b * turn_b + first_head.to(tl.int64) * turn_h
    angles = load_angles(cos + at, sin + at, tokens, used, turn_s, turn_d, HALF, ROPE, ROTARY)
    weight_low, weight_high = load_weights(norm_weight, D, HALF, NORM)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    q_rows = batch * heads * q_parts
    maxima = layout.maxima(buffer, groups, LANES)
    sums = layout.sums(buffer, groups, q_rows + groups * (k_parts + v_parts), LANES)
    group_heads = in_batch // kv_heads
    with_k = (which == 1) | (lse_shift is not None)
    magnitudes = tl.zeros((TOKENS, HALF), tl.float32)
    for i in tl.range(0, each, num_stages=1):
        # Where the last program has fewer heads, it takes its last one again, and writes the same.
        h = tl.minimum(first_head + i, in_batch - 1)
        low, high = low_next, high_next
        # The next head is on its way while this one is turned.
        following = tl.minimum(h + 1, in_batch - 1)
        wanted = rows < length * tl.minimum(each - 1 - i, 1)
        low_next, high_next = load_tile(
            x + following.to(tl.int64) * stride_h, tokens, wanted, stride_s, stride_d, D, HALF, LINES
        )
        group = (b * kv_heads + h // group_heads).to(tl.int32)
        low_k, high_k, low_c, high_c, scale = _turned_scale(
            maxima, sums, which, with_k, group, group_heads * q_parts, q_rows, k_parts, length, factor, floor,
            TOKENS, HALF, Q_ROWS, K_ROWS,
        )  # fmt: skip
        if tile == 0:
            # One of the rows, which are all alike.
            lanes = tl.arange(0, HALF)[None, :] + rows[:, None]
            kept = (lanes < HALF) & (rows == tl.where(which == 1, 0, -1))[:, None]
            constant = layout.constants(buffer, groups, which, LANES) + group * LANES + lanes
            tl.store(constant, low_c, mask=kept)
            tl.store(constant + HALF, high_c, mask=kept)
        _, scaled = _turn(
            low, high, x, h, b * in_batch + h, rows, tokens, used, rows < room, stride_h, stride_s, stride_d,
            norm_weight, weight_low, weight_high, eps, angles, low_k, high_k, low_c, high_c, scale, factor,
            out, lse_shift, which, room, key_counts, D, HALF, NORM, ROPE, ROTARY, HADAMARD, INTERPRETED,
        )  # fmt: skip
        magnitudes = tl.maximum(magnitudes, scaled)
    done = layout.counters(buffer, groups, which, LANES)
    if tl.max(magnitudes) > E4M3_MAX:
        # Of which heads, is looked for here: to reduce the magnitudes of each at once would take longer.
        for i in tl.range(0, each, num_stages=1):
            h = tl.minimum(first_head + i, in_batch - 1)
            group = (b * kv_heads + h // group_heads).to(tl.int32)
            low_k, high_k, low_c, high_c, scale = _turned_scale(
                maxima, sums, which, with_k, group, group_heads * q_parts, q_rows, k_parts, length, factor, floor,
                TOKENS, HALF, Q_ROWS, K_ROWS,
            )  # fmt: skip
            low, high = load_tile(x + h.to(tl.int64) * stride_h, tokens, used, stride_s, stride_d, D, HALF, KEPT)
            found, _ = _turn(
                low, high, x, h, b * in_batch + h, rows, tokens, used, rows < 0, stride_h, stride_s, stride_d,
                norm_weight, weight_low, weight_high, eps, angles, low_k, high_k, low_c, high_c, scale, factor,
                out, lse_shift, which, room, key_counts, D, HALF, NORM, ROPE, ROTARY, HADAMARD, INTERPRETED,
            )  # fmt: skip
            _exceeds(done + groups + group, tl.max(tl.maximum(found, 0.0)), tl.max(scale))
    first = (b * kv_heads + first_head // group_heads).to(tl.int32)
    # Programs of several groups signal to the first of them.
    if _all_done(done + first, tiles * tl.cdiv(group_heads, each)):
        end = (b * kv_heads + tl.cdiv(tl.minimum(first_head + each, in_batch), group_heads)).to(tl.int32)
        for group in range(first, end):
            low_k, high_k, low_c, high_c, scale = _turned_scale(
                maxima, sums, which, with_k, group, group_heads * q_parts, q_rows, k_parts, length, factor, floor,
                TOKENS, HALF, Q_ROWS, K_ROWS,
            )  # fmt: skip
            estimated = tl.max(scale)
            wanted_scale = _wanted_scale(done + groups + group, estimated, floor)
            tl.store(layout.descales(buffer, groups, which) + group, wanted_scale)
            # Where it does not fit, all tiles of the group once more.
            for i in range(0, tl.where(wanted_scale > estimated, tiles * group_heads, 0)):
                h = (group - b * kv_heads) * group_heads + i // tiles
                rows = i % tiles * TOKENS + tl.arange(0, TOKENS)
                used = rows < length
                tokens = _tokens(keys, which, b, kv_len, rows, used)
                low, high = load_tile(x + h * stride_h, tokens, used, stride_s, stride_d, D, HALF, KEPT)
                at = b * turn_b + h * turn_h
                _turn(
                    low, high, x, h, b * in_batch + h, rows, tokens, used, rows < room, stride_h, stride_s, stride_d,
                    norm_weight, weight_low, weight_high, eps,
                    load_angles(cos + at, sin + at, tokens, used, turn_s, turn_d, HALF, ROPE, ROTARY),
                    low_k, high_k, low_c, high_c, wanted_scale, factor,
                    out, lse_shift, which, room, key_counts, D, HALF, NORM, ROPE, ROTARY, HADAMARD, INTERPRETED,
                )  # fmt: skip


@triton.jit
def _turn(
    low, high, x, h, row, rows, tokens, used, written, stride_h, stride_s, stride_d,
    norm_weight, weight_low, weight_high, eps, angles, low_k, high_k, low_c, high_c, scale, factor,
    out, lse_shift, which, room, key_counts,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr,
    HADAMARD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Transform a loaded tile of head ``h``, the ``row``-th of all, and store it where ``written``.

    Returns:
        As :func:`_store_scaled`.
    """
    low, high, of_rows = transform_tile(
        low, high, x + h.to(tl.int64) * stride_h, tokens, used, stride_s, stride_d,
        norm_weight, weight_low, weight_high, eps, None, angles, True, D, HALF, NORM, ROPE, ROTARY, HADAMARD,
    )  # fmt: skip
    return _store_scaled(
        low, high, of_rows * factor, low_c, high_c, scale, low_k, high_k,
        out, lse_shift, which, row, rows, used, written, room, key_counts, D, HALF, ROPE, INTERPRETED,
    )  # fmt: skip


@triton.jit
def _turned_scale(
    maxima, sums, which, with_k, group, group_rows, q_rows, k_parts, length, factor, floor,
    TOKENS: tl.constexpr, HALF: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr,
):  # fmt: skip
    """Constants and scale of a group of q or k; the sample of k has ``k_parts`` of each head, and q's comes first.

    Every row of a tile gets its own, all alike: in a program of several warps, that is faster than to share them.

    Returns:
        (lower half, upper half [TOKENS, HALF] of k's constant, where ``with_k`` wants it, otherwise zeros; the same of
        what is subtracted, which is nothing from q; the scale [TOKENS, 1])
    """
    at = tl.arange(0, Q_ROWS)
    first = tl.where(which == 1, q_rows + group * k_parts, group * group_rows)
    found = tl.load(maxima + 2 * (first + at), mask=at < tl.where(which == 1, k_parts, group_rows), other=0.0)
    rows, lanes = tl.zeros((TOKENS,), tl.int32)[:, None], tl.arange(0, HALF)[None, :]
    part = sums + (q_rows + group * k_parts).to(tl.int64) * (2 * HALF) + (rows + lanes)
    low_k, high_k = tl.zeros((TOKENS, HALF), tl.float32), tl.zeros((TOKENS, HALF), tl.float32)
    for row in tl.static_range(K_ROWS):
        wanted = with_k & (row < k_parts) & (rows + lanes >= 0)
        low_k += tl.load(part + row * (2 * HALF), mask=wanted, other=0.0)
        high_k += tl.load(part + (row * 2 + 1) * HALF, mask=wanted, other=0.0)
    low_c, high_c = tl.where(which == 1, low_k, 0.0), tl.where(which == 1, high_k, 0.0)
    largest = tl.max(tl.maximum(tl.abs(low_c), tl.abs(high_c)), 1)[:, None] + tl.max(found) * tl.abs(factor)
    return low_k, high_k, low_c, high_c, estimated_scale(largest, length, FEW, floor)


@triton.jit
def _store_scaled(
    low, high, of_rows, low_c, high_c, scale, low_k, high_k, out, lse_shift, which, row, rows, used, written,
    room, key_counts, D: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Smooth, scale and round tokens ``rows`` of the ``row``-th head, of ``room`` tokens; store them where ``written``.

    What they add to the LSE is stored, too.

    Returns:
        (in front of scaling, behind it): two [TOKENS, HALF], the magnitudes, the larger of both halves; NaN for what is
        not finite in the input. Behind it, what does not fit into float32 is inf.
    """
    if lse_shift is not None:
        products = tl.sum((low * low_k + high * high_k) * of_rows, 1)
        tl.store(lse_shift + row * room + rows, products, mask=used & (which == 0))
    low, high = nan_for_inf(low * of_rows - low_c), nan_for_inf(high * of_rows - high_c)
    if key_counts is not None:
        # Tokens past the used ones are written too: zeros, since 0 * NaN would reach the output.
        low, high = tl.where(used[:, None], low, 0.0), tl.where(used[:, None], high, 0.0)
    inverse = inverse_power_of_two(scale)
    store_tile(
        out + row * room * D, rows, written, D,
        round_e4m3(low * inverse, INTERPRETED), round_e4m3(high * inverse, INTERPRETED), D, HALF, ROPE,
    )  # fmt: skip
    return tl.maximum(tl.abs(low), tl.abs(high)), tl.maximum(tl.abs(low * inverse), tl.abs(high * inverse))


@triton.jit
def _exceeds(exceeding, most, scale):
    """Tell the group of a magnitude beyond its scale."""
    if most > E4M3_MAX * scale:
        # The order of positive floats is that of their bits.
        tl.atomic_max(exceeding, most.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _all_done(done, programs):
    """Signal that this program has stored its tiles; whether all of the ``programs`` have."""
    # All of the program's stores come before its signal.
    tl.debug_barrier()
    return tl.atomic_add(done, 1, sem="acq_rel") == programs - 1


@triton.jit
def _wanted_scale(exceeding, scale, floor):
    """The scale that fits all of a group, which is the one at hand where no magnitude exceeds it."""
    most = tl.atomic_max(exceeding, 0, sem="relaxed").to(tl.float32, bitcast=True)
    return tl.where(most > 0.0, scale_for(most / E4M3_MAX, floor), scale)


@triton.jit
def _length(key_counts, b, room, which):
    """Tokens of a tensor that are used."""
    length = room
    if key_counts is not None:
        if which > 0:
            length = tl.load(key_counts + b)
    return length


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
