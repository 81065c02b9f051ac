"""What the kernel takes: q, k and v smoothed and rounded to e4m3 with one scale each, and what is added afterwards.

Knows nothing of cuDNN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lpattn import AttentionCall
from lpattn.quantize import E4M3_MAX

OUTPUT_HEADROOM = 1.125
"""How far an output may exceed v's largest magnitude before e4m3 clips it. Rounding to e4m3 makes a weight up to 1/16
larger, and the sum that divides the output counts the weights as they were."""

LEAST_DESCALE = 2.0**-50
"""Of q and k: the product of two is a normal float32, and logits that are lost by it are below 2^-80. cuDNN makes NaN
of a masked logit times a scale of zero. v may be smaller: 2^-100, of which the output's scale is the inverse."""


@dataclass(frozen=True)
class Operands:
    """One call's operands.

    Attributes:
        query, key, value: e4m3, [B, S, H, D] contiguous.
        q_descale, k_descale, v_descale: float32 [1]; value = data * descale.
        o_scale: float32 [1], the factor on an output that is rounded to e4m3.
        k_mean, v_mean: float32 [B, Hkv, 1, D], what was subtracted.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    q_descale: torch.Tensor
    k_descale: torch.Tensor
    v_descale: torch.Tensor
    o_scale: torch.Tensor
    k_mean: torch.Tensor
    v_mean: torch.Tensor


def sign_and_scale(softmax_scale: float) -> tuple[float, float]:
    """(factor on q, softmax scale above 0): kernels take the row's maximum before they scale."""
    return (0.0, 1.0) if softmax_scale == 0.0 else (math.copysign(1.0, softmax_scale), abs(softmax_scale))


def quantize(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> Operands:
    """Smooth k and v, and round all three to e4m3.

    Args:
        query: [B, H, q_len, D]; ``key``, ``value``: [B, Hkv, kv_len, D]. Any strides.
        call: its softmax scale; where that is negative or zero, q takes the sign.

    Precision:
        Means and scales in float32. A scale is the largest finite magnitude over 448, or the least one. An output is a
        mean of v's tokens, so v's largest magnitude bounds it: that makes the output's scale without a second pass.
    """
    k_mean, v_mean = (_finite(x).mean(2, keepdim=True, dtype=torch.float32) for x in (key, value))
    sign, _ = sign_and_scale(call.softmax_scale)
    q, q_descale = _to_e4m3(query.float() * sign)
    k, k_descale = _to_e4m3(key.float() - k_mean)
    v, v_descale = _to_e4m3(value.float() - v_mean, least=2.0**-100)
    return Operands(q, k, v, q_descale, k_descale, v_descale, 1 / (v_descale * OUTPUT_HEADROOM), k_mean, v_mean)


def per_query_head(x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """What belongs to a KV head, [B, Hkv, ...], for each of its query heads: [B, H, ...]."""
    return x.repeat_interleave(call.num_heads // call.num_kv_heads, 1)


def _to_e4m3(x: torch.Tensor, least: float = LEAST_DESCALE) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, S, H, D] contiguous in e4m3, descale [1]); an inf becomes NaN, and neither enters the scale."""
    descale = (_finite(x).abs().amax() / E4M3_MAX).clamp_min(least)
    scaled = torch.where(x.isfinite(), x / descale, torch.nan)
    return scaled.transpose(1, 2).to(torch.float8_e4m3fn, memory_format=torch.contiguous_format), descale.reshape(1)


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
