"""What is declared is taken, and what is not is refused: for the right reason, in words that name the value."""

from __future__ import annotations

import warnings
from typing import Any

import torch

import lpattn
from lpattn.errors import InvalidArgumentError, LpattnWarning, UnsupportedCallError
from lpattn.testing.checks.packed import require_packed_refused
from lpattn.testing.exact import sqnr
from lpattn.testing.grid import declared_by_axis, undeclared_calls
from lpattn.testing.inputs import Problem
from lpattn.testing.outcome import NotApplicable, check, require
from lpattn.testing.subject import Subject
from lpattn.types import AttentionCall, CausalKind, MaskKind

_NAMED = {
    "dtype": lambda call: str(call.dtype).removeprefix("torch."),
    "head_dim": lambda call: str(call.head_dim),
    "head_dim_v": lambda call: str(call.head_dim_v),
    "mask": lambda call: str(call.mask),
    "causal_alignment": lambda call: str(call.kv_len),
    "gqa": lambda call: str(call.num_kv_heads),
    "hadamard": lambda call: str(call.hadamard),
    "device": lambda call: call.device_type,
    "architecture": lambda call: "sm_{}{}".format(*call.capability),
}
"""By code: the value that the message must name."""


@check
def declared_is_taken(subject: Subject) -> str:
    """supports() accepts something of every kind that the capabilities declare."""
    declined = {}
    for axis, calls in declared_by_axis(subject.capabilities).items():
        refused = {call: subject.backend.supports(call) for call in calls}
        for call, reasons in refused.items():
            if reasons:
                declined[f"{reasons[0]}"] = call
        require(
            not all(refused.values()),
            f"capabilities declare {axis}, but supports() refuses all such calls: "
            f"{'; '.join(str(r) for reasons in refused.values() for r in reasons[:1])}",
        )
    return f"declines beyond the data: {'; '.join(declined)}" if declined else ""


@check
def undeclared_is_refused(subject: Subject) -> str:
    """supports() refuses what the capabilities exclude, with the code for it and a message that names the value."""
    refused = undeclared_calls(subject.capabilities)
    if not refused:
        raise NotApplicable("declares everything")
    for code, call in refused:
        reasons = subject.backend.supports(call)
        found = [reason for reason in reasons if reason.code == code]
        require(
            found,
            f"{call.describe()}: not declared, so supports() must give a reason with code {code!r}; it gave "
            f"{[reason.code for reason in reasons]}. Extend super().supports(call)",
        )
        value = _NAMED[code](call) if code in _NAMED else ""
        require(value in found[0].message, f"code {code!r}: the message must name {value!r}; got {found[0].message!r}")
    return f"{len(refused)} calls"


@check
def refusals_reach_the_user(subject: Subject) -> str:
    """Strict calls raise an error that lists the reasons; with on_unsupported="fallback" they run exactly."""
    device = next((d for d, reasons in subject.probed.items() if not reasons), torch.device("cpu"))
    seen = 0
    for code, call in undeclared_calls(subject.capabilities):
        if code == "varlen":
            require_packed_refused(subject, device)
            seen += 1
        problem = _as_problem(code, call, device)
        if problem is None:
            continue
        seen += 1
        options: dict[str, Any] = {"return_lse": call.return_lse, "dropout_p": 0.5 if call.dropout else 0.0}
        try:
            out = lpattn.low_precision_sdpa(
                problem.query,
                problem.key,
                problem.value,
                problem.attn_mask,
                is_causal=problem.is_causal,
                enable_gqa=True,
                backend=subject.name,
                hadamard=problem.hadamard,
                on_unsupported="raise",
                **options,
            )
        except UnsupportedCallError as error:
            codes = [reason.code for reason in error.reasons.get(subject.name, ())]
            require(code in codes, f"{problem}: refused for {codes}, and not for {code!r}")
            require(subject.name in str(error), f"{problem}: the error does not name the backend:\n{error}")
        except InvalidArgumentError as error:
            # Options that the backend never offers are refused when they are configured.
            require(code == "hadamard" and subject.name in str(error), f"{problem}: {error}")
            continue
        else:
            require(False, f"{problem}: not declared ({code}), and yet it ran and returned {type(out).__name__}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LpattnWarning)
            result = subject.call(problem, on_unsupported="fallback", **options)
        if not call.dropout:
            out = result[0] if call.return_lse else result
            quality = sqnr(problem.exact()[0], out)
            floor = 60.0 if problem.query.dtype in (torch.float32, torch.float64) else 35.0
            require(quality > floor, f"{problem}: the fallback is not exact: {quality:.1f} dB")
    if not seen:
        raise NotApplicable("declares everything that can be asked for on this machine")
    return f"{seen} calls"


def _as_problem(code: str, call: AttentionCall, device: torch.device) -> Problem | None:
    """The call as [B, H, S, D] tensors on a device of this machine; None where it is about something else.

    What is declared for GPUs alone is refused on the CPU as well: for the same reasons, and one more.
    """
    if code in ("architecture", "varlen") or (code == "device" and call.device_type != device.type):
        return None

    def make(heads: int, length: int, dim: int) -> torch.Tensor:
        length = min(length, 64) if call.q_len == call.kv_len else length // 4
        if call.contiguous_last_dim:
            x = torch.randn(call.batch, heads, length, dim, device=device, dtype=call.dtype)
        else:
            x = torch.randn(call.batch, heads, length, dim, 2, device=device, dtype=call.dtype)[..., 0]
        return x.requires_grad_(call.requires_grad)

    q = make(call.num_heads, call.q_len, call.head_dim)
    k = make(call.num_kv_heads, call.kv_len, call.head_dim)
    v = make(call.num_kv_heads, call.kv_len, call.head_dim_v)
    mask = None
    if call.mask is not MaskKind.NONE:
        mask = torch.rand(call.batch, 1, q.shape[2], k.shape[2], device=device) > 0.4
        mask[..., 0] = True
        if call.mask_shape is not None and call.mask_shape[2] == 1:
            mask = mask[:, :, :1]
        if call.mask is MaskKind.ADDITIVE:
            mask = torch.where(mask, 0.5, -1.0).to(call.dtype)
    causal = call.causal is CausalKind.TOP_LEFT
    return Problem(q, k, v, mask, causal, None, call.hadamard, "not declared")
