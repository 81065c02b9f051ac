"""What attention is measured on: shapes, kinds of data, and exact attention in float64 to hold outputs against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One attention call; bfloat16, [B, H, S, D], q_len = kv_len.

    Attributes:
        kv_lengths: how many keys the queries of each sequence see, by a bool mask; None where they see all.
        window: how many keys a query sees, its own the last of them, by a dense bool mask; None where there is none.
        holes: a dense bool mask hides one key in ten from each query, so that no tile of it can be left out.
        bias: an additive mask in bfloat16, normal numbers, hides no key, as a bias by relative positions.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    length: int
    head_dim: int
    causal: bool
    kv_lengths: tuple[int, ...] | None = None
    window: int | None = None
    holes: bool = False
    bias: bool = False

    @property
    def flop(self) -> float:
        keys = float(self.batch * self.length if self.kv_lengths is None else sum(self.kv_lengths))
        if self.window is not None:
            # The first queries see fewer.
            keys = self.batch * self.window * (1 - (self.window - 1) / (2 * self.length))
        return 4.0 * self.num_heads * self.length * keys * self.head_dim / (2 if self.causal else 1)

    def mask(self, device: str) -> torch.Tensor | None:
        """[B, 1, 1, S] or [1, 1, S, S]: True where a key is seen, or what is added."""
        if self.window is not None:
            ones = torch.ones(1, 1, self.length, self.length, dtype=torch.bool, device=device)
            return ones.tril().triu(1 - self.window)
        if self.holes or self.bias:
            generator = torch.Generator(device).manual_seed(0)
            size = (1, 1, self.length, self.length)
            if self.bias:
                return torch.randn(size, generator=generator, device=device).bfloat16()
            return torch.rand(size, generator=generator, device=device) < 0.9
        if self.kv_lengths is None:
            return None
        seen = torch.tensor(self.kv_lengths, device=device)
        return torch.arange(self.length, device=device) < seen[:, None, None, None]

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        padded = "" if self.kv_lengths is None else f",keys {'+'.join(map(str, self.kv_lengths))}"
        padded += "" if self.window is None else f",window {self.window}"
        padded += ",holes" if self.holes else ",bias" if self.bias else ""
        return f"{self.batch},{self.num_heads}/{self.num_kv_heads},{self.length},{self.head_dim},{kind}{padded}"


FLUX = Shape(1, 24, 24, 4608, 128, False)  # FLUX.1 at 1024x1024
LONG = Shape(1, 32, 32, 16384, 128, False)
NAMED = [
    FLUX,
    LONG,
    Shape(1, 32, 32, 16384, 64, False),
    Shape(1, 32, 8, 8192, 128, True),  # Llama-3-8B prefill
    Shape(2, 24, 24, 512, 128, False),
]
PADDED = Shape(2, 24, 24, 4608, 128, False, kv_lengths=(4608, 3072))
WINDOWED = [
    Shape(1, 32, 8, 8192, 128, False, window=4096),  # Mistral-7B prefill
    Shape(1, 32, 32, 16384, 128, False, window=4096),
]
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
DIMS = (64, 128, 256)


def sweep(lengths: tuple[int, ...], dims: tuple[int, ...]) -> list[Shape]:
    """Lengths x kind of mask x grouped x head_dim, the short ones first: what a budget cuts off is the long end."""
    shapes = []
    for length in lengths:
        for dim in dims:
            # Hidden size 4096 at one batch; fewer heads where a call would take seconds.
            heads = max(4, min(4096 // dim, 2**20 // length))
            for causal in (False, True):
                shapes += [Shape(1, heads, kv, length, dim, causal) for kv in (heads, max(1, heads // 4))]
            if 1024 <= length <= 16384:
                for kv in (heads, max(1, heads // 4)):
                    shapes += [Shape(1, heads, kv, length, dim, False, **{kind: True}) for kind in ("holes", "bias")]
    return shapes


DATA = {
    "randn": "normal",
    "outliers": "normal, and 0.1 % of the elements with another normal number of standard deviation 10 added",
    "bias": "normal, and a constant per channel added: standard deviation 4 over the channels of K, 1 over those of V",
}
"""Kinds of data, in words. The outliers are those of FlashAttention-3 (arXiv:2407.08608, section 4.3)."""


def inputs(shape: Shape, data: str = "randn", device: str = "cuda", layout: str = "bhsd", seed: int = 0) -> Tensors:
    """q, k and v of one kind of data, for a seed always the same.

    Args:
        shape: the call.
        data: a key of :data:`DATA`.
        device: of the tensors.
        layout: of the memory, as the dimensions from the slowest to the fastest: "bhsd", or "bshd" as models have it.
        seed: of the random numbers.
    """
    torch.manual_seed(seed)

    def one(heads: int, bias: float) -> torch.Tensor:
        size = (shape.batch, heads, shape.length, shape.head_dim)
        x = torch.randn(size, device=device)
        if data == "outliers":
            x += (torch.rand(size, device=device) < 0.001) * 10 * torch.randn(size, device=device)
        elif data == "bias" and bias:
            x += bias * torch.randn(shape.batch, heads, 1, shape.head_dim, device=device)
        x = x.bfloat16()
        return x if layout == "bhsd" else x.transpose(1, 2).contiguous().transpose(1, 2)

    return one(shape.num_heads, 0.0), one(shape.num_kv_heads, 4.0), one(shape.num_kv_heads, 1.0)


def sqnr(out: torch.Tensor, qkv: Tensors, shape: Shape, rows: int = 24, all_heads: bool = False) -> float:
    """SQNR in dB against exact attention in float64: see :func:`energies`."""
    return decibels(*energies(out, qkv, shape, rows, all_heads))


def energies(
    out: torch.Tensor, qkv: Tensors, shape: Shape, rows: int = 24, all_heads: bool = False
) -> tuple[float, float]:
    """Sums of squares of exact attention in float64, and of the difference, on sampled rows.

    They are rows of the first and last sequence and head.

    Args:
        out: [B, H, S, D], what is judged.
        qkv: what it was computed from.
        shape: the call.
        rows: how many rows of each head, evenly spaced, the first and the last among them.
        all_heads: not only the first and the last one.
    """
    q, k, v = qkv
    at = torch.linspace(0, shape.length - 1, rows, device=q.device).long()
    keys = torch.arange(shape.length, device=q.device)
    mask = shape.mask(str(q.device))
    signal = noise = 0.0
    for batch in {0, shape.batch - 1}:
        for head in range(shape.num_heads) if all_heads else {0, shape.num_heads - 1}:
            kv = head // (shape.num_heads // shape.num_kv_heads)
            logits = q[batch, head, at].double() @ k[batch, kv].double().T * shape.head_dim**-0.5
            if shape.causal:
                logits = logits.masked_fill(keys > at[:, None], -math.inf)
            if mask is not None:
                rows_of_mask = mask.expand(shape.batch, 1, shape.length, shape.length)[batch, 0, at]
                if mask.dtype == torch.bool:
                    logits = logits.masked_fill(~rows_of_mask, -math.inf)
                else:
                    logits = logits + rows_of_mask
            expected = logits.softmax(-1) @ v[batch, kv].double()
            signal += float(expected.square().sum())
            noise += float((expected - out[batch, head, at].double()).square().sum())
    return signal, noise


def decibels(signal: float, noise: float) -> float:
    """10 * log10(signal / noise); -inf where the noise is no number."""
    return 10 * math.log10(signal / max(noise, 1e-300)) if math.isfinite(noise) else -math.inf
