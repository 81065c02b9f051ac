"""Attention as an FP8 kernel computes it: e4m3 operands, online softmax over key tiles, P rounded tile by tile.

Owns the order of operations. Casts, rotation, smoothing and masks live in the modules next to it.
"""

from __future__ import annotations

import contextlib
from typing import Literal, overload

import torch

from lpattn.errors import InvalidArgumentError
from lpattn.predicates import FLOATING, FLOATING_NAMES
from lpattn.quantize.e4m3 import Granularity, Quantized, quantize_e4m3, round_e4m3
from lpattn.quantize.exponential import Exponential, e4m3_weights
from lpattn.quantize.hadamard import hadamard_transform
from lpattn.quantize.recipe import Recipe, RowSum
from lpattn.quantize.smoothing import channel_mean
from lpattn.quantize.visibility import Visibility
from lpattn.types import HadamardMode


@overload
def emulated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    recipe: Recipe,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def emulated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    recipe: Recipe,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def emulated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    recipe: Recipe,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def emulated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    recipe: Recipe,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention with q, k, v and P rounded to e4m3 as the recipe says, in plain PyTorch on any device.

    Masks, causality, scale and empty or fully masked rows mean what they mean to scaled_dot_product_attention.

    Args:
        query: [B, H, q_len, D], float16, bfloat16, float32 or float64, any strides.
        key: [B, Hkv, kv_len, D] in the same dtype; H is a multiple of Hkv, and query head h reads KV head h*Hkv // H.
        value: [B, Hkv, kv_len, D_v] in the same dtype.
        recipe: what is rounded, and how.
        attn_mask: bool (True attends) or additive float, broadcastable to [B, H, q_len, kv_len]. Default: none.
        is_causal: query i sees keys 0..i (top-left aligned); together with attn_mask both apply. Default: False.
        softmax_scale: factor on q.k. Default: 1/sqrt(D).
        return_lse: return the log-sum-exp too. Default: False.

    Returns:
        [B, H, q_len, D_v] in the dtype of q; zeros in rows that attend to nothing. With ``return_lse`` a tuple
        (output, lse): lse in float32 [B, H, q_len], natural logarithm, -inf in rows that attend to nothing.

    Raises:
        InvalidArgumentError: shapes, dtypes or devices do not fit, or an input requires grad while grad is enabled.

    Precision:
        q, k, v and P are rounded to e4m3; products of e4m3 values are exact and are accumulated in float32 (float64
        for float64 inputs or masks), one accumulator per key tile, which is added to the rescaled output. One
        division at the end. Tokens that are masked for every query of a KV head enter no scale and no mean, and may
        hold anything. A NaN or inf (which e4m3 does not have: it becomes NaN) in k or v reaches the rows that attend
        to its token; in q, its own row. Magnitudes above about 1e36 may overflow in the rotation or smoothing.
        Memory is O(q_len * tile) per head.

    Source:
        Online softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867). P times 2^8 before the cast and one descale per
        KV head: FlashAttention-3 (arXiv:2407.08608, section 3.3). K's mean: SageAttention (arXiv:2410.02367).
    """
    _check(query, key, value, attn_mask)
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len, dim_v = value.shape[1:]
    if 0 in (batch, heads, q_len, kv_len):
        output = query.new_zeros(batch, heads, q_len, dim_v)
        lse = torch.full((batch, heads, q_len), -torch.inf, dtype=torch.float32, device=query.device)
        return (output, lse) if return_lse else output

    work = torch.promote_types(query.dtype, torch.float32)
    if attn_mask is not None and attn_mask.is_floating_point():
        work = torch.promote_types(work, attn_mask.dtype)  # a smaller type would turn finite biases into -inf
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    group = heads // kv_heads
    visibility = Visibility(attn_mask, is_causal, (batch, kv_heads, group, q_len, kv_len), query.device)
    # Contiguous, because sums in another order would round differently for other strides of the same values.
    q, k, v = (x.to(work).contiguous() for x in (query, key, value))
    # Autocast would run the products below in bfloat16.
    with _no_autocast(query.device.type):
        output, lse = _attend(q, k, v, recipe, visibility, scale)
    output = output.to(query.dtype)
    return (output, lse.float()) if return_lse else output


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, recipe: Recipe, visibility: Visibility, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    kv_heads = key.shape[1]
    used_queries, used_keys = visibility.used(recipe.tile)
    if used_queries is not None:
        used_queries = used_queries.expand(-1, kv_heads, query.shape[1] // kv_heads, -1).flatten(1, 2)

    k_mean = channel_mean(key, used_keys, recipe.smooth_every) if recipe.smooth_k else None
    v_mean = channel_mean(value, used_keys, recipe.smooth_every) if recipe.smooth_v else None
    q, k = query, key if k_mean is None else key - k_mean
    v = value if v_mean is None else value - v_mean
    if recipe.hadamard is HadamardMode.QKV:
        q, k = hadamard_transform(q), hadamard_transform(k)
    if recipe.hadamard is not HadamardMode.NONE:
        v = hadamard_transform(v)

    def quantize(x: torch.Tensor, granularity: Granularity, qmax: float, used: torch.Tensor | None) -> Quantized:
        return quantize_e4m3(
            x,
            granularity,
            block=recipe.block,
            qmax=qmax,
            used=used,
            num_kv_heads=kv_heads,
            power_of_two=recipe.power_of_two,
        )

    output, maximum, row_sum = _online_softmax(
        quantize(q, recipe.q_granularity, recipe.qk_max, used_queries),
        quantize(k, recipe.k_granularity, recipe.qk_max, used_keys),
        quantize(v, recipe.v_granularity, recipe.v_max, used_keys),
        recipe,
        visibility,
        scale,
    )
    nothing = row_sum == 0  # the row's largest weight alone contributes p_scale, so only rows without keys sum to 0
    output = output / row_sum
    lse = maximum + (row_sum / recipe.p_scale).log()
    if recipe.hadamard is not HadamardMode.NONE:
        output = hadamard_transform(output)[..., : value.shape[3]]
    if v_mean is not None:
        output = output + v_mean[:, :, None]
    if k_mean is not None:
        lse = lse + ((query * scale).unflatten(1, (kv_heads, -1)) * k_mean[:, :, None]).sum(-1, keepdim=True)
    output = output.masked_fill(nothing, 0.0)
    lse = lse.masked_fill(nothing, -torch.inf)
    return output.flatten(1, 2), lse.squeeze(-1).flatten(1, 2)


def _online_softmax(
    query: Quantized, key: Quantized, value: Quantized, recipe: Recipe, visibility: Visibility, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loop over key tiles.

    Returns:
        (output, maximum, row_sum) of shapes [B, Hkv, G, q_len, D_v or 1 or 1]: the output times row_sum, the row's
        largest logit (-inf where there is none), and the sum of exp(logit - maximum) * p_scale.
    """
    work, kv_heads = query.scale.dtype, key.data.shape[1]
    q = query.data.to(work).unflatten(1, (kv_heads, -1))  # [B, Hkv, G, q_len, D]
    q_scale = (query.broadcast_scale() * scale).expand(-1, -1, q.shape[3], -1).unflatten(1, (kv_heads, -1))
    k_scale, v_scale = key.broadcast_scale(), value.broadcast_scale()
    # Looking is free on a CPU; elsewhere it would wait for the device, and break CUDA-graph capture.
    look_for_nan = value.data.device.type != "cpu" or bool(value.data.to(work).isnan().any())

    output = q.new_zeros(*q.shape[:4], value.data.shape[3])
    maximum = q.new_full((*q.shape[:4], 1), -torch.inf)
    row_sum = q.new_zeros(*q.shape[:4], 1)
    for start, stop, first_row in visibility.tiles(recipe.tile):
        rows = (Ellipsis, slice(first_row, None), slice(None))
        visible, bias = visibility.tile(start, stop, first_row)
        k = key.data[:, :, None, start:stop].to(work)  # [B, Hkv, 1, tile, D]
        v = value.data[:, :, None, start:stop].to(work)
        # Raw e4m3 values go into the product: they are exact even where float32 products run in TF32 or bfloat16.
        # All keys of a tile share their scale, so it joins q's before either can overflow the sum.
        logits = (q[rows] @ k.mT) * (q_scale[rows] * k_scale[:, :, None, _first(k_scale, start)])
        if bias is not None:
            logits = logits + bias.to(work)
        if visible is not None:
            logits = logits.masked_fill(~visible, -torch.inf)  # also where a masked key made the logit NaN

        old = maximum[rows]
        new = torch.maximum(old, logits.amax(-1, keepdim=True))
        shift = new.masked_fill(new == -torch.inf, 0.0)  # no key yet: exp(-inf - 0) is 0, exp(-inf + inf) is not
        if recipe.exponential is Exponential.EXACT:
            p = (logits - shift).exp() * recipe.p_scale
            rounded = _round_p(p)
        else:
            p = rounded = e4m3_weights(logits - shift, recipe.exponential, recipe.p_scale)
        alpha = (old - shift).exp()
        summed = rounded if recipe.row_sum is RowSum.ROUNDED else p
        maximum[rows] = new
        row_sum[rows] = row_sum[rows] * alpha + summed.sum(-1, keepdim=True)
        product = _weigh(rounded, v, visible if look_for_nan else None)
        output[rows] = output[rows] * alpha + product * v_scale[:, :, None, _first(v_scale, start)]
    return output, maximum, row_sum


