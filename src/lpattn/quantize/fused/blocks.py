"""What lpattn's own attention kernels read: q with a scale per token, k and v with one per block of keys.

Owns the allocation of the results and the launches. The passes themselves are :mod:`.per_block`'s.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch

from lpattn.quantize.fused.launcher import INTERPRETED, Launch, kinds_of
from lpattn.quantize.fused.operands import (
    Keys,
    Rotation,
    Turns,
    check_device,
    how_to_read,
    lanes_of,
    overlaps_on,
    tables_of,
    used_keys,
    weights_of,
)
from lpattn.quantize.fused.per_block import quantize_blocks, sample_blocks
from lpattn.quantize.fused.tile import E4M3_MAX
from lpattn.types import HadamardMode, Norm

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
        buffer: the memory of all floats; ``v_constant`` lies where :func:`lpattn.quantize.fused.restore_output` looks.
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
    norm: Norm | None = None,
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
        norm: normalizes q and k before that.
        keys: which tokens of k and v are used: these come first, in their order, and are followed by zeros.
        used: bool [B, Hkv or 1, kv_len], which tokens of k and v are used: the others become zeros where they are, and
            enter no scale and (unless another head uses them) no constant. Not together with ``keys``.
        with_lse_shift: also compute q.constant, which the smoothing of k takes from every logit.

    Precision:
        Norm and rotation are float32, as are the transform (inputs rounded to their own dtype) and smoothing. The
        constants are means of a sample of 256 tokens, or of a sixteenth of them up to 4096. Scales of e4m3 are powers
        of two (for v, times sqrt(2)) that map the largest magnitude to at most ``qk_max`` (448 for v): at least 2^-56
        for q and k; for v at least 2^-60 of what the largest sampled value would get. An inf or NaN becomes NaN, alone
        (with a Hadamard transform: its whole token), and enters neither scale nor constant. Magnitudes above about 1e36
        may overflow in the transform. int8 has no NaN: there, the scale of its token (of its block, in k) becomes NaN.
        The scales of int8 map the largest magnitude to 127; v in float16 is scaled like v in e4m3. The oracle is
        :func:`lpattn.quantize.quantize_e4m3` with ``power_of_two=True``, given the constants.
    """
    if keys is not None and used is not None:
        raise ValueError("keys packs the keys, and used keeps them where they are: pass one of the two")
    sampled, flags = keys, None
    if used is not None:
        batch, kv_heads, kv_len, _ = key.shape
        sampled = used_keys(used.any(1, keepdim=True)[:, :, None], batch, kv_len)
        flags = used.expand(batch, kv_heads, kv_len)
    indices, counts = (None, None) if sampled is None else (sampled.indices, sampled.counts)
    cos_q, sin_q, cos_k, sin_k, turns = tables_of(rope)
    (weight_q, weight_k), eps = weights_of(norm)
    more = (indices, counts, cos_q, sin_q, cos_k, sin_k, weight_q, weight_k)
    plan = _plan(
        query.shape,
        value.shape,
        query.stride(),
        key.stride(),
        value.stride(),
        turns,
        eps,
        hadamard,
        factor,
        qk_max,
        precision,
        with_lse_shift,
        keys is not None,
        None if flags is None else flags.stride(),
        # What kinds_of says, in a quarter of its time: q, k and v have one dtype, and plain calls bring nothing else.
        (query.dtype, query.data_ptr() % 16, key.data_ptr() % 16, value.data_ptr() % 16),
        None if rope is None and sampled is None and norm is None else kinds_of(more),
        query.device,
    )
    device = plan.device
    data = torch.empty(plan.bytes, dtype=plan.eight_bit, device=device)
    floats = torch.empty(plan.floats, dtype=torch.float32, device=device)
    q_out = data.as_strided(*plan.q)
    k_out = data.as_strided(*plan.k)
    if plan.half_v is None:
        v_out = data.as_strided(*plan.v)
    else:
        v_out = torch.empty(plan.half_v, dtype=torch.float16, device=device)
    q_scale = floats.as_strided(*plan.q_scale)
    k_scale = floats.as_strided(*plan.k_scale)
    v_scale = floats.as_strided(*plan.v_scale)
    k_constant = floats.as_strided(*plan.k_constant)
    v_constant = floats.as_strided(*plan.v_constant)
    shift = torch.empty(plan.shift_shape, dtype=torch.float32, device=device) if with_lse_shift else None
    plan.sample((key, value, indices, counts, cos_k, sin_k, weight_k, k_constant, v_constant))
    written = (q_out, k_out, v_out, q_scale, k_scale, v_scale, shift)
    plan.quantize((query, key, value, *more, flags, k_constant, v_constant, *written))
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
        plan.kv_len,
        plan.dim_v,
        floats,
    )


_Part = tuple[tuple[int, ...], tuple[int, ...], int]
"""Of an allocation, as ``as_strided`` takes it: shape, strides, start."""


