"""How rotated heads are divided among programs.

A program takes several that turn by the same angles, one after the other.
"""

from __future__ import annotations

import torch

from lpattn.quantize.fused.device import multiprocessors
from lpattn.quantize.fused.inputs import Turns
from lpattn.quantize.fused.reading import kind_of
from lpattn.quantize.fused.tile import HALF_SPLIT_PARTIAL
from lpattn.types import HadamardMode

_MOST_HEADS = 8
_REGISTERS = 128
"""Per thread: 16 warps run on a multiprocessor, at the price of a few spills. There would be many where q and k are
also transformed, or partners are loaded once more."""


def heads_each(tiles: int, heads: int, programs: int, device: torch.device) -> int:
    """How many heads of a tile a program turns: some, where enough programs are left to occupy the device.

    Args:
        tiles, heads: of the tensor.
        programs: per multiprocessor, that are enough.
        device: theirs.
    """
    most = max(1, min(_MOST_HEADS, heads, tiles * heads // (programs * multiprocessors(device))))
    # As many programs with fewer heads, where the last one would have less to do.
    return -(-heads // -(-heads // most))


def whole_groups(each: int, heads: int, kv_heads: int) -> int:
    """At most ``each`` heads, but one at least: whole groups, or an equal part of one; of a single group, any part."""
    if kv_heads == 1:
        return each
    group_heads = heads // kv_heads
    if each >= group_heads:
        return each - each % group_heads
    return next(n for n in range(each, 0, -1) if group_heads % n == 0)


def registers(turns: Turns | None, dim: int, hadamard: HadamardMode) -> int | None:
    """The most of a thread that turns 16 elements of a tensor at a time; None: as many as it takes."""
    light = hadamard is not HadamardMode.QKV and kind_of(turns, dim) != HALF_SPLIT_PARTIAL.value
    return _REGISTERS if turns is not None and light else None
