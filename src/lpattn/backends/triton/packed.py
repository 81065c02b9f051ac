"""Packed sequences in the layout that the portable kernel reads, and its output packed again; nothing waits.

Queries are copied into one row of tokens per sequence. Keys stay where they are: lists of their positions, of the kind
that key padding makes, lead the quantization to them. Lengths on a GPU are not waited for, so what contradicts the
largest ones is found there: no memory but the tensors' own is touched, and the result of such a sequence is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lpattn.quantize.fused import Keys


def lengths_of(cu_seqlens: torch.Tensor, most: int) -> torch.Tensor:
    """int32 [B], contiguous: how many tokens each sequence has, at most ``most`` of them."""
    return cu_seqlens.diff().clamp(0, most).to(torch.int32)


def contradictory(cu_seqlens: torch.Tensor, total: int, most: int) -> torch.Tensor:
    """Bool [B]: sequences of negative length, of more than ``most`` tokens, or not within ``total``."""
    lengths, start, end = cu_seqlens.diff(), cu_seqlens[:-1], cu_seqlens[1:]
    return (lengths < 0) | (lengths > most) | (start < 0) | (end > total)


def padded_queries(query: torch.Tensor, cu_seqlens: torch.Tensor, max_q: int) -> torch.Tensor:
    """[T, H, D] to [B, H, max_q, D]; past the end of a sequence come tokens of others."""
    positions = cu_seqlens[:-1, None] + torch.arange(max_q, device=query.device)
    return query[positions.clamp(0, query.shape[0] - 1)].transpose(1, 2)


def key_lists(cu_seqlens: torch.Tensor, total: int, max_k: int) -> Keys:
    """Where the keys of each sequence are, of ``total`` tokens."""
    from lpattn.quantize.fused import Keys

    positions = cu_seqlens[:-1, None] + torch.arange(max_k, device=cu_seqlens.device)
    return Keys(positions.clamp(0, max(total - 1, 0)).to(torch.int32), lengths_of(cu_seqlens, max_k))


def as_batch(x: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """[T, H, D] as [batch, H, tokens, D]: each entry the same memory, in which lists say where tokens are."""
    heads, lanes = x.shape[1:]
    return x.as_strided((batch, heads, tokens, lanes), (0, x.stride(1), x.stride(0), x.stride(2)))


def pack(
    padded: torch.Tensor, cu_seqlens: torch.Tensor, total: int, beyond: float, wrong: torch.Tensor
) -> torch.Tensor:
    """[B, max_q, ...] to [T, ...]: ``beyond`` for tokens in no sequence, NaN for those of a ``wrong`` one, bool [B]."""
    tokens = torch.arange(total, device=padded.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).clamp_max(padded.shape[0] - 1)
    position = (tokens - cu_seqlens[sequence]).clamp(0, padded.shape[1] - 1)
    shape = (-1, *[1] * (padded.dim() - 2))
    inside = ((tokens >= cu_seqlens[0]) & (tokens < cu_seqlens[-1])).view(shape)
    found = torch.where(wrong[sequence].view(shape), torch.nan, padded[sequence, position])
    return torch.where(inside, found, beyond)
