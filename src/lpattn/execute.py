"""Runs one attention call: plans it once per shape, warns once per reason, counts it, and fixes the output's layout."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
import torch.nn.functional as F

from lpattn.active import excluded
from lpattn.calls import build_call, outside
from lpattn.dispatch import ASKED_CODES, POLICY_CODES, REFERENCE, choose, error_text, reason_lines
from lpattn.errors import InvalidArgumentError, LpattnWarning, UnsupportedCallError
from lpattn.ledger import Ledger
from lpattn.registry import registry
from lpattn.rope import rotate
from lpattn.settings import Settings, with_environment
from lpattn.types import AttentionCall, Choice, HadamardMode, Reason, Rope

Plan = tuple[AttentionCall | None, Choice]
"""The call as backends see it (None: PyTorch's own SDPA takes the inputs as they are) and the decision."""

_PLANS_SIZE = 1024
_plans: dict[object, Plan] = {}
_warned: set[tuple[int, str, str]] = set()

_GRADIENT = Reason(
    "requires_grad",
    "inputs require grad: low precision has no backward pass",
    "wrap the forward in torch.no_grad() or torch.inference_mode()",
)
_QUIET_CODES = POLICY_CODES | ASKED_CODES | {"empty"}


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
) -> Any:
    """Attention with the meaning of SDPA, on the backend that the settings lead to.

    Args:
        query: [B, H, q_len, head_dim]; the other tensors and options as in SDPA.
        settings: what the user asked for.
        ledger: counts the call; None counts nothing.
        return_lse: also return the log-sum-exp.

    Returns:
        [B, H, q_len, head_dim_v] in [B, S, H, D]-contiguous memory; with return_lse a tuple (output, lse).

    Raises:
        UnsupportedCallError: strict settings, and the wanted backend cannot run the call.
    """
    call, choice = _plan(query, key, value, attn_mask, dropout_p, is_causal, scale, settings, return_lse)
    _account(call, choice, settings, ledger)
    if call is None:
        if return_lse:
            raise InvalidArgumentError(f"return_lse needs plain [B, H, S, D] tensors: {choice.exact_reason}")
        with excluded():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    query, key, value, attn_mask = cast_like_autocast(query, key, value, attn_mask)
    backend = registry.get(choice.backend)
    assert backend is not None
    with excluded(), _no_autocast(call):
        return _finish(backend.attention(query, key, value, call, _four_dims(attn_mask), dropout_p), return_lse)


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
    settings: Settings,
    ledger: Ledger | None = None,
    return_lse: bool = False,
) -> Any:
    """Rotate q and k, then attend. q, k, v are [B, S, H, D]; the result is as :func:`attend`'s.

    A backend without a fused rotation gets q and k rotated in plain PyTorch.
    """
    rope = Rope(interleaved, cos.shape[-1])
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    call, choice = _plan(q, k, v, attn_mask, dropout_p, is_causal, scale, settings, return_lse, rope)
    _account(call, choice, settings, ledger)
    backend = registry.get(choice.backend)
    assert backend is not None
    if call is None or not backend.capabilities.rope:
        q = rotate(query, cos, sin, interleaved).transpose(1, 2)
        k = rotate(key, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved).transpose(1, 2)
        if ledger is not None:
            ledger.rope = f"{choice.backend} has no fused rotation"
        if call is None:
            with excluded():
                return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
        q, k, v, attn_mask = cast_like_autocast(q, k, v, attn_mask)
        with excluded(), _no_autocast(call):
            call = dataclasses.replace(call, rope=None)
            return _finish(backend.attention(q, k, v, call, _four_dims(attn_mask), dropout_p), return_lse)
    if ledger is not None:
        ledger.rope = "fused"
    query, key, value, attn_mask = cast_like_autocast(query, key, value, attn_mask)
    with excluded(), _no_autocast(call):
        out = backend.rope_attention(
            query, key, value, cos, sin, call, _four_dims(attn_mask), dropout_p, cos_k=cos_k, sin_k=sin_k
        )
        return _finish(out, return_lse)


