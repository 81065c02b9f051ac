"""RMS normalization of q and k in plain PyTorch: the meaning that fused kernels must reproduce."""

from __future__ import annotations

import torch

from lpattn.types import Norm


def normalize(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Divide each row by its root mean square: ``x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        x: [..., D]; the mean is over D.
        eps: what is added to the mean square.
        weight: [D], floating point; None is ones.

    Returns:
        [..., D] in the dtype of x.

    Precision:
        Computed in float32 (float64 if x or the weight is), rounded once.

    Source:
        Zhang and Sennrich, Root Mean Square Layer Normalization (2019), equation 4.
    """
    wide = torch.float32
    for tensor in (x, weight):
        wide = wide if tensor is None else torch.promote_types(wide, tensor.dtype)
    normal = x.to(wide)
    normal = normal * (normal.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normal if weight is None else normal * weight).to(x.dtype)


def normalize_both(query: torch.Tensor, key: torch.Tensor, norm: Norm | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and k, lanes in the last dimension of both, as a norm leaves them."""
    if norm is None:
        return query, key
    return (
        query if norm.eps_q is None else normalize(query, norm.eps_q, norm.weight_q),
        key if norm.eps_k is None else normalize(key, norm.eps_k, norm.weight_k),
    )
