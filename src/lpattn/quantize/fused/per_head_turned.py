"""Rotated q and k in the second pass for scales per (batch, KV head): one tile of tokens, one head after the other."""

from __future__ import annotations

import triton
import triton.language as tl

from lpattn.quantize.fused import layout
from lpattn.quantize.fused.estimated import all_done, exceeds, store_scaled, tokens_of, used_length, wanted_scale
from lpattn.quantize.fused.layout import FEW
from lpattn.quantize.fused.sample import estimated_scale
from lpattn.quantize.fused.tile import (
    E4M3_MAX,
    KEPT,
    PASSING,
    load_angles,
    load_tile,
    load_weights,
    transform_tile,
    turns_whole,
)


@triton.jit
def quantize_turned(
    x, out, keys, key_counts, norm_weight, eps, cos, sin, buffer, lse_shift, which, index, room, floor,
    batch, heads, kv_heads, in_batch, kv_len, q_parts, k_parts, v_parts,
    stride_b, stride_h, stride_s, stride_d, turn_b, turn_h, turn_s, turn_d, each, factor,
    D: tl.constexpr, LANES: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr,
    HADAMARD: tl.constexpr, TOKENS: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Quantize the ``index``-th tile of q or k, one head after the other: ``each`` of them, which share their angles.

    These are whole groups, or an equal part of one; of a single group, any part. The sample of a head has few parts,
    K_ROWS at most: to add up many for every head of every tile would take as long as to load the tile.

    Args:
        which: q (0) or k (1).
        room: tokens, of which ``key_counts`` says how many are used.
        in_batch: heads of this tensor per batch entry.
    """
    HALF: tl.constexpr = LANES // 2
    LINES: tl.constexpr = PASSING if turns_whole(ROPE) else KEPT
    groups = batch * kv_heads
    tiles, shares = tl.cdiv(room, TOKENS), tl.cdiv(in_batch, each)
    tile, share = index % tiles, index // tiles % shares
    b = (index // (tiles * shares)).to(tl.int64)
    length = used_length(key_counts, b, room, which)
    x += b * stride_b
    first_head = share * each
    rows = tile * TOKENS + tl.arange(0, TOKENS)
    used = rows < length
    tokens = tokens_of(keys, which, b, kv_len, rows, used)
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
            exceeds(done + groups + group, tl.max(tl.maximum(found, 0.0)), tl.max(scale))
    first = (b * kv_heads + first_head // group_heads).to(tl.int32)
    # Programs of several groups signal to the first of them.
    if all_done(done + first, tiles * tl.cdiv(group_heads, each)):
        end = (b * kv_heads + tl.cdiv(tl.minimum(first_head + each, in_batch), group_heads)).to(tl.int32)
        for group in range(first, end):
            low_k, high_k, low_c, high_c, scale = _turned_scale(
                maxima, sums, which, with_k, group, group_heads * q_parts, q_rows, k_parts, length, factor, floor,
                TOKENS, HALF, Q_ROWS, K_ROWS,
            )  # fmt: skip
            estimated = tl.max(scale)
            fitting = wanted_scale(done + groups + group, estimated, floor)
            tl.store(layout.descales(buffer, groups, which) + group, fitting)
            # Where it does not fit, all tiles of the group once more.
            for i in range(0, tl.where(fitting > estimated, tiles * group_heads, 0)):
                h = (group - b * kv_heads) * group_heads + i // tiles
                rows = i % tiles * TOKENS + tl.arange(0, TOKENS)
                used = rows < length
                tokens = tokens_of(keys, which, b, kv_len, rows, used)
                low, high = load_tile(x + h * stride_h, tokens, used, stride_s, stride_d, D, HALF, KEPT)
                at = b * turn_b + h * turn_h
                _turn(
                    low, high, x, h, b * in_batch + h, rows, tokens, used, rows < room, stride_h, stride_s, stride_d,
                    norm_weight, weight_low, weight_high, eps,
                    load_angles(cos + at, sin + at, tokens, used, turn_s, turn_d, HALF, ROPE, ROTARY),
                    low_k, high_k, low_c, high_c, fitting, factor,
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
        As :func:`store_scaled`.
    """
    low, high, of_rows = transform_tile(
        low, high, x + h.to(tl.int64) * stride_h, tokens, used, stride_s, stride_d,
        norm_weight, weight_low, weight_high, eps, None, angles, True, D, HALF, NORM, ROPE, ROTARY, HADAMARD,
    )  # fmt: skip
    return store_scaled(
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
