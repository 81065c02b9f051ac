"""What lpattn's own attention kernels read: q with a scale per token, k and v with one per block of keys.

Owns the allocation of the results and the launches. The passes themselves are :mod:`.per_block`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from lpattn.quantize.fused.launcher import INTERPRETED, kinds_of, launch
from lpattn.quantize.fused.operands import (
    Keys,
    Rotation,
    how_to_read,
    lanes_of,
    overlaps_on,
    tables_of,
    used_keys,
)
from lpattn.quantize.fused.per_block import quantize_blocks, sample_blocks
from lpattn.quantize.fused.tile import E4M3_MAX
from lpattn.types import HadamardMode

BLOCK = 128
"""Keys that share a scale."""

# Warps per program that were the fastest on an H100.
_SAMPLE_WARPS = 16
_WARPS = 4
_WIDE_WARPS = 8
"""Where a tile has more than 128 lanes."""

_ROW_BYTES = 16
"""Rows of q and k are padded to a multiple of this: what loads of 16 bytes and TMA descriptors need."""


class Precision(str, Enum):
    """What q, k and v are rounded to.

    * ``E4M3``: all three.
    * ``INT8_F16``: q and k to integers of 8 bits, v to float16.
    """

    E4M3 = "e4m3"
    INT8_F16 = "int8_f16"

    __str__ = str.__str__


@dataclass(frozen=True)
class PerBlock:
    """q with a scale per token, k and v with one per block of 128 keys: value = data * scale (+ constant for k and v).

    Attributes:
        query: [B, H, q_len, D'], contiguous; of q times ``factor``. torch.float8_e4m3fn, or torch.int8. D' is D rounded
            up to a multiple of 16, lanes past D being zeros; or, with Hadamard mode QKV, all lanes of the transform.
        q_scale: float32 [B, H, q_len]. Powers of two, as k's are; those of int8 are not.
        key: [B, Hkv, blocks * 128, D'] in q's dtype, contiguous; zeros past the keys that are used.
        k_scale: float32 [B, Hkv, blocks].
        value: e4m3: [B, Hkv, blocks, D_v', 128], contiguous: each block transposed, with the keys of every group of 16
            permuted (see :mod:`.per_block`). D_v' is D_v, or, with a Hadamard transform, all of its lanes. float16, in
            order: [B, Hkv, blocks * 128, D_v'], D_v' as D' from D. Zeros past the keys that are used.
        v_scale: float32 [B, Hkv, blocks], powers of two times sqrt(2): their ratios are powers of two.
        k_constant, v_constant: float32 [B, Hkv, lanes], what was subtracted from k and v after rotation and transform,
            lanes being D or D_v padded to a power of two, at least 32.
        key_counts: int32 [B], how many keys come first, where ``keys`` packed them; else None: all of them.
        lse_shift: float32 [B, H, q_len], q.constant of k, times ``factor``; None unless it was asked for.
        hadamard: the mode that was applied.
        kv_len: number of keys.
        dim_v: D_v.
        buffer: where ``v_constant`` is, for :func:`lpattn.quantize.fused.restore_output`.
    """

    query: torch.Tensor
    q_scale: torch.Tensor
    key: torch.Tensor
    k_scale: torch.Tensor
    value: torch.Tensor
    v_scale: torch.Tensor
    k_constant: torch.Tensor
    v_constant: torch.Tensor
    key_counts: torch.Tensor | None
    lse_shift: torch.Tensor | None
    hadamard: HadamardMode
    kv_len: int
    dim_v: int
    buffer: torch.Tensor

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.key.shape[1]


def quantize_per_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    factor: float = 1.0,
    qk_max: float = E4M3_MAX.value,
    precision: Precision = Precision.E4M3,
    hadamard: HadamardMode = HadamardMode.NONE,
    rope: Rotation | None = None,
    keys: Keys | None = None,
    used: torch.Tensor | None = None,
    with_lse_shift: bool = False,
) -> PerBlock:
    """Quantize for lpattn's own kernels in two launches, without waiting for the device.

    Args:
        query: [B, H, q_len, D], float16, bfloat16 or float32, any strides.
        key: [B, Hkv, kv_len, D] in the same dtype.
        value: [B, Hkv, kv_len, D_v] in the same dtype.
        factor: what q is multiplied by, such as the softmax scale times log2(e).
        qk_max: what the largest magnitude of a scale's values in q and k becomes at most, in (0, 448]; e4m3 only.
        precision: what q, k and v are rounded to.
        hadamard: which operands are transformed along head_dim, after rotation: any D, padded to a power of two.
        rope: rotates q and k first.
        keys: which tokens of k and v are used: these come first, in their order, and are followed by zeros.
        used: bool [B, Hkv or 1, kv_len], which tokens of k and v are used: the others become zeros where they are, and
            enter no scale and (unless another head uses them) no constant. Not together with ``keys``.
        with_lse_shift: also compute q.constant, which the smoothing of k takes from every logit.

    Precision:
        Rotation, transform (inputs rounded to their own dtype in between) and smoothing are float32. The constants are
        means of a sample of 256 tokens, or of a sixteenth of them up to 4096. Scales of e4m3 are powers of two (for v,
        times sqrt(2)) that map the largest magnitude to at most ``qk_max`` (448 for v): at least 2^-56 for q and k; for
        v at least 2^-60 of what the largest sampled value would get. An inf or NaN becomes NaN, alone (with a Hadamard
        transform: its whole token), and enters neither scale nor constant. Magnitudes above about 1e36 may overflow in
        the transform. int8 has no NaN: there, the scale of its token (of its block, in k) becomes NaN. The scales of
        int8 map the largest magnitude to 127; v in float16 is scaled like v in e4m3. The oracle is
        :func:`lpattn.quantize.quantize_e4m3` with ``power_of_two=True``, given the constants.
    """
    if keys is not None and used is not None:
        raise ValueError("keys packs the keys, and used keeps them where they are: pass one of the two")
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len, dim_v = value.shape[1:]
    groups, device = batch * kv_heads, query.device
    q_blocks, blocks = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    lanes, lanes_v = lanes_of(dim), lanes_of(dim_v)
    eight_bit = torch.float8_e4m3fn if precision is Precision.E4M3 else torch.int8
    dim_out = lanes if hadamard is HadamardMode.QKV else -(-dim // _ROW_BYTES) * _ROW_BYTES
    rows_v = dim_v if hadamard is HadamardMode.NONE else lanes_v

    q_out = torch.empty((batch, heads, q_len, dim_out), dtype=eight_bit, device=device)
    k_out = torch.empty((batch, kv_heads, blocks * BLOCK, dim_out), dtype=eight_bit, device=device)
    if precision is Precision.E4M3:
        v_out = torch.empty((batch, kv_heads, blocks, rows_v, BLOCK), dtype=eight_bit, device=device)
    else:
        rows_v = -(-rows_v // _ROW_BYTES) * _ROW_BYTES
        v_out = torch.empty((batch, kv_heads, blocks * BLOCK, rows_v), dtype=torch.float16, device=device)
    q_scale = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device)
    k_scale, v_scale = torch.empty((2, batch, kv_heads, blocks), dtype=torch.float32, device=device).unbind()
    k_constant = torch.empty((batch, kv_heads, lanes), dtype=torch.float32, device=device)
    # restore_output finds V's constant behind as much as other passes have there; behind it are floors of V's scales.
    start = (3 + 2 * lanes_v) * groups
    buffer = torch.empty(start + (lanes_v + 1) * groups, dtype=torch.float32, device=device)
    v_constant = buffer[start : start + lanes_v * groups].view(batch, kv_heads, lanes_v)
    shift = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device) if with_lse_shift else None

    sampled = keys
    if used is not None:
        sampled = used_keys(used.any(1, keepdim=True)[:, :, None], batch, kv_len)
    of_keys = (None, None) if sampled is None else (sampled.indices, sampled.counts)
    flags = None if used is None else used.expand(batch, kv_heads, kv_len)
    flag_strides = (0, 0, 0) if flags is None else flags.stride()
    cos_q, sin_q, cos_k, sin_k, turns = tables_of(rope)
    strides, reading = how_to_read(dim, query.stride(), key.stride(), value.stride(), turns, hadamard)
    unit, dense, turn_unit, turn_dense, _, _, *transforms = reading
    constants = (unit, dense, turn_unit, turn_dense, dim, lanes, dim_v, lanes_v, *transforms)
    overlaps = overlaps_on(device)
    inputs = (query, key, value, *of_keys, cos_q, sin_q, cos_k, sin_k)
    kinds = kinds_of(inputs)
    # A part of an allocation: whether it is aligned is a matter of sizes.
    aligned = (v_constant.data_ptr() % 16, v_scale.data_ptr() % 16)
    launch(
        sample_blocks,
        2 * groups,
        (key, value, *of_keys, cos_k, sin_k, k_constant, v_constant),
        (batch, kv_heads, kv_len, *strides[4:12], *strides[16:20]),
        (*constants, overlaps),
        (kinds, aligned),
        _SAMPLE_WARPS,
        overlaps,
    )
    launch(
        quantize_blocks,
        batch * heads * q_blocks + 2 * groups * blocks,
        (*inputs, flags, k_constant, v_constant, q_out, k_out, v_out, q_scale, k_scale, v_scale, shift),
        (batch, heads, kv_heads, q_len, kv_len, *strides, *flag_strides, float(factor), float(qk_max)),
        (*constants, dim_out, rows_v, keys is not None, BLOCK, overlaps, INTERPRETED),
        (kinds, aligned, with_lse_shift, precision, flags is None),
        _WARPS if max(lanes, lanes_v) <= 128 else _WIDE_WARPS,
        overlaps,
    )
    return PerBlock(
        q_out,
        q_scale,
        k_out,
        k_scale,
        v_out,
        v_scale,
        k_constant,
        v_constant,
        None if keys is None else keys.counts,
        shift,
        hadamard,
        kv_len,
        dim_v,
        buffer,
    )
