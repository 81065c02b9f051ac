"""What the passes read besides q, k and v: RoPE tables, lists of keys, and what norms multiply with."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lpattn.quantize.fused.keys import list_used
from lpattn.quantize.fused.launcher import Launch, kinds_of, short_way
from lpattn.quantize.fused.tile import OF_HEAD, OF_TOKEN
from lpattn.types import Norm

Turns = tuple[bool, int, tuple[int, ...], tuple[int, ...]]
"""Whether pairs are interleaved, how many lanes turn, and the strides of q's and of k's tables, [B, S, H, lanes]."""


@dataclass(frozen=True)
class Rotation:
    """RoPE tables, as :func:`lpattn.low_precision_rope_sdpa` takes them, made to broadcast.

    Attributes:
        cos, sin: of q, [B, S, H, rotary_dim], any strides (0 where they broadcast).
        cos_k, sin_k: of k.
        interleaved: which lanes form a pair.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    cos_k: torch.Tensor
    sin_k: torch.Tensor
    interleaved: bool


def rotation_of(query: torch.Tensor, key: torch.Tensor, tables: Sequence[torch.Tensor], interleaved: bool) -> Rotation:
    """Tables as a backend gets them, made to broadcast.

    Args:
        query, key: [B, H, q_len, D] and [B, Hkv, kv_len, D], of which only sizes matter.
        tables: cos and sin of q, then of k, broadcastable to [B, S, H, rotary_dim], of any dtypes.
        interleaved: which lanes form a pair.
    """
    (batch, heads, q_len, _), (_, kv_heads, kv_len, _) = query.shape, key.shape
    rotary_dim = tables[0].shape[-1]
    dtypes = [table.dtype for table in tables]
    if any(dtype != dtypes[0] for dtype in dtypes):
        # A pass has one place for those of q and of k. Before they are expanded, which a cast would write out.
        tables = [table.to(functools.reduce(torch.promote_types, dtypes)) for table in tables]
    cos, sin = (table.expand(batch, q_len, heads, rotary_dim) for table in tables[:2])
    cos_k, sin_k = (table.expand(batch, kv_len, kv_heads, rotary_dim) for table in tables[2:])
    return Rotation(cos, sin, cos_k, sin_k, interleaved)


Both = tuple[torch.Tensor | None, torch.Tensor | None]
"""Of the norms of q and of k, contiguous and of one dtype: both, or none."""


class Norms(NamedTuple):
    """The norms of q and of k.

    Attributes:
        kind: OF_HEAD or OF_TOKEN, for both.
        eps: OF_HEAD: of each; negative where that tensor has no norm.
    """

    kind: int
    eps: tuple[float, float]


@dataclass(frozen=True)
class Keys:
    """Tokens of k and v that are used.

    Attributes:
        indices: int32 [B, kv_len]: their positions in increasing order, then anything.
        counts: int32 [B]: how many.
    """

    indices: torch.Tensor
    counts: torch.Tensor


def used_keys(mask: torch.Tensor, batch: int, kv_len: int) -> Keys:
    """The tokens that a mask over keys lets through for one head or another, in one launch.

    Args:
        mask: bool, four dimensions that broadcast to [B, heads, 1, kv_len]; True where a head uses a token.
        batch: B.
        kv_len: number of tokens.
    """
    indices = torch.empty((batch, kv_len), dtype=torch.int32, device=mask.device)
    counts = torch.empty((batch,), dtype=torch.int32, device=mask.device)
    at = mask.data_ptr()
    listing = _listing(mask.shape, mask.stride(), batch, kv_len, at % 16 == 0, mask.device)
    tensors = (mask, indices, counts)
    listing.on(short_way(mask.device), (at, indices.data_ptr(), counts.data_ptr()), lambda: tensors)
    return Keys(indices, counts)


@functools.lru_cache(maxsize=1024)
def _listing(
    shape: tuple[int, ...], strides: tuple[int, ...], batch: int, kv_len: int, aligned: bool, device: torch.device
) -> Launch:
    of_batch, of_heads, _, of_keys = (0 if n == 1 else step for n, step in zip(shape, strides, strict=True))
    return Launch(list_used, batch, (of_batch, of_heads, of_keys, shape[1], kv_len), (1024,), aligned, 4, False, device)


