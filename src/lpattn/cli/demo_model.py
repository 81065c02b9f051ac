"""The demo's model, its output in float64, and how both are compared: a quality in dB and a time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

_ROWS = 1024
"""Queries whose float64 scores are in memory at once."""


class MyModel(nn.Module):
    """One causal self-attention layer.

    Args:
        embed_dim: channels; a multiple of num_heads.
        num_heads: heads of embed_dim / num_heads channels each.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend; x and the result are [B, S, embed_dim]."""
        q, k, v = self.heads(x)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of x, each [B, H, S, D]."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v


def exact_output(model: MyModel, x: torch.Tensor) -> torch.Tensor:
    """What the model's weights give in float64: attention written out, a block of queries at a time.

    Args:
        model: a model in float64.
        x: [B, S, embed_dim], float64.

    Returns:
        [B, S, embed_dim], float64.
    """
    q, k, v = model.heads(x)
    blocks = []
    for start in range(0, q.shape[2], _ROWS):
        stop = min(start + _ROWS, q.shape[2])
        allowed = torch.ones(stop - start, stop, dtype=torch.bool, device=x.device).tril(start)
        heads = []
        for head in range(q.shape[1]):
            scores = q[:, head, start:stop] @ k[:, head, :stop].mT / math.sqrt(q.shape[3])
            heads.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[:, head, :stop])
        blocks.append(torch.stack(heads, dim=1))
    return model.out_proj(torch.cat(blocks, dim=2).transpose(1, 2).flatten(2))


def sqnr(reference: torch.Tensor, out: torch.Tensor) -> float:
    """Signal to quantization noise, 10*log10(sum(ref^2) / sum((ref - out)^2)), in dB. Computed in float64."""
    reference, out = reference.double(), out.double()
    noise = (reference - out).square().sum().item()
    return 10.0 * math.log10(reference.square().sum().item() / noise) if noise > 0.0 else math.inf


def interleaved_medians(functions: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median wall time of each function in seconds, over repeats in which they take turns.

    Each runs twice before anything is measured. On a GPU every measurement waits for the device.
    """

    def timed(function: Callable[[], object]) -> float:
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        return time.perf_counter() - start

    for function in (*functions, *functions):
        timed(function)
    rounds = [[timed(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
