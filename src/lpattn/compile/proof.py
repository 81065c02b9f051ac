"""Proves that an operand of attention is a rotation of an earlier tensor, or says what stands in the way.

Elements of the operand are pulled back to linear forms over each earlier tensor that could be the one before rotation.
It is one if every element is a sum of at most two elements of its own row and head, the partners pair up as half-split
or interleaved RoPE has them, and the coefficients are tables. All lanes are looked at, and as many rows as stand for
all others (see ``blocks``).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lpattn.compile.blocks import Block, Partition, block_of, elements
from lpattn.compile.linear import PullBack, args_of, dim_of, is_transparent
from lpattn.compile.rotation import BATCH, HEAD, LANE, ROW, Rotation, read_order, read_rotation
from lpattn.compile.sizes import Sizes, UnknownSizeError, value_of
from lpattn.compile.tables import Extent, Place
from lpattn.compile.terms import NOT_A_ROTATION, Points, RefusedError, unravel

_MAX_ANCESTORS = 120


@dataclass(frozen=True)
class Stretch:
    """Rows of an operand that come from one tensor.

    Attributes:
        root: where the search for the source begins.
        start, rows: by assignment of sizes.
    """

    root: fx.Node
    start: tuple[int, ...]
    rows: tuple[int, ...]


class Prover:
    """Proofs about one operand.

    Args:
        operand: [B, H, S, D].
        sizes: assignments of symbolic sizes; what is proven holds at all of them.
    """

    def __init__(self, operand: fx.Node, sizes: Sequence[Sizes]) -> None:
        self.operand = operand
        self._sizes = sizes
        self._shapes = [s.shape(operand) for s in sizes]
        self.heads = self._shapes[0][1]
        whole = tuple(shape[2] for shape in self._shapes)
        self.whole = Stretch(operand, tuple(0 for _ in whole), whole)
        self._partitions: dict[tuple[Stretch, int, int], Partition] = {}

    def rotations(self, groups: int) -> list[Rotation]:
        """The operand as rotations of tensors that are concatenated along rows; one where nothing is concatenated.

        Args:
            groups: how many heads of the operand share one head of its sources.

        Raises:
            RefusedError: there is no rotation.
        """
        try:
            return [self._prove(self.whole, groups, rotated=True)]
        except RefusedError as refused:
            why = refused
        stretches = self._stretches()
        if not stretches:
            raise why
        found = []
        for stretch in stretches:
            try:
                found.append(self._prove(stretch, groups, rotated=True))
            except RefusedError as refused:
                try:
                    found.append(self._prove(stretch, groups, rotated=False))
                except RefusedError:
                    raise refused from None
        if not any(rotation.rotary_dim for rotation in found):
            raise why
        return found

    def view(self, groups: int) -> Rotation:
        """The operand as a view of an earlier tensor, each head of which it holds ``groups`` times.

        Raises:
            RefusedError: it is none.
        """
        if groups == 1:
            return Rotation(self.operand, (BATCH, HEAD, ROW, LANE), 1)
        return self._prove(self.whole, groups, rotated=False)

    def repeats(self) -> int:
        """How many heads of the operand in a row are the same, as far as can be seen; 1 where none are."""
        for groups in range(self.heads, 1, -1):
            if self.heads % groups == 0:
                try:
                    self.view(groups)
                except RefusedError:
                    continue
                return groups
        return 1

    def _prove(self, stretch: Stretch, groups: int, rotated: bool) -> Rotation:
        nearest = next((node for node in ancestors(stretch.root) if not is_transparent(node)), stretch.root)
        where = f" ({nearest.target})" if nearest.op == "call_function" else ""
        best = RefusedError(f"no rotation lies between {nearest.name}{where} and the attention", progress=-1)
        for candidate in self._candidates(stretch, groups):
            try:
                found = self._fit_everywhere(candidate, stretch, groups)
            except UnknownSizeError as error:
                best = max(best, RefusedError(str(error)), key=lambda refused: refused.progress)
                continue
            except RefusedError as refused:
                best = max(best, refused, key=lambda refused: refused.progress)
                continue
            if bool(found.rotary_dim) is rotated:
                return found
        raise best

    def _candidates(self, stretch: Stretch, groups: int) -> Iterator[fx.Node]:
        """Earlier tensors of the dtype and size that the source must have, nearest first."""
        dtype = value_of(self.operand).dtype
        # The operand itself is no earlier tensor; a stretch of it may be what is looked for.
        nearest = [] if stretch is self.whole else [stretch.root]
        for node in itertools.chain(nearest, ancestors(stretch.root)):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.dtype == dtype:
                try:
                    shapes = [s.shape(node) for s in self._sizes]
                except UnknownSizeError:
                    continue
                wanted = [b * (h // groups) * n * d for (b, h, _, d), n in zip(self._shapes, stretch.rows, strict=True)]
                if [torch.Size(shape).numel() for shape in shapes] == wanted:
                    yield node

    def _fit_everywhere(self, source: fx.Node, stretch: Stretch, groups: int) -> Rotation:
        dependent = dependents(self.operand, source)
        found = None
        for number, sizes in enumerate(self._sizes):
            fitted = self._fit(source, dependent, stretch, groups, number, sizes)
            if found is not None and fitted != found:
                raise RefusedError("it is another rotation at other lengths", NOT_A_ROTATION)
            found = fitted
        assert found is not None
        return found

    def _fit(
        self, source: fx.Node, dependent: set[fx.Node], stretch: Stretch, groups: int, number: int, sizes: Sizes
    ) -> Rotation:
        batch, heads, length, dim = self._shapes[number]
        start, rows = stretch.start[number], stretch.rows[number]
        if 0 in (batch, heads, rows, dim):
            raise RefusedError("the operand is empty")
        extent = Extent(batch, rows, heads // groups, dim)

        def fitted(blocks: list[Block]) -> Rotation:
            row, lanes, counts = elements(blocks, dim)
            pull = PullBack(source, dependent, sizes)
            samples = Points(torch.arange(len(row), device="cpu"), row * dim + lanes, counts)
            terms = pull(self.operand, samples).at_corners()
            b, h, s = unravel(row.flatten(), (batch, heads, length))
            place = Place(b, s - start, h // groups, lanes.flatten())
            order, lane = read_order(terms, place, extent, h % extent.heads)
            in_row = lane.reshape(-1, row.shape[1])
            if bool((in_row != in_row[:, :1]).any()):
                raise RefusedError("lanes change places from one row to another", NOT_A_ROTATION)
            return read_rotation(
                Rotation(source, order, groups), terms, place, lane, extent, row.numel(), pull.leaves, sizes
            )

        return self._partition(stretch, groups, number).prove(fitted)

    def _partition(self, stretch: Stretch, groups: int, number: int) -> Partition:
        """The blocks that earlier candidates had to be looked at in: most are on the way to the next."""
        key = (stretch, groups, number)
        if key not in self._partitions:
            batch, heads, length, dim = self._shapes[number]
            # Rows are numbered along [B, H, S] of the operand, which may hold more of them than the stretch.
            repeated = (heads // groups, groups * length), (groups, length)
            axes = [(batch, heads * length), *repeated, (stretch.rows[number], 1)]
            self._partitions[key] = Partition(block_of(stretch.start[number], axes), dim)
        return self._partitions[key]

    def _stretches(self) -> list[Stretch]:
        """The inputs of the nearest concatenation along rows that the operand is a view of; empty if there is none."""
        node, shared = self.operand, len(self.operand.users) > 1
        while node.target is not torch.ops.aten.cat.default:
            inputs = [a for a in node.all_input_nodes if is_transparent(node)]
            if len(inputs) != 1:
                return []
            node = inputs[0]
            shared = shared or len(node.users) > 1
        if shared:
            # A cache, for one: with its rows concatenated a second time, more would be copied than saved.
            raise RefusedError(f"{node.name}, which puts rows together, is needed for something else, too")
        parts = args_of(node)[0]
        try:
            order = self._fit_everywhere(node, self.whole, 1).order
        except (RefusedError, UnknownSizeError):
            return []
        lengths = []
        for (batch, heads, rows, dim), sizes in zip(self._shapes, self._sizes, strict=True):
            shape = sizes.shape(node)
            axis = dim_of(node, 1, 0) % len(shape)
            extent = (batch, rows, heads, dim)
            outside = [extent[o] for o in order[: order.index(ROW)]]
            if shape[axis] != rows or torch.Size(shape[:axis]).numel() != torch.Size(outside).numel():
                return []
            lengths.append([sizes.shape(part)[axis] for part in parts])
        starts = [[sum(found[:i]) for i in range(len(found))] for found in lengths]
        return [
            Stretch(part, tuple(s[i] for s in starts), tuple(n[i] for n in lengths)) for i, part in enumerate(parts)
        ]


def ancestors(root: fx.Node) -> Iterator[fx.Node]:
    """What a node is computed from, nearest first, no further than forms can be pulled back."""
    seen, queue = {root}, deque([root])
    while queue and len(seen) < _MAX_ANCESTORS:
        node = queue.popleft()
        if not is_transparent(node):
            continue
        for argument in node.all_input_nodes:
            if argument not in seen:
                seen.add(argument)
                queue.append(argument)
                yield argument


def dependents(node: fx.Node, source: fx.Node) -> set[fx.Node]:
    """The nodes between a source and a node that depend on the source, the node included."""
    found: dict[fx.Node, bool] = {source: True}
    stack = [node]
    while stack:
        current = stack[-1]
        if current in found:
            stack.pop()
            continue
        inputs = current.all_input_nodes if current > source else []
        waiting = [argument for argument in inputs if argument not in found]
        if waiting:
            stack += waiting
        else:
            found[current] = any(found[argument] for argument in inputs)
            stack.pop()
    return {current for current, depends in found.items() if depends and current is not source}