class More(NamedTuple):
    """What the passes read besides q, k and v.

    Attributes:
        tensors: indices and counts of the keys that are used, cos and sin of q and of k, then the weights of their
            norms, and what their tokens are multiplied with; None for what there is not.
        turns: what is to be known of the tables; None without any.
        norms: what is to be known of the norms; None without any.
        kinds: of the tensors, as kernels are compiled for them.
    """

    tensors: tuple[torch.Tensor | None, ...]
    turns: Turns | None
    norms: Norms | None
    kinds: Hashable


NO_MORE = (None,) * 10
"""In place of :attr:`More.tensors`."""

NO_EPS = (0.0, 0.0)
"""In place of :attr:`Norms.eps`."""


def more_of(rope: Rotation | None, keys: Keys | None, norm: Norm | None = None) -> More | None:
    """What the passes are to read of a rotation, a list of keys and a norm; None where there is none of them."""
    if rope is None and keys is None and norm is None:
        return None
    indices, counts = (None, None) if keys is None else (keys.indices, keys.counts)
    turns = cos_q = sin_q = cos_k = sin_k = None
    if rope is not None:
        cos_q, sin_q = _alike(rope.cos, rope.sin)
        cos_k, sin_k = _alike(rope.cos_k, rope.sin_k)
        turns = (rope.interleaved, cos_q.shape[-1], cos_q.stride(), cos_k.stride())
    norms, weights, rstd = (None, (None, None), (None, None)) if norm is None else _norms_of(norm)
    tensors = (indices, counts, cos_q, sin_q, cos_k, sin_k, *weights, *rstd)
    return More(tensors, turns, norms, kinds_of(tensors))


Alike = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Hashable, Turns | None, Norms | None, Hashable]
"""Strides of q, k and v, what kernels are compiled for of these, and turns, norms and kinds of :class:`More`."""


def alike(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: tuple[int, int, int], more: More | None
) -> Alike:
    """What a plan for q, k and v depends on besides shapes and device: equal where one serves for both.

    Args:
        query, key, value: the tensors.
        at: their addresses.
        more: what else there is.
    """
    turns, norms, more_kinds = (None, None, None) if more is None else (more.turns, more.norms, more.kinds)
    # What kinds_of says, in a quarter of its time: q, k and v have one dtype.
    kinds = (query.dtype, at[0] % 16, at[1] % 16, at[2] % 16)
    return query.stride(), key.stride(), value.stride(), kinds, turns, norms, more_kinds


def addresses_of(tensors: Sequence[torch.Tensor | None]) -> tuple[int | None, ...]:
    """As a launch takes them; None for none."""
    return tuple([None if t is None else t.data_ptr() for t in tensors])


def _norms_of(norm: Norm) -> tuple[Norms, Both, Both]:
    """Of which kind they are, the weights of q and of k, and what their tokens are multiplied with."""
    weights, rstd = (norm.weight_q, norm.weight_k), (norm.rstd_q, norm.rstd_k)
    if not norm.over_heads:
        eps = tuple([-1.0 if number is None else float(number) for number in (norm.eps_q, norm.eps_k)])
        return Norms(OF_HEAD.value, (eps[0], eps[1])), _both(weights), rstd
    return Norms(OF_TOKEN.value, NO_EPS), _both(weights), _both([None if r is None else r.float() for r in rstd])


def _both(tensors: Sequence[torch.Tensor | None]) -> Both:
    """The two as a pass takes them. Where one is missing, ones: a kernel without it would be another one to compile."""
    q, k = tensors
    if q is None and k is None:
        return None, None
    q = torch.ones_like(k) if q is None else q  # type: ignore[arg-type]
    k = torch.ones_like(q) if k is None else k
    if q.dtype != k.dtype:
        q, k = q.float(), k.float()
    return q.contiguous(), k.contiguous()


def _alike(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two with equal strides, so that one set of them serves both."""
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())
