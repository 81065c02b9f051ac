"""The passes for scales per query token and per block of keys, in the layout that lpattn's own kernels read.

Nothing about a scale lies outside of its tile, so that one pass over the tokens is enough; only the constants that are
subtracted from k and v come from a sample of their tokens, in a launch of their own. Any constant would do: it is added
back exactly.

V in e4m3 is stored transposed, [D, BLOCK] per block, and the keys of each group of 16 are permuted: slot 4c + 2b + e
holds key 8b + 2c + e. That is the order in which the accumulator of a product of q and k holds its columns, so that P
becomes an operand of the next product without leaving its registers. V in float16 is stored as it comes: a product of
16-bit operands reads either order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lpattn.quantize.fused.layout import FEW, PART, sample_size
from lpattn.quantize.fused.sample import sampled_tokens
from lpattn.quantize.fused.tile import (
    E4M3_MAX,
    KEPT,
    NO_NORM,
    NO_ROPE,
    OF_TOKEN,
    PASSING,
    QK_FLOOR,
    V_FLOOR,
    V_UNIT,
    inverse_power_of_two,
    load_angles,
    load_tile,
    load_weights,
    nan_for_inf,
    round_e4m3,
    scale_for,
    store_tile,
    to_int8,
    transform_tile,
    turns_whole,
    zero_bits_from,
)

_V_SPREAD = tl.constexpr(2.0**-60)
"""How far below the scale of a head's largest sampled value of v a scale may lie. A kernel may then keep its
accumulator in the units of the block at hand: the ratio of two scales overflows only where a block that was not sampled
holds values some 10^13 times as large as all that were."""

_INT8_MAX = tl.constexpr(127.0)

# Numbers of which every call has others: to compile anew for a length would stall it.
_VARYING = [
    "batch", "heads", "kv_heads", "q_len", "kv_len", "q_each", "k_each", "factor", "qk_max",
    "flag_b", "flag_h", "flag_s",
    "q_b", "q_h", "q_s", "q_d", "k_b", "k_h", "k_s", "k_d", "v_b", "v_h", "v_s", "v_d",
    "turn_q_b", "turn_q_h", "turn_q_s", "turn_q_d", "turn_k_b", "turn_k_h", "turn_k_s", "turn_k_d", "eps_q", "eps_k",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def sample_blocks(
    k, v, keys, key_counts, cos_k, sin_k, weight_k, rstd_k, k_constant, v_constant, batch, kv_heads, kv_len,
    k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, turn_k_b, turn_k_h, turn_k_s, turn_k_d, eps_k,
    UNIT: tl.constexpr, DENSE: tl.constexpr, TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, D_V: tl.constexpr, LANES_V: tl.constexpr,
    ROPE: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, HADAMARD_QK: tl.constexpr, HADAMARD_V: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Mean of a sample of the tokens of each head of k, then of v: one program each. Of v also the least scale.

    With OVERLAPS it may be launched before what is in front of it in the stream has ended.
    """
    program = tl.program_id(0)
    groups = batch * kv_heads
    row = program % groups
    b, h = (row // kv_heads).to(tl.int64), (row % kv_heads).to(tl.int64)
    if OVERLAPS:
        # In this order: the next kernel reads the inputs before it waits for this one.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    length = kv_len
    if key_counts is not None:
        length = tl.load(key_counts + b)
    size = sample_size(length, FEW)
    # Dividing first keeps the sum of large values finite.
    weight = 1.0 / tl.maximum(size, 1).to(tl.float32)
    # Tiles that are loaded ahead would not all fit into shared memory beside those of a Hadamard transform.
    if program < groups:
        HALF: tl.constexpr = LANES // 2
        x = k + (b * k_b + h * k_h) * UNIT
        low_sum, high_sum = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
        head_weight = weight_k + h * D if NORM == OF_TOKEN and weight_k is not None else weight_k
        weight_low, weight_high = load_weights(head_weight, D, HALF, NORM)
        rstd = rstd_k + b * kv_len if NORM == OF_TOKEN else None
        for first in tl.range(0, size, PART, num_stages=1):
            tokens, used = _sampled(keys, b, kv_len, first, size, length)
            low, high, of_rows = _qk_tile(
                x, tokens, used, k_s, k_d, head_weight, weight_low, weight_high, eps_k, rstd, cos_k, sin_k, b, h,
                turn_k_b, turn_k_h, turn_k_s, turn_k_d,
                UNIT, DENSE, TURN_UNIT, TURN_DENSE, D, HALF, NORM, ROPE, ROTARY, HADAMARD_QK,
            )  # fmt: skip
            low_sum += tl.sum(_finite(low * of_rows) * weight, 0)
            high_sum += tl.sum(_finite(high * of_rows) * weight, 0)
        at = k_constant + row * LANES + tl.arange(0, HALF)
        tl.store(at, low_sum)
        tl.store(at + HALF, high_sum)
    else:
        HALF_V: tl.constexpr = LANES_V // 2
        x = v + (b * v_b + h * v_h) * UNIT
        v_low_sum, v_high_sum = tl.zeros((HALF_V,), tl.float32), tl.zeros((HALF_V,), tl.float32)
        largest = 0.0
        for first in tl.range(0, size, PART, num_stages=1):
            tokens, used = _sampled(keys, b, kv_len, first, size, length)
            v_low, v_high = _v_tile(x, tokens, used, v_s, v_d, UNIT, DENSE, D_V, HALF_V, HADAMARD_V)
            v_low, v_high = _finite(v_low), _finite(v_high)
            largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(v_low), tl.abs(v_high))))
            v_low_sum += tl.sum(v_low * weight, 0)
            v_high_sum += tl.sum(v_high * weight, 0)
        v_at = v_constant + row * LANES_V + tl.arange(0, HALF_V)
        tl.store(v_at, v_low_sum)
        tl.store(v_at + HALF_V, v_high_sum)
        # Where all that was sampled is zero, nothing is known of the others but that they are not tiny.
        floor = tl.where(largest > 0.0, largest * (_V_SPREAD / E4M3_MAX), _V_SPREAD)
        tl.store(v_constant + groups * LANES_V + row, tl.maximum(floor, V_FLOOR))


