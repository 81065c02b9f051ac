"""q, k and v as FlashAttention-3's FP8 forward takes them: e4m3 in [B, S, H, D], a descale per (batch, kv head).

The values are those of ``quantize_e4m3(x, Granularity.PER_HEAD)``, with less memory traffic: inputs are read in place,
whatever their strides, and no float32 copy of them is made.
"""

from __future__ import annotations

import torch

from lpattn.quantize.e4m3 import E4M3_MAX

_QK_FLOOR = 2.0**-56
"""Smallest descale of q and k. The kernel multiplies softmax_scale, q_descale and k_descale; a product below float32's
normal range is flushed to zero, and zero times the -inf of a fully masked tile would be NaN."""

_V_FLOOR = torch.finfo(torch.float32).tiny


def quantize_qk(x: torch.Tensor, num_kv_heads: int, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize q or k.

    Args:
        x: [B, H, S, D], float16, bfloat16 or float32, any strides.
        num_kv_heads: H / num_kv_heads consecutive heads share a descale.
        factor: 1, -1 or 0; what x is multiplied by.

    Returns:
        The data, torch.float8_e4m3fn [B, S, H, D] contiguous; and the descales, float32 [B, num_kv_heads], positive:
        x * factor = data * descale. A token with an inf or NaN becomes NaN as a whole (so do its logits, whatever its
        other channels hold) and enters no descale.

    Precision:
        descale = amax / 448, at least 2^-56; the division is float32.
    """
    batch, heads, tokens, _ = x.shape
    largest = torch.linalg.vector_norm(x, torch.inf, -1, dtype=torch.float32)  # [B, H, S]
    largest = largest.reshape(batch, num_kv_heads, -1)
    amax = largest.nan_to_num(nan=0.0, posinf=0.0).amax(-1)
    descale = (amax / E4M3_MAX).clamp_min(_QK_FLOOR)
    divisor = descale if factor == 1.0 else descale * (factor or torch.inf)
    # Zero times the largest magnitude is NaN exactly in the tokens that e4m3 cannot express.
    divisor = torch.add(divisor[..., None], largest, alpha=0).view(batch, heads, tokens)
    return _divided(x, divisor[..., None]), descale


def quantize_v(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize v.

    Args:
        x: [B, Hkv, S, D], float16, bfloat16 or float32, any strides.

    Returns:
        As :func:`quantize_qk`, with a descale per head. Other than there, only the element that is inf or NaN becomes
        NaN: the other channels of its token are outputs of their own.

    Precision:
        descale = amax / 448, at least the smallest normal float32; the division is float32.
    """
    # inf + 0 * inf is NaN. What a cast to e4m3 makes of an inf depends on the version of torch: NaN or 448.
    x = torch.add(x, x, alpha=0)
    amax = torch.linalg.vector_norm(x.nan_to_num(nan=0.0), torch.inf, (2, 3), dtype=torch.float32)
    descale = (amax / E4M3_MAX).clamp_min(_V_FLOOR)
    return _divided(x, descale[..., None, None]), descale


def _divided(x: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Compute x / divisor in [B, S, H, D] memory: one pass that reads x and writes e4m3."""
    batch, heads, tokens, dim = x.shape
    data = torch.empty(batch, tokens, heads, dim, dtype=torch.float8_e4m3fn, device=x.device)
    torch.div(x.transpose(1, 2), divisor.transpose(1, 2), out=data)
    return data
