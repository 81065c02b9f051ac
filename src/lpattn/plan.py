"""From one call's tensors to what runs it, remembered per shape: the part of a call that need not be done twice."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from lpattn.backend import Backend
from lpattn.calls import autocast_dtype, build_call, cast_like_autocast, check_inputs, is_grouped, outside
from lpattn.dispatch import ASKED_CODES, POLICY_CODES, REFERENCE, asked_for_exact, choose
from lpattn.errors import UnsupportedCallError
from lpattn.registry import registry
from lpattn.settings import Settings, with_environment
from lpattn.types import AttentionCall, Choice, HadamardMode, Reason, Rope

QUIET_CODES = POLICY_CODES | ASKED_CODES | {"empty"}
"""Codes of reasons to run exactly that warrant no warning."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs a call, and what of it depends on nothing but the facts that plans are remembered by.

    Attributes:
        call: the call as backends see it; None: PyTorch's own SDPA takes the inputs as they are.
        choice: the decision.
        backend: that of the choice.
        autocast: whether inputs are cast as SDPA casts them, and autocast is to be off where the backend runs.
        quiet: whether there is nothing to warn of.
        grouped: whether SDPA takes the call only with enable_gqa.
        shape: of the output, [B, H, q_len, head_dim_v].
        strides: of the output in [B, S, H, D] memory.
    """

    call: AttentionCall | None
    choice: Choice
    backend: Backend
    autocast: bool = False
    quiet: bool = False
    grouped: bool = False
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()


_PLANS_SIZE = 1024
_plans: dict[object, Plan] = {}


def make_plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    settings: Settings,
    return_lse: bool,
    requires_grad: bool,
    rope: Rope | None = None,
    check: bool = False,
) -> Plan:
    """Decide what runs the call. q, k, v are [B, H, S, D].

    With ``check``, inputs of which no plan is known are checked first; of wrong ones, none ever is.

    Raises:
        UnsupportedCallError: strict settings, and the wanted backend cannot run the call.
        InvalidArgumentError: ``check`` found the inputs to be wrong.
    """
    settings = with_environment(settings)
    if query.is_nested or key.is_nested or value.is_nested or torch._C._functorch.peek_interpreter_stack() is not None:
        if check:
            check_inputs(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return _plan_anew(
            query, key, value, attn_mask, dropout_p, is_causal, scale, settings, return_lse, requires_grad, rope
        )
    # One tuple of plain facts: everything that a plan can depend on.
    facts = (
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.get_device(),  # cheaper to make and to hash than a torch.device, and as good for noticing another one
        value.get_device(),
        query.__class__,
        key.__class__,
        value.__class__,
        query.stride(),
        key.stride(),
        value.stride(),
        None
        if attn_mask is None
        else (
            attn_mask.shape,
            attn_mask.stride(),
            attn_mask.dtype,
            attn_mask.device,
            attn_mask.__class__,
            attn_mask.requires_grad,
        ),
        dropout_p,
        is_causal,
        scale,
        settings.text,
        return_lse,
        requires_grad,
        check,
        rope,
        autocast_dtype(query.device) if torch._C._is_any_autocast_enabled() else None,
        registry.generation,
    )
    plan = _plans.get(facts)
    if plan is None:
        if check:
            check_inputs(query, key, value, attn_mask, dropout_p, is_causal, scale)
        plan = _plan_anew(
            query, key, value, attn_mask, dropout_p, is_causal, scale, settings, return_lse, requires_grad, rope
        )
        if len(_plans) >= _PLANS_SIZE:
            _plans.clear()
        _plans[facts] = plan
    return plan


def _plan_anew(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    settings: Settings,
    return_lse: bool,
    requires_grad: bool,
    rope: Rope | None,
) -> Plan:
    query, key, value, _ = cast_like_autocast(query, key, value, None)  # not the mask: see build_call
    if (reason := outside(query, key, value, attn_mask, dropout_p, is_causal, scale)) is not None:
        return outside_plan(reason, settings)
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
        rope,
        requires_grad,
    )
    choice = choose(call, settings)
    if choice.backend == REFERENCE and call.hadamard is not HadamardMode.NONE:
        # Exact attention needs no rotation; the report says that none was applied.
        call = dataclasses.replace(call, hadamard=HadamardMode.NONE)
    heads, length, dim = call.num_heads, call.q_len, call.head_dim_v
    return Plan(
        call,
        choice,
        _backend_of(choice),
        autocast=autocast_dtype(query.device) is not None,
        quiet=choice.exact_reason is None or choice.exact_reason.code in QUIET_CODES,
        grouped=is_grouped(query, key),
        shape=(call.batch, heads, length, dim),
        strides=bshd_strides(heads, length, dim),
    )


def bshd_strides(heads: int, length: int, dim: int) -> tuple[int, int, int, int]:
    """Strides of a [B, H, S, D] tensor in [B, S, H, D]-contiguous memory."""
    return (length * heads * dim, dim, heads * dim, 1)


def _backend_of(choice: Choice) -> Backend:
    backend = registry.get(choice.backend)
    assert backend is not None
    return backend


def outside_plan(reason: Reason, settings: Settings) -> Plan:
    """The plan for a call that only PyTorch's own SDPA takes.

    Raises:
        UnsupportedCallError: strict settings.
    """
    settings = with_environment(settings)
    if refusal := refusal_outside(settings, reason):
        raise UnsupportedCallError(refusal)
    reason = asked_for_exact(settings) or reason
    choice = Choice(REFERENCE, settings.provenance, {}, reason)
    return Plan(None, choice, _backend_of(choice), quiet=reason.code in QUIET_CODES)


def refusal_outside(settings: Settings, reason: Reason) -> str:
    """The error text for inputs that only PyTorch's own SDPA takes; empty where the settings allow that."""
    if not settings.strict or asked_for_exact(settings) is not None:
        return ""
    return (
        f"{settings.backend or 'low precision'} cannot run this attention call: {reason}\n"
        'Use on_unsupported="fallback" to run such calls exactly.'
    )
