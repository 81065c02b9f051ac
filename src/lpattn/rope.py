"""Rotary position embedding in plain PyTorch: the meaning that fused kernels must reproduce."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the first rotary_dim lanes: ``out[d] = x[d] * cos[d] + rot(x)[d] * sin[d]``.

    Args:
        x: [B, S, H, D].
        cos, sin: broadcastable to [B, S, H, rotary_dim], any strides. Their halves need not be equal, and
            cos^2 + sin^2 need not be 1.
        interleaved: rot(x) is (-x[2i+1], x[2i]) if True, else [-x2, x1] with x1, x2 the halves of the rotated lanes.

    Returns:
        [B, S, H, D] in the dtype of x.

    Precision:
        Computed in the wider of the dtypes of x and cos, rounded once.

    Source:
        Su et al., RoFormer (2021), section 3.4.2; half-split as in GPT-NeoX.
    """
    rotary_dim = cos.shape[-1]
    head = x[..., :rotary_dim]
    if interleaved:
        turned = torch.stack((-head[..., 1::2], head[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = head.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    rotated = (head * cos + turned * sin).to(x.dtype)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


def rotate_heads_first(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None,
    sin_k: torch.Tensor | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k, [B, S, H, D], and return them as attention takes them, [B, H, S, D].

    The keys take cos_k and sin_k where they are given.
    """
    q = rotate(query, cos, sin, interleaved)
    k = rotate(key, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved)
    return q.transpose(1, 2), k.transpose(1, 2)
