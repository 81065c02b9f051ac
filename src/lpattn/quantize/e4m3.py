"""Casts to e4m3 and the scales that go with them.

Owns: which elements share a scale, how the scale follows from them, what becomes of values that e4m3 does not have.
It does not know what q, k and v are.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from lpattn.errors import InvalidArgumentError

E4M3_MAX = 448.0
"""The largest finite value of torch.float8_e4m3fn (1.75 * 2^8). The format has NaN but no inf."""


class Granularity(str, Enum):
    """Which elements of a [B, H, S, D] tensor share a scale, and the shape of the scales.

    * ``PER_HEAD``: all tokens of a (batch, head); for q, of all heads that share a KV head. [B, Hkv]
    * ``PER_TOKEN``: one token. [B, H, S]
    * ``PER_BLOCK``: ``block`` consecutive tokens, the last block may be short. [B, H, ceil(S / block)]
    * ``PER_CHANNEL``: one channel of a (batch, head), over all tokens. [B, H, D]
    """

    PER_HEAD = "per_head"
    PER_TOKEN = "per_token"
    PER_BLOCK = "per_block"
    PER_CHANNEL = "per_channel"

    __str__ = str.__str__


@dataclass(frozen=True)
class Quantized:
    """An e4m3 tensor with its scales: value = data * scale.

    Attributes:
        data: [B, H, S, D], torch.float8_e4m3fn.
        scale: float32 (float64 for float64 inputs), of the shape that ``granularity`` names; all positive and finite.
        granularity: which elements share a scale.
        block: tokens per scale; only meaningful for ``Granularity.PER_BLOCK``.
    """

    data: torch.Tensor
    scale: torch.Tensor
    granularity: Granularity
    block: int

    def broadcast_scale(self) -> torch.Tensor:
        """The scales, broadcastable to [B, H, S, D]: of shape [B, H, S or 1, D or 1]."""
        heads, tokens = self.data.shape[1:3]
        if self.granularity is Granularity.PER_HEAD:
            return self.scale.repeat_interleave(heads // max(self.scale.shape[1], 1), dim=1)[..., None, None]
        if self.granularity is Granularity.PER_TOKEN:
            return self.scale[..., None]
        if self.granularity is Granularity.PER_BLOCK:
            return self.scale.repeat_interleave(self.block, dim=2)[:, :, :tokens, None]
        return self.scale[:, :, None, :]

    def dequantize(self) -> torch.Tensor:
        """The values, data * scale: [B, H, S, D] in the dtype of the scales."""
        return self.data.to(self.scale.dtype) * self.broadcast_scale()


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest e4m3 value (ties to even), saturating finite values at +-448.

    Args:
        x: any shape, floating point.

    Returns:
        The same shape in torch.float8_e4m3fn. inf and NaN become NaN: to saturate inf would turn a row that is
        infinite into one that looks sound.

    Precision:
        Relative error at most 2^-4 for |x| in [2^-6, 448]; absolute error at most 2^-10 below that.
    """
    # What a bare cast does above 448 depends on the version of torch (NaN, or 448 even for inf).
    finite = x.clamp(-E4M3_MAX, E4M3_MAX)
    return torch.where(x.isinf(), torch.nan, finite).to(torch.float8_e4m3fn)


def quantize_e4m3(
    x: torch.Tensor,
    granularity: Granularity,
    *,
    block: int = 128,
    qmax: float = E4M3_MAX,
    used: torch.Tensor | None = None,
    num_kv_heads: int | None = None,
    power_of_two: bool = False,
) -> Quantized:
    """Quantize to e4m3 with scales that map the largest magnitude of each group to ``qmax``.

    Args:
        x: [B, H, S, D], floating point, any strides.
        granularity: which elements share a scale.
        block: tokens per scale for ``Granularity.PER_BLOCK``.
        qmax: what the largest magnitude becomes, in (0, 448]. e4m3 is a floating-point format: a smaller value costs
            range at the small end (values below 2^-6 / qmax of the largest lose bits), not precision.
        used: bool, broadcastable to [B, H, S]. Tokens where it is False enter no scale, and their data is zero
            whatever they held. None: all tokens are used.
        num_kv_heads: with ``Granularity.PER_HEAD``, H / num_kv_heads consecutive heads share a scale, which is what
            FlashAttention-3's q_descale [B, Hkv] means. None: every head has its own.
        power_of_two: round scales up to a power of two, so that multiplying by them is exact.

    Returns:
        The data and its scales. Scales come from finite values only: an inf or NaN element becomes NaN itself and
        leaves the others of its group as they are. Groups without a finite non-zero value get the smallest scale.

    Raises:
        InvalidArgumentError: x is not 4-D, or block, qmax or num_kv_heads is out of range.

    Precision:
        Scales and the division are float32 (float64 for float64 inputs). Scales are at least the smallest normal
        number, so a group of zeros stays zero.
    """
    if x.dim() != 4:
        raise InvalidArgumentError(f"x must be [B, H, S, D]; got {x.dim()} dimensions: {list(x.shape)}")
    if not 0 < qmax <= E4M3_MAX:
        raise InvalidArgumentError(f"qmax must be in (0, {E4M3_MAX:g}], the range of e4m3; got {qmax:g}")
    if block < 1:
        raise InvalidArgumentError(f"block must be at least 1 token; got {block}")
    batch, heads, tokens = x.shape[:3]
    groups = heads if num_kv_heads is None else num_kv_heads
    if heads and (groups < 1 or heads % groups):
        raise InvalidArgumentError(f"num_kv_heads must divide the number of heads, {heads}; got {groups}")

    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if used is not None:
        x = torch.where(used[..., None], x, 0.0)
    magnitude = torch.where(x.isfinite(), x.abs(), 0.0)
    if granularity is Granularity.PER_CHANNEL:
        amax = _amax(magnitude, 2)
    else:
        amax = _amax(magnitude, 3)
        if granularity is Granularity.PER_HEAD:
            amax = _amax(amax.reshape(batch, groups, heads // max(groups, 1) * tokens), 2)
        elif granularity is Granularity.PER_BLOCK:
            blocks = -(-tokens // block)
            amax = torch.nn.functional.pad(amax, (0, blocks * block - tokens))
            amax = _amax(amax.reshape(batch, heads, blocks, block), 3)
    scale = (amax / qmax).clamp_min(torch.finfo(x.dtype).tiny)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    empty = Quantized(x, scale, granularity, block)
    return Quantized(round_e4m3(x / empty.broadcast_scale()), scale, granularity, block)


def _amax(x: torch.Tensor, dim: int) -> torch.Tensor:
    # amax refuses to reduce an empty dimension; the scale of no tokens is then the floor.
    return x.amax(dim) if x.shape[dim] else x.sum(dim)
