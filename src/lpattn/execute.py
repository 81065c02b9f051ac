"""Runs one attention call: counts it, warns once per reason, and brings the output into its layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from lpattn.active import NOTHING, is_redirecting, outside_redirection
from lpattn.calls import autocast_dtype, cast_like_autocast, is_grouped, narrowed_mask, needs_grad
from lpattn.dispatch import reason_lines
from lpattn.errors import BackendError, InvalidArgumentError, warn
from lpattn.ledger import Ledger
from lpattn.norm import normalize_both
from lpattn.plan import QUIET_CODES, Plan, bshd_strides, make_plan, outside_plan
from lpattn.rope import rotate_heads_first
from lpattn.settings import Settings
from lpattn.types import AttentionCall, Choice, HadamardMode, Norm, Reason, Rope

_warned: set[tuple[int, str, str]] = set()


def attend(
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
    ledger: Ledger | None = None,
    return_lse: bool = False,
    check: bool = False,
) -> Any:
    """Attention with the meaning of SDPA, on the backend that the settings lead to.

    Args:
        query: [B, H, q_len, head_dim]; the other tensors and options as in SDPA.
        settings: what the user asked for.
        ledger: counts the call; None counts nothing.
        return_lse: also return the log-sum-exp.
        check: as lpattn's own functions do: check inputs that were not seen before by
            :func:`lpattn.calls.check_inputs`, and take fewer KV heads than heads without ``enable_gqa``.

    Returns:
        [B, H, q_len, head_dim_v] in [B, S, H, D]-contiguous memory; with return_lse a tuple (output, lse).

    Raises:
        UnsupportedCallError: strict settings, and the wanted backend cannot run the call.
        InvalidArgumentError: ``check`` found the inputs to be wrong.
    """
    if isinstance(scale, torch.Tensor) or isinstance(dropout_p, torch.Tensor):
        # SDPA reads them at every call: a plan that knew the tensor would not notice another value.
        scale, dropout_p = (x.item() if isinstance(x, torch.Tensor) else x for x in (scale, dropout_p))
    gradient = needs_grad(query, key, value, attn_mask)
    plan = make_plan(
        query, key, value, attn_mask, dropout_p, is_causal, scale, settings, return_lse, gradient, check=check
    )
    if plan.grouped and not (enable_gqa or check):  # which SDPA refuses
        return _outside_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, plan.choice
        )
    if ledger is not None or not plan.quiet:
        account(plan.call, plan.choice, settings, ledger)
    if plan.call is None:
        grouped = enable_gqa or (check and is_grouped(query, key))
        return _outside_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale, grouped, return_lse, plan.choice
        )
    return _run(query, key, value, attn_mask, dropout_p, plan, plan.call)


def attend_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    interleaved: bool = False,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    norm: Norm | None = None,
    settings: Settings,
    ledger: Ledger | None = None,
    return_lse: bool = False,
) -> Any:
    """Normalize q and k if there is a norm, rotate them, then attend.

    q, k, v are [B, S, H, D]; the result is as :func:`attend`'s. What a backend does not do itself is done for it in
    plain PyTorch.
    """
    rope = Rope(interleaved, cos.shape[-1])
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    of_norm = () if norm is None else norm.tensors
    gradient = needs_grad(query, key, value, attn_mask, cos, sin, cos_k, sin_k, *of_norm)
    plan = make_plan(q, k, v, attn_mask, dropout_p, is_causal, scale, settings, return_lse, gradient, rope)
    call, choice, backend = plan.call, plan.choice, plan.backend
    account(call, choice, settings, ledger)
    # Under autocast these come before the cast, as in the code that this function stands for.
    apart = call is None or not backend.capabilities.rope or autocast_dtype(query.device) is not None
    if ledger is not None:
        ledger.norm = None
    can = norm is None or backend.capabilities.takes_norm(norm.over_heads)
    if norm is not None and (apart or not can):
        over = " over all heads" if norm.over_heads else ""
        query, key = normalize_both(query, key, norm)
        norm = None
        if ledger is not None:
            ledger.norm = _why_apart(call, choice, can, f"norm{over}")
    if call is None or apart:
        q, k = rotate_heads_first(query, key, cos, sin, cos_k, sin_k, interleaved)
        if ledger is not None:
            ledger.rope = _why_apart(call, choice, backend.capabilities.rope, "rotation")
        if call is None:
            grouped = query.shape[2] != key.shape[2]
            return _outside_sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale, grouped, return_lse, choice)
        return _run(q, k, v, attn_mask, dropout_p, plan, dataclasses.replace(call, rope=None))
    if ledger is not None:
        ledger.rope = "fused"
        ledger.norm = ledger.norm if norm is None else norm.said
    if attn_mask is not None:
        attn_mask = narrowed_mask(attn_mask)
    # Not all backends that rotate have the keyword.
    options: dict[str, Any] = {"cos_k": cos_k, "sin_k": sin_k} | ({} if norm is None else {"norm": norm})
    with outside_redirection():
        out = backend.rope_attention(query, key, value, cos, sin, call, attn_mask, dropout_p, **options)
    return _finish(out, plan)


def _why_apart(call: AttentionCall | None, choice: Choice, can: bool, what: str) -> str:
    """What reports say of a norm or rotation that is computed in plain PyTorch."""
    if call is None:
        return "the call is left to PyTorch's own SDPA"
    return "autocast is enabled" if can else f"{choice.backend} has no fused {what}"


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    plan: Plan,
    call: AttentionCall,
) -> Any:
    """The chosen backend's attention, with inputs cast as autocast would, and its output checked and laid out."""
    if attn_mask is not None:
        # Before the cast, which would copy an expanded mask in full.
        attn_mask = narrowed_mask(attn_mask)
    if plan.autocast:
        query, key, value, attn_mask = cast_like_autocast(query, key, value, attn_mask)
    elif not is_redirecting():
        # The usual case, without the time that context managers take.
        return _finish(plan.backend.attention(query, key, value, call, attn_mask, dropout_p), plan)
    with outside_redirection(), no_autocast(call):
        return _finish(plan.backend.attention(query, key, value, call, attn_mask, dropout_p), plan)


