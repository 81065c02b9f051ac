"""The attention kernel in plain Triton, for every GPU from sm_80 on: one program per tile of queries of a head.

Owns the loop over key tiles and the epilogue. What q, k and v are quantized to is :mod:`lpattn.quantize.fused`'s, which
tiles need no look at the mask :mod:`.mask_tiles`', and everything about launching :mod:`.attention`'s.

A tile of keys is skipped, seen in full, or masked. Tiles seen in full come first, in a loop without any masking.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lpattn.quantize.fused.tile import round_e4m3

NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
ADDITIVE_MASK = tl.constexpr(2)

NO_BAND = tl.constexpr(0)
"""A query sees all keys."""
UPPER = tl.constexpr(1)
"""A query sees no key past its own position: causal."""
BOTH = tl.constexpr(2)
"""A query sees no key far in front of its own position either: a sliding window."""

_P_BITS = tl.constexpr(8.0)
"""P, at most 1, is multiplied by 2^8: weights down to 2^-17 of the largest one survive the cast to e4m3."""

_ONES = tl.constexpr(8)
"""Columns of ones that P is multiplied by: where that takes P from registers, it is cheaper than additions. Hopper's
instructions would have the compiler store the ones, and wait, in every tile."""

_SUMMED = tl.constexpr(4)
"""Weights of e4m3 whose sum is rounded to float16: by 2^-11 of it, where each of them was rounded by up to 2^-4."""

_UNITS_APART = tl.constexpr(2.0**-60)
"""How much smaller the scale of a block of V may be than the largest one in front of it: what acc is multiplied by from
block to block, and acc itself, stay finite. Blocks of still smaller values count for no more than 2^-50 of the largest.
"""

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)

# Numbers of which every call has others: to compile anew for a length would stall it.
_VARYING = [
    "heads", "kv_heads", "q_len", "kv_len", "q_tiles", "before", "after",
    "mask_b", "mask_h", "mask_q", "mask_k", "list_b", "list_h", "list_q", "list_room",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def attend_tiles(
    q, k, v, q_scale, k_scale, v_scale, v_constant, lse_shift, q_counts, key_counts, mask, tile_lists, tile_counts,
    out, lse,
    heads, kv_heads, q_len, kv_len, q_tiles, before, after, mask_b, mask_h, mask_q, mask_k,
    list_b, list_h, list_q, list_room,
    D: tl.constexpr, D_V: tl.constexpr, D_V_OUT: tl.constexpr, LANES: tl.constexpr, LANES_V: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, BAND: tl.constexpr,
    FROM_END: tl.constexpr, MASK: tl.constexpr, MASK_UNIT: tl.constexpr, MASK_DENSE: tl.constexpr,
    HADAMARD: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr, K_REORDERED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attention of BM queries of a head.

    Args:
        q, k, v, q_scale, k_scale, v_scale, v_constant, lse_shift, key_counts: as ``PerBlock`` says; q times
            softmax_scale * log2(e). D and D_V are the lanes of q and k and of v as they are stored, in blocks of BLOCK
            keys. LANES and LANES_V are these padded to powers of two.
        q_counts: int32 [B], queries of each batch entry that are there; None: q_len.
        mask: bool or float, strides mask_b to mask_k (all but the last in units of MASK_UNIT), for MASK other than
            NO_MASK; tile_lists and tile_counts are then what ``list_tiles`` made of it, with strides list_b to list_q
            in pairs of lists; a list has room for list_room tiles.
        out: [B, q_len, heads, D_V_OUT], contiguous.
        lse: float32 [B, heads, q_len], or None.
        before, after: for a BAND, query i sees keys i - before to i + after; with FROM_END, both positions are counted
            from the last query and key.
    """
    program = tl.program_id(0)
    rows_of_programs = tl.num_programs(0) // q_tiles
    if BAND == NO_BAND:
        tile, head = program % q_tiles, program // q_tiles
    else:
        # The last queries see the most keys, so they start first.
        tile, head = q_tiles - 1 - program // rows_of_programs, program % rows_of_programs
    b, h = head // heads, head % heads
    group = b * kv_heads + h // (heads // kv_heads)
    kv_blocks = tl.cdiv(kv_len, BLOCK)
    keys = kv_len
    if key_counts is not None:
        keys = tl.load(key_counts + b)
    queries = q_len
    if q_counts is not None:
        queries = tl.load(q_counts + b)
    if FROM_END:
        before, after = before - (keys - queries), after + (keys - queries)
    if q_counts is not None:
        # Nobody reads what a tile without queries would find out.
        keys = tl.where(tile * BM < queries, keys, 0)

    rows = tile * BM + tl.arange(0, BM)
    there = rows < queries
    lanes = tl.arange(0, LANES)
    at = q + (head.to(tl.int64) * q_len + rows[:, None]) * D + lanes[None, :]
    q_tile = tl.load(at, mask=there[:, None] & (lanes < D)[None, :], other=0.0)
    of_row = tl.load(q_scale + head.to(tl.int64) * q_len + rows, mask=there, other=1.0)
    k += group.to(tl.int64) * kv_blocks * BLOCK * D
    v += group.to(tl.int64) * kv_blocks * BLOCK * D_V
    k_scale += group * kv_blocks
    v_scale += group * kv_blocks

    maximum = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM, _ONES) if SUM_BY_PRODUCT else (BM,), tl.float32)
    acc = tl.zeros((BM, LANES_V), tl.float32)
    unit, largest_unit = 1.0, 0.0
    # Key tiles: seen in full from whole_first to whole_end, the others of first to end with a look at each key.
    first, whole_first, end = 0, 0, tl.cdiv(keys, BN)
    whole_end = keys // BN
    if BAND != NO_BAND:
        last = tile * BM + BM - 1
        end = tl.minimum(end, tl.cdiv(tl.maximum(last + after + 1, 0), BN))
        whole_end = tl.minimum(whole_end, tl.maximum(tile * BM + after + 1, 0) // BN)
        if BAND == BOTH:
            first = tl.minimum(tl.maximum(tile * BM - before, 0) // BN, end)
            whole_first = tl.minimum(tl.cdiv(tl.maximum(last - before, 0), BN), end)
            whole_end = tl.maximum(whole_end, whole_first)
    whole_list, part_list = tile_lists, tile_lists
    whole_tiles, left_tiles, part_tiles = whole_end - whole_first, whole_first - first, end - whole_end
    part_tiles += left_tiles
    if MASK != NO_MASK:
        mask += (b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h) * MASK_UNIT
        of_tile = b.to(tl.int64) * list_b + h * list_h + tile * list_q
        whole_list = tile_lists + of_tile * 2 * list_room
        part_list = whole_list + list_room
        whole_tiles, part_tiles = tl.load(tile_counts + of_tile * 2), tl.load(tile_counts + of_tile * 2 + 1)
    acc, row_sum, maximum, unit, largest_unit = _sweep(
        acc, row_sum, maximum, unit, largest_unit, q_tile, of_row, k, v, k_scale, v_scale, whole_list, mask,
        mask_q, mask_k, rows, queries, keys, whole_tiles, whole_tiles, whole_first, whole_first, before, after,
        D, D_V, LANES, LANES_V, BLOCK, BM, BN, STAGES, NO_BAND, MASK != NO_MASK, NO_MASK, 1, True, False,
        MASK == ADDITIVE_MASK, SUM_BY_PRODUCT, K_REORDERED, INTERPRETED,
    )  # fmt: skip
    acc, row_sum, maximum, unit, largest_unit = _sweep(
        acc, row_sum, maximum, unit, largest_unit, q_tile, of_row, k, v, k_scale, v_scale, part_list, mask,
        mask_q, mask_k, rows, queries, keys, part_tiles, left_tiles, first, whole_end, before, after,
        D, D_V, LANES, LANES_V, BLOCK, BM, BN, STAGES, BAND, MASK != NO_MASK, MASK, MASK_UNIT, MASK_DENSE, True,
        MASK == ADDITIVE_MASK, SUM_BY_PRODUCT, K_REORDERED, INTERPRETED,
    )  # fmt: skip

    if SUM_BY_PRODUCT:
        row_sum = tl.max(row_sum, 1)  # all columns are equal
    # The row's largest weight alone adds 2^8, so only rows that see no key sum to 0.
    nothing = row_sum == 0.0
    if lse is not None:
        found = tl.log2(tl.where(nothing, 1.0, row_sum)) - _P_BITS
        if lse_shift is not None:
            found += tl.load(lse_shift + head.to(tl.int64) * q_len + rows, mask=there, other=0.0)
        found = maximum + found * _LN2 if MASK == ADDITIVE_MASK else (maximum + found) * _LN2
        found = tl.where(nothing, float("-inf"), found)
        tl.store(lse + head.to(tl.int64) * q_len + rows, found, mask=there)
    lanes_v = tl.arange(0, LANES_V)
    constant = tl.load(v_constant + group.to(tl.int64) * LANES_V + lanes_v)
    acc = acc * (unit / tl.where(nothing, 1.0, row_sum))[:, None] + constant[None, :]
    acc = tl.where(nothing[:, None], 0.0, acc)
    to = out + ((b.to(tl.int64) * q_len + rows[:, None]) * heads + h) * D_V_OUT
    if HADAMARD:
        _store_transformed(acc, to, there, D_V_OUT, LANES_V)
    else:
        written = there[:, None] & (lanes_v < D_V_OUT)[None, :]
        tl.store(to + lanes_v[None, :], _cast(acc, out.dtype.element_ty), mask=written)


@triton.jit
def _sweep(
    acc, row_sum, maximum, unit, largest_unit, q, of_row, k, v, k_scale, v_scale, tile_list, mask, mask_q, mask_k,
    rows, queries, keys, tiles, left_tiles, first, second, before, after,
    D: tl.constexpr, D_V: tl.constexpr, LANES: tl.constexpr, LANES_V: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, BAND: tl.constexpr, LISTED: tl.constexpr,
    MASK: tl.constexpr, MASK_UNIT: tl.constexpr, MASK_DENSE: tl.constexpr, LOOKS: tl.constexpr,
    NATURAL: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr, K_REORDERED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Online softmax over ``tiles`` key tiles: of a list, or ``left_tiles`` from ``first`` on, then from ``second`` on.

    Args:
        acc, row_sum, maximum: output and sum of exp2(logit - maximum) * 2^8, maximum of the logits.
        unit, largest_unit: scale of v that acc is in, and the largest one so far.
        LOOKS: the tiles' keys may be masked by BAND, MASK or their number.
        NATURAL: maximum is in natural units, not in those of exp2.
        SUM_BY_PRODUCT: row_sum is [BM, _ONES], equal columns; else [BM].
        K_REORDERED: K is loaded in the order in which V of e4m3 is stored, so that P has it too; else P is reordered.

    Returns:
        (acc, row_sum, maximum, unit, largest_unit)
    """
    lanes, lanes_v, slots = tl.arange(0, LANES), tl.arange(0, LANES_V), tl.arange(0, BN)
    columns = slots
    if K_REORDERED and v.dtype.element_ty == tl.float8e4nv:
        columns = slots // 16 * 16 + slots // 2 % 2 * 8 + slots // 4 % 4 * 2 + slots % 2
    for i in tl.range(0, tiles, num_stages=STAGES):
        if LISTED:
            start = tl.load(tile_list + i) * BN
        else:
            start = tl.where(i < left_tiles, first + i, second + i - left_tiles) * BN
        block = start // BLOCK
        # [LANES, BN]
        at = k + (start + columns).to(tl.int64)[None, :] * D + lanes[:, None]
        k_tile = tl.load(at) if D == LANES else tl.load(at, mask=(lanes < D)[:, None], other=0.0)
        # Logits are in the units of exp2, or natural where there is a bias: the lowest one of a dtype has no multiple.
        factor = of_row * tl.load(k_scale + block)
        if NATURAL:
            factor *= _LN2
        column = start + columns
        if MASK != NO_MASK:
            # In front of the product: behind it, the compiler gives the scores and P the layout of this load, so that
            # they travel through shared memory, where Triton 3.6 gets e4m3 wrong.
            mask_at = mask + rows[:, None].to(tl.int64) * (mask_q.to(tl.int64) * MASK_UNIT)
            mask_at += column[None, :].to(tl.int64) * (1 if MASK_DENSE else mask_k)
            exists = (column < keys)[None, :] & (rows < queries)[:, None]
            of_mask = tl.load(mask_at, mask=exists, other=0 if MASK == BOOL_MASK else float("-inf"))
        s = tl.dot(q, k_tile).to(tl.float32)
        if LOOKS:
            s = s * factor[:, None]
            seen = (column < keys)[None, :]
            if BAND != NO_BAND:
                seen = seen & (column[None, :] <= rows[:, None] + after)
                if BAND == BOTH:
                    seen = seen & (column[None, :] >= rows[:, None] - before)
            if MASK != NO_MASK:
                if MASK == BOOL_MASK:
                    seen = of_mask != 0
                else:
                    bias = of_mask.to(tl.float32)
                    seen = bias != float("-inf")
                    s += bias
            s = tl.where(seen, s, float("-inf"))
            highest = tl.maximum(maximum, tl.max(s, 1))
            # Where no key was seen yet, exp2(-inf - 0) is 0; exp2(-inf + inf) would be NaN.
            shift = tl.where(highest == float("-inf"), 0.0, highest)
        else:
            highest = tl.maximum(maximum, tl.max(s, 1) * factor)
            shift = highest
            s = s * factor[:, None]
        if NATURAL:
            p = tl.exp2((s - shift[:, None]) * _LOG2E + _P_BITS)
            alpha = tl.exp2((maximum - shift) * _LOG2E)
        else:
            p = tl.exp2(s - (shift - _P_BITS)[:, None])
            alpha = tl.exp2(maximum - shift)
        maximum = highest
        of_v = tl.load(v_scale + block)
        if v.dtype.element_ty == tl.float8e4nv:
            weights = round_e4m3(p, True) if INTERPRETED else p.to(tl.float8e4nv)
            rounded = weights.to(tl.float16)
            if not K_REORDERED:
                weights = _in_order_of_v(rounded, BM, BN)
            # [BN, LANES_V], stored as [D_V, BLOCK] per block
            # Triton 3.6 does not see by itself that this is a multiple, and would load byte by byte.
            within = tl.multiple_of(start % BLOCK, BN)
            at = v + block.to(tl.int64) * (D_V * BLOCK) + lanes_v[None, :] * BLOCK + (within + slots)[:, None]
        else:
            rounded = p.to(tl.float16)
            weights = rounded
            at = v + (start + slots).to(tl.int64)[:, None] * D_V + lanes_v[None, :]
        v_tile = tl.load(at) if D_V == LANES_V else tl.load(at, mask=(lanes_v < D_V)[None, :], other=0.0)
        # A fresh accumulator for every tile: that of the tensor cores is narrower than float32.
        largest_unit = tl.maximum(largest_unit, of_v)
        next_unit = tl.maximum(of_v, largest_unit * _UNITS_APART)
        acc = acc * (alpha * (unit / next_unit))[:, None] + tl.dot(weights, v_tile)
        if SUM_BY_PRODUCT:
            if v.dtype.element_ty == tl.float8e4nv:
                # The bits of 1.0, since ptxas 12.8 gets a cast of a constant to e4m3 wrong.
                ones = tl.full((BN, _ONES), 0x38, tl.int8).to(tl.float8e4nv, bitcast=True)
            else:
                ones = tl.full((BN, _ONES), 1.0, tl.float16)
            row_sum = row_sum * alpha[:, None] + tl.dot(weights, ones)
        else:
            row_sum = row_sum * alpha + _sum_of_rows(rounded, v.dtype.element_ty == tl.float8e4nv, BM, BN)
        unit = next_unit
    return acc, row_sum, maximum, unit, largest_unit


@triton.jit
def _in_order_of_v(p, BM: tl.constexpr, BN: tl.constexpr):
    """P of e4m3's values, keys in order, as e4m3 with the keys of each 16 in the order in which V is stored.

    Where products take P from registers, what a thread holds of S it needs of P in this order, and nothing moves. It
    takes P in float16, since Triton 3.6 gets a reshape of e4m3 wrong.
    """
    sixteens = tl.permute(tl.reshape(p, (BM, BN // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(sixteens, (BM, BN)).to(tl.float8e4nv)


@triton.jit
def _sum_of_rows(p, E4M3: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Sums of the rows of P in float16, as float32. Some of e4m3's values are added before: two per instruction."""
    if E4M3:
        p = tl.sum(tl.reshape(p, (BM, _SUMMED, BN // _SUMMED)), 1)
    return tl.sum(p.to(tl.float32), 1)


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """X in ``dtype``. What float16 cannot hold becomes its largest number; a clamp would make that of a NaN too."""
    if dtype == tl.float16:
        x = tl.where(x == x, tl.clamp(x, -65504.0, 65504.0), x)
    return x.to(dtype)


@triton.jit
def _store_transformed(x, to, there, D_V_OUT: tl.constexpr, LANES_V: tl.constexpr):
    """Store the orthonormal Hadamard transform of the rows of x, which undoes that of V, some lanes at a time."""
    WIDTH: tl.constexpr = 32
    i = tl.arange(0, LANES_V)
    # Rows with a largest value of 1 lose nothing but 2^-12 of that in float16, whatever their range.
    largest = tl.max(tl.abs(x), 1)
    largest = tl.where(largest > 0.0, largest, 1.0)
    x = (x / largest[:, None]).to(tl.float16)
    norm = largest * LANES_V**-0.5
    for first in range(0, D_V_OUT, WIDTH):
        lanes = first + tl.arange(0, WIDTH)
        parity = i[:, None] & lanes[None, :]
        parity ^= parity >> 4
        parity ^= parity >> 2
        parity ^= parity >> 1
        signs = (1 - 2 * (parity & 1)).to(tl.float16)
        part = tl.dot(x, signs) * norm[:, None]
        written = there[:, None] & (lanes < D_V_OUT)[None, :]
        tl.store(to + lanes[None, :], _cast(part, to.dtype.element_ty), mask=written)
