"""The ``torch.library`` operators that compiled graphs contain, their fakes, and how settings travel in them.

Settings travel as one string and the layer as a 0-dim CPU tensor: with the string alone, or an int, torch.compile
would make a graph per layer. The backend is chosen when the operator runs, on real sizes. Why a rotation in front of
attention, or a norm in front of that, was not fused travels as a string too, which :mod:`lpattn.compile` adds: when a
graph comes out of a cache, nothing else knows.
"""

from __future__ import annotations

import torch

from lpattn.execute import attend, attend_rope, in_bshd_memory
from lpattn.ledger import Ledger, find_ledger
from lpattn.settings import from_text
from lpattn.types import Norm, Reason
from lpattn.varlen import attend_varlen

_OPTIONS = "Tensor? attn_mask, float dropout_p, bool is_causal, float? scale"
_SETTINGS = "Tensor? layer, str settings"
_REASON = "str rope=''"
_ROPE = "Tensor cos, Tensor sin, Tensor? cos_k, Tensor? sin_k, bool interleaved"
_OF_NORM = "Tensor? weight_q=None, Tensor? weight_k=None, Tensor? rstd_q=None, Tensor? rstd_k=None"
_NORM = f"float? eps_q=None, float? eps_k=None, {_OF_NORM}, str norm=''"
_QKV = "Tensor query, Tensor key, Tensor value"

_NOT_LOOKED_FOR = "not looked for: the graph was not compiled by inductor, or not with lpattn's pass"

_library = torch.library.Library("lpattn", "DEF")
_library.define(f"sdpa({_QKV}, {_OPTIONS}, {_SETTINGS}, {_REASON}) -> Tensor")
_library.define(f"sdpa_lse({_QKV}, {_OPTIONS}, {_SETTINGS}, {_REASON}) -> (Tensor, Tensor)")
_library.define(f"rope_sdpa({_QKV}, {_ROPE}, {_OPTIONS}, {_SETTINGS}, {_NORM}) -> Tensor")
_library.define(f"rope_sdpa_lse({_QKV}, {_ROPE}, {_OPTIONS}, {_SETTINGS}, {_NORM}) -> (Tensor, Tensor)")
_VARLEN = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k, float? scale, int left, int right"
_library.define(f"varlen_sdpa({_QKV}, {_VARLEN}, {_SETTINGS}) -> Tensor")
_library.define(f"varlen_sdpa_lse({_QKV}, {_VARLEN}, {_SETTINGS}) -> (Tensor, Tensor)")
_library.define("count_exact(Tensor(a!) layer, str code, str message) -> ()")
"""Counts a call that ran exactly where nothing was redirected. Declared to write its layer, so that it is kept."""


def _ledger(layer: torch.Tensor | None) -> Ledger | None:
    return None if layer is None else find_ledger(int(layer))


def _sdpa_with(return_lse: bool):  # type: ignore[no-untyped-def]
    def run(  # type: ignore[no-untyped-def]
        query, key, value, attn_mask, dropout_p, is_causal, scale, layer, settings, rope=""
    ):
        ledger = _ledger(layer)
        if ledger is not None:
            ledger.rope, ledger.norm = rope or _NOT_LOOKED_FOR, None
        result = attend(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa=query.shape[1] != key.shape[1],
            settings=from_text(settings),
            ledger=ledger,
            return_lse=return_lse,
        )
        return result if return_lse else in_bshd_memory(result)

    return run


def _rope_sdpa_with(return_lse: bool):  # type: ignore[no-untyped-def]
    def run(  # type: ignore[no-untyped-def]
        query,
        key,
        value,
        cos,
        sin,
        cos_k,
        sin_k,
        interleaved,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        layer,
        settings,
        eps_q=None,
        eps_k=None,
        weight_q=None,
        weight_k=None,
        rstd_q=None,
        rstd_k=None,
        norm="",
    ):
        ledger = _ledger(layer)
        given = Norm(eps_q, eps_k, weight_q, weight_k, rstd_q, rstd_k)
        result = attend_rope(
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
            norm=None if eps_q is None and eps_k is None and rstd_q is None else given,
            settings=from_text(settings),
            ledger=ledger,
            return_lse=return_lse,
        )
        if ledger is not None and norm:
            ledger.norm = f"{ledger.norm}; {norm}" if ledger.norm else norm
        return result if return_lse else in_bshd_memory(result)

    return run


