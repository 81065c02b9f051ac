"""Inputs that find bugs: uniform or merely random ones let a wrong kernel pass.

A :class:`Problem` is what a call to ``low_precision_sdpa`` takes. The kinds of data are in :data:`KINDS`; all of them
keep logits, weights and outputs in the range of float16.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lpattn.testing.exact import exact_attention, pytorch_attention
from lpattn.types import HadamardMode

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call; ``causal`` and ``scale`` (None: 1/sqrt(head_dim)) matter to where some kinds put weight."""

    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    scale: float | None = None

    @property
    def softmax_scale(self) -> float:
        """The factor on q.k."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True, eq=False)
class Problem:
    """The arguments of one attention call.

    Attributes:
        query, key, value: [B, H, q_len, D], [B, Hkv, kv_len, D], [B, Hkv, kv_len, D_v].
        attn_mask, is_causal, scale: as ``scaled_dot_product_attention`` takes them.
        hadamard: rotation that the backend is asked for.
        label: what it is, for messages.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    hadamard: HadamardMode = HadamardMode.NONE
    label: str = ""

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, lse) in float64, by the formula; computed once, of the values that the tensors have then."""
        return self._exact

    @functools.cached_property
    def _exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        return exact_attention(self.query, self.key, self.value, self.attn_mask, self.is_causal, self.scale)

    def by_pytorch(self) -> torch.Tensor | None:
        """The output of PyTorch's own SDPA; None where it refuses the call."""
        return pytorch_attention(self.query, self.key, self.value, self.attn_mask, self.is_causal, self.scale)

    def changed(self, **changes: Any) -> Problem:
        """A copy with other values of some attributes."""
        return dataclasses.replace(self, **changes)

    @property
    def softmax_scale(self) -> float:
        """The factor on q.k."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def visible(self) -> torch.Tensor:
        """Which keys each row sees: bool [B, H, q_len, kv_len]."""
        shape = (*self.query.shape[:3], self.key.shape[2])
        seen = torch.ones(shape, dtype=torch.bool, device=self.query.device)
        if self.is_causal:
            seen = seen.tril()
        if self.attn_mask is None:
            return seen
        return seen & (self.attn_mask if self.attn_mask.dtype == torch.bool else self.attn_mask != -torch.inf)

    def laid_out(self, layout: str) -> Problem:
        """The same values of q, k and v in another layout of memory, one of :data:`LAYOUTS`."""
        q, k, v = (LAYOUTS[layout](x) for x in (self.query, self.key, self.value))
        return self.changed(query=q, key=k, value=v, label=layout)

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same in another dtype; masks of bool stay as they are."""
        mask = self.attn_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(dtype)
        q, k, v = (x.to(dtype) for x in (self.query, self.key, self.value))
        return self.changed(query=q, key=k, value=v, attn_mask=mask)

    def with_scale(self, factor: float) -> Problem:
        """The same with the softmax scale times a factor."""
        return self.changed(scale=self.softmax_scale * factor)

    def __str__(self) -> str:
        q, k, v = self.query, self.key, self.value
        text = f"{self.label}: q {list(q.shape)} {str(q.dtype).removeprefix('torch.')}"
        if k.shape != q.shape or v.shape != q.shape:
            text += f", k {list(k.shape)}, v {list(v.shape)}"
        text += ", causal" if self.is_causal else ""
        if self.attn_mask is not None:
            text += f", attn_mask {list(self.attn_mask.shape)} {str(self.attn_mask.dtype).removeprefix('torch.')}"
        text += "" if self.scale is None else f", scale {self.scale:g}"
        return text + ("" if self.hadamard is HadamardMode.NONE else f", hadamard {self.hadamard}")


def _normal(sizes: Sizes, generator: torch.Generator) -> Tensors:
    def make(heads: int, length: int, dim: int) -> torch.Tensor:
        return torch.randn(sizes.batch, heads, length, dim, generator=generator)

    q = make(sizes.num_heads, sizes.q_len, sizes.head_dim)
    k = make(sizes.num_kv_heads, sizes.kv_len, sizes.head_dim)
    return q, k, make(sizes.num_kv_heads, sizes.kv_len, sizes.head_dim_v)


