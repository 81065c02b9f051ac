"""The passes for scales per query token and per block of keys, in the layout that lpattn's own kernels read.

Nothing about a scale lies outside of its tile, so that one pass over the tokens is enough; only the constants that are
subtracted from k and v come from a sample of their tokens, in a launch of their own. Any constant would do: it is added
back exactly.

V is stored transposed, [D, BLOCK] per block, and the keys of each group of 16 are permuted: slot 4c + 2b + e holds key
8b + 2c + e. That is the order in which the accumulator of a product of q and k holds its columns, so that P becomes an
operand of the next product without leaving its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lpattn.quantize.fused.layout import FEW, PART, sample_size
from lpattn.quantize.fused.per_head import QK_FLOOR, V_FLOOR
from lpattn.quantize.fused.sample import sampled_tokens
from lpattn.quantize.fused.tile import (
    E4M3_MAX,
    inverse_power_of_two,
    load_tile,
    scale_for,
    store_tile,
    to_e4m3,
    transform_tile,
)

# Numbers of which every call has others: to compile anew for a length would stall it.
_VARYING = [
    "batch", "heads", "kv_heads", "q_len", "kv_len", "factor", "qk_max",
    "q_b", "q_h", "q_s", "q_d", "k_b", "k_h", "k_s", "k_d", "v_b", "v_h", "v_s", "v_d",
    "turn_q_b", "turn_q_h", "turn_q_s", "turn_q_d", "turn_k_b", "turn_k_h", "turn_k_s", "turn_k_d",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def sample_blocks(
    k, v, keys, key_counts, cos_k, sin_k, k_constant, v_constant, batch, kv_heads, kv_len,
    k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, turn_k_b, turn_k_h, turn_k_s, turn_k_d,
    UNIT: tl.constexpr, DENSE: tl.constexpr, TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, D_V: tl.constexpr, LANES_V: tl.constexpr,
    ROPE: tl.constexpr, ROTARY: tl.constexpr, HADAMARD_QK: tl.constexpr, HADAMARD_V: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Mean of a sample of the tokens of each head of k, then of v: one program each.

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
    if program < groups:
        HALF: tl.constexpr = LANES // 2
        x = k + (b * k_b + h * k_h) * UNIT
        low_sum, high_sum = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
        for first in range(0, size, PART):
            tokens, used = _sampled(keys, b, kv_len, first, size, length)
            low, high = _qk_tile(
                x, tokens, used, k_s, k_d, cos_k, sin_k, b, h, turn_k_b, turn_k_h, turn_k_s, turn_k_d,
                UNIT, DENSE, TURN_UNIT, TURN_DENSE, D, HALF, ROPE, ROTARY, HADAMARD_QK,
            )  # fmt: skip
            low_sum += tl.sum(_finite(low) * weight, 0)
            high_sum += tl.sum(_finite(high) * weight, 0)
        at = k_constant + row * LANES + tl.arange(0, HALF)
        tl.store(at, low_sum)
        tl.store(at + HALF, high_sum)
    else:
        HALF_V: tl.constexpr = LANES_V // 2
        x = v + (b * v_b + h * v_h) * UNIT
        v_low_sum, v_high_sum = tl.zeros((HALF_V,), tl.float32), tl.zeros((HALF_V,), tl.float32)
        for first in range(0, size, PART):
            tokens, used = _sampled(keys, b, kv_len, first, size, length)
            v_low, v_high = _v_tile(x, tokens, used, v_s, v_d, UNIT, DENSE, D_V, HALF_V, HADAMARD_V)
            v_low_sum += tl.sum(_finite(v_low) * weight, 0)
            v_high_sum += tl.sum(_finite(v_high) * weight, 0)
        v_at = v_constant + row * LANES_V + tl.arange(0, HALF_V)
        tl.store(v_at, v_low_sum)
        tl.store(v_at + HALF_V, v_high_sum)


@triton.jit(do_not_specialize=_VARYING)
def quantize_blocks(
    q, k, v, keys, key_counts, cos_q, sin_q, cos_k, sin_k, k_constant, v_constant,
    q_out, k_out, v_out, q_scale, k_scale, v_scale, lse_shift,
    batch, heads, kv_heads, q_len, kv_len,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    turn_q_b, turn_q_h, turn_q_s, turn_q_d, turn_k_b, turn_k_h, turn_k_s, turn_k_d, factor, qk_max,
    UNIT: tl.constexpr, DENSE: tl.constexpr, TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, D_V: tl.constexpr, LANES_V: tl.constexpr,
    ROPE: tl.constexpr, ROTARY: tl.constexpr, HADAMARD_QK: tl.constexpr, HADAMARD_V: tl.constexpr,
    PITCH: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK tokens of a head of q, then of k, then of v.

    With OVERLAPS it may start while ``sample_blocks`` still runs, of which q needs nothing.
    """
    program = tl.program_id(0)
    groups = batch * kv_heads
    q_blocks, blocks = tl.cdiv(q_len, BLOCK), tl.cdiv(kv_len, BLOCK)
    q_all = batch * heads * q_blocks
    kv_all = q_all + groups * blocks
    slots = tl.arange(0, BLOCK)
    HALF: tl.constexpr = LANES // 2
    lanes = tl.arange(0, HALF)
    if program < q_all:
        block, row = program % q_blocks, (program // q_blocks).to(tl.int64)
        b, h = row // heads, row % heads
        rows = block * BLOCK + slots
        used = rows < q_len
        low, high = _qk_tile(
            q + (b * q_b + h * q_h) * UNIT, rows, used, q_s, q_d,
            cos_q, sin_q, b, h, turn_q_b, turn_q_h, turn_q_s, turn_q_d,
            UNIT, DENSE, TURN_UNIT, TURN_DENSE, D, HALF, ROPE, ROTARY, HADAMARD_QK,
        )  # fmt: skip
        low, high = low * factor, high * factor
        if lse_shift is not None:
            if OVERLAPS:
                tl.extra.cuda.gdc_wait()
            constant = k_constant + (b * kv_heads + h // (heads // kv_heads)) * LANES + lanes
            low_c, high_c = tl.load(constant), tl.load(constant + HALF)
            products = tl.sum(low * low_c[None, :] + high * high_c[None, :], 1)
            tl.store(lse_shift + row * q_len + rows, products, mask=used)
        scale = scale_for(_largest(low, high) / qk_max, QK_FLOOR)
        inverse = inverse_power_of_two(scale)
        low_out = to_e4m3(low * inverse[:, None], INTERPRETED)
        high_out = to_e4m3(high * inverse[:, None], INTERPRETED)
        store_tile(q_out + row * q_len * PITCH, rows, used, PITCH, low_out, high_out, PITCH, HALF)
        tl.store(q_scale + row * q_len + rows, scale, mask=used)
    elif program < kv_all:
        block, row = (program - q_all) % blocks, ((program - q_all) // blocks).to(tl.int64)
        b, h = row // kv_heads, row % kv_heads
        rows = block * BLOCK + slots
        tokens, used = _packed(keys, key_counts, b, kv_len, rows)
        low, high = _qk_tile(
            k + (b * k_b + h * k_h) * UNIT, tokens, used, k_s, k_d,
            cos_k, sin_k, b, h, turn_k_b, turn_k_h, turn_k_s, turn_k_d,
            UNIT, DENSE, TURN_UNIT, TURN_DENSE, D, HALF, ROPE, ROTARY, HADAMARD_QK,
        )  # fmt: skip
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        constant = k_constant + row * LANES + lanes
        low_c, high_c = tl.load(constant), tl.load(constant + HALF)
        low = tl.where(used[:, None], low - low_c[None, :], 0.0)
        high = tl.where(used[:, None], high - high_c[None, :], 0.0)
        k_unit = scale_for(tl.max(_largest(low, high)) / qk_max, QK_FLOOR)
        k_inverse = inverse_power_of_two(k_unit)
        low_out, high_out = to_e4m3(low * k_inverse, INTERPRETED), to_e4m3(high * k_inverse, INTERPRETED)
        # The last block is whole, its tail zeros.
        store_tile(k_out + row * blocks * BLOCK * PITCH, rows, rows >= 0, PITCH, low_out, high_out, PITCH, HALF)
        tl.store(k_scale + row * blocks + block, k_unit)
    else:
        HALF_V: tl.constexpr = LANES_V // 2
        v_lanes = tl.arange(0, HALF_V)
        block, row = (program - kv_all) % blocks, ((program - kv_all) // blocks).to(tl.int64)
        b, h = row // kv_heads, row % kv_heads
        rows = block * BLOCK + slots // 16 * 16 + slots // 2 % 2 * 8 + slots // 4 % 4 * 2 + slots % 2
        tokens, used = _packed(keys, key_counts, b, kv_len, rows)
        v_low, v_high = _v_tile(
            v + (b * v_b + h * v_h) * UNIT, tokens, used, v_s, v_d, UNIT, DENSE, D_V, HALF_V, HADAMARD_V
        )
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        v_mean = v_constant + row * LANES_V + v_lanes
        v_low_c, v_high_c = tl.load(v_mean), tl.load(v_mean + HALF_V)
        v_low = tl.where(used[:, None], v_low - v_low_c[None, :], 0.0)
        v_high = tl.where(used[:, None], v_high - v_high_c[None, :], 0.0)
        v_unit = scale_for(tl.max(_largest(v_low, v_high)) / E4M3_MAX, V_FLOOR)
        v_inverse = inverse_power_of_two(v_unit)
        v_low_out, v_high_out = to_e4m3(v_low * v_inverse, INTERPRETED), to_e4m3(v_high * v_inverse, INTERPRETED)
        v_at = v_out + (row * blocks + block) * D_V * BLOCK + v_lanes[:, None] * BLOCK + slots[None, :]
        tl.store(v_at, tl.trans(v_low_out), mask=v_lanes[:, None] < D_V)
        tl.store(v_at + HALF_V * BLOCK, tl.trans(v_high_out), mask=v_lanes[:, None] < D_V - HALF_V)
        tl.store(v_scale + row * blocks + block, v_unit)


@triton.jit
def _qk_tile(
    x, tokens, used, stride_s, stride_d, cos, sin, b, h, turn_b, turn_h, turn_s, turn_d,
    UNIT: tl.constexpr, DENSE: tl.constexpr, TURN_UNIT: tl.constexpr, TURN_DENSE: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr, HADAMARD: tl.constexpr,
):  # fmt: skip
    """Tokens of a head of q or k, rotated and transformed: two float32 tensors [BLOCK, HALF]."""
    stride_s, stride_d = stride_s * UNIT, 1 if DENSE else stride_d
    low, high = load_tile(x, tokens, used, stride_s, stride_d, D, HALF)
    return transform_tile(
        low, high, x, tokens, used, stride_s, stride_d,
        None if ROPE == 0 else cos + (b * turn_b + h * turn_h) * TURN_UNIT,
        None if ROPE == 0 else sin + (b * turn_b + h * turn_h) * TURN_UNIT,
        turn_s * TURN_UNIT, 1 if TURN_DENSE else turn_d, True, True, D, HALF, ROPE, ROTARY, HADAMARD,
    )  # fmt: skip


@triton.jit
def _v_tile(
    x, tokens, used, stride_s, stride_d, UNIT: tl.constexpr, DENSE: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, HADAMARD: tl.constexpr,
):  # fmt: skip
    """Tokens of a head of v, transformed: two float32 tensors [BLOCK, HALF]."""
    stride_s, stride_d = stride_s * UNIT, 1 if DENSE else stride_d
    low, high = load_tile(x, tokens, used, stride_s, stride_d, D, HALF)
    return transform_tile(
        low, high, x, tokens, used, stride_s, stride_d, None, None, 0, 1, False, True, D, HALF, 0, 0, HADAMARD
    )


@triton.jit
def _sampled(keys, b, kv_len, first, size, length):
    """Tokens of a sample from its ``first`` on, where they lie in the input, and which of them exist."""
    tokens, used = sampled_tokens(first, size, length)
    if keys is not None:
        tokens = tl.load(keys + b * kv_len + tokens, mask=used, other=0).to(tl.int64)
    return tokens, used


@triton.jit
def _packed(keys, key_counts, b, kv_len, rows):
    """Where in the input the rows of the output are, and which of them are used."""
    if keys is not None:
        used = rows < tl.load(key_counts + b)
        tokens = tl.load(keys + b * kv_len + rows, mask=used, other=0)
    else:
        used = rows < kv_len
        tokens = rows
    return tokens, used


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _largest(low, high):
    """Largest finite magnitude per token: inf times 0 is NaN, which a maximum leaves out."""
    magnitudes = tl.maximum(tl.abs(low + low * 0.0), tl.abs(high + high * 0.0))
    return tl.maximum(tl.max(magnitudes, 1), 0.0)
