"""The functions themselves: attention that any code can call, and what would happen to a call."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F

from lpattn import ops
from lpattn.active import active, current_settings
from lpattn.calls import (
    autocast_dtype,
    build_call,
    cast_like_autocast,
    check_inputs,
    needs_grad,
    outside,
    usual_types,
)
from lpattn.dispatch import Explanation, explain_call
from lpattn.errors import InvalidArgumentError, UnsupportedCallError
from lpattn.execute import attend, attend_rope
from lpattn.ledger import Ledger
from lpattn.norm import normalize_both
from lpattn.plan import refusal_outside
from lpattn.registry import registry
from lpattn.rope import rotate_heads_first
from lpattn.settings import Settings, from_text, is_exact, make_settings, with_environment
from lpattn.tracing import constant_while_tracing, is_traced
from lpattn.types import AttentionBackend, HadamardMode, Norm, Provenance, Reason
from lpattn.varlen import attend_varlen
from lpattn.varlen import check_inputs as check_varlen_inputs

_AUTOMATIC = Settings()


def low_precision_sdpa(
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
) -> Any:
    """Attention in low precision: a drop-in for ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: [B, H, q_len, head_dim], floating point, any strides.
        key: [B, Hkv, kv_len, head_dim]; H is a multiple of Hkv.
        value: [B, Hkv, kv_len, head_dim_v].
        attn_mask: bool (True attends) or additive, broadcastable to [B, H, q_len, kv_len].
        dropout_p: dropout probability, in [0, 1].
        is_causal: query i sees keys 0..i (top-left aligned, whatever the two lengths are).
        scale: softmax scale; None is 1/sqrt(head_dim).
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
    settings = _resolve(backend, hadamard, on_unsupported)
    if is_traced() or not usual_types(query, key, value, attn_mask, dropout_p, is_causal, scale):
        check_inputs(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return redirect(
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
        check=True,
    )


def low_precision_rope_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
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
        norm: normalizes q and k over D first, as :class:`lpattn.Norm` says; None does not.
        attn_mask, dropout_p, is_causal, scale, enable_gqa, backend, hadamard, on_unsupported, return_lse: as in
            :func:`low_precision_sdpa`.

    Returns:
        [B, H, S, D_v]: heads first, as SDPA returns it; with ``return_lse`` a tuple (output, lse).

    Raises:
        As :func:`low_precision_sdpa`.
    """
    _check_rope(query, key, value, cos, sin, cos_k, sin_k)
    _check_norm(query, norm)
    check_inputs(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, dropout_p, is_causal, scale
    )
    settings = _resolve(backend, hadamard, on_unsupported)
    layer = active.layer
    if is_traced():
        given = () if norm is None else (norm.weight_q, norm.weight_k)
        gradient = needs_grad(query, key, value, attn_mask, cos, sin, cos_k, sin_k, *given)
        # Autocast casts after the rotation, and while the graph is traced: it is off where compiled code runs.
        if gradient or dropout_p > 0.0 or autocast_dtype(query.device) is not None:
            query, key = normalize_both(query, key, norm)
            q, k = rotate_heads_first(query, key, cos, sin, cos_k, sin_k, interleaved)
            v = value.transpose(1, 2)
            return redirect(
                q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, settings=settings, return_lse=return_lse
            )
        operator = ops.rope_sdpa_lse if return_lse else ops.rope_sdpa
        tag = None if layer is None else layer.tag
        tables = (cos, sin, cos_k, sin_k, interleaved)
        options = (attn_mask, dropout_p, is_causal, scale, tag, settings.text)
        of_norm = () if norm is None else (norm.eps_q, norm.eps_k, norm.weight_q, norm.weight_k)
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
        max_q, max_k: the largest number of queries and of keys of a sequence, or more.
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
    check_varlen_inputs(*packed, window_size)
    settings = _resolve(backend, hadamard, on_unsupported)
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


def redirect(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    settings: Settings,
    return_lse: bool = False,
    check: bool = False,
) -> Any:
    """One SDPA call under settings: run at once in eager mode, put into the graph as an operator while tracing.

    With ``check``, inputs are checked in eager mode as :func:`lpattn.calls.check_inputs` does.
    """
    layer = active.layer
    if not is_traced():
        ledger: Ledger | None = None if layer is None else layer.ledger
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
            ledger=ledger,
            return_lse=return_lse,
            check=check,
        )
    if reason := _unfit_for_graph(query, key, value, attn_mask, dropout_p, is_causal):
        if refusal := _refusal_while_tracing(settings.text, *reason):
            raise UnsupportedCallError(refusal)
        if return_lse:
            raise InvalidArgumentError(f"return_lse cannot be traced for this call: {reason[1]}")
        if layer is not None:
            ops.count_exact(layer.tag, *reason)
        grouped = query.dim() == 4 and query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa or grouped
        )
    query, key, value, attn_mask = cast_like_autocast(query, key, value, attn_mask)
    if torch.compiler.is_dynamo_compiling():
        _look_for_rope()
    operator = ops.sdpa_lse if return_lse else ops.sdpa
    tag = None if layer is None else layer.tag
    return operator(query, key, value, attn_mask, dropout_p, is_causal, scale, tag, settings.text)


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
            about (three-dimensional or nested tensors).
    """
    check_inputs(query, key, value, attn_mask, dropout_p, is_causal, scale)
    settings = _resolve(backend, hadamard, on_unsupported)
    query, key, value, _ = cast_like_autocast(query, key, value, None)  # not the mask: see build_call
    if reason := outside(query, key, value, attn_mask, dropout_p, is_causal):
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


def _resolve(
    backend: str | AttentionBackend | None, hadamard: str | HadamardMode | None, on_unsupported: str | None
) -> Settings:
    surrounding = current_settings() or _AUTOMATIC
    if backend is None and hadamard is None and on_unsupported is None:
        return surrounding
    if not all(isinstance(argument, (str, type(None))) for argument in (backend, hadamard, on_unsupported)):
        make_settings(backend, hadamard, on_unsupported, Provenance.ARGUMENT)  # raises, and names the value
    if torch.compiler.is_compiling():
        return _merged_while_tracing(backend, hadamard, on_unsupported, surrounding.text)
    return _merged(backend, hadamard, on_unsupported, surrounding.text, registry.generation)


@functools.lru_cache(maxsize=256)
def _merged(
    backend: str | AttentionBackend | None,
    hadamard: str | HadamardMode | None,
    on_unsupported: str | None,
    surrounding_text: str,
    generation: int,
) -> Settings:
    """A call's own arguments over the surrounding settings. The generation keeps stale names out of the cache."""
    surrounding = from_text(surrounding_text)
    named = backend is not None
    if hadamard is None:
        hadamard = HadamardMode.NONE if backend is not None and is_exact(backend) else surrounding.hadamard
    settings = make_settings(
        backend if named else surrounding.backend,
        hadamard,
        on_unsupported if on_unsupported is not None else (None if named else surrounding.on_unsupported),
        Provenance.ARGUMENT,
    )
    provenance = Provenance.ARGUMENT if named else surrounding.provenance
    return dataclasses.replace(settings, provenance=provenance, scope=surrounding.scope)


@constant_while_tracing
def _merged_while_tracing(
    backend: str | AttentionBackend | None,
    hadamard: str | HadamardMode | None,
    on_unsupported: str | None,
    surrounding_text: str,
) -> Settings:
    return _merged(backend, hadamard, on_unsupported, surrounding_text, registry.generation)


def _unfit_for_graph(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> tuple[str, str] | None:
    """Code and message of why a traced call must stay PyTorch's own SDPA; None if it can become an operator."""
    if needs_grad(query, key, value, attn_mask):
        return "requires_grad", "inputs require grad, and compiled low precision has no backward pass"
    if dropout_p > 0.0:
        return "dropout", "dropout_p > 0: an operator's random numbers would not be the compiler's"
    if query.is_nested or query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return "dimensions", "q, k, v are not plain [B, H, S, D] tensors"
    if query.shape[0] != key.shape[0]:
        return "shapes", "q and k have different batch sizes"
    if is_causal and attn_mask is not None:
        return "mask_and_causal", "both attn_mask and is_causal=True"
    return None


@constant_while_tracing
def _look_for_rope() -> None:
    """Have the compilation that traces this call look for rotations in front of it. An export compiles nothing."""
    if torch.compiler.is_exporting():
        return
    from lpattn.compile.install import install  # imports inductor

    install()


@constant_while_tracing
def _refusal_while_tracing(settings_text: str, code: str, message: str) -> str:
    return refusal_outside(with_environment(from_text(settings_text)), Reason(code, message))


def _check_norm(query: torch.Tensor, norm: Norm | None) -> None:
    if norm is None:
        return
    if not isinstance(norm, Norm):
        raise InvalidArgumentError(f"norm must be a lpattn.Norm; got {type(norm).__name__}")
    for name, eps, weight in (("q", norm.eps_q, norm.weight_q), ("k", norm.eps_k, norm.weight_k)):
        if eps is not None and not 0.0 <= eps < float("inf"):
            raise InvalidArgumentError(f"norm.eps_{name} must be at least 0 and finite, or None; got {eps}")
        if weight is None:
            continue
        if eps is None:
            raise InvalidArgumentError(f"norm.weight_{name} is given, but norm.eps_{name} is None: {name} has no norm")
        if tuple(weight.shape) != query.shape[-1:] or not weight.dtype.is_floating_point:
            raise InvalidArgumentError(
                f"norm.weight_{name} must be floating point of shape [head_dim] = {list(query.shape[-1:])}; got "
                f"{weight.dtype} {list(weight.shape)}"
            )
        if weight.device != query.device:
            raise InvalidArgumentError(f"norm.weight_{name} must be on {query.device} as q is; got {weight.device}")


def _check_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None,
    sin_k: torch.Tensor | None,
) -> None:
    if (cos_k is None) != (sin_k is None):
        raise InvalidArgumentError("cos_k and sin_k go together; got only one of them")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            got = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InvalidArgumentError(f"{name} must be a [B, S, H, D] tensor; got {got}")
    tables = [("cos", cos, query), ("sin", sin, query)]
    if cos_k is not None and sin_k is not None:
        tables += [("cos_k", cos_k, key), ("sin_k", sin_k, key)]
    for name, table, _ in tables:
        if not isinstance(table, torch.Tensor):
            raise InvalidArgumentError(f"{name} must be a tensor; got {table!r} ({type(table).__name__})")
    rotary_dim = cos.shape[-1] if cos.dim() else 0
    if rotary_dim % 2 or not 0 < rotary_dim <= query.shape[-1]:
        raise InvalidArgumentError(
            f"rotary_dim, the last dimension of cos, must be even and at most head_dim {query.shape[-1]}; "
            f"got {rotary_dim}"
        )
    if cos_k is None:
        tables += [("cos (for the keys)", cos, key), ("sin (for the keys)", sin, key)]
    for name, table, x in tables:
        full = (*x.shape[:3], rotary_dim)
        if table.device != x.device:
            raise InvalidArgumentError(f"{name} must be on {x.device} as q and k are; got {table.device}")
        shape = (1,) * (4 - table.dim()) + tuple(table.shape)
        # Tables without an axis for heads would broadcast positions over heads: ask for the axis, do not guess.
        headless = table.dim() < 3 or (table.dim() == 3 and shape[1] in (1, full[0]) and shape[2] == full[1] != 1)
        fits = len(shape) == 4 and shape[3] == rotary_dim and not headless
        if not fits or any(t not in (1, f) for t, f in zip(shape, full, strict=True)):
            raise InvalidArgumentError(
                f"{name} {list(table.shape)} must broadcast to [B, S, H, rotary_dim] = {list(full)}"
                "\n[S, rotary_dim] and [B, S, rotary_dim] tables need an axis for heads: cos.unsqueeze(-2)"
            )
