"""What lies between the projections and an FP8 attention kernel, with more and more of it in the quantization.

Each module takes q, k and v as the projections write them. ``opaque``, ``rope`` and ``norm`` end in the quantization of
fp8_triton, which is an operator to the compiler: scales per token and block, k and v smoothed, v transposed.
``row-local`` is what the compiler can fuse by itself: everything in plain PyTorch, with a scale for each token of each
head, nothing smoothed or transposed. No kernel here reads that: a scale per token cannot be taken out of the sums over
keys for v. It says how fast the quantization could be if one did.
"""

from __future__ import annotations

import torch
from blocks import EPS, Between
from torch import nn

from lpattn.types import Norm

OPAQUE, ROPE, NORM, ROW_LOCAL = "opaque", "rope", "norm", "row-local"

_library = torch.library.Library("lpattn_benchmark", "DEF")
_library.define(
    "quantize(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, bool interleaved, "
    "Tensor? weight_q, Tensor? weight_k, float? eps) -> (Tensor, Tensor)"
)


def _quantize(query, key, value, cos, sin, interleaved, weight_q, weight_k, eps):  # type: ignore[no-untyped-def]
    from lpattn.quantize.fused import quantize_per_block, rotation_of

    rope = (
        None if cos is None else rotation_of(query, key, [t[None, :, None] for t in (cos, sin, cos, sin)], interleaved)
    )
    norm = None if eps is None else Norm(eps, eps, weight_q, weight_k)
    found = quantize_per_block(query, key, value, rope=rope, norm=norm)
    return found.query.transpose(1, 2), found.q_scale.transpose(1, 2).unsqueeze(-1)


def _fake(query, key, value, *rest):  # type: ignore[no-untyped-def]
    batch, heads, tokens, dim = query.shape
    data = query.new_empty(batch, heads, tokens, dim, dtype=torch.float8_e4m3fn).transpose(1, 2)
    return data, query.new_empty(batch, heads, tokens, dtype=torch.float32).transpose(1, 2).unsqueeze(-1)


_library.impl("quantize", _quantize, "CompositeExplicitAutograd")
torch.library.register_fake("lpattn_benchmark::quantize", _fake, lib=_library)


class Rounding(nn.Module):
    """Norm, RoPE and quantization.

    Args:
        between: what has the norm and RoPE.
        how: one of the four.
    """

    def __init__(self, between: Between, how: str) -> None:
        super().__init__()
        self.between, self.how = between, how

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """e4m3 [B, S, H, D] of q and its scales, float32 [B, S, H, 1]."""
        own, normed = self.between, self.between.normed
        q, k, v = (x.unflatten(-1, (-1, own.sizes.head_dim)).transpose(1, 2) for x in (q, k, v))
        if normed and self.how != NORM:
            q, k = own.q_norm(q), own.k_norm(k)
        if self.how in (OPAQUE, ROW_LOCAL):
            q, k = own.rotate(q, cos, sin), own.rotate(k, cos, sin)
        if self.how == ROW_LOCAL:
            found = [_per_token(x.transpose(1, 2)) for x in (q, k, v)]
            return tuple(tensor for pair in found for tensor in pair)
        tables = (None, None) if self.how == OPAQUE else (cos, sin)
        norm = (None, None, None)
        if normed and self.how == NORM:
            norm = (own.q_norm.weight, own.k_norm.weight, EPS)  # type: ignore[assignment]
        made: tuple[torch.Tensor, ...] = torch.ops.lpattn_benchmark.quantize(q, k, v, *tables, own.interleaved, *norm)
        return made


def _per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 448.0).clamp_min(2.0**-56)
    return (x / scale).to(torch.float8_e4m3fn), scale


def query_of(made: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Q as it was rounded: float32 [B, S, H, D]."""
    data, scale = made[:2]
    return data.float() * scale
