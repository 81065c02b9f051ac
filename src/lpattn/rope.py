"""Rotary position embedding in plain PyTorch: the meaning that fused kernels must reproduce."""

from __future__ import annotations

import torch

from lpattn.errors import InvalidArgumentError
from lpattn.predicates import FLOATING, FLOATING_NAMES, broadcasts


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
        Computed in the widest of the dtypes of x, cos and sin, as models do it: in bfloat16, each product is rounded.

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


def check_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None,
    sin_k: torch.Tensor | None,
    interleaved: bool,
) -> None:
    """Refuse what cannot be rotated: q, k, v are to be [B, S, H, D], and tables to broadcast over that.

    Raises:
        InvalidArgumentError: names the value and the limit.
    """
    if not isinstance(interleaved, bool):
        raise InvalidArgumentError(
            f"interleaved must be True or False; got {interleaved!r} ({type(interleaved).__name__})"
        )
    if (cos_k is None) != (sin_k is None):
        raise InvalidArgumentError("cos_k and sin_k go together; got only one of them")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            got = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InvalidArgumentError(f"{name} must be a [B, S, H, D] tensor; got {got}")
        if tensor.is_nested:
            raise InvalidArgumentError(f"{name} is a nested tensor; a rotation takes plain [B, S, H, D] tensors")
    tables = [("cos", cos, query), ("sin", sin, query)]
    if cos_k is not None and sin_k is not None:
        tables += [("cos_k", cos_k, key), ("sin_k", sin_k, key)]
    for name, table, _ in tables:
        if not isinstance(table, torch.Tensor):
            raise InvalidArgumentError(f"{name} must be a tensor; got {table!r} ({type(table).__name__})")
        if table.dtype not in FLOATING:
            raise InvalidArgumentError(f"{name} must be {FLOATING_NAMES}, a number for each lane; got {table.dtype}")
    rotary_dim = cos.shape[-1] if cos.dim() else 0
    if rotary_dim % 2 or not 0 < rotary_dim <= query.shape[-1]:
        raise InvalidArgumentError(
            f"rotary_dim, the last dimension of cos, must be even and at most head_dim {query.shape[-1]}; "
            f"got {rotary_dim}"
        )
    if cos_k is None:
        tables += [("cos (for the keys)", cos, key), ("sin (for the keys)", sin, key)]
    for name, table, x in tables:
        full = (*x.shape[:3], rotary_dim)
        if table.device != x.device:
            raise InvalidArgumentError(f"{name} must be on {x.device} as q and k are; got {table.device}")
        shape = (1,) * (4 - table.dim()) + tuple(table.shape)
        # Tables without an axis for heads would broadcast positions over heads: ask for the axis, do not guess.
        # The batch size is compared last: an export would keep what it was compared with as a constraint.
        of_batch = table.dim() == 3 and shape[2] == full[1] != 1 and broadcasts(shape[1:2], full[:1])
        headless = table.dim() < 3 or of_batch
        fit = len(shape) == 4 and broadcasts(shape, full)
        if headless or not fit or shape[3] != rotary_dim:
            raise InvalidArgumentError(
                f"{name} {list(table.shape)} must broadcast to [B, S, H, rotary_dim] = {list(full)}"
                "\n[S, rotary_dim] and [B, S, rotary_dim] tables need an axis for heads: cos.unsqueeze(-2)"
            )
