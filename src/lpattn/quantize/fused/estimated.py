"""Tokens of a head that are rounded with an estimated scale, and how a group learns that it does not fit."""

from __future__ import annotations

import triton
import triton.language as tl

from lpattn.quantize.fused.tile import E4M3_MAX, inverse_power_of_two, nan_for_inf, round_e4m3, scale_for, store_tile


@triton.jit
def store_scaled(
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
def exceeds(exceeding, most, scale):
    """Tell the group of a magnitude beyond its scale."""
    if most > E4M3_MAX * scale:
        # The order of positive floats is that of their bits.
        tl.atomic_max(exceeding, most.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def all_done(done, programs):
    """Signal that this program has stored its tiles; whether all of the ``programs`` have."""
    # All of the program's stores come before its signal.
    tl.debug_barrier()
    return tl.atomic_add(done, 1, sem="acq_rel") == programs - 1


@triton.jit
def wanted_scale(exceeding, scale, floor):
    """The scale that fits all of a group, which is the one at hand where no magnitude exceeds it."""
    most = tl.atomic_max(exceeding, 0, sem="relaxed").to(tl.float32, bitcast=True)
    return tl.where(most > 0.0, scale_for(most / E4M3_MAX, floor), scale)


@triton.jit
def used_length(key_counts, b, room, which):
    """Tokens of a tensor that are used."""
    length = room
    if key_counts is not None:
        if which > 0:
            length = tl.load(key_counts + b)
    return length


@triton.jit
def tokens_of(keys, which, b, kv_len, rows, used):
    """Where in the input the rows of the output are: k and v may be packed."""
    tokens = rows
    if keys is not None:
        if which > 0:
            tokens = tl.load(keys + b * kv_len + rows, mask=used, other=0)
    return tokens
