"""What lpattn's own kernels see of the passes: tensors in, e4m3 with scales per token and per block out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lpattn.quantize.fused import operands
from lpattn.quantize.fused.launcher import INTERPRETED, kinds_of, launch
from lpattn.quantize.fused.operands import Keys, Rotation
from lpattn.quantize.fused.per_block import quantize_blocks, sample_blocks
from lpattn.quantize.fused.tile import E4M3_MAX
from lpattn.types import HadamardMode

BLOCK = 128
"""Keys that share a scale."""

_SAMPLE_WARPS = 16
_WARPS = 4


@dataclass(frozen=True)
class PerBlock:
    """q in e4m3 with a scale per token, k and v with one per block of 128 keys: value = data * scale (+ constant).

    PITCH is head_dim rounded up to a multiple of 16 bytes, which the copy engine needs; lanes past head_dim are zeros.

    Attributes:
        query: torch.float8_e4m3fn [B, H, q_len, PITCH], contiguous; of q times ``factor``.
        q_scale: float32 [B, H, q_len], powers of two as all scales.
        key: torch.float8_e4m3fn [B, Hkv, blocks * 128, PITCH], contiguous; zeros past the keys.
        k_scale: float32 [B, Hkv, blocks].
        value: torch.float8_e4m3fn [B, Hkv, blocks, D_v, 128], contiguous: each block transposed, with the keys of every
            group of 16 permuted (see :mod:`.per_block`); zeros past the keys.
        v_scale: float32 [B, Hkv, blocks].
        k_constant, v_constant: float32 [B, Hkv, lanes], what was subtracted from k and v after rotation and transform;
            lanes is head_dim rounded up to a power of two.
        lse_shift: float32 [B, H, q_len], q.constant of k in the unit of q times ``factor``; None unless asked for.
        counts: int32 [B], how many keys are used; None where all are.
        hadamard: the mode that was applied.
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
    lse_shift: torch.Tensor | None
    counts: torch.Tensor | None
    hadamard: HadamardMode
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
    hadamard: HadamardMode = HadamardMode.NONE,
    rope: Rotation | None = None,
    keys: Keys | None = None,
    with_lse_shift: bool = False,
) -> PerBlock:
    """Quantize for lpattn's own kernels in two launches, without waiting for the device.

    Args:
        query: [B, H, q_len, D], float16, bfloat16 or float32, any strides.
        key: [B, Hkv, kv_len, D] in the same dtype. value: [B, Hkv, kv_len, D_v].
        factor: what q is multiplied by, such as the softmax scale times log2(e).
        qk_max: what the largest magnitude of a scale's values in q and k becomes at most, in (0, 448].
        hadamard: which operands are transformed along head_dim, after rotation. D and D_v must then be powers of two.
        rope: rotates q and k first.
        keys: which tokens of k and v are used: these come first, in their order, and are followed by zeros.
        with_lse_shift: also compute q.constant, which the smoothing of k takes from every logit.

    Precision:
        Rotation, transform (inputs rounded to their own dtype in between) and smoothing are float32. Scales are powers
        of two, at least 2^-56 (2^-126 for v), and follow from all of their values. An inf or NaN becomes NaN, alone
        (with a Hadamard transform: its whole token), and enters neither scale nor constant. The oracle is
        :func:`lpattn.quantize.quantize_e4m3` with ``power_of_two=True``, given the constants.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    dim_v = value.shape[3]
    groups, device = batch * kv_heads, query.device
    lanes, lanes_v = operands.lanes_of(dim), operands.lanes_of(dim_v)
    pitch = -(-dim // 16) * 16
    q_blocks, blocks = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    cos_q, sin_q, cos_k, sin_k, turns = operands.tables_of(rope)
    strides, constants = operands.read_as(dim, query.stride(), key.stride(), value.stride(), turns, hadamard)
    unit, dense, turn_unit, turn_dense, _, _, *transforms = constants
    constants = (unit, dense, turn_unit, turn_dense, dim, lanes, dim_v, lanes_v, *transforms)
    indices, counts = (None, None) if keys is None else (keys.indices, keys.counts)
    overlaps = operands.overlaps_on(device)

    data = torch.empty(
        batch * heads * q_len * pitch + groups * blocks * BLOCK * (pitch + dim_v),
        dtype=torch.float8_e4m3fn, device=device,
    )  # fmt: skip
    q_out, k_out, v_out = data.split(
        [batch * heads * q_len * pitch, groups * blocks * BLOCK * pitch, groups * blocks * BLOCK * dim_v]
    )
    q_scale = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device)
    kv_scale = torch.empty((2, batch, kv_heads, blocks), dtype=torch.float32, device=device)
    k_constant = torch.empty((batch, kv_heads, lanes), dtype=torch.float32, device=device)
    # restore_output finds V's constant behind as much as other passes have there.
    start = (3 + 2 * lanes_v) * groups
    buffer = torch.empty(start + lanes_v * groups, dtype=torch.float32, device=device)
    v_constant = buffer[start:].view(batch, kv_heads, lanes_v)
    shift = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device) if with_lse_shift else None
    found = PerBlock(
        query=q_out.view(batch, heads, q_len, pitch),
        q_scale=q_scale,
        key=k_out.view(batch, kv_heads, blocks * BLOCK, pitch),
        k_scale=kv_scale[0],
        value=v_out.view(batch, kv_heads, blocks, dim_v, BLOCK),
        v_scale=kv_scale[1],
        k_constant=k_constant,
        v_constant=v_constant,
        lse_shift=shift,
        counts=counts,
        hadamard=hadamard,
        buffer=buffer,
    )
    kinds = kinds_of((query, key, value, indices, counts, cos_q, sin_q, cos_k, sin_k))
    launch(
        sample_blocks,
        2 * groups,
        (key, value, indices, counts, cos_k, sin_k, k_constant, v_constant),
        (batch, kv_heads, kv_len, *strides[4:12], *strides[16:20]),
        (*constants, overlaps),
        kinds,
        _SAMPLE_WARPS,
        overlaps,
    )
    tensors = (query, key, value, indices, counts, cos_q, sin_q, cos_k, sin_k, k_constant, v_constant)
    written = (found.query, found.key, found.value, q_scale, found.k_scale, found.v_scale, shift)
    # Parts of one allocation: whether they are aligned is a matter of sizes.
    aligned = tuple(x.data_ptr() % 16 == 0 for x in (found.key, found.value, found.v_scale, v_constant))
    launch(
        quantize_blocks,
        batch * heads * q_blocks + 2 * groups * blocks,
        (*tensors, *written),
        (batch, heads, kv_heads, q_len, kv_len, *strides, float(factor), float(qk_max)),
        (*constants, pitch, BLOCK, overlaps, INTERPRETED),
        (kinds, aligned, with_lse_shift),
        _WARPS,
        overlaps,
    )
    return found
