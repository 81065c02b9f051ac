"""Whether fusing would pay for a call: only a low-precision backend that rotates while it quantizes gains by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lpattn.calls import default_scale, device_capability
from lpattn.compile.linear import args_of
from lpattn.compile.sizes import Sizes, value_of
from lpattn.dispatch import asked_for_exact, choose
from lpattn.errors import LpattnError
from lpattn.registry import registry
from lpattn.settings import from_text, with_environment
from lpattn.types import AttentionCall, CausalKind, MaskKind, Provenance


def reason_against(call: fx.Node, sizes: Sizes) -> str | None:
    """Why the rotations in front of a call should stay with the compiler; None where a backend should have them.

    Where a call runs exactly, the compiler's own fusion of the rotation is the faster one. An exact backend that the
    user named runs what it was given.

    Args:
        call: an attention operator of a graph.
        sizes: the sizes that the graph was traced with.
    """
    settings = with_environment(from_text(str(call.args[8])))
    try:
        choice = choose(describe(call, sizes), settings)
    except LpattnError as error:
        return str(error).splitlines()[0]
    named = asked_for_exact(settings) is not None and settings.provenance is not Provenance.LAYER_RULE
    if choice.exact_reason is not None and not named:
        return f"the call runs exactly: {choice.exact_reason}"
    backend = registry.get(choice.backend)
    if backend is None or not backend.capabilities.rope:
        return f"{choice.backend} has no fused rotation"
    return None


def reason_against_rotation_alone(call: fx.Node, sizes: Sizes) -> str | None:
    """Why rotations in front of which nothing is normalized should stay with the compiler; None if not."""
    name, q_len = _chosen(call, sizes), sizes.shape(args_of(call)[0])[2]
    backend = registry.get(name)
    if backend is None or q_len >= (least := backend.capabilities.rope_from):
        return None
    return f"q_len {q_len}: {name} is faster at a rotation without a norm from {least} queries on"


def reason_against_norm(call: fx.Node, sizes: Sizes, over_heads: bool) -> str | None:
    """Why a norm in front of rotations that a backend is to have should stay with the compiler; None if not."""
    name = _chosen(call, sizes)
    backend = registry.get(name)
    if backend is not None and backend.capabilities.takes_norm(over_heads):
        return None
    return f"{name} has no fused norm{' over all heads' if over_heads else ''}"


def _chosen(call: fx.Node, sizes: Sizes) -> str:
    """What runs a call that :func:`reason_against` has let through."""
    return choose(describe(call, sizes), with_environment(from_text(str(call.args[8])))).backend


def describe(call: fx.Node, sizes: Sizes) -> AttentionCall:
    """The call that an attention operator of a graph makes, at given sizes."""
    query, key, value, mask, dropout_p, is_causal, scale, _, settings, *_ = args_of(call)
    batch, num_heads, q_len, head_dim = sizes.shape(query)
    _, num_kv_heads, kv_len, _ = sizes.shape(key)
    q: Any = value_of(query)
    kind, mask_shape = MaskKind.NONE, None
    if isinstance(mask, fx.Node):
        tensor = value_of(mask)
        kind = MaskKind.BOOL if tensor.dtype == torch.bool else MaskKind.ADDITIVE
        strides = [sizes(stride) for stride in tensor.stride()]
        narrow = [1 if stride == 0 else size for size, stride in zip(sizes.shape(mask), strides, strict=True)]
        mask_shape = (*(1,) * (4 - len(narrow)), *narrow)
    return AttentionCall(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        head_dim_v=sizes.shape(value)[3],
        dtype=q.dtype,
        device_type=q.device.type,
        device_index=q.device.index or 0,
        capability=device_capability(q.device.type, q.device.index),
        softmax_scale=float(scale) if isinstance(scale, (int, float)) else default_scale(head_dim),
        mask=kind,
        mask_shape=mask_shape,  # type: ignore[arg-type]
        causal=CausalKind.TOP_LEFT if is_causal else CausalKind.NONE,
        dropout=isinstance(dropout_p, float) and dropout_p > 0.0,
        hadamard=from_text(str(settings)).hadamard,
    )
