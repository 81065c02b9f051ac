"""Blocks of rows with each of which a graph does the same, so that a few rows stand for all of them.

Every index that a view or a write computes is a sum of multiples of the row's place in its block, as long as no
coordinate carries over into the next and no boundary is crossed. Two such sums that agree at the corners of a block
agree in all of it. Whoever meets a carry or a boundary inside a block raises :class:`Cut`, and the proof is begun again
with smaller blocks: nothing is left to chance, and nothing depends on how a boundary came to lie where it does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from lpattn.compile.terms import Cut, RefusedError

_MAX_BLOCKS = 128
_MAX_ATTEMPTS = 64
"""Rows of more kinds, or that are told apart in more steps, would take a proof too long."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Block:
    """The rows ``first + sum of step * i`` for all i below the counts.

    Attributes:
        first: number of a row.
        axes: (count, step) each.
    """

    first: int
    axes: tuple[tuple[int, int], ...]

    def cut(self, axis: int, places: Sequence[int], again: bool) -> list[Block]:
        """The block in pieces.

        Args:
            axis: which one is cut.
            places: where pieces begin, besides the first, in rising order.
            again: there is one place, and more at every multiple of it: all whole pieces are one block.
        """
        count, step = self.axes[axis]
        pieces, bounds = [], [0, *places, count]
        if again:
            (width,) = places
            whole = count // width
            pieces, bounds = [(0, [(whole, width * step), (width, step)])], [whole * width, count]
        pieces += [(start, [(end - start, step)]) for start, end in itertools.pairwise(bounds) if start < end]
        return [
            block_of(self.first + start * step, [*self.axes[:axis], *axes, *self.axes[axis + 1 :]])
            for start, axes in pieces
        ]


def block_of(first: int, axes: Sequence[tuple[int, int]]) -> Block:
    """A block without axes along which there is one row."""
    return Block(first, tuple((count, step) for count, step in axes if count > 1))


def elements(blocks: Sequence[Block], lanes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The corners of blocks in every lane: rows and lanes, int64 [N, 1 + K], and counts [N, K], N running lanes first.

    Column 0 is the first row, column 1 + k the last one along axis k.
    """
    most = max(len(block.axes) for block in blocks)
    axes = [[*block.axes, *[(1, 0)] * (most - len(block.axes))] for block in blocks]
    rows = [[b.first, *(b.first + (count - 1) * step for count, step in a)] for b, a in zip(blocks, axes, strict=True)]
    counts = torch.tensor([[count for count, _ in a] for a in axes], dtype=torch.int64, device="cpu")
    row = torch.tensor(rows, dtype=torch.int64, device="cpu").repeat_interleave(lanes, 0)
    lane = torch.arange(lanes, device="cpu").repeat(len(blocks))
    return row, lane[:, None].expand_as(row), counts.repeat_interleave(lanes, 0)


class Partition:
    """All rows, in as few blocks as proofs about them have needed so far.

    Args:
        whole: all rows.
        lanes: how many samples each block has; they are numbered block by block.
    """

    def __init__(self, whole: Block, lanes: int) -> None:
        self._blocks, self._lanes = [whole], lanes
        self._attempts = 0
        self._where = ""

    def prove(self, attempt: Callable[[list[Block]], Result]) -> Result:
        """What an attempt returns, with blocks small enough for it.

        Args:
            attempt: a proof about some blocks. It may raise :class:`Cut`.

        Raises:
            RefusedError: the attempt was, or there are too many blocks.
        """
        while len(self._blocks) <= _MAX_BLOCKS and self._attempts < _MAX_ATTEMPTS:
            try:
                return attempt(self._blocks)
            except Cut as cut:
                wanted = {sample // self._lanes: places for sample, places in cut.places.items()}
                self._where = cut.where
            self._attempts += 1
            self._blocks = [
                piece
                for number, block in enumerate(self._blocks)
                for piece in (block.cut(*wanted[number]) if number in wanted else [block])
            ]
        raise RefusedError(f"too many kinds of rows to look at: {self._where} treats some of them differently")
