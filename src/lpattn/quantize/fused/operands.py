"""What callers see of the passes: tensors in, e4m3 and scales out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from lpattn.quantize.fused import layout
from lpattn.quantize.fused.keys import list_used
from lpattn.quantize.fused.launcher import INTERPRETED, launch
from lpattn.quantize.fused.output import restore
from lpattn.quantize.fused.per_head import quantize_heads, sample_heads
from lpattn.quantize.fused.tile import HALF_SPLIT, HALF_SPLIT_PARTIAL, INTERLEAVED, NO_ROPE
from lpattn.types import HadamardMode

_TOKENS = 64
_TILES = 4
_STAGES = 1
_WARPS = 4
_SAMPLE_WARPS = 8


@dataclass(frozen=True)
class Rotation:
    """RoPE tables, as :func:`lpattn.low_precision_rope_sdpa` takes them, made to broadcast.

    Attributes:
        cos, sin: of q, [B, S, H, rotary_dim], any strides (0 where they broadcast).
        cos_k, sin_k: of k.
        interleaved: which lanes form a pair.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    cos_k: torch.Tensor
    sin_k: torch.Tensor
    interleaved: bool


@dataclass(frozen=True)
class Keys:
    """Tokens of k and v that are used.

    Attributes:
        indices: int32 [B, kv_len]: their positions in increasing order, then anything.
        counts: int32 [B]: how many.
    """

    indices: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class PerHead:
    """q, k and v in e4m3 with a descale per (batch, KV head): value = data * descale (+ constant, for k and v).

    Attributes:
        query: torch.float8_e4m3fn [B, H, q_len, D], contiguous; of q times ``factor``.
        key, value: torch.float8_e4m3fn [B, Hkv, kv_len, D], contiguous.
        descale: float32 [3, B, Hkv], of q, k and v; powers of two.
        constant: float32 [2, B, Hkv, lanes], what was subtracted from k and from v after rotation and transform; lanes is
            D padded to a power of two. V's is zero where its mean is not significant.
        lse_shift: float32 [B, H, q_len], q.constant of k; None unless it was asked for.
        hadamard: the mode that was applied.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    descale: torch.Tensor
    constant: torch.Tensor
    lse_shift: torch.Tensor | None
    hadamard: HadamardMode
    buffer: torch.Tensor


def used_keys(mask: torch.Tensor, batch: int, kv_len: int) -> Keys:
    """The tokens that a key-padding mask lets through, in one launch.

    Args:
        mask: bool, broadcastable to [B, 1, 1, kv_len]; True where a token is used.
        batch: B.
        kv_len: number of tokens.
    """
    indices = torch.empty((batch, kv_len), dtype=torch.int32, device=mask.device)
    counts = torch.empty((batch,), dtype=torch.int32, device=mask.device)
    rows = mask.expand(batch, 1, 1, kv_len)
    launch(list_used, batch, (rows, indices, counts), (rows.stride(0), rows.stride(3), kv_len), (1024,), 4)
    return Keys(indices, counts)


def quantize_per_head(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    factor: float = 1.0,
    hadamard: HadamardMode = HadamardMode.NONE,
    rope: Rotation | None = None,
    keys: Keys | None = None,
    with_lse_shift: bool = False,
) -> PerHead:
    """Quantize in two launches, without waiting for the device.

    Args:
        query: [B, H, q_len, D], float16, bfloat16 or float32, any strides.
        key, value: [B, Hkv, kv_len, D] in the same dtype.
        factor: what q is multiplied by.
        hadamard: which operands are transformed along head_dim, after rotation. D must then be a power of two.
        rope: rotates q and k first.
        keys: which tokens of k and v are used: these come first, in their order, and are followed by zeros.
        with_lse_shift: also compute q.constant, which the smoothing of k takes from every logit.

    Precision:
        Rotation, transform (inputs rounded to their own dtype in between) and smoothing are float32. Scales are powers of
        two, at least 2^-56 (2^-126 for v), and map the largest magnitude to between 14 and 448: where only a sample of
        the tokens was looked at, there is headroom for the others. A token of q or k with an inf or NaN becomes NaN as
        a whole, of v only that element (with a Hadamard transform, the token), and neither enters scale or constant.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    lanes = max(triton.next_power_of_2(dim), 32)
    device = query.device
    q_size, kv_size = query.numel(), key.numel()
    data = torch.empty(q_size + 2 * kv_size, dtype=torch.float8_e4m3fn, device=device)
    q_out = data.as_strided(query.shape, (heads * q_len * dim, q_len * dim, dim, 1), 0)
    k_out = data.as_strided(key.shape, (kv_heads * kv_len * dim, kv_len * dim, dim, 1), q_size)
    v_out = data.as_strided(key.shape, (kv_heads * kv_len * dim, kv_len * dim, dim, 1), q_size + kv_size)

    q_parts = layout.parts(q_len, layout.FEW.value)
    k_parts = layout.parts(kv_len, layout.FEW.value)
    v_parts = layout.parts(kv_len, layout.MANY.value)
    groups = batch * kv_heads
    all_parts = batch * heads * q_parts + groups * (k_parts + v_parts)
    buffer = torch.empty(layout.size(groups, lanes, all_parts), dtype=torch.float32, device=device)
    descale = buffer.as_strided((3, batch, kv_heads), (groups, kv_heads, 1), 0)
    constant = buffer.as_strided(
        (2, batch, kv_heads, lanes), (groups * lanes, kv_heads * lanes, lanes, 1), (3 + lanes) * groups
    )
    shift = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device) if with_lse_shift else None

    strides, unit, dense = _in_units((*query.stride(), *key.stride(), *value.stride()))
    indices, counts = (None, None) if keys is None else (keys.indices, keys.counts)
    cos_q = sin_q = cos_k = sin_k = None
    turns, turn_unit, turn_dense = (0,) * 8, 1, True
    kind, rotary = NO_ROPE.value, 0
    if rope is not None:
        cos_q, sin_q = _alike(rope.cos, rope.sin)
        cos_k, sin_k = _alike(rope.cos_k, rope.sin_k)
        rotary = cos_q.shape[-1]
        whole = rotary == dim == lanes
        kind = (INTERLEAVED if rope.interleaved else HALF_SPLIT if whole else HALF_SPLIT_PARTIAL).value
        turns, turn_unit, turn_dense = _in_units((*_bhsd(cos_q), *_bhsd(cos_k)))
    constants = (
        unit, dense, turn_unit, turn_dense, dim, lanes, kind, rotary,
        hadamard is HadamardMode.QKV, hadamard is not HadamardMode.NONE,
    )  # fmt: skip
    sizes = (batch, heads, kv_heads, q_len, kv_len, q_parts, k_parts, v_parts)
    inputs = (query, key, value, indices, counts, cos_q, sin_q, cos_k, sin_k, buffer)
    launch(sample_heads, all_parts, inputs, (*sizes, *strides, *turns), constants, _SAMPLE_WARPS)
    tokens = _TOKENS * _TILES
    launch(
        quantize_heads,
        batch * heads * -(-q_len // tokens) + 2 * groups * -(-kv_len // tokens),
        (*inputs, q_out, k_out, v_out, shift),
        (*sizes, *strides, *turns, float(factor)),
        (*constants, _TOKENS, _TILES, _STAGES, triton.next_power_of_2(heads // kv_heads * q_parts), INTERPRETED),
        _WARPS,
    )
    return PerHead(q_out, k_out, v_out, descale, constant, shift, hadamard, buffer)


def restore_output(out: torch.Tensor, quantized: PerHead, dtype: torch.dtype) -> torch.Tensor:
    """Add V's constant to an attention output, undo V's Hadamard transform, and cast: one launch.

    Args:
        out: [B, q_len, H, D], contiguous: attention over ``quantized.value``. Overwritten where ``dtype`` is its own.
        quantized: what the attention ran on.
        dtype: of the result.

    Returns:
        [B, q_len, H, D] in ``dtype``, contiguous.

    Precision:
        The sum is float32; the transform takes it rounded to out's dtype. Values beyond float16's range become its
        largest where that is the dtype.
    """
    batch, q_len, heads, dim = out.shape
    to = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    limit = torch.finfo(dtype).max if dtype == torch.float16 else 0.0
    lanes = quantized.constant.shape[-1]
    launch(
        restore,
        batch * heads * -(-q_len // _TOKENS),
        (out, to, quantized.buffer),
        (batch, heads, quantized.key.shape[1], q_len, limit),
        (dim, lanes, quantized.hadamard is not HadamardMode.NONE, _TOKENS),
        _WARPS,
    )
    return to


def _alike(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two with equal strides, so that one set of them serves both."""
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def _bhsd(turn: torch.Tensor) -> tuple[int, int, int, int]:
    b, s, h, d = turn.stride()
    return b, h, s, d


def _in_units(strides: tuple[int, ...]) -> tuple[tuple[int, ...], int, bool]:
    """(B, H, S, D) strides of some tensors, the unit that all but D's are given in, and whether D's are all 1.

    In units of 8 elements, where that can be, the compiler sees that loads are aligned whatever the strides are.
    """
    dense = all(stride == 1 for stride in strides[3::4])
    unit = 8 if dense and not any(stride % 8 for axis in range(3) for stride in strides[axis::4]) else 1
    return tuple(s if i % 4 == 3 else s // unit for i, s in enumerate(strides)), unit, dense
