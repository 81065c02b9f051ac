"""Tile shapes of the portable kernel: a small table by architecture and head_dim, no search in a user's forward."""

from __future__ import annotations

from typing import NamedTuple


class TileShape(NamedTuple):
    """What a program of the kernel works on.

    Attributes:
        queries: rows of a tile.
        keys: columns of a tile; a divisor of the block of keys that share a scale.
        warps: per program.
        stages: key tiles that are loaded ahead, the one at hand included.
        sum_by_product: whether the tensor cores sum the rows of P.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    sum_by_product: bool = True


# By the larger of the padded head_dims. Chosen so that nothing spills and shared memory suffices, as the compiler says
# for each architecture (tests/kernels/test_compiled.py).
_BIG = {lanes: TileShape(128, 128, 8, 3, sum_by_product=False) for lanes in (32, 64, 128)}
_SMALL = {32: TileShape(128, 64, 4, 3), 64: TileShape(128, 64, 4, 3), 128: TileShape(128, 64, 8, 2)}
_TABLE: dict[str, dict[int, TileShape]] = {
    # 227 KiB of shared memory and products of 64 rows by groups of four warps.
    "hopper": _BIG | {256: TileShape(128, 64, 8, 2, sum_by_product=False)},
    "other": _SMALL | {256: TileShape(64, 64, 8, 2)},
}
INTERPRETED_SHAPE = TileShape(16, 64, 4, 1)
"""Small tiles, so that short inputs have several of them."""


def tile_shape(capability: tuple[int, int] | None, lanes: int) -> TileShape:
    """The shape for an architecture (None: the interpreter) and the larger of the padded head_dims."""
    if capability is None:
        return INTERPRETED_SHAPE
    table = _TABLE["hopper" if capability[0] == 9 else "other"]
    return table[max(lanes, 32)]
