"""Proves that an operand of attention is a rotation of an earlier tensor, or says what stands in the way.

Sampled elements of the operand are pulled back to linear forms over each earlier tensor that could be the one before
rotation. It is one if every element is a sum of at most two elements of its own row and head, the partners pair up as
half-split or interleaved RoPE has them, and the coefficients are tables. All lanes of the sampled rows are looked at.
The rows are the corners, those around every constant of the graph in between, and random ones.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lpattn.compile.linear import PullBack, args_of, dim_of, is_transparent
from lpattn.compile.rotation import BATCH, HEAD, LANE, ROW, Rotation, read_order, read_rotation
from lpattn.compile.sizes import Sizes, UnknownSizeError, value_of
from lpattn.compile.tables import Extent, Place
from lpattn.compile.terms import NOT_A_ROTATION, Points, RefusedError, ravel

_RANDOM_ROWS = 12
_MAX_ROWS = 96
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
        triples = rows_to_look_at(batch, heads, rows, groups, constants_of(dependent, sizes))
        lanes = torch.arange(dim, device="cpu").repeat(len(triples))
        b, h, s = (c.repeat_interleave(dim) for c in torch.tensor(triples, device="cpu").unbind(1))
        flat = ravel([b, h, s + start, lanes], (batch, heads, length, dim))
        pull = PullBack(source, dependent, sizes)
        terms = pull(self.operand, Points(torch.arange(flat.numel(), device="cpu"), flat))
        place = Place(b, s, h // groups, lanes)
        order, lane = read_order(terms, place, extent, h % extent.heads)
        return read_rotation(
            Rotation(source, order, groups), terms, place, lane, extent, flat.numel(), pull.leaves, sizes
        )

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


def constants_of(dependent: Iterable[fx.Node], sizes: Sizes) -> list[int]:
    """Whole numbers at which what the graph computes may change from one row to the next."""
    found: set[int] = set()
    for node in dependent:
        for argument in args_of(node):
            for value in argument if isinstance(argument, (list, tuple)) else [argument]:
                if isinstance(value, int) or (
                    isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.SymInt)
                ):
                    try:
                        found.add(sizes(value))
                    except UnknownSizeError:
                        continue
        if node.target is torch.ops.aten.cat.default:
            at = 0
            for part in args_of(node)[0]:
                shape = sizes.shape(part)
                at += shape[dim_of(node, 1, 0) % len(shape)] if shape else 0
                found.add(at)
    return sorted(found)


def rows_to_look_at(
    batch: int, heads: int, rows: int, groups: int, constants: Sequence[int]
) -> list[tuple[int, int, int]]:
    """(b, h, s) to look at: corners, neighbours of constants, and others at random, always the same ones.

    A write to some tokens of some heads begins at a constant of each axis, so that its first row is among them.
    """
    if batch * heads * rows <= _MAX_ROWS:
        return list(itertools.product(range(batch), range(heads), range(rows)))

    def at_constants(size: int, around: Sequence[int] = (0,), more: Sequence[int] = (0,)) -> list[int]:
        wanted = [c + d for constant in constants for c in (constant, size + constant) for d in around]
        return sorted({value for value in (*wanted, *more) if 0 <= value < size})

    def near(size: int) -> list[int]:
        return at_constants(size, (-1, 0, 1), (0, 1, size - 1, size - 2, size // 2))

    shuffled = random.Random(0)
    last = (batch - 1, heads - 1, rows - 1)
    found = {(b, h, s) for b in {0, last[0]} for h in {0, last[1]} for s in {0, last[2]}}
    found |= {(0, min(groups, heads - 1), 0), (0, heads - 1, min(1, rows - 1)), (min(1, batch - 1), 0, 0)}
    found |= {(b, shuffled.randrange(heads), shuffled.randrange(rows)) for b in near(batch)[:8]}
    found |= {(shuffled.randrange(batch), h, shuffled.randrange(rows)) for h in near(heads)[:24]}
    found |= {(shuffled.randrange(batch), shuffled.randrange(heads), s) for s in near(rows)[:40]}
    found |= set(itertools.product(at_constants(batch), at_constants(heads), at_constants(rows)))
    for _ in range(_RANDOM_ROWS):
        found.add((shuffled.randrange(batch), shuffled.randrange(heads), shuffled.randrange(rows)))
    return sorted(found)
