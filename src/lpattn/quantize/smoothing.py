"""The per-channel constant that is subtracted from K or V before the cast.

Subtracting any constant is exact: softmax ignores a shift of all logits of a row by q.c, and the rows of P sum to 1, so
what V loses is added to the output. The mean is merely the constant that leaves the least to quantize, which is why an
estimate from a sample of the tokens will do.
"""

from __future__ import annotations

import torch

from lpattn.errors import InvalidArgumentError


def channel_mean(x: torch.Tensor, used: torch.Tensor | None = None, every: int = 1) -> torch.Tensor:
    """Mean over the used tokens, per channel.

    Args:
        x: [B, H, S, D], float32 or float64.
        used: bool, broadcastable to [B, H, S]; tokens where it is False do not count. None: all tokens count.
        every: take tokens 0, every, 2 * every, ...; 1 takes all of them.

    Returns:
        [B, H, 1, D] in x's dtype, always finite: inf and NaN elements do not count, and a channel with no element
        that counts gets 0.

    Raises:
        InvalidArgumentError: every is less than 1.
    """
    if every < 1:
        raise InvalidArgumentError(f"every must be at least 1 (take all tokens); got {every}")
    x = x[:, :, ::every]
    counts = x.isfinite()
    if used is not None:
        counts = counts & used.expand(*used.shape[:2], -1)[:, :, ::every, None]
    number = counts.sum(2, keepdim=True).clamp_min(1)
    # Dividing first keeps the sum of large values finite.
    return torch.where(counts, x / number, 0.0).sum(2, keepdim=True)