def _varlen_sdpa_with(return_lse: bool):  # type: ignore[no-untyped-def]
    def run(  # type: ignore[no-untyped-def]
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, left, right, layer, settings
    ):
        packed = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, (left, right))
        return attend_varlen(*packed, settings=from_text(settings), ledger=_ledger(layer), return_lse=return_lse)

    return run


def _fake_varlen_sdpa(query, key, value, *options):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


def _fake_varlen_sdpa_lse(query, key, value, *options):  # type: ignore[no-untyped-def]
    return _fake_varlen_sdpa(query, key, value), query.new_empty(query.shape[:2], dtype=torch.float32)


def _empty_output(batch: int, heads: int, q_len: int, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(batch, q_len, heads, value.shape[-1]).transpose(1, 2)


def _empty_lse(batch: int, heads: int, q_len: int, query: torch.Tensor) -> torch.Tensor:
    return query.new_empty(batch, heads, q_len, dtype=torch.float32)


def _fake_sdpa(query, key, value, *options):  # type: ignore[no-untyped-def]
    batch, heads, q_len, _ = query.shape
    return _empty_output(batch, heads, q_len, query, value)


def _fake_sdpa_lse(query, key, value, *options):  # type: ignore[no-untyped-def]
    batch, heads, q_len, _ = query.shape
    return _empty_output(batch, heads, q_len, query, value), _empty_lse(batch, heads, q_len, query)


def _fake_rope_sdpa(query, key, value, *options):  # type: ignore[no-untyped-def]
    batch, q_len, heads, _ = query.shape
    return _empty_output(batch, heads, q_len, query, value)


def _fake_rope_sdpa_lse(query, key, value, *options):  # type: ignore[no-untyped-def]
    batch, q_len, heads, _ = query.shape
    return _empty_output(batch, heads, q_len, query, value), _empty_lse(batch, heads, q_len, query)


def _no_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise NotImplementedError(
        "lpattn's operators have no backward pass; run them under torch.no_grad() or torch.inference_mode()"
    )


def _count_exact(layer: torch.Tensor, code: str, message: str) -> None:
    if (ledger := _ledger(layer)) is not None:
        ledger.count_exact(Reason(code, message))


_library.impl("count_exact", _count_exact, "CompositeExplicitAutograd")
torch.library.register_fake("lpattn::count_exact", lambda layer, code, message: None, lib=_library)

for _name, _run, _fake in (
    ("sdpa", _sdpa_with(return_lse=False), _fake_sdpa),
    ("sdpa_lse", _sdpa_with(return_lse=True), _fake_sdpa_lse),
    ("rope_sdpa", _rope_sdpa_with(return_lse=False), _fake_rope_sdpa),
    ("rope_sdpa_lse", _rope_sdpa_with(return_lse=True), _fake_rope_sdpa_lse),
    ("varlen_sdpa", _varlen_sdpa_with(return_lse=False), _fake_varlen_sdpa),
    ("varlen_sdpa_lse", _varlen_sdpa_with(return_lse=True), _fake_varlen_sdpa_lse),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lpattn::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"lpattn::{_name}", _no_backward, lib=_library)

count_exact = torch.ops.lpattn.count_exact.default
sdpa = torch.ops.lpattn.sdpa.default
sdpa_lse = torch.ops.lpattn.sdpa_lse.default
rope_sdpa = torch.ops.lpattn.rope_sdpa.default
rope_sdpa_lse = torch.ops.lpattn.rope_sdpa_lse.default
varlen_sdpa = torch.ops.lpattn.varlen_sdpa.default
varlen_sdpa_lse = torch.ops.lpattn.varlen_sdpa_lse.default