@triton.jit(do_not_specialize=_VARYING)
def quantize_blocks(
    q, k, v, keys, key_counts, cos_q, sin_q, cos_k, sin_k, weight_q, weight_k, rstd_q, rstd_k,
    flags, k_constant, v_constant, q_out, k_out, v_out, q_scale, k_scale, v_scale, lse_shift,
    batch, heads, kv_heads, q_len, kv_len, q_each, k_each,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    turn_q_b, turn_q_h, turn_q_s, turn_q_d, turn_k_b, turn_k_h, turn_k_s, turn_k_d,
    eps_q, eps_k, flag_b, flag_h, flag_s, factor, qk_max,
    UNIT: tl.constexpr, DENSE: tl.constexpr, TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, D_V: tl.constexpr, LANES_V: tl.constexpr,
    ROPE: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, HADAMARD_QK: tl.constexpr, HADAMARD_V: tl.constexpr,
    D_OUT: tl.constexpr, D_V_OUT: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr, Q_TOKENS: tl.constexpr, OVERLAPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program per Q_TOKENS tokens of ``q_each`` heads of q, then per BLOCK of ``k_each`` of k, then per BLOCK of v.

    Heads that follow each other in a program turn by the same angles: q's stay in registers, k's in the cache. With
    OVERLAPS it may start while ``sample_blocks`` still runs, of which q needs nothing. ``keys`` and ``key_counts`` say
    which tokens of k and v are used; with PACKED these come first in the output, otherwise ``flags`` says so of each,
    in its place.
    """
    program = tl.program_id(0)
    groups = batch * kv_heads
    q_tiles, blocks = tl.cdiv(q_len, Q_TOKENS), tl.cdiv(kv_len, BLOCK)
    q_parts, k_parts = tl.cdiv(heads, q_each), tl.cdiv(kv_heads, k_each)
    q_all = batch * q_parts * q_tiles
    qk_all = q_all + batch * k_parts * blocks
    slots = tl.arange(0, BLOCK)
    LINES: tl.constexpr = PASSING if turns_whole(ROPE) else KEPT
    HALF: tl.constexpr = LANES // 2
    WRITTEN: tl.constexpr = LANES if HADAMARD_QK else D
    lanes = tl.arange(0, HALF)
    if program < q_all:
        tile, part = program % q_tiles, (program // q_tiles).to(tl.int64)
        b = part // q_parts
        q_rows = tile * Q_TOKENS + tl.arange(0, Q_TOKENS)
        q_used = q_rows < q_len
        weight_low, weight_high = load_weights(weight_q, D, HALF, NORM)
        rstd = rstd_q + b * q_len if NORM == OF_TOKEN else None
        stride_s, stride_d = q_s * UNIT, 1 if DENSE else q_d
        first = part % q_parts * q_each
        angles = _angles(
            cos_q, sin_q, q_rows, q_used, b, first, turn_q_b, turn_q_h, turn_q_s, turn_q_d,
            TURN_UNIT, TURN_DENSE, HALF, ROPE, ROTARY,
        )  # fmt: skip
        start = q + (b * q_b + first * q_h) * UNIT
        low_next, high_next = load_tile(start, q_rows, q_used, stride_s, stride_d, D, HALF, LINES)
        # Without angles, there is one head: this is no loop.
        for i in tl.range(0, 1 if ROPE == NO_ROPE else q_each, num_stages=1):
            # Where the last program has fewer heads, it takes its last one again, and writes the same.
            h = tl.minimum(first + i, heads - 1)
            row = b * heads + h
            q_low, q_high = low_next, high_next
            head_weight = weight_q + h * D if NORM == OF_TOKEN and weight_q is not None else weight_q
            if NORM == OF_TOKEN:
                weight_low, weight_high = load_weights(head_weight, D, HALF, NORM)
            if ROPE != NO_ROPE:
                # The next head is on its way while this one is turned.
                follows = q + (b * q_b + tl.minimum(h + 1, heads - 1) * q_h) * UNIT
                wanted = q_rows < q_len * tl.minimum(q_each - 1 - i, 1)
                low_next, high_next = load_tile(follows, q_rows, wanted, stride_s, stride_d, D, HALF, LINES)
            q_low, q_high, times = transform_tile(
                q_low, q_high, q + (b * q_b + h * q_h) * UNIT, q_rows, q_used, stride_s, stride_d,
                head_weight, weight_low, weight_high, eps_q, rstd, angles, True,
                D, HALF, NORM, ROPE, ROTARY, HADAMARD_QK,
            )  # fmt: skip
            times *= factor
            if lse_shift is not None:
                if OVERLAPS:
                    tl.extra.cuda.gdc_wait()
                constant = k_constant + (b * kv_heads + h // (heads // kv_heads)) * LANES + lanes
                low_c, high_c = tl.load(constant), tl.load(constant + HALF)
                products = tl.sum((q_low * low_c[None, :] + q_high * high_c[None, :]) * times, 1)
                tl.store(lse_shift + row * q_len + q_rows, products, mask=q_used)
            q_low, q_high = nan_for_inf(q_low), nan_for_inf(q_high)
            largest = _largest(q_low, q_high)[:, None] * tl.abs(times)
            of_rows, q_low_out, q_high_out = _round_rows(
                q_low, q_high, times, largest, _spoiled(q_low, q_high)[:, None], qk_max, q_out.dtype.element_ty,
                WRITTEN, INTERPRETED,
            )  # fmt: skip
            q_at = q_out + row * q_len * D_OUT
            store_tile(q_at, q_rows, q_used, D_OUT, q_low_out, q_high_out, D_OUT, HALF, ROPE)
            tl.store(q_scale + row * q_len + q_rows[:, None], of_rows, mask=q_used[:, None])
    elif program < qk_all:
        block, part = (program - q_all) % blocks, ((program - q_all) // blocks).to(tl.int64)
        b = part // k_parts
        rows = block * BLOCK + slots
        weight_low, weight_high = load_weights(weight_k, D, HALF, NORM)
        rstd = rstd_k + b * kv_len if NORM == OF_TOKEN else None
        for i in tl.range(0, 1 if ROPE == NO_ROPE else k_each, num_stages=1):
            h = tl.minimum(part % k_parts * k_each + i, kv_heads - 1)
            row = b * kv_heads + h
            tokens, used = _used(keys, key_counts, flags, b, h, kv_len, rows, flag_b, flag_h, flag_s, PACKED)
            head_weight = weight_k + h * D if NORM == OF_TOKEN and weight_k is not None else weight_k
            if NORM == OF_TOKEN:
                weight_low, weight_high = load_weights(head_weight, D, HALF, NORM)
            low, high, times = _qk_tile(
                k + (b * k_b + h * k_h) * UNIT, tokens, used, k_s, k_d,
                head_weight, weight_low, weight_high, eps_k, rstd, cos_k, sin_k, b, h,
                turn_k_b, turn_k_h, turn_k_s, turn_k_d,
                UNIT, DENSE, TURN_UNIT, TURN_DENSE, D, HALF, NORM, ROPE, ROTARY, HADAMARD_QK,
            )  # fmt: skip
            if OVERLAPS:
                tl.extra.cuda.gdc_wait()
            constant = k_constant + row * LANES + lanes
            low_c, high_c = tl.load(constant), tl.load(constant + HALF)
            low = nan_for_inf(tl.where(used[:, None], low * times - low_c[None, :], 0.0))
            high = nan_for_inf(tl.where(used[:, None], high * times - high_c[None, :], 0.0))
            scale, low_out, high_out = _round_rows(
                low, high, 1.0, tl.max(_largest(low, high)), tl.max(_spoiled(low, high)), qk_max,
                k_out.dtype.element_ty, WRITTEN, INTERPRETED,
            )  # fmt: skip
            # The last block is whole, its tail zeros.
            k_at = k_out + row * blocks * BLOCK * D_OUT
            store_tile(k_at, rows, rows >= 0, D_OUT, low_out, high_out, D_OUT, HALF, ROPE)
            tl.store(k_scale + row * blocks + block, scale)
    else:
        HALF_V: tl.constexpr = LANES_V // 2
        E4M3: tl.constexpr = v_out.dtype.element_ty == tl.float8e4nv
        v_lanes = tl.arange(0, HALF_V)
        block, row = (program - qk_all) % blocks, ((program - qk_all) // blocks).to(tl.int64)
        b, h = row // kv_heads, row % kv_heads
        rows = block * BLOCK + slots
        if E4M3:
            rows = block * BLOCK + slots // 16 * 16 + slots // 2 % 2 * 8 + slots // 4 % 4 * 2 + slots % 2
        tokens, used = _used(keys, key_counts, flags, b, h, kv_len, rows, flag_b, flag_h, flag_s, PACKED)
        v_low, v_high = _v_tile(
            v + (b * v_b + h * v_h) * UNIT, tokens, used, v_s, v_d, UNIT, DENSE, D_V, HALF_V, HADAMARD_V
        )
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        v_mean = v_constant + row * LANES_V + v_lanes
        v_low_c, v_high_c = tl.load(v_mean), tl.load(v_mean + HALF_V)
        v_low = nan_for_inf(tl.where(used[:, None], v_low - v_low_c[None, :], 0.0))
        v_high = nan_for_inf(tl.where(used[:, None], v_high - v_high_c[None, :], 0.0))
        floor = tl.load(v_constant + groups * LANES_V + row)
        v_unit = scale_for(tl.max(_largest(v_low, v_high)) / (E4M3_MAX * V_UNIT), floor)
        v_inverse = inverse_power_of_two(v_unit) * (1.0 / V_UNIT)
        v_low, v_high = v_low * v_inverse, v_high * v_inverse
        tl.store(v_scale + row * blocks + block, v_unit * V_UNIT)
        if E4M3:
            v_at = v_out + (row * blocks + block) * D_V_OUT * BLOCK + v_lanes[:, None] * BLOCK + slots[None, :]
            tl.store(v_at, tl.trans(round_e4m3(v_low, INTERPRETED)), mask=v_lanes[:, None] < D_V_OUT)
            above = v_lanes[:, None] < D_V_OUT - HALF_V
            tl.store(v_at + HALF_V * BLOCK, tl.trans(round_e4m3(v_high, INTERPRETED)), mask=above)
        else:
            v_start = v_out + row * blocks * BLOCK * D_V_OUT
            v_low, v_high = v_low.to(tl.float16), v_high.to(tl.float16)
            store_tile(v_start, rows, rows >= 0, D_V_OUT, v_low, v_high, D_V_OUT, HALF_V, NO_ROPE)


@triton.jit
def _round_rows(
    low, high, times, largest, spoiled, qk_max, DTYPE: tl.constexpr, D: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Round q or k times ``times``, D lanes and then zeros, to 8 bits.

    Args:
        low, high: [TOKENS, HALF], finite or NaN.
        times, largest, spoiled: [TOKENS, 1] or scalars: a factor, the largest magnitude of the product, and whether
            there is a NaN, for what shares a scale.

    Returns:
        (scales, shaped as ``largest``; lower half, upper half [TOKENS, HALF])
    """
    if DTYPE == tl.float8e4nv:
        scale = scale_for(largest / qk_max, QK_FLOOR)
        # As exact as one multiplication after the other, since a scale is a power of two.
        inverse = inverse_power_of_two(scale) * times
        HALF: tl.constexpr = low.shape[1]
        lanes = tl.arange(0, HALF)
        low_out = zero_bits_from(round_e4m3(low * inverse, INTERPRETED), lanes, D)
        high_out = zero_bits_from(round_e4m3(high * inverse, INTERPRETED), lanes + HALF, D)
    else:
        scale = tl.maximum(largest / _INT8_MAX, QK_FLOOR)
        inverse = times / scale
        low_out, high_out = to_int8(low * inverse), to_int8(high * inverse)
        # An integer cannot be NaN: the scale is, for all that share it.
        scale = tl.where(spoiled != 0, float("nan"), scale)
    return scale, low_out, high_out


@triton.jit
def _qk_tile(
    x, tokens, used, stride_s, stride_d, weight, weight_low, weight_high, eps, rstd, cos, sin, b, h,
    turn_b, turn_h, turn_s, turn_d,
    UNIT: tl.constexpr, DENSE: tl.constexpr, TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr,
    HADAMARD: tl.constexpr,
):  # fmt: skip
    """Tokens of a head of q or k, normalized, rotated and transformed: what :func:`transform_tile` returns."""
    stride_s, stride_d = stride_s * UNIT, 1 if DENSE else stride_d
    LINES: tl.constexpr = PASSING if turns_whole(ROPE) else KEPT
    low, high = load_tile(x, tokens, used, stride_s, stride_d, D, HALF, LINES)
    angles = _angles(
        cos, sin, tokens, used, b, h, turn_b, turn_h, turn_s, turn_d, TURN_UNIT, TURN_DENSE, HALF, ROPE, ROTARY
    )  # fmt: skip
    return transform_tile(
        low, high, x, tokens, used, stride_s, stride_d, weight, weight_low, weight_high, eps, rstd, angles, True,
        D, HALF, NORM, ROPE, ROTARY, HADAMARD,
    )  # fmt: skip


@triton.jit
def _angles(
    cos, sin, tokens, used, b, h, turn_b, turn_h, turn_s, turn_d,
    TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """What tokens of a head turn by: what :func:`load_angles` returns."""
    return load_angles(
        None if ROPE == NO_ROPE else cos + (b * turn_b + h * turn_h) * TURN_UNIT,
        None if ROPE == NO_ROPE else sin + (b * turn_b + h * turn_h) * TURN_UNIT,
        tokens, used, turn_s * TURN_UNIT, 1 if TURN_DENSE else turn_d, HALF, ROPE, ROTARY,
    )  # fmt: skip


@triton.jit
def _v_tile(
    x, tokens, used, stride_s, stride_d, UNIT: tl.constexpr, DENSE: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, HADAMARD: tl.constexpr,
):  # fmt: skip
    """Tokens of a head of v, transformed: two float32 tensors [BLOCK, HALF]."""
    stride_s, stride_d = stride_s * UNIT, 1 if DENSE else stride_d
    low, high = load_tile(x, tokens, used, stride_s, stride_d, D, HALF, KEPT)
    low, high, _ = transform_tile(
        low, high, x, tokens, used, stride_s, stride_d, None, 1.0, 1.0, 0.0, None, (1.0, 1.0, 1.0, 1.0), True,
        D, HALF, NO_NORM, NO_ROPE, 0, HADAMARD,
    )  # fmt: skip
    return low, high


@triton.jit
def _sampled(keys, b, kv_len, first, size, length):
    """Tokens of a sample from its ``first`` on, where they lie in the input, and which of them exist."""
    tokens, used = sampled_tokens(first, size, length)
    if keys is not None:
        tokens = tl.load(keys + b * kv_len + tokens, mask=used, other=0).to(tl.int64)
    return tokens, used


@triton.jit
def _used(keys, key_counts, flags, b, h, kv_len, rows, flag_b, flag_h, flag_s, PACKED: tl.constexpr):
    """Where in the input the rows of k's or v's output are, and which of them are used."""
    used = rows < kv_len
    tokens = rows
    if PACKED:
        used = rows < tl.load(key_counts + b)
        tokens = tl.load(keys + b * kv_len + rows, mask=used, other=0)
    if flags is not None:
        at = flags + b * flag_b + h * flag_h + rows.to(tl.int64) * flag_s
        used = tl.load(at, mask=used, other=0) != 0
    return tokens, used


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _largest(low, high):
    """Largest magnitude per token of what is finite or NaN. A maximum leaves NaN out."""
    return tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)


@triton.jit
def _spoiled(low, high):
    """Whether a token, finite or NaN, has a NaN."""
    return tl.max(((low != low) | (high != high)).to(tl.int32), 1)
