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
        k_reordered: whether keys are loaded in the order in which V of e4m3 is stored, as is best where products do not
            take P from registers; else P gets that order.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    sum_by_product: bool = True
    k_reordered: bool = False


# By the larger of the padded head_dims. Chosen so that nothing spills and shared memory suffices, as the compiler says
# for each architecture (tests/kernels/test_compiled.py). On Hopper, two programs of half the queries run on a
# multiprocessor at once: one computes exponentials while the products of the other one run. With V in float16, whose
# tiles are twice as large, loading them twice as often costs more than that brings.
_TO_128 = (32, 64, 128)
_D256 = TileShape(64, 64, 8, 2, sum_by_product=False)
_HOPPER = dict.fromkeys(_TO_128, TileShape(64, 128, 4, 3, sum_by_product=False)) | {256: _D256}
_HOPPER_INT8 = dict.fromkeys(_TO_128, TileShape(128, 128, 8, 3, sum_by_product=False)) | {256: _D256}
_MEDIUM = {
    **dict.fromkeys(_TO_128, TileShape(128, 64, 8, 2, sum_by_product=False, k_reordered=True)),
    256: _D256._replace(k_reordered=True),
}
_SMALL = {32: TileShape(128, 64, 8, 3), 64: TileShape(128, 64, 8, 3), 128: TileShape(128, 64, 8, 2), 256: _D256}
_HOPPER_INT8_BIASED = TileShape(128, 64, 8, 2, sum_by_product=False)
_SMALL_BIASED = TileShape(128, 32, 8, 2)
INTERPRETED_SHAPE = TileShape(32, 64, 4, 1)
"""Small tiles, so that short inputs have several of them."""


def tile_shape(capability: tuple[int, int] | None, lanes: int, *, int8: bool = False, bias_bits: int = 0) -> TileShape:
    """The shape for an architecture, a head_dim, a recipe and a kind of mask.

    Args:
        capability: of the device; None: the interpreter.
        lanes: the larger of the padded head_dims, a power of two from 32 to 256.
        int8: whether q and k are int8 and v float16, instead of all three e4m3.
        bias_bits: size of an additive mask's elements, which take registers and memory of their own; 0: there is none.
    """
    if capability is None:
        return INTERPRETED_SHAPE
    if capability[0] == 9:
        if int8 and bias_bits == 32 and lanes <= 128:
            return _HOPPER_INT8_BIASED
        shape = (_HOPPER_INT8 if int8 else _HOPPER)[lanes]
        return shape._replace(stages=2) if bias_bits else shape
    # From sm_100 on to sm_110, products have their accumulators outside of the registers; elsewhere, they take P from
    # registers, and an SM has as little as 99 KiB of shared memory.
    if capability[0] in (10, 11):
        return _MEDIUM[lanes]
    return _SMALL_BIASED if bias_bits == 32 and lanes == 128 else _SMALL[lanes]