def _outside_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    choice: Choice,
) -> torch.Tensor:
    """PyTorch's own SDPA, for inputs that no AttentionCall describes."""
    if return_lse:
        raise InvalidArgumentError(f"return_lse needs plain [B, H, S, D] tensors: {choice.exact_reason}")
    with outside_redirection():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def account_outside(reason: Reason, settings: Settings, ledger: Ledger | None) -> None:
    """Count and warn of a call that stays PyTorch's own.

    Raises:
        UnsupportedCallError: strict settings.
    """
    account(None, outside_plan(reason, settings).choice, settings, ledger)


def account(call: AttentionCall | None, choice: Choice, settings: Settings, ledger: Ledger | None) -> None:
    """Count a planned call, and warn of a fallback: once per scope and reason."""
    if ledger is not None:
        ledger.count(choice)
        on_gpu = call is not None and call.device_type == "cuda"
        if on_gpu and not ledger.captured and torch.cuda.is_current_stream_capturing():
            ledger.captured = True
    reason = choice.exact_reason
    if reason is None or reason.code in QUIET_CODES:
        return
    key = (settings.scope, settings.backend or "automatic", reason.code)
    if key in _warned:
        return
    _warned.add(key)
    described = call.describe() if call is not None else "a call that is not plain [B, H, S, D] tensors"
    lines = [f"attention runs exactly, not in low precision ({reason}): {described}"]
    lines += reason_lines(choice.reasons)
    if settings.hadamard is not HadamardMode.NONE:
        lines.append(f"hadamard={settings.hadamard.value!r} is not applied to such calls.")
    lines.append("This is said once per reason; attention_report(model) counts such calls.")
    warn("\n".join(lines))


def no_autocast(call: AttentionCall) -> Any:
    """Inputs are cast by now; what a backend computes inside must keep the precision that it asks for."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(call.device_type):
        return torch.autocast(call.device_type, enabled=False)
    return NOTHING


def _finish(result: Any, plan: Plan) -> Any:
    """What a backend returned, checked, and the output in its layout."""
    call, choice = plan.call, plan.choice
    assert call is not None
    out, lse = result if call.return_lse and isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(out, torch.Tensor) or out.shape != plan.shape or out.dtype != call.dtype:
        got = f"{list(out.shape)} {out.dtype}" if isinstance(out, torch.Tensor) else type(out).__name__
        raise BackendError(
            f"backend {choice.backend!r} returned {got}; the output of this call is {list(plan.shape)} {call.dtype}"
        )
    if out.stride() != plan.strides:
        out = in_bshd_memory(out)
    if not call.return_lse:
        return out
    if not isinstance(lse, torch.Tensor) or lse.shape != plan.shape[:3] or lse.dtype != torch.float32:
        got = f"{list(lse.shape)} {lse.dtype}" if isinstance(lse, torch.Tensor) else type(lse).__name__
        raise BackendError(
            f"backend {choice.backend!r} returned lse {got}; it must be {list(plan.shape[:3])} torch.float32"
        )
    return out, lse


def in_bshd_memory(out: torch.Tensor) -> torch.Tensor:
    """The same [B, H, S, D] values in [B, S, H, D]-contiguous memory; no copy where they already are."""
    _, heads, length, dim = out.shape
    strides = bshd_strides(heads, length, dim)
    if out.stride() == strides:
        return out
    if 1 in (heads, length) and out.is_contiguous():
        # As on a decode step: the memory is right, and only the stride of a dimension of size 1 is another.
        return out.as_strided(out.shape, strides)
    # Not by transpose and contiguous, which would be an operator more.
    return out.new_empty_strided(out.shape, strides).copy_(out)
