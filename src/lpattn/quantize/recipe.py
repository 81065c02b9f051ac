"""What a low-precision attention does, as data: granularities, smoothing, rotation, how P is rounded and summed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from lpattn.errors import InvalidArgumentError
from lpattn.quantize.e4m3 import E4M3_MAX, Granularity
from lpattn.quantize.exponential import Exponential
from lpattn.types import HadamardMode


class RowSum(str, Enum):
    """What the softmax denominator sums.

    * ``ROUNDED``: P as PV consumes it, so that the weights that are applied sum to exactly 1.
    * ``UNROUNDED``: P before the cast; the weights that are applied then sum to 1 only up to P's rounding error.
    """

    ROUNDED = "rounded"
    UNROUNDED = "unrounded"

    __str__ = str.__str__


@dataclass(frozen=True)
class Recipe:
    """How q, k, v and P become e4m3. Frozen and hashable; ``dataclasses.replace`` makes variants.

    Attributes:
        q_granularity: any but PER_CHANNEL (the scale has to come out of q.k). PER_HEAD: per KV head, as k's.
        k_granularity: PER_HEAD or PER_BLOCK.
        v_granularity: PER_HEAD, PER_BLOCK or PER_CHANNEL.
        block: tokens per scale where a granularity is PER_BLOCK; a multiple of ``tile``.
        qk_max: what the largest magnitude of a group of q or k becomes, at most 448. 14 keeps every sum of up to 256
            products below 65504, the largest float16: 14 * 14 * 256 = 50176.
        v_max: the same for v.
        power_of_two: round the scales of q, k and v up to powers of two.
        smooth_k, smooth_v: subtract the mean over the tokens, per channel.
        smooth_every: estimate that mean from every n-th token.
        hadamard: which operands are rotated along head_dim, after smoothing.
        p_scale: factor on P (which is at most 1) before the cast, at most 448. Without it, weights below 2^-10 of the
            row's largest vanish.
        row_sum: what the denominator sums.
        exponential: how P is made. Any but EXACT gives P in e4m3 at once, so that ``row_sum`` must be ROUNDED, and
            ``p_scale`` a power of two up to 256.
        tile: keys per step of the online softmax.

    Raises:
        InvalidArgumentError: a field is out of its range, or two of them contradict each other.
    """

    q_granularity: Granularity = Granularity.PER_TOKEN
    k_granularity: Granularity = Granularity.PER_BLOCK
    v_granularity: Granularity = Granularity.PER_BLOCK
    block: int = 128
    qk_max: float = E4M3_MAX
    v_max: float = E4M3_MAX
    power_of_two: bool = False
    smooth_k: bool = True
    smooth_v: bool = True
    smooth_every: int = 1
    hadamard: HadamardMode = HadamardMode.NONE
    p_scale: float = 256.0
    row_sum: RowSum = RowSum.ROUNDED
    exponential: Exponential = Exponential.EXACT
    tile: int = 128

    def __post_init__(self) -> None:
        allowed: dict[str, set[Granularity] | set[HadamardMode] | set[RowSum] | set[Exponential]] = {
            "q_granularity": set(Granularity) - {Granularity.PER_CHANNEL},
            "k_granularity": {Granularity.PER_HEAD, Granularity.PER_BLOCK},
            "v_granularity": set(Granularity) - {Granularity.PER_TOKEN},
            "hadamard": set(HadamardMode),
            "row_sum": set(RowSum),
            "exponential": set(Exponential),
        }
        for name, members in allowed.items():
            value = getattr(self, name)
            if value not in members:
                names = ", ".join(sorted(m.value for m in members))
                raise InvalidArgumentError(f"{name} must be one of {names}; got {value}")
            # Plain strings work too, but identity comparisons need the member.
            member = next(m for m in members if m == value)
            object.__setattr__(self, name, member)
        for name in ("qk_max", "v_max", "p_scale"):
            if not 0 < getattr(self, name) <= E4M3_MAX:
                raise InvalidArgumentError(
                    f"{name} must be in (0, {E4M3_MAX:g}], the range of e4m3; got {getattr(self, name):g}"
                )
        for name in ("block", "smooth_every", "tile"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.exponential is not Exponential.EXACT:
            if self.row_sum is not RowSum.ROUNDED:
                raise InvalidArgumentError(f"row_sum must be rounded where exponential is {self.exponential}")
            if self.p_scale > 256 or not math.log2(self.p_scale).is_integer():
                raise InvalidArgumentError(
                    f"p_scale must be a power of two up to 256 where exponential is {self.exponential}; "
                    f"got {self.p_scale:g}"
                )
        blocks = Granularity.PER_BLOCK in (self.k_granularity, self.v_granularity)
        if blocks and self.block % self.tile:
            raise InvalidArgumentError(
                f"block must be a multiple of tile, {self.tile}, so that one scale serves a tile; got {self.block}"
            )


FA3_PER_HEAD = Recipe(
    q_granularity=Granularity.PER_HEAD,
    k_granularity=Granularity.PER_HEAD,
    v_granularity=Granularity.PER_HEAD,
    power_of_two=True,
    row_sum=RowSum.UNROUNDED,
)
"""What the backend ``fp8_fa3`` computes: one power-of-two descale per (batch, KV head), K and V smoothed, P times 2^8,
the sum taken before the cast. The backend takes constants and scales from a sample of the tokens (from 8192 keys on,
V's from all of them). Scales get headroom for the others, which costs nothing but some of e4m3's subnormals; any
constant is exact, and one from a sample leaves little more to round than the mean. V's constant is left out where V's
mean is not significant.

FlashAttention-3's single accumulator for the whole row is NOT part of it: the error of Hopper's narrow accumulation
comes on top. tests/quantize/fused/test_long_sums.py has a model of it."""

PER_BLOCK = Recipe()
"""A scale per query token and per 128 keys, K and V smoothed, P summed as rounded, two-level accumulation."""

PER_BLOCK_F16 = Recipe(qk_max=14.0, power_of_two=True)
"""PER_BLOCK with q and k small enough for q.k to be accumulated in float16, and scales that multiply exactly. The
float16 rounding of q.k itself (relative 2^-11) is not emulated: it is far below the error of the cast."""

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {"fa3_per_head": FA3_PER_HEAD, "per_block": PER_BLOCK, "per_block_f16": PER_BLOCK_F16}
)
"""The named recipes."""
