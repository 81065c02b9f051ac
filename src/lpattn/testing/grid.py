"""Which calls the declared capabilities admit, and which they do not, each with the code that must refuse it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from lpattn.backend import Capabilities
from lpattn.types import AttentionCall, CausalKind, HadamardMode, MaskKind, Varlen

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def typical_call(capabilities: Capabilities) -> AttentionCall:
    """A call that the capabilities admit: no mask, not causal, as many KV heads as heads."""
    dims = capabilities.head_dims
    dim = 64 if dims is None or 64 in dims else min(dims)
    devices = capabilities.device_types
    device_type = "cpu" if devices is None or "cpu" in devices else min(devices)
    architectures = capabilities.architectures
    return AttentionCall(
        batch=2,
        num_heads=4,
        num_kv_heads=4,
        q_len=256,
        kv_len=256,
        head_dim=dim,
        head_dim_v=dim,
        dtype=min(capabilities.dtypes, key=_FLOATS.index) if capabilities.dtypes <= set(_FLOATS) else torch.float32,
        device_type=device_type,
        capability=((8, 0) if architectures is None else architectures[0]) if device_type == "cuda" else None,
        softmax_scale=dim**-0.5,
    )


def _changes(capabilities: Capabilities) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """(axis, whether it is declared, the change of a typical call) for every value of every axis."""
    call = typical_call(capabilities)
    for dtype in _FLOATS:
        yield "dtype", dtype in capabilities.dtypes, {"dtype": dtype}
    if capabilities.head_dims is not None:
        for dim in sorted(capabilities.head_dims):
            yield "head_dim", True, {"head_dim": dim, "head_dim_v": dim}
        odd = next(d for d in range(72, 2000, 8) if d not in capabilities.head_dims)
        yield "head_dim", False, {"head_dim": odd, "head_dim_v": odd}
    yield "head_dim_v", capabilities.head_dim_v_differs, {"head_dim_v": call.head_dim + 8}
    full = (call.batch, 1, call.q_len, call.kv_len)
    for kind in (MaskKind.BOOL, MaskKind.ADDITIVE):
        yield "mask", kind in capabilities.masks, {"mask": kind, "mask_shape": full}
    padding = {"mask": MaskKind.BOOL, "mask_shape": (call.batch, 1, 1, call.kv_len)}
    yield "mask", MaskKind.BOOL in capabilities.masks or capabilities.key_padding, padding
    yield "causal", capabilities.causal, {"causal": CausalKind.TOP_LEFT}
    if capabilities.causal:
        for kv_len in (call.q_len // 2, call.q_len * 2):
            change = {"causal": CausalKind.TOP_LEFT, "kv_len": kv_len}
            yield "causal_alignment", capabilities.causal_rectangular, change
    yield "gqa", capabilities.gqa, {"num_kv_heads": 2}
    yield "gqa", capabilities.gqa, {"num_kv_heads": 1}
    yield "lse", capabilities.lse, {"return_lse": True}
    yield "dropout", capabilities.dropout, {"dropout": True}
    yield "varlen", capabilities.varlen, {"varlen": Varlen()}
    for mode in HadamardMode:
        yield "hadamard", mode in capabilities.hadamard, {"hadamard": mode}
    yield "layout", capabilities.strided_last_dim, {"contiguous_last_dim": False}
    yield "requires_grad", capabilities.backward, {"requires_grad": True}
    if capabilities.device_types is not None:
        for device_type in ("cpu", "cuda", "xpu"):
            if device_type not in capabilities.device_types:
                yield "device", False, {"device_type": device_type, "capability": None}
    if capabilities.architectures is not None and call.capability is not None:
        (low, high) = capabilities.architectures
        for capability in ((low[0] - 1, 9), (high[0], high[1] + 1), (high[0] + 1, 0)):
            yield "architecture", False, {"capability": capability}


def declared_by_axis(capabilities: Capabilities) -> dict[str, list[AttentionCall]]:
    """Calls that are declared, by the axis along which they differ from the typical one."""
    calls: dict[str, list[AttentionCall]] = {"typical": [typical_call(capabilities)]}
    for axis, declared, change in _changes(capabilities):
        if declared:
            calls.setdefault(axis, []).append(dataclasses.replace(typical_call(capabilities), **change))
    return calls


def declared_calls(capabilities: Capabilities) -> list[AttentionCall]:
    """All of :func:`declared_by_axis`."""
    return [call for calls in declared_by_axis(capabilities).values() for call in calls]


def undeclared_calls(capabilities: Capabilities) -> list[tuple[str, AttentionCall]]:
    """(code, call): a call that the capabilities exclude, for one reason alone, and that reason's code."""
    typical = typical_call(capabilities)
    changes = [(axis, change) for axis, declared, change in _changes(capabilities) if not declared]
    return [(axis, dataclasses.replace(typical, **change)) for axis, change in changes]