def _round_p(p: torch.Tensor) -> torch.Tensor:
    return round_e4m3(p).to(p.dtype)


def _weigh(p: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """The product p @ v, where a NaN in v reaches only the rows that see its key (0 * NaN would reach them all)."""
    if visible is None:
        return p @ v
    nan = v.isnan()
    reached = (visible.expand(*visible.shape[:-1], v.shape[-2]).to(p.dtype) @ nan.to(p.dtype)) > 0
    return (p @ v.masked_fill(nan, 0.0)).masked_fill(reached, torch.nan)


def _first(scale: torch.Tensor, start: int) -> slice:
    """Where the scale of the tile that begins at ``start`` lies: one per token, or one for all tokens."""
    return slice(start, start + 1) if scale.shape[2] > 1 else slice(None)


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None) -> None:
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise InvalidArgumentError(
                f"{name} must be [B, H, S, D]; got {tensor.dim()} dimensions: {list(tensor.shape)}. "
                "Add the missing ones with unsqueeze"
            )
        if tensor.dtype not in FLOATING:
            raise InvalidArgumentError(f"{name} must be one of {FLOATING_NAMES}; got {tensor.dtype}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise InvalidArgumentError(
                f"{name} must have the dtype and device of query, {query.dtype} on {query.device}; "
                f"got {tensor.dtype} on {tensor.device}"
            )
    batch, heads, _, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != dim or dim == 0:
        raise InvalidArgumentError(
            f"key must share query's batch and head_dim (at least 1), {batch} and {dim}; got {list(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise InvalidArgumentError(
            f"value must share key's [B, Hkv, kv_len], {[batch, kv_heads, kv_len]}; got {list(value.shape[:3])}"
        )
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise InvalidArgumentError(f"query's number of heads, {heads}, must be a multiple of key's; got {kv_heads}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, attn_mask) if t is not None):
        raise InvalidArgumentError(
            "an input requires grad, and rounding to e4m3 has no useful gradient. Use torch.no_grad(), or detach()"
        )
