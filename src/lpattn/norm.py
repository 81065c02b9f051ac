"""RMS normalization of q and k in plain PyTorch: the meaning that fused kernels must reproduce."""

from __future__ import annotations

import torch

from lpattn.errors import InvalidArgumentError
from lpattn.predicates import is_number
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


def check_norm(query: torch.Tensor, norm: Norm | None) -> None:
    """Refuse a norm that does not fit q and k [B, S, H, D].

    Raises:
        InvalidArgumentError: its type, an eps, or a weight's type, shape, dtype or device is wrong.
    """
    if norm is None:
        return
    if not isinstance(norm, Norm):
        raise InvalidArgumentError(f"norm must be a lpattn.Norm; got {type(norm).__name__}")
    for name, eps, weight in (("q", norm.eps_q, norm.weight_q), ("k", norm.eps_k, norm.weight_k)):
        if eps is not None and not is_number(eps):
            raise InvalidArgumentError(f"norm.eps_{name} must be a number, or None; got {eps!r} ({type(eps).__name__})")
        if eps is not None and not 0.0 <= eps < float("inf"):
            raise InvalidArgumentError(f"norm.eps_{name} must be at least 0 and finite, or None; got {eps}")
        if weight is None:
            continue
        if eps is None:
            raise InvalidArgumentError(f"norm.weight_{name} is given, but norm.eps_{name} is None: {name} has no norm")
        if not isinstance(weight, torch.Tensor):
            raise InvalidArgumentError(f"norm.weight_{name} must be a tensor, or None; got {type(weight).__name__}")
        if tuple(weight.shape) != query.shape[-1:] or not weight.dtype.is_floating_point:
            raise InvalidArgumentError(
                f"norm.weight_{name} must be floating point of shape [head_dim] = {list(query.shape[-1:])}; got "
                f"{weight.dtype} {list(weight.shape)}"
            )
        if weight.device != query.device:
            raise InvalidArgumentError(f"norm.weight_{name} must be on {query.device} as q is; got {weight.device}")
