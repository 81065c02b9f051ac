"""The second pass for scales per (batch, KV head), as FlashAttention-3 takes them.

A scale for all tokens of a head depends on all of them, and reading them twice would cost as much again. So the first
pass looks at a sample, and this one quantizes with the scale that follows from it, and headroom. Where a token turns
out to be larger still, the last program that is done with tokens of the group quantizes it again with the scale that
fits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lpattn.quantize.fused import layout
from lpattn.quantize.fused.estimated import all_done, exceeds, store_scaled, tokens_of, used_length, wanted_scale
from lpattn.quantize.fused.layout import FEW
from lpattn.quantize.fused.per_head_sample import VARYING
from lpattn.quantize.fused.per_head_turned import quantize_turned
from lpattn.quantize.fused.sample import estimated_scale, smoothing_constant
from lpattn.quantize.fused.tile import (
    KEPT,
    NO_NORM,
    NO_ROPE,
    QK_FLOOR,
    V_FLOOR,
    load_tile,
    load_weights,
    transform_tile,
)


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
            quantize_turned(
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
    length = used_length(key_counts, b, room, which)
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
                used_length(key_counts, b, kv_len, 1), kv_len, FEW, k_parts, True, D, HALF,
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
            tokens = tokens_of(keys, which, b, kv_len, rows, used)
            low, high, of_rows = transform_tile(
                low, high, x + head * stride_h, tokens, used, stride_s, stride_d,
                norm_weight, weight_low, weight_high, eps, None, None, True, D, HALF, NORM, NO_ROPE, 0, HADAMARD,
            )  # fmt: skip
            found, _ = store_scaled(
                low, high, of_rows * factor, low_c[None, :], high_c[None, :], scale, low_k, high_k,
                out, lse_shift, which, b * in_batch + head, rows, used, rows < room, room, key_counts,
                D, HALF, NO_ROPE, INTERPRETED,
            )  # fmt: skip
            magnitudes = tl.maximum(magnitudes, found)
        start = end
        if not again:
            exceeds(done + groups, tl.max(magnitudes), scale)
            if all_done(done, programs * group_heads):
                wanted = wanted_scale(done + groups, scale, floor)
                if wanted > scale:
                    scale = wanted
                    start, end, again = tl.zeros_like(start), tiles * group_heads, True
                    low_next, high_next = _load(
                        x, keys, which, b, kv_len, first_head, start, end, tiles, length,
                        stride_h, stride_s, stride_d, TOKENS, D, HALF,
                    )  # fmt: skip
                tl.store(layout.descales(buffer, groups, which) + group, scale)


@triton.jit
def _load(
    x, keys, which, b, kv_len, first_head, index, end, tiles, length, stride_h, stride_s, stride_d,
    TOKENS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Load the group's tile ``index``, or zeros from ``end`` on."""
    rows = index % tiles * TOKENS + tl.arange(0, TOKENS)
    used = rows < tl.where(index < end, length, 0)
    tokens = tokens_of(keys, which, b, kv_len, rows, used)
    return load_tile(
        x + (first_head + index // tiles).to(tl.int64) * stride_h, tokens, used, stride_s, stride_d, D, HALF, KEPT
    )
