"""What the commands share: the console, and lpattn's data as JSON knows it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from lpattn.dispatch import Explanation
from lpattn.types import AttentionCall, Reason

if TYPE_CHECKING:
    from rich.console import Console

EMULATION = "fp8_emulated"
"""Name of the backend that the distribution lpattn-emulated brings."""
INSTALL_EMULATION = "pip install lpattn-emulated"

_WIDE = 400
"""Columns where the output is not a terminal: lines that programs read are not to be broken."""


def make_console(stderr: bool = False) -> Console:
    """A console that writes to the present stdout or stderr."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)
    return (
        console
        if console.is_terminal
        else Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True, width=_WIDE)
    )


def print_json(document: object) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=2, allow_nan=False))


def reason_data(reason: Reason | None) -> dict[str, str] | None:
    """A reason as a dict."""
    return None if reason is None else {"code": reason.code, "message": reason.message, "remedy": reason.remedy}


def call_data(call: AttentionCall) -> dict[str, Any]:
    """A call as a dict."""
    return {
        "batch": call.batch,
        "num_heads": call.num_heads,
        "num_kv_heads": call.num_kv_heads,
        "q_len": call.q_len,
        "kv_len": call.kv_len,
        "head_dim": call.head_dim,
        "head_dim_v": call.head_dim_v,
        "dtype": dtype_name(call.dtype),
        "device": str(call.device),
        "capability": call.capability,
        "softmax_scale": call.softmax_scale,
        "mask": call.mask.value,
        "mask_shape": call.mask_shape,
        "causal": call.causal.value,
        "hadamard": call.hadamard.value,
        "return_lse": call.return_lse,
    }


def explanation_data(explanation: Explanation) -> dict[str, Any]:
    """An explanation as a dict."""
    choice = explanation.choice
    return {
        "call": call_data(explanation.call),
        "choice": None
        if choice is None
        else {
            "backend": choice.backend,
            "provenance": choice.provenance.value,
            "exact_reason": reason_data(choice.exact_reason),
            "detours": [reason_data(detour) for detour in choice.detours],
        },
        "reasons": {name: [reason_data(r) for r in reasons] for name, reasons in explanation.reasons.items()},
        "text": str(explanation),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its ``torch.``."""
    return str(dtype).removeprefix("torch.")
