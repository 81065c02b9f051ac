"""What lpattn's own attention kernels read: q with a scale per token, k and v with one per block of keys.

Owns the allocation of the results and the launches. The pass itself is :mod:`.per_block`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from lpattn.quantize.fused import layout
from lpattn.quantize.fused.launcher import INTERPRETED, kinds_of, launch
from lpattn.quantize.fused.operands import (
    SAMPLE_WARPS,
    Keys,
    Rotation,
    _overlaps,
    constants_in,
    how_to_read,
    lanes_of,
    tables_of,
    used_keys,
)
from lpattn.quantize.fused.per_block import quantize_blocks
from lpattn.quantize.fused.per_head import sample_heads
from lpattn.quantize.fused.tile import E4M3_MAX
from lpattn.types import HadamardMode

BLOCK = 128
"""Keys that share a scale."""

_WARPS = 8
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
        q_scale: float32 [B, H, q_len]. Powers of two, as all scales are; those of int8 are not.
        key: [B, Hkv, blocks * 128, D'] in q's dtype, contiguous; zeros past the keys that are used.
        k_scale: float32 [B, Hkv, blocks].
        value: e4m3: [B, Hkv, blocks, D_v', 128], contiguous: each block transposed, with the keys of every group of 16
            permuted (see :mod:`.per_block`). D_v' is D_v, or, with a Hadamard transform, all of its lanes. float16, in
            order: [B, Hkv, blocks * 128, D_v'], D_v' as D' from D. Zeros past the keys that are used.
        v_scale: float32 [B, Hkv, blocks]. No two of a head are further apart than a factor of 2^61.
        k_constant, v_constant: float32 [B, Hkv, lanes], what was subtracted from k and v after rotation and transform,
            lanes being D or D_v padded to a power of two, at least 32. V's is never left out.
        key_counts: int32 [B], how many keys come first, where ``keys`` packed them; else None: all of them.
        lse_shift: float32 [B, H, q_len], q.constant of k, times ``factor``; None unless it was asked for.
        hadamard: the mode that was applied.
        kv_len: number of keys.
        dim_v: D_v.
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

    Where the lanes of v are not as many as those of q and k, it takes four.

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
        Rotation, transform (inputs rounded to their own dtype in between) and smoothing are float32. Scales of e4m3 are
        powers of two that map the largest magnitude to at most ``qk_max`` (448 for v): at least 2^-56 for q and k; at
        least 2^-126 for v, and 2^-60 of what the head's largest value would get. An inf or NaN becomes NaN, alone (with
        a Hadamard transform: its whole token), and enters neither scale nor constant. Magnitudes above about 1e36 may
        overflow in the transform. int8 has no NaN: there, the scale of its token (of its block, in k) becomes NaN. The
        scales of int8 map the largest magnitude to 127; v in float16 is scaled like v in e4m3. The oracle is
        :func:`lpattn.quantize.quantize_e4m3` with ``power_of_two=True``, given the constants.
    """
    if keys is not None and used is not None:
        raise ValueError("keys packs the keys, and used keeps them where they are: pass one of the two")
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len, dim_v = value.shape[1:]
    device = query.device
    q_blocks, blocks = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    eight_bit = torch.float8_e4m3fn if precision is Precision.E4M3 else torch.int8
    dim_out = lanes_of(dim) if hadamard is HadamardMode.QKV else -(-dim // _ROW_BYTES) * _ROW_BYTES
    rows_v = dim_v if hadamard is HadamardMode.NONE else lanes_of(dim_v)
    if precision is Precision.E4M3:
        v_out = torch.empty((batch, kv_heads, blocks, rows_v, BLOCK), dtype=eight_bit, device=device)
    else:
        rows_v = -(-rows_v // _ROW_BYTES) * _ROW_BYTES
        v_out = torch.empty((batch, kv_heads, blocks * BLOCK, rows_v), dtype=torch.float16, device=device)
    k_parts, v_parts = layout.parts(kv_len, layout.FEW.value), layout.parts(kv_len, layout.ALL.value)

    sampled = keys
    if used is not None:
        sampled = used_keys(used.any(1, keepdim=True)[:, :, None], batch, kv_len)
    of_keys = (None, None) if sampled is None else (sampled.indices, sampled.counts)
    flags = None if used is None else used.expand(batch, kv_heads, kv_len)
    flag_strides = (0, 0, 0) if flags is None else flags.stride()

    q_out = torch.empty((batch, heads, q_len, dim_out), dtype=eight_bit, device=device)
    k_out = torch.empty((batch, kv_heads, blocks * BLOCK, dim_out), dtype=eight_bit, device=device)
    q_scale = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device)
    kv_scales = torch.empty((2, batch, kv_heads, blocks), dtype=torch.float32, device=device)
    shift = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device) if with_lse_shift else None
    written = (q_out, k_out, v_out, q_scale, *kv_scales.unbind(), shift)
    q_programs, kv_programs = batch * heads * q_blocks, batch * kv_heads * blocks

    def run(
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        rope: Rotation | None,
        k_parts: int,
        v_parts: int,
        programs: tuple[int, int, int],
    ) -> torch.Tensor:
        """Sample and quantize some of the tensors, those that have parts and programs; returns the buffer."""
        width, groups = tensors[0].shape[3], batch * kv_heads
        *tables, turns = tables_of(rope)
        q_strides, k_strides, v_strides = (x.stride() for x in tensors)
        strides, constants = how_to_read(width, q_strides, k_strides, v_strides, turns, hadamard)
        buffer = torch.empty(
            layout.size(groups, lanes_of(width), groups * (k_parts + v_parts)), dtype=torch.float32, device=device
        )
        kinds = kinds_of((*tensors, *of_keys, *tables))
        numbers = (batch, heads, kv_heads, q_len, kv_len, 0, k_parts, v_parts, *strides)
        overlaps = _overlaps(device)
        launch(
            sample_heads,
            groups * (k_parts + v_parts),
            (*tensors, *of_keys, *tables, buffer),
            numbers,
            (*constants, overlaps),
            kinds,
            SAMPLE_WARPS,
            overlaps,
        )
        launch(
            quantize_blocks,
            sum(programs),
            (*tensors, *of_keys, *tables, flags, buffer, *written),
            (*numbers, *flag_strides, programs[0], programs[1], float(factor), float(qk_max)),
            (*constants, dim_out, rows_v, keys is not None, BLOCK, overlaps, INTERPRETED),
            (kinds, with_lse_shift, precision, flags is None),
            _WARPS,
            overlaps,
        )
        return buffer

    if dim == dim_v:
        buffers = (run((query, key, value), rope, k_parts, v_parts, (q_programs, kv_programs, kv_programs)),) * 2
    else:
        buffers = (
            run((query, key, key), rope, k_parts, 0, (q_programs, kv_programs, 0)),
            run((value, value, value), None, 0, v_parts, (0, 0, kv_programs)),
        )
    k_constant, _ = constants_in(buffers[0], kv_scales[0], lanes_of(dim))
    _, v_constant = constants_in(buffers[1], kv_scales[0], lanes_of(dim_v))
    return PerBlock(
        q_out,
        q_scale,
        k_out,
        kv_scales[0],
        v_out,
        kv_scales[1],
        k_constant,
        v_constant,
        None if keys is None else keys.counts,
        shift,
        hadamard,
        kv_len,
        dim_v,
    )