def _plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    settings: Settings,
    return_lse: bool,
    rope: Rope | None = None,
) -> Plan:
    if query.is_nested or key.is_nested or value.is_nested:
        return _outside_plan(Reason("nested", "nested tensors: lpattn takes plain tensors"), settings)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _outside_plan(Reason("functorch", "inside of a torch.func transform, such as vmap"), settings)
    gradient = torch.is_grad_enabled() and needs_grad(query, key, value, attn_mask)
    device = query.device
    # One tuple of plain facts: everything that a decision or a description can depend on.
    facts = (
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        key.dtype,
        value.dtype,
        device,
        key.device,
        value.device,
        query.__class__,
        key.__class__,
        value.__class__,
        query.stride()[-1:],
        key.stride()[-1:],
        value.stride()[-1:],
        None if attn_mask is None else (attn_mask.shape, attn_mask.dtype, attn_mask.device, attn_mask.__class__),
        dropout_p,
        is_causal,
        scale,
        with_environment(settings),
        return_lse,
        rope,
        gradient,
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        registry.generation,
    )
    plan = _plans.get(facts)
    if plan is None:
        plan = _make_plan(
            query, key, value, attn_mask, dropout_p, is_causal, scale, settings, return_lse, rope, gradient
        )
        if len(_plans) >= _PLANS_SIZE:
            _plans.clear()
        _plans[facts] = plan
    return plan


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether any of the tensors requires grad."""
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _make_plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    settings: Settings,
    return_lse: bool,
    rope: Rope | None,
    gradient: bool,
) -> Plan:
    query, key, value, attn_mask = cast_like_autocast(query, key, value, attn_mask)
    if reason := outside(query, key, value, attn_mask, is_causal):
        return _outside_plan(reason, settings)
    call = build_call(query, key, value, attn_mask, dropout_p, is_causal, scale, settings.hadamard, return_lse, rope)
    choice = None if gradient else choose(call, settings)
    if choice is None:
        effective = with_environment(settings)
        asked_for_exact = effective.backend == REFERENCE
        if effective.strict and not asked_for_exact:
            raise UnsupportedCallError(error_text(call, {effective.backend or "any backend": (_GRADIENT,)}))
        reason = choose(call, settings).exact_reason if asked_for_exact else _GRADIENT
        choice = Choice(REFERENCE, effective.provenance, {}, reason)
    if choice.backend == REFERENCE and call.hadamard is not HadamardMode.NONE:
        # Exact attention needs no rotation; the report says that none was applied.
        call = dataclasses.replace(call, hadamard=HadamardMode.NONE)
    return call, choice


def _outside_plan(reason: Reason, settings: Settings) -> Plan:
    effective = with_environment(settings)
    if effective.strict and effective.backend != REFERENCE and reason.code not in _QUIET_CODES:
        raise UnsupportedCallError(
            f"{effective.backend or 'low precision'} cannot run this attention call: {reason}\n"
            "Use on_unsupported='fallback' to run such calls exactly."
        )
    return None, Choice(REFERENCE, effective.provenance, {}, reason)


def _account(call: AttentionCall | None, choice: Choice, settings: Settings, ledger: Ledger | None) -> None:
    if ledger is not None:
        ledger.count(choice)
        if call is not None and call.device_type == "cuda" and torch.cuda.is_current_stream_capturing():
            ledger.captured = True
    reason = choice.exact_reason
    if reason is None or reason.code in _QUIET_CODES:
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
    warnings.warn("\n".join(lines), LpattnWarning, stacklevel=4)


def cast_like_autocast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cast as SDPA casts its inputs under autocast: floating point but not float64, to the autocast dtype."""
    device_type = query.device.type
    if not torch.is_autocast_enabled(device_type):
        return query, key, value, attn_mask
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        eligible = (
            tensor.dtype.is_floating_point and tensor.dtype != torch.float64 and tensor.device.type == device_type
        )
        return tensor.to(dtype) if eligible else tensor

    return cast(query), cast(key), cast(value), None if attn_mask is None else cast(attn_mask)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


_NOTHING = _Nothing()


def _no_autocast(call: AttentionCall) -> Any:
    """Inputs are cast by now; what a backend computes inside must keep the precision that it asks for."""
    if torch.is_autocast_enabled(call.device_type):
        return torch.autocast(call.device_type, enabled=False)
    return _NOTHING


def _four_dims(attn_mask: torch.Tensor | None) -> torch.Tensor | None:
    if attn_mask is None or attn_mask.dim() == 4:
        return attn_mask
    return attn_mask[(None,) * (4 - attn_mask.dim())]


def _finish(result: Any, return_lse: bool) -> Any:
    if return_lse:
        out, lse = result
        return in_bshd_memory(out), lse
    return in_bshd_memory(result)


def in_bshd_memory(out: torch.Tensor) -> torch.Tensor:
    """The same [B, H, S, D] values in [B, S, H, D]-contiguous memory; no copy where they already are."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
