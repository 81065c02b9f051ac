"""Exact attention in float64, and the measures by which an output is held against it. Knows torch alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its formula, with the meaning of ``scaled_dot_product_attention``.

    Args:
        query: [B, H, q_len, D], any floating-point dtype.
        key: [B, Hkv, kv_len, D]; query head h reads KV head h * Hkv // H.
        value: [B, Hkv, kv_len, D_v].
        attn_mask: bool (True attends) or additive, broadcastable to [B, H, q_len, kv_len].
        is_causal: query i sees keys 0..i (top-left aligned).
        scale: factor on q.k; None is 1/sqrt(D).

    Returns:
        (output, lse) in float64: [B, H, q_len, D_v], and [B, H, q_len] in natural logarithms. Rows that attend to
        nothing are 0, their lse -inf.

    Precision:
        float64 throughout.
    """
    groups = query.shape[1] // key.shape[1]
    q = query.double()
    k, v = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        columns = torch.arange(scores.shape[-1], device=scores.device)
        rows = torch.arange(scores.shape[-2], device=scores.device)[:, None]
        scores = scores.masked_fill(columns > rows, -torch.inf)
    if attn_mask is not None:
        hides = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hides else scores + attn_mask.double()
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.sum(-1) - torch.inf
    # Not as exp(scores - lse): next to a bias such as finfo.min, the logarithm of the number of keys is lost in lse.
    weights = torch.where(lse[..., None] == -torch.inf, 0.0, scores.softmax(-1))
    return weights @ v, lse


def pytorch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor | None:
    """What PyTorch's own SDPA returns, which need not be right; None where its kernels for the device refuse the call.

    The arguments are those of :func:`exact_attention`.
    """
    grouped = query.shape[1] != key.shape[1]
    try:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
    except (RuntimeError, IndexError):  # the latter of masks of one dimension
        return None


def sqnr(reference: torch.Tensor, output: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio, 10 * log10(sum(ref^2) / sum((ref - out)^2)), in dB.

    Returns:
        inf where both are equal, -inf where the output is not finite.
    """
    reference, output = reference.detach().double(), output.detach().double()
    noise = float((reference - output).square().sum())
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0.0:
        return math.inf
    signal = float(reference.square().sum())
    return 10 * math.log10(signal / noise) if signal else -math.inf


def worst_row_sqnr(reference: torch.Tensor, output: torch.Tensor) -> float:
    """The SQNR of the worst row in dB.

    A row counts at least a tenth of the whole's magnitude as its signal, and more where D_v is small: a row of few
    lanes is near zero by chance, and a relative error of almost nothing says nothing. One lane counts the whole's.
    """
    reference, output = reference.double(), output.double()
    noise = (reference - output).square().mean(-1)
    if not bool(noise.isfinite().all()):
        return -math.inf
    least = max(0.01, 1 / max(reference.shape[-1], 1))
    signal = torch.maximum(reference.square().mean(-1), least * reference.square().mean())
    worst = float((noise / signal).nan_to_num(nan=0.0).max())
    return math.inf if worst == 0.0 else -10 * math.log10(worst)


def fitted_scales(
    outputs_at: tuple[torch.Tensor, torch.Tensor, torch.Tensor], step: float, output: torch.Tensor
) -> tuple[float, float]:
    """By which factors the output, and the softmax scale, are off: both fitted at once, by least squares.

    Rounding errors have no direction, and cancel in the fit: 16,000 elements of 25 dB leave 0.001.

    Args:
        outputs_at: exact outputs at the softmax scale times 1 - step, 1 and 1 + step.
        step: a small number.
        output: of the same shape.

    Returns:
        (factor on the output, factor on the softmax scale); 1.0 is right.
    """
    low, exact, high = (x.double() for x in outputs_at)
    slope = (high - low) / (2 * step)
    columns = torch.stack((exact.flatten(), slope.flatten()), dim=1)
    # A factor g on the output and s on the softmax scale make it g * (exact + (s - 1) * slope), to first order.
    gain, product = torch.linalg.lstsq(columns, output.double().reshape(-1, 1)).solution.flatten().tolist()
    return gain, 1 + product / gain
