"""nn.MultiheadAttention and nn.TransformerEncoderLayer, so that their attention can be redirected.

Their fast paths attend inside one C++ operator; that operator is replaced by the same computation around
:func:`lpattn.redirection.redirect`. Dynamo puts the slow path, ``F.multi_head_attention_forward``, into the graph as
one opaque function, so that it is written out here, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lpattn.active import active, current_settings, excluded
from lpattn.execute import account_outside
from lpattn.redirection import redirect
from lpattn.types import Reason

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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``torch._native_multi_head_attention``: q, k, v are [B, S, embed_dim]; returns (output, weights or None).

    With ``need_weights`` the original runs: the weights only exist in exact attention.
    """
    settings = current_settings()
    if settings is not None and not need_weights and query.is_nested:
        ledger = None if active.layer is None else active.layer.ledger
        account_outside(Reason("nested", "nested tensors: lpattn takes plain tensors"), settings, ledger)
    if need_weights or settings is None or query.is_nested:
        with excluded():
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
    return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias), None


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
    if src_mask is None and is_causal and _has_fast_path(layer, src):
        is_causal = False  # the fast path takes no hint, and on the slow path one without a mask is an error
    masks = (src_mask, src_key_padding_mask)
    x = src
    if layer.norm_first:
        x = x + layer._sa_block(layer.norm1(x), *masks, is_causal=is_causal)
        return x + layer._ff_block(layer.norm2(x))
    x = layer.norm1(x + layer._sa_block(x, *masks, is_causal=is_causal))
    return layer.norm2(x + layer._ff_block(x))


def _has_fast_path(layer: nn.TransformerEncoderLayer, src: torch.Tensor) -> bool:
    """Whether nn.TransformerEncoderLayer.forward would take its fast path; the conditions are its own."""
    attention = layer.self_attn
    return (
        torch.backends.mha.get_fastpath_enabled()
        and src.dim() == 3
        and not layer.training
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
        and attention.num_heads % 2 == 0
        and not torch.is_autocast_enabled()
        and not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (src, *layer.parameters())))
    )


def can_redirect(options: Mapping[str, Any]) -> bool:
    """Whether a call of F.multi_head_attention_forward with these keyword arguments attends through SDPA."""
    if options.get("attn_mask") is None and options.get("is_causal", False) is not False:
        return False  # a hint about no mask, which the original refuses
    statics = options.get("static_k"), options.get("static_v")
    return not options.get("need_weights", True) and statics == (None, None) and current_settings() is not None


def traced_multi_head_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: torch.Tensor | None,
    in_proj_bias: torch.Tensor | None,
    bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    training: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = False,
    attn_mask: torch.Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: torch.Tensor | None = None,
    k_proj_weight: torch.Tensor | None = None,
    v_proj_weight: torch.Tensor | None = None,
    static_k: torch.Tensor | None = None,
    static_v: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, None]:
    """F.multi_head_attention_forward where :func:`can_redirect` says so; q, k, v are [S, B, E] or [S, E]."""
    settings = current_settings()
    assert settings is not None
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    q_len, batch, embed_dim = query.shape
    if in_proj_weight is not None and not use_separate_proj_weight:
        q_proj_weight, k_proj_weight, v_proj_weight = in_proj_weight.chunk(3)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q = F.linear(query, _present(q_proj_weight), biases[0])
    k = F.linear(key, _present(k_proj_weight), biases[1])
    v = F.linear(value, _present(v_proj_weight), biases[2])
    extra_keys = 0
    if bias_k is not None and bias_v is not None:
        k = torch.cat((k, bias_k.expand(1, batch, -1)))
        v = torch.cat((v, bias_v.expand(1, batch, -1)))
        extra_keys += 1
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
        extra_keys += 1
    # is_causal is a hint about attn_mask: where nothing else is masked, it stands for it. Not where it is a SymBool, as
    # what nn.TransformerEncoder finds out about its mask: a graph cannot branch on that.
    only_causal = is_causal is True and key_padding_mask is None and not extra_keys
    mask = None if only_causal else _merged_mask(attn_mask, key_padding_mask, extra_keys, batch, num_heads, q)
    q, k, v = (x.reshape(x.shape[0], batch, num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    dropout = dropout_p if training else 0.0
    out = redirect(q, k, v, mask, dropout, only_causal, settings=settings)
    out = F.linear(out.permute(2, 0, 1, 3).reshape(q_len, batch, embed_dim), out_proj_weight, out_proj_bias)
    return (out if batched else out.squeeze(1)), None


def _present(weight: torch.Tensor | None) -> torch.Tensor:
    assert weight is not None
    return weight


def _merged_mask(
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    extra_keys: int,
    batch: int,
    num_heads: int,
    query: torch.Tensor,
) -> torch.Tensor | None:
    """Additive mask of both; bool masks of nn.MultiheadAttention mark what is masked out."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (batch, num_heads)) if attn_mask.dim() == 3 else attn_mask[None, None])
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    total = None
    for mask in masks:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))
        total = mask if total is None else total + mask
    return total if total is None or not extra_keys else F.pad(total, (0, extra_keys))
