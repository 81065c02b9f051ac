"""The first pass for scales per (batch, KV head): what a sample of each head's tokens looks like."""

from __future__ import annotations

import triton
import triton.language as tl

from lpattn.quantize.fused import layout
from lpattn.quantize.fused.layout import FEW, PART, part_size, sample_size
from lpattn.quantize.fused.sample import sampled_tokens
from lpattn.quantize.fused.tile import KEPT, NO_NORM, NO_ROPE, load_angles, load_tile, load_weights, transform_tile

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
