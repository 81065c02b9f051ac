"""The functions themselves: attention that any code can call, and what would happen to a call."""

from __future__ import annotations

from typing import Any

import torch

from lpattn import ops
from lpattn.active import active
from lpattn.arguments import settings_of_call
from lpattn.calls import (
    autocast_dtype,
    build_call,
    cast_like_autocast,
    check_inputs,
    needs_grad,
    outside,
    usual_types,
    without_causal_bias,
)
from lpattn.dispatch import Explanation, explain_call
from lpattn.errors import InvalidArgumentError
from lpattn.execute import attend, attend_rope
from lpattn.norm import check_norm, normalize_both
from lpattn.redirection import put_into_graph
from lpattn.rope import check_rope, rotate_heads_first
from lpattn.tracing import is_traced
from lpattn.types import AttentionBackend, HadamardMode, Norm
from lpattn.varlen import attend_varlen
from lpattn.varlen import check_inputs as check_varlen_inputs


def low_precision_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0,  # no 0.0: see redirection.redirect
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | AttentionBackend | None = None,
    hadamard: str | HadamardMode | None = None,
    on_unsupported: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention in low precision: a drop-in for ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: [B, H, q_len, head_dim], floating point, any strides.
        key: [B, Hkv, kv_len, head_dim]; H is a multiple of Hkv.
        value: [B, Hkv, kv_len, head_dim_v].
        attn_mask: bool (True attends) or additive (float32 or in q's dtype), broadcastable to [B, H, q_len, kv_len]; or
            a ``torch.nn.attention.bias.CausalBias``, which may be aligned at the last query and key.
        dropout_p: dropout probability, in [0, 1].
        is_causal: query i sees keys 0..i (top-left aligned, whatever the two lengths are).
        scale: softmax scale, finite; None is 1/sqrt(head_dim).
        enable_gqa: accepted as in SDPA; fewer kv heads than heads are understood without it, too.
        backend: name of a backend; None leaves the choice to the context manager, the layer, ``LPATTN_BACKEND``, or to
            lpattn, in this order.
        hadamard: rotation before quantization; None is that of the surrounding settings, and NONE without any.
        on_unsupported: ``"fallback"`` runs calls that the backend cannot run exactly, with one warning per reason;
            ``"raise"`` refuses them. None is strict where a backend is named, and falls back where none is.
        return_lse: also return the log-sum-exp.

    Returns:
        [B, H, q_len, head_dim_v] in the dtype of q, in [B, S, H, D]-contiguous memory; with ``return_lse`` a tuple
        (output, lse), lse the natural logarithm, float32 [B, H, q_len], -inf for rows that attend to nothing.

    Raises:
        UnknownBackendError: no backend has the name.
        InvalidArgumentError: wrong shapes, dtypes or devices, or options that contradict each other.
        UnsupportedCallError: the named backend cannot run the call; lists every backend's reasons.

    Precision:
        Whatever the chosen backend states. Inputs that require grad run exactly: there is no backward pass.
    """
    settings = settings_of_call(backend, hadamard, on_unsupported)
    attn_mask, is_causal = without_causal_bias(attn_mask, is_causal, query)
    if is_traced():
        check_inputs(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return put_into_graph(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            settings=settings,
            return_lse=return_lse,
        )
    if not usual_types(query, key, value, attn_mask, dropout_p, is_causal, scale):
        check_inputs(query, key, value, attn_mask, dropout_p, is_causal, scale)
    layer = active.layer
    return attend(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        settings=settings,
        ledger=None if layer is None else layer.ledger,
        return_lse=return_lse,
        check=True,
    )


def low_precision_rope_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0,  # no 0.0: see redirection.redirect
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    interleaved: bool = False,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    norm: Norm | None = None,
    backend: str | AttentionBackend | None = None,
    hadamard: str | HadamardMode | None = None,
    on_unsupported: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Rotate q and k by their positions, then attend, in one fused call where the backend has one.

    ``out[d] = x[d] * cos[d] + rot(x)[d] * sin[d]`` for the first ``rotary_dim`` lanes; the others pass through.

    Args:
        query: [B, S, H, D]; note that heads and lengths are in the layout in front of the usual transpose.
        key: [B, S_kv, Hkv, D]. ``value``: [B, S_kv, Hkv, D_v].
        cos, sin: broadcastable to [B or 1, S, H or 1, rotary_dim], any strides; rotary_dim is even and at most D. The
            halves need not be equal, and cos^2 + sin^2 need not be 1.
        interleaved: rot(x) is (-x[2i+1], x[2i]) if True, else [-x2, x1] with the halves x1, x2 of the rotated lanes.
        cos_k, sin_k: tables of the keys, where their positions differ from those of the queries.
        norm: normalizes q and k first, over D or over all heads, as :class:`lpattn.Norm` says; None does not.
        attn_mask, dropout_p, is_causal, scale, enable_gqa, backend, hadamard, on_unsupported, return_lse: as in
            :func:`low_precision_sdpa`.

    Returns:
        [B, H, S, D_v]: heads first, as SDPA returns it; with ``return_lse`` a tuple (output, lse).

    Raises:
        As :func:`low_precision_sdpa`.
    """
    check_rope(query, key, value, cos, sin, cos_k, sin_k, interleaved)
    check_norm(query, key, norm)
    attn_mask, is_causal = without_causal_bias(attn_mask, is_causal, query)
    check_inputs(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, dropout_p, is_causal, scale
    )
    settings = settings_of_call(backend, hadamard, on_unsupported)
    layer = active.layer
    if is_traced():
        given = () if norm is None else norm.tensors
        gradient = needs_grad(query, key, value, attn_mask, cos, sin, cos_k, sin_k, *given)
        # Autocast casts after the rotation, and while the graph is traced: it is off where compiled code runs.
        if gradient or dropout_p > 0.0 or autocast_dtype(query.device) is not None:
            query, key = normalize_both(query, key, norm)
            q, k = rotate_heads_first(query, key, cos, sin, cos_k, sin_k, interleaved)
            v = value.transpose(1, 2)
            return put_into_graph(
                q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, settings=settings, return_lse=return_lse
            )
        operator = ops.rope_sdpa_lse if return_lse else ops.rope_sdpa
        tag = None if layer is None else layer.tag
        tables = (cos, sin, cos_k, sin_k, interleaved)
        options = (attn_mask, dropout_p, is_causal, scale, tag, settings.text)
        of_norm = () if norm is None else (norm.eps_q, norm.eps_k, *norm.tensors)
        return operator(query, key, value, *tables, *options, *of_norm)
    return attend_rope(
        query,
        key,
        value,
        cos,
        sin,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        interleaved=interleaved,
        cos_k=cos_k,
        sin_k=sin_k,
        norm=norm,
        settings=settings,
        ledger=None if layer is None else layer.ledger,
        return_lse=return_lse,
    )


def low_precision_varlen_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    backend: str | AttentionBackend | None = None,
    hadamard: str | HadamardMode | None = None,
    on_unsupported: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of packed sequences in low precision: the counterpart of ``torch.nn.attention.varlen.varlen_attn``.

    Every query attends to the keys of its own sequence. Where no backend can, sequences run exactly, one by one, for
    which their lengths are copied to the host.

    Args:
        query: [T_q, H, head_dim]: the queries of all sequences behind each other; floating point, any strides.
        key: [T_k, Hkv, head_dim]; H is a multiple of Hkv. ``value``: [T_k, Hkv, head_dim_v].
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1]: where each sequence starts, and the last one ends. Those of
            the keys are those of the queries where they are None.
        max_q, max_k: the largest number of queries and of keys of a sequence, or more. On a CPU, lengths that
            contradict them or the tensors are refused; on a GPU nobody waits to see them: where a kernel runs that
            needs the numbers, the results of such a sequence are NaN.
        scale: softmax scale; None is 1/sqrt(head_dim).
        window_size: (left, right): a query sees so many keys in front of its own position and behind it, -1 for all of
            them; positions are counted from the end of the sequence (bottom-right aligned). (-1, 0) is causal.
        enable_gqa: accepted as in PyTorch; fewer kv heads than heads are understood without it, too.
        backend, hadamard, on_unsupported, return_lse: as in :func:`low_precision_sdpa`.

    Returns:
        [T_q, H, head_dim_v] in the dtype of q, contiguous: zeros for queries that see no key, or lie behind the last
        sequence. With ``return_lse`` a tuple (output, lse), lse the natural logarithm, float32 [T_q, H], -inf for such
        queries.

    Raises:
        As :func:`low_precision_sdpa`.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    packed = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    check_varlen_inputs(*packed, scale, window_size)
    settings = settings_of_call(backend, hadamard, on_unsupported)
    layer = active.layer
    if is_traced():
        if needs_grad(query, key, value):
            raise InvalidArgumentError(
                "packed sequences that require grad cannot be traced; use torch.no_grad() or torch.inference_mode()"
            )
        operator = ops.varlen_sdpa_lse if return_lse else ops.varlen_sdpa
        tag = None if layer is None else layer.tag
        return operator(*packed, scale, *window_size, tag, settings.text)
    ledger = None if layer is None else layer.ledger
    return attend_varlen(
        *packed, scale, (window_size[0], window_size[1]), settings=settings, ledger=ledger, return_lse=return_lse
    )


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | AttentionBackend | None = None,
    hadamard: str | HadamardMode | None = None,
    on_unsupported: str | None = None,
    return_lse: bool = False,
) -> Explanation:
    """What :func:`low_precision_sdpa` would do with these arguments: every known backend, with all its reasons.

    Never launches a kernel and never raises for a call that cannot run; printing the result shows the text.

    Raises:
        InvalidArgumentError: inputs that no attention could take, or that no backend but PyTorch's own SDPA is asked
            about (three-dimensional or nested tensors, batch sizes or heads that broadcast).
    """
    attn_mask, is_causal = without_causal_bias(attn_mask, is_causal, query)
    check_inputs(query, key, value, attn_mask, dropout_p, is_causal, scale)
    settings = settings_of_call(backend, hadamard, on_unsupported)
    query, key, value, _ = cast_like_autocast(query, key, value, None)  # not the mask: see build_call
    if reason := outside(query, key, value, attn_mask, dropout_p, is_causal, scale):
        raise InvalidArgumentError(f"such calls always run on PyTorch's own SDPA: {reason}")
    gradient = needs_grad(query, key, value, attn_mask)
    call = build_call(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        settings.hadamard,
        return_lse,
        requires_grad=gradient,
    )
    return explain_call(call, settings)