class _Plan(NamedTuple):
    """What the two launches for some shapes and strides need: what they write, and themselves."""

    device: torch.device
    eight_bit: torch.dtype
    bytes: int
    q: _Part
    k: _Part
    v: _Part
    half_v: tuple[int, ...] | None
    floats: int
    q_scale: _Part
    k_scale: _Part
    v_scale: _Part
    k_constant: _Part
    v_constant: _Part
    shift_shape: tuple[int, ...]
    kv_len: int
    dim_v: int
    sample: Launch
    quantize: Launch


@functools.lru_cache(maxsize=1024)
def _plan(
    q_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    turns: Turns | None,
    eps: tuple[float, float] | None,
    hadamard: HadamardMode,
    factor: float,
    qk_max: float,
    precision: Precision,
    with_lse_shift: bool,
    packed: bool,
    flag_strides: tuple[int, ...] | None,
    kinds: Hashable,
    more_kinds: Hashable,
    device: torch.device,
) -> _Plan:
    e4m3 = precision is Precision.E4M3
    if e4m3:
        check_device(device)
    batch, heads, q_len, dim = q_shape
    kv_heads, kv_len, dim_v = v_shape[1:]
    groups = batch * kv_heads
    q_blocks, blocks = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    lanes, lanes_v = lanes_of(dim), lanes_of(dim_v)
    dim_out = lanes if hadamard is HadamardMode.QKV else _round_up(dim, _ROW_BYTES)
    rows_v = dim_v if hadamard is HadamardMode.NONE else lanes_v
    if not e4m3:
        rows_v = _round_up(rows_v, _ROW_BYTES)

    # Every part starts at a multiple of 128 bytes: Triton compiles for the alignment of its tensors, and copies of
    # tiles want as much.
    sizes = [batch * heads * q_len * dim_out, groups * blocks * BLOCK * dim_out]
    sizes.append(groups * blocks * BLOCK * rows_v if e4m3 else 0)
    q_at, k_at, v_at, size = _starts(sizes, 128)
    # restore_output finds V's constant behind as much as other passes have there; floors of V's scales follow it.
    v_constant = (3 + 2 * lanes_v) * groups
    sizes = [
        v_constant + (lanes_v + 1) * groups,
        groups * lanes,
        batch * heads * q_len,
        groups * blocks,
        groups * blocks,
    ]
    _, k_constant, q_scale, k_scale, v_scale, floats = _starts(sizes, 32)

    strides, reading = how_to_read(dim, q_strides, k_strides, v_strides, turns, eps, hadamard)
    unit, dense, turn_unit, turn_dense, _, _, *transforms = reading
    eps_q, eps_k = eps or (0.0, 0.0)
    factors = (float(factor), float(qk_max))
    constants = (unit, dense, turn_unit, turn_dense, dim, lanes, dim_v, lanes_v, *transforms)
    overlaps = overlaps_on(device)
    sample = Launch(
        sample_blocks,
        2 * groups,
        (batch, kv_heads, kv_len, *strides[4:12], *strides[16:20], eps_k),
        (*constants, overlaps),
        (kinds, more_kinds, v_constant % 4),
        _SAMPLE_WARPS,
        overlaps,
        device,
    )
    quantize = Launch(
        quantize_blocks,
        batch * heads * q_blocks + 2 * groups * blocks,
        (batch, heads, kv_heads, q_len, kv_len, *strides, eps_q, eps_k, *(flag_strides or (0, 0, 0)), *factors),
        (*constants, dim_out, rows_v, packed, BLOCK, overlaps, INTERPRETED),
        (kinds, more_kinds, v_constant % 4, with_lse_shift, precision, flag_strides is None),
        _WARPS if max(lanes, lanes_v) <= 128 else _WIDE_WARPS,
        overlaps,
        device,
    )
    return _Plan(
        device=device,
        eight_bit=torch.float8_e4m3fn if e4m3 else torch.int8,
        bytes=size,
        q=_dense((batch, heads, q_len, dim_out), q_at),
        k=_dense((batch, kv_heads, blocks * BLOCK, dim_out), k_at),
        v=_dense((batch, kv_heads, blocks, rows_v, BLOCK), v_at),
        half_v=None if e4m3 else (batch, kv_heads, blocks * BLOCK, rows_v),
        floats=floats,
        q_scale=_dense((batch, heads, q_len), q_scale),
        k_scale=_dense((batch, kv_heads, blocks), k_scale),
        v_scale=_dense((batch, kv_heads, blocks), v_scale),
        k_constant=_dense((batch, kv_heads, lanes), k_constant),
        v_constant=_dense((batch, kv_heads, lanes_v), v_constant),
        shift_shape=(batch, heads, q_len),
        kv_len=kv_len,
        dim_v=dim_v,
        sample=sample,
        quantize=quantize,
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _starts(sizes: list[int], multiple: int) -> list[int]:
    """Where parts of these sizes start in one allocation, and its size."""
    return [0, *itertools.accumulate(_round_up(size, multiple) for size in sizes)]


def _dense(shape: tuple[int, ...], start: int) -> _Part:
    strides = [1, *itertools.accumulate(reversed(shape[1:]), operator.mul)]
    return shape, tuple(reversed(strides)), start
