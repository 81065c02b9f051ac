"""Transformer blocks with random weights, shaped as Llama-3-8B's, FLUX.1's and Wan 14B's, to measure compiled code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6
"""Of the norms of q and k."""

Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Shape of a block: heads, kv heads, head_dim, width of the MLP."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


LLAMA = Sizes(32, 8, 128, 14336)
FLUX = Sizes(24, 24, 128, 12288)
WAN = Sizes(40, 40, 128, 13824)
SMALL = {"llama": Sizes(4, 2, 16, 96), "flux": Sizes(4, 4, 16, 96), "wan": Sizes(4, 4, 16, 96)}


class Between(nn.Module):
    """What lies between the projections: norm of q and k where there is one, RoPE, attention.

    Args:
        sizes: of the block.
        norm: what q and k are RMS-normalized over: a "head", as in FLUX, all "heads", as in Wan, or nothing.
        interleaved: how lanes pair up.
        causal: causal attention.
    """

    def __init__(self, sizes: Sizes, norm: str | None, interleaved: bool, causal: bool) -> None:
        super().__init__()
        self.sizes, self.norm, self.interleaved, self.causal = sizes, norm, interleaved, causal
        widths = (sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(sizes.head_dim if norm == "head" else width, EPS) if norm else nn.Identity() for width in widths
        )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """q, k, v are [B, S, H * D] as projections write them, cos and sin [S, D]; the result is [B, S, H * D]."""
        if self.norm == "heads":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, self.sizes.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        grouped = self.sizes.heads != self.sizes.kv_heads
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x is [B, H, S, D]."""
        if self.interleaved:
            # As diffusers does it for FLUX: in float32.
            a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
            turned = torch.stack((-b, a), -1).flatten(3)
            return (x.float() * cos + turned.float() * sin).to(x.dtype)
        # As transformers does it for Llama: in the model's dtype.
        a, b = x.chunk(2, -1)
        return x * cos.to(x.dtype) + torch.cat((-b, a), -1) * sin.to(x.dtype)


class Block(nn.Module):
    """Norm, projections, what lies between, output projection, and an MLP beside it."""

    def __init__(self, sizes: Sizes, between: Between) -> None:
        super().__init__()
        kv = sizes.kv_heads * sizes.head_dim
        self.norm, self.between = nn.RMSNorm(sizes.width), between
        self.q, self.k, self.v = (nn.Linear(sizes.width, n, bias=False) for n in (sizes.width, kv, kv))
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)
        self.up, self.down = (
            nn.Linear(a, b, bias=False) for a, b in ((sizes.width, sizes.mlp), (sizes.mlp, sizes.width))
        )

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x and the result are [B, S, width]."""
        inner = self.norm(x)
        attended = self.out(self.between(self.q(inner), self.k(inner), self.v(inner), cos, sin))
        return x + attended + self.down(F.silu(self.up(inner)))


def tables(length: int, dim: int, interleaved: bool, device: str) -> Tables:
    """cos and sin, float32 [S, D]."""
    angle = torch.arange(length, device=device)[:, None] * 10000.0 ** -(
        torch.arange(dim // 2, device=device) / (dim // 2)
    )
    full = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    return full.cos(), full.sin()


BETWEEN: dict[str, Callable[[Sizes], Between]] = {
    "llama": lambda sizes: Between(sizes, norm=None, interleaved=False, causal=True),
    "flux": lambda sizes: Between(sizes, norm="head", interleaved=True, causal=False),
    "wan": lambda sizes: Between(sizes, norm="heads", interleaved=True, causal=False),
}
SHAPES = {"llama": LLAMA, "flux": FLUX, "wan": WAN}
