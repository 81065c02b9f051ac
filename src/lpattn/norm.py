"""RMS normalization of q and k in plain PyTorch: the meaning that fused kernels must reproduce."""

from __future__ import annotations

import torch

from lpattn.errors import InvalidArgumentError
from lpattn.predicates import FLOATING, FLOATING_NAMES, is_number
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


def scale_tokens(x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply each token by one over its root mean square, and each lane by its weight.

    Args:
        x: [B, S, H, D].
        rstd: [B, S], floating point.
        weight: [H, D], floating point; None is ones.

    Returns:
        [B, S, H, D] in the dtype of x.

    Precision:
        Computed in float32 (float64 if one of them is), rounded once.
    """
    wide = torch.float32
    for tensor in (x, rstd, weight):
        wide = wide if tensor is None else torch.promote_types(wide, tensor.dtype)
    scaled = x.to(wide) * rstd[:, :, None, None]
    return (scaled if weight is None else scaled * weight).to(x.dtype)


def normalize_both(query: torch.Tensor, key: torch.Tensor, norm: Norm | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and k as a norm leaves them, lanes in their last dimension; with ``rstd`` they are [B, S, H, D]."""
    if norm is None:
        return query, key
    if norm.rstd_q is not None and norm.rstd_k is not None:
        return scale_tokens(query, norm.rstd_q, norm.weight_q), scale_tokens(key, norm.rstd_k, norm.weight_k)
    return (
        query if norm.eps_q is None else normalize(query, norm.eps_q, norm.weight_q),
        key if norm.eps_k is None else normalize(key, norm.eps_k, norm.weight_k),
    )


def check_norm(query: torch.Tensor, key: torch.Tensor, norm: Norm | None) -> None:
    """Refuse a norm that does not fit q and k [B, S, H, D].

    Raises:
        InvalidArgumentError: its type, an eps, or a tensor's type, shape, dtype or device is wrong, or some of it does
            not go together.
    """
    if norm is None:
        return
    if not isinstance(norm, Norm):
        raise InvalidArgumentError(f"norm must be a lpattn.Norm; got {type(norm).__name__}")
    spans_heads = norm.over_heads
    if all(part is None for part in (norm.eps_q, norm.eps_k, *norm.tensors)):
        raise InvalidArgumentError("norm has neither eps nor rstd, of q or of k: it normalizes nothing; pass norm=None")
    operands = (
        ("q", query, norm.eps_q, norm.weight_q, norm.rstd_q),
        ("k", key, norm.eps_k, norm.weight_k, norm.rstd_k),
    )
    for name, x, eps, weight, rstd in operands:
        if eps is not None and not is_number(eps):
            raise InvalidArgumentError(f"norm.eps_{name} must be a number, or None; got {eps!r} ({type(eps).__name__})")
        if eps is not None and not 0.0 <= eps < float("inf"):
            raise InvalidArgumentError(f"norm.eps_{name} must be at least 0 and finite, or None; got {eps}")
        if spans_heads and eps is not None:
            raise InvalidArgumentError(
                f"norm.eps_{name} is given beside norm.rstd_q or norm.rstd_k: eps belongs to a norm over head_dim, and "
                "where a norm spans heads, to the computation of rstd"
            )
        if weight is not None and eps is None and not spans_heads:
            raise InvalidArgumentError(f"norm.weight_{name} is given, but norm.eps_{name} is None: {name} has no norm")
        if spans_heads:
            _check_tensor(f"rstd_{name}", rstd, "[B, S]", x.shape[:2], query.device)
        if weight is not None:
            says, shape = ("[H, head_dim]", x.shape[2:]) if spans_heads else ("[head_dim]", x.shape[3:])
            _check_tensor(f"weight_{name}", weight, says, shape, query.device)
    if spans_heads and (norm.weight_q is None) != (norm.weight_k is None):
        raise InvalidArgumentError(
            "norm.weight_q and norm.weight_k go together beside norm.rstd_q; got only one of them: pass ones for the "
            "other"
        )


def _check_tensor(name: str, tensor: object, says: str, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        missing = " (rstd_q and rstd_k go together)" if tensor is None else ", or None"
        raise InvalidArgumentError(f"norm.{name} must be a tensor{missing}; got {type(tensor).__name__}")
    if tensor.shape != shape or tensor.dtype not in FLOATING:
        raise InvalidArgumentError(
            f"norm.{name} must be {FLOATING_NAMES} of shape {says} = {list(shape)}; "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
    if tensor.layout is not torch.strided:
        raise InvalidArgumentError(f"norm.{name} must be a dense tensor; got {tensor.layout}: pass its to_dense()")
    if tensor.device != device:
        raise InvalidArgumentError(f"norm.{name} must be on {device} as q is; got {tensor.device}")
