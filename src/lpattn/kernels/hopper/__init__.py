"""FP8 attention for Hopper (sm_90), written in Gluon.

Owns the kernel (:mod:`.attention`, :mod:`.softmax`, :mod:`.hadamard`), how it is launched (:mod:`.launch`), and what it
computes in plain PyTorch (:mod:`.emulation`). Importing this package needs neither triton nor a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

from lpattn.types import AttentionCall, CausalKind, MaskKind, Reason

ARCHITECTURE = (9, 0)
HEAD_DIMS = frozenset(range(16, 257, 8))

_LANGUAGE = "triton.experimental.gluon.language.nvidia.hopper"
_NEEDED = ("fence_async_shared", "mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait")
_INT32_END = 2**31


@functools.cache
def reasons_against_triton() -> tuple[Reason, ...]:
    """Why the kernel cannot be compiled here; empty if it can."""
    remedy = "install triton 3.6 or newer"
    if importlib.util.find_spec("triton") is None:
        return (Reason("not_installed", "triton is not installed", "pip install triton"),)
    try:
        language = importlib.import_module(_LANGUAGE)
    except ImportError as error:
        return (Reason("gluon", f"this triton has no Gluon for Hopper ({error})", remedy),)
    if lacking := [name for name in _NEEDED if not hasattr(language, name)]:
        return (Reason("gluon", f"this triton's Gluon has no {', '.join(lacking)}", remedy),)
    return ()


def reasons_against(call: AttentionCall) -> list[Reason]:
    """Why the kernel cannot run a call on :data:`ARCHITECTURE`; empty if it can."""
    reasons = []
    if call.head_dim not in HEAD_DIMS:
        text = f"head_dim {call.head_dim}: the Hopper kernel takes multiples of 8 from 16 to 256"
        reasons.append(Reason("head_dim", text))
    if call.head_dim_v != call.head_dim:
        text = f"head_dim_v {call.head_dim_v}: the Hopper kernel needs head_dim, which is {call.head_dim}"
        reasons.append(Reason("head_dim_v", text))
    if call.varlen is not None:
        reasons.append(Reason("varlen", "packed sequences: the Hopper kernel takes none"))
    if call.mask is MaskKind.ADDITIVE:
        remedy = "if it only hides keys, pass it as bool, True where a key is seen"
        reasons.append(Reason("mask", f"{call.mask} attn_mask: the Hopper kernel takes bool masks", remedy))
    elif call.mask is MaskKind.BOOL and (call.mask_shape is None or call.mask_shape[2] > 1):
        # A head's bits are words of 32 keys, for each query as many as fill tiles of up to 128 keys. A word's number
        # within the head is 32 bits wide.
        words = call.q_len * -(-call.kv_len // 128) * 4
        if words > _INT32_END:
            text = f"attn_mask over {call.q_len} queries and {call.kv_len} keys: has {words} words of 32 keys per head"
            reasons.append(Reason("size", f"{text}, the Hopper kernel counts up to 2^31"))
    if call.causal not in (CausalKind.NONE, CausalKind.TOP_LEFT):
        reasons.append(Reason("causal", f"causal {call.causal}: the Hopper kernel's causal masks are top-left"))
    # The copy engine's coordinates are 32 bits wide.
    rows = call.batch * max(call.num_heads * call.q_len, call.num_kv_heads * (call.kv_len + 128) * 2)
    if rows * 2 >= _INT32_END:
        reasons.append(Reason("size", f"batch * heads * tokens is {rows}: the Hopper kernel counts up to 2^30"))
    return reasons
