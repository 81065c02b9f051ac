"""nn.MultiheadAttention and nn.TransformerEncoderLayer, so that their attention can be redirected.

Their fast paths attend inside one C++ operator; that operator is replaced by the same computation around
:func:`lpattn.functional.redirect`. Dynamo puts the slow path, ``F.multi_head_attention_forward``, into the graph as one
opaque function; :mod:`lpattn.eager.traced_functional` has a copy that Dynamo can look into.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lpattn.active import active, current_settings
from lpattn.functional import redirect

_PADDING_MASK = 1
"""The mask_type of the fused operators that means [B, S]; others are [S, S] and [B, H, S, S]. Nonzero is masked out."""


def multi_head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch._native_multi_head_attention``: q, k, v are [B, S, embed_dim]; returns (output, weights).

    With ``need_weights`` the original runs: the weights only exist in exact attention.
    """
    settings = current_settings()
    if need_weights or settings is None or query.is_nested:
        result: tuple[torch.Tensor, torch.Tensor] = torch._native_multi_head_attention(
            query,
            key,
            value,
            embed_dim,
            num_heads,
            qkv_weight,
            qkv_bias,
            proj_weight,
            proj_bias,
            mask,
            need_weights,
            average_attn_weights,
            mask_type,
        )
        return result
    weights = qkv_weight.chunk(3)
    biases = qkv_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    out = redirect(q, k, v, _allowed(mask, mask_type), settings=settings)
    return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias), query.new_empty(0)


def _allowed(mask: torch.Tensor | None, mask_type: int | None) -> torch.Tensor | None:
    if mask is None:
        return None
    allowed = mask.logical_not()
    return allowed[:, None, None, :] if mask_type == _PADDING_MASK else allowed


def encoder_layer(
    src: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: torch.Tensor,
    norm_bias_1: torch.Tensor,
    norm_weight_2: torch.Tensor,
    norm_bias_2: torch.Tensor,
    ffn_weight_1: torch.Tensor,
    ffn_bias_1: torch.Tensor,
    ffn_weight_2: torch.Tensor,
    ffn_bias_2: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> torch.Tensor:
    """``torch._transformer_encoder_layer_fwd``: src is [B, S, embed_dim], or nested (padded sequences packed)."""
    filled: torch.Tensor | None = None
    if src.is_nested:
        # nn.TransformerEncoder packs padded batches. Sizes of nested tensors live on the host: no sync.
        lengths = src._nested_tensor_size()[:, 0]
        src = src.to_padded_tensor(0.0)
        filled = (torch.arange(src.shape[1]) < lengths[:, None]).to(src.device)
        mask, mask_type = ~filled, _PADDING_MASK

    def attend(x: torch.Tensor) -> torch.Tensor:
        return multi_head_attention(
            x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True, mask_type
        )[0]

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm_1(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    layer = active.layer
    if layer is not None:
        # The call belongs to the layer's self_attn, as it does on the slow path.
        active.layer = layer.child("self_attn") or layer
    try:
        if norm_first:
            x = src + attend(norm_1(src))
            x = x + feed_forward(norm_2(x))
        else:
            x = norm_1(src + attend(src))
            x = norm_2(x + feed_forward(x))
    finally:
        active.layer = layer
    return x if filled is None else torch._nested_tensor_from_mask(x, filled)


def traced_encoder_layer_forward(
    layer: nn.TransformerEncoderLayer,
    src: torch.Tensor,
    src_mask: torch.Tensor | None = None,
    src_key_padding_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """nn.TransformerEncoderLayer.forward without its fast path, which Dynamo would take into the graph."""
    src_key_padding_mask = F._canonical_mask(
        mask=src_key_padding_mask,
        mask_name="src_key_padding_mask",
        other_type=F._none_or_dtype(src_mask),
        other_name="src_mask",
        target_type=src.dtype,
    )
    src_mask = F._canonical_mask(
        mask=src_mask,
        mask_name="src_mask",
        other_type=None,
        other_name="",
        target_type=src.dtype,
        check_other=False,
    )
    masks = (src_mask, src_key_padding_mask)
    x = src
    if layer.norm_first:
        x = x + layer._sa_block(layer.norm1(x), *masks, is_causal=is_causal)
        return x + layer._ff_block(layer.norm2(x))
    x = layer.norm1(x + layer._sa_block(x, *masks, is_causal=is_causal))
    return layer.norm2(x + layer._ff_block(x))
