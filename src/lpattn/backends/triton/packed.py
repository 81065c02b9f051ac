"""Packed sequences in the layout that the portable kernel reads, and its output packed again; nothing waits.

Queries are copied into one row of tokens per sequence. Keys stay where they are: lists of their positions, of the kind
that key padding makes, lead the quantization to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lpattn.quantize.fused import Keys


def lengths_of(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """int32 [B], contiguous: how many tokens each sequence has."""
    return cu_seqlens.diff().to(torch.int32)


def padded_queries(query: torch.Tensor, cu_seqlens: torch.Tensor, max_q: int) -> torch.Tensor:
    """[T, H, D] to [B, H, max_q, D]; past the end of a sequence come tokens of others."""
    positions = cu_seqlens[:-1, None] + torch.arange(max_q, device=query.device)
    return query[positions.clamp_max(query.shape[0] - 1)].transpose(1, 2)


def key_lists(cu_seqlens: torch.Tensor, max_k: int) -> Keys:
    """Where the keys of each sequence are."""
    from lpattn.quantize.fused import Keys

    positions = cu_seqlens[:-1, None] + torch.arange(max_k, device=cu_seqlens.device)
    return Keys(positions.to(torch.int32), lengths_of(cu_seqlens))


def as_batch(x: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """[T, H, D] as [batch, H, tokens, D]: each entry the same memory, in which lists say where tokens are."""
    heads, lanes = x.shape[1:]
    return x.as_strided((batch, heads, tokens, lanes), (0, x.stride(1), x.stride(0), x.stride(2)))


def pack(padded: torch.Tensor, cu_seqlens: torch.Tensor, total: int, beyond: float) -> torch.Tensor:
    """[B, max_q, ...] to [T, ...]; ``beyond`` for tokens behind the last sequence."""
    tokens = torch.arange(total, device=padded.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).clamp_max(padded.shape[0] - 1)
    position = (tokens - cu_seqlens[sequence]).clamp(0, padded.shape[1] - 1)
    inside = (tokens < cu_seqlens[-1]).view(-1, *[1] * (padded.dim() - 2))
    return torch.where(inside, padded[sequence, position], beyond)