def _codes(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Random signs: all but orthogonal to each other, and exact where a format's scale is that of the largest."""
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


def _grouped(per_kv_head: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    return per_kv_head.repeat_interleave(sizes.num_heads // sizes.num_kv_heads, 1)


def _soft(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """Logits with a standard deviation of 0.25: nearly uniform weights."""
    q, k, v = _normal(sizes, generator)
    return q * 0.25 / (sizes.softmax_scale * sizes.head_dim**0.5), k, v


def _sharp(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """Logits with a standard deviation of 3: a few keys have most of the weight."""
    q, k, v = _normal(sizes, generator)
    return q * 3.0 / (sizes.softmax_scale * sizes.head_dim**0.5), k, v


def _heads_of_different_scale(sizes: Sizes, generator: torch.Generator) -> Tensors:
    q, k, v = _normal(sizes, generator)
    size = 2.0 ** (torch.arange(sizes.num_kv_heads) % 7 - 3)[None, :, None, None]
    batches = 2.0 ** (torch.arange(sizes.batch) % 3)[:, None, None, None]
    return q / _grouped(size, sizes), k * size, v * size * batches


def _outlier_channels(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """One channel of k and one of v ten times as large as the others; logits stay as they are."""
    q, k, v = _normal(sizes, generator)
    channel = sizes.head_dim // 3
    q[..., channel] /= 10
    k[..., channel] *= 10
    v[..., sizes.head_dim_v // 2] *= 10
    return q, k, v


def _biased(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """A constant per channel on k, which softmax ignores but lse does not, and on v, which comes out as it is."""
    q, k, v = _normal(sizes, generator)
    k += torch.randn(sizes.batch, sizes.num_kv_heads, 1, sizes.head_dim, generator=generator) * 2
    v += torch.randn(sizes.batch, sizes.num_kv_heads, 1, sizes.head_dim_v, generator=generator)
    return q, k, v


def _sink(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """The first key has about half of the weight of every row, as attention sinks have."""
    q, k, v = _normal(sizes, generator)
    direction = _codes(sizes.batch, sizes.num_kv_heads, 1, sizes.head_dim, generator=generator)
    per_lane = math.log(max(sizes.kv_len, 2)) / (sizes.head_dim * sizes.softmax_scale)
    q += _grouped(direction, sizes)
    k[:, :, :1] = direction * per_lane
    return q, k, v


def _peak_and_tails(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """The first key has half of the weight, many small ones share the rest, and the two halves of v are opposed.

    The small weights lie about 1 / kv_len below the peak, spread over a factor of 4: where they underflow, are clipped
    against the peak, or enter the sum otherwise than the product, the output moves as a whole.
    """
    q, k, v = _normal(sizes, generator)
    signs = _codes(sizes.batch, sizes.num_kv_heads, 1, sizes.head_dim, generator=generator)
    # Lanes of many sizes, so that the rounding of q and k has no direction: lanes of one size are all rounded alike.
    q[:] = _grouped(signs, sizes) * (0.5 + torch.rand(q.shape, generator=generator))
    size = torch.rand(sizes.batch, sizes.num_kv_heads, sizes.kv_len, sizes.head_dim, generator=generator) + 0.5
    size /= size.sum(-1, keepdim=True) * sizes.softmax_scale
    depth = math.log(max(sizes.kv_len, 2))
    spread = (torch.rand(sizes.batch, sizes.num_kv_heads, sizes.kv_len, 1, generator=generator) - 0.5) * math.log(4.0)
    spread[:, :, 0] = depth
    k[:] = signs * size * (spread - depth / 2)
    v[:, :, :1] = 1.0 + 0.25 * v[:, :, :1]
    v[:, :, 1:] = -1.0 + 0.25 * v[:, :, 1:]
    return q, k, v


def _needle(sizes: Sizes, generator: torch.Generator, offset: int) -> Tensors:
    _, _, v = _normal(sizes, generator)
    k = _codes(sizes.batch, sizes.num_kv_heads, sizes.kv_len, sizes.head_dim, generator=generator)
    last = torch.full((sizes.q_len,), sizes.kv_len - 1)
    if sizes.causal:
        last = torch.arange(sizes.q_len).clamp_max(sizes.kv_len - 1)
    target = (last + offset).clamp_max(sizes.kv_len - 1)
    strength = 8.0 / (sizes.head_dim * sizes.softmax_scale)
    return _grouped(k, sizes)[:, :, target] * strength, k, v


def _last_key(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """Every row attends to the last key that it may see."""
    return _needle(sizes, generator, 0)


def _past_the_last_key(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """Every row would attend to the key after the last one that it may see."""
    return _needle(sizes, generator, 1)


def _large_values(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """Values past what e4m3 holds without a scale, with ordinary logits."""
    q, k, v = _normal(sizes, generator)
    return q / 64, k * 64, v * 700


def _small_values(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """Values below what e4m3 holds without a scale, with ordinary logits."""
    q, k, v = _normal(sizes, generator)
    return q * 64, k / 64, v / 2048


Kind = Callable[[Sizes, torch.Generator], Tensors]

KINDS: dict[str, Kind] = {
    "normal": _normal,
    "soft": _soft,
    "sharp": _sharp,
    "heads_of_different_scale": _heads_of_different_scale,
    "outlier_channels": _outlier_channels,
    "biased": _biased,
    "sink": _sink,
    "peak_and_tails": _peak_and_tails,
    "last_key": _last_key,
    "past_the_last_key": _past_the_last_key,
    "large_values": _large_values,
    "small_values": _small_values,
}
"""Every kind of data by name."""


def make_problem(
    kind: str,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    *,
    attn_mask: torch.Tensor | None = None,
    hadamard: HadamardMode = HadamardMode.NONE,
    seed: int = 0,
) -> Problem:
    """A problem of one kind; the same arguments give the same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (x.to(device=device, dtype=dtype) for x in KINDS[kind](sizes, generator))
    mask = None if attn_mask is None else attn_mask.to(device)
    return Problem(q, k, v, mask, sizes.causal, sizes.scale, hadamard, kind.replace("_", " "))


def spread(problem: Problem) -> Problem:
    """Logits with a standard deviation of 1, whatever the scale."""
    lanes = problem.query.shape[-1]
    size = (abs(problem.softmax_scale) or lanes**-0.5) * lanes**0.5
    return problem.changed(query=problem.query / size, label="spread over all keys")


def level(problem: Problem) -> Problem:
    """Logits of zero: a key too many or too few shows in the log-sum-exp."""
    return problem.changed(query=torch.zeros_like(problem.query), label="q of zeros")


def at_one_visible_key(problem: Problem) -> Problem:
    """Every row attends to one of the keys that it sees, chosen at random."""
    return _aimed(problem, problem.visible(), "each row attends to one key")


def at_one_hidden_key(problem: Problem) -> Problem:
    """Every row would attend to one of the keys that are hidden from it, chosen at random."""
    return _aimed(problem, ~problem.visible(), "each row would attend to one hidden key")


def _aimed(problem: Problem, targets: torch.Tensor, label: str) -> Problem:
    generator, device = torch.Generator().manual_seed(0), problem.query.device
    lanes, groups = problem.query.shape[-1], problem.query.shape[1] // problem.key.shape[1]
    key = _codes(*problem.key.shape, generator=generator).to(problem.key)
    # Where a row has no such key, any will do.
    target = (torch.rand(targets.shape, generator=generator).to(device) + targets.float()).argmax(-1, keepdim=True)
    query = key.repeat_interleave(groups, 1).gather(2, target.expand(-1, -1, -1, lanes))
    return problem.changed(query=query * (8.0 / (lanes * (problem.softmax_scale or lanes**-0.5))), key=key, label=label)


AIMS: tuple[Callable[[Problem], Problem], ...] = (spread, level, at_one_visible_key, at_one_hidden_key)
"""Where rows look: other q and k for a problem of any mask and scale."""


def _sliced_heads(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, x), 1)[:, : x.shape[1]]


def _sliced_tokens(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, x, x), 2)[:, :, x.shape[2] : 2 * x.shape[2]]


def _sliced_lanes(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, x), 3)[..., : x.shape[3]]


def _offset(x: torch.Tensor) -> torch.Tensor:
    """One element past an aligned address."""
    flat = x.new_zeros(x.numel() + 1)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


def _every_other_lane(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, x), -1).flatten(-2)[..., ::2]


Layout = Callable[[torch.Tensor], torch.Tensor]

LAYOUTS: dict[str, Layout] = {
    "[B, S, H, D] memory": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "[S, B, H, D] memory": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "[B, H, D, S] memory": lambda x: x.mT.contiguous().mT,
    "sliced heads": _sliced_heads,
    "sliced tokens": _sliced_tokens,
    "sliced lanes": _sliced_lanes,
    "not aligned": _offset,
    "every other lane": _every_other_lane,
}
"""Every way to lay out [B, H, S, D] in memory, as what makes such a copy."""
