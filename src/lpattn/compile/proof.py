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
from dataclasses import dataclass, replace

import torch
from torch import fx

from lpattn.compile.linear import (
    NOT_A_ROTATION,
    NOT_A_TABLE,
    NOT_LINEAR,
    Points,
    PullBack,
    RefusedError,
    Terms,
    args_of,
    dim_of,
    is_transparent,
    ravel,
    unravel,
)
from lpattn.compile.sizes import Sizes, UnknownSizeError, value_of
from lpattn.compile.tables import Extent, Place, Table, read_table

BATCH, ROW, HEAD, LANE = range(4)
# Orders in which a pre-rotation tensor may hold [B, S, H, D]; lanes lie together in all of them.
ORDERS = [(*order, LANE) for order in itertools.permutations((BATCH, ROW, HEAD))]

_RANDOM_ROWS = 12
_MAX_ROWS = 96
_MAX_ANCESTORS = 120


@dataclass(frozen=True)
class Rotation:
    """What was proven of an operand, or of a stretch of its rows.

    Attributes:
        source: the tensor before rotation.
        order: how its elements, read as contiguous, hold [B, S, H, D]: which of these is outermost, and so on.
        groups: how many heads of the operand share one of the source.
        rotary_dim: rotated lanes; 0 where the operand holds the source's elements unchanged.
        interleaved: how lanes pair up; None where that is the same (two lanes), or nothing is rotated.
        cos, sin: coefficients; None where nothing is rotated.
    """

    source: fx.Node
    order: tuple[int, ...]
    groups: int
    rotary_dim: int = 0
    interleaved: bool | None = None
    cos: Table | None = None
    sin: Table | None = None


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
        constants = _constants(self.operand, dependent, sizes)
        triples = _rows(batch, heads, rows, groups, constants)
        lanes = torch.arange(dim, device="cpu").repeat(len(triples))
        b, h, s = (c.repeat_interleave(dim) for c in torch.tensor(triples, device="cpu").unbind(1))
        flat = ravel([b, h, s + start, lanes], (batch, heads, length, dim))
        pull = PullBack(source, dependent, sizes)
        terms = pull(self.operand, Points(torch.arange(flat.numel(), device="cpu"), flat))
        place = Place(b, s, h // groups, lanes)
        order, lane = _order(terms, place, extent, h % extent.heads)
        return _read_rotation(
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


def _constants(operand: fx.Node, dependent: Iterable[fx.Node], sizes: Sizes) -> list[int]:
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


def _rows(batch: int, heads: int, rows: int, groups: int, constants: Sequence[int]) -> list[tuple[int, int, int]]:
    """(b, h, s) to look at: corners, neighbours of constants, and others at random, always the same ones."""
    if batch * heads * rows <= _MAX_ROWS:
        return list(itertools.product(range(batch), range(heads), range(rows)))

    def near(size: int) -> list[int]:
        wanted = [0, 1, size - 1, size - 2, size // 2]
        wanted += [c + d for constant in constants for c in (constant, size + constant) for d in (-1, 0, 1)]
        return sorted({value for value in wanted if 0 <= value < size})

    shuffled = random.Random(0)
    last = (batch - 1, heads - 1, rows - 1)
    found = {(b, h, s) for b in {0, last[0]} for h in {0, last[1]} for s in {0, last[2]}}
    found |= {(0, min(groups, heads - 1), 0), (0, heads - 1, min(1, rows - 1)), (min(1, batch - 1), 0, 0)}
    found |= {(b, shuffled.randrange(heads), shuffled.randrange(rows)) for b in near(batch)[:8]}
    found |= {(shuffled.randrange(batch), h, shuffled.randrange(rows)) for h in near(heads)[:24]}
    found |= {(shuffled.randrange(batch), shuffled.randrange(heads), s) for s in near(rows)[:40]}
    for _ in range(_RANDOM_ROWS):
        found.add((shuffled.randrange(batch), shuffled.randrange(heads), shuffled.randrange(rows)))
    return sorted(found)


def _order(
    terms: Terms, place: Place, extent: Extent, tiled_head: torch.Tensor
) -> tuple[tuple[int, ...], torch.Tensor]:
    """How the source holds [B, S, H, D], and the lane in it of every term."""
    at = place.of(terms.sample)
    sizes = (extent.batch, extent.rows, extent.heads, extent.lanes)
    tiled = False
    for order in ORDERS:
        coordinates = unravel(terms.index, tuple(sizes[o] for o in order))
        b, s, h, d = (coordinates[order.index(o)] for o in (BATCH, ROW, HEAD, LANE))
        if torch.equal(b, at.batch) and torch.equal(s, at.row):
            if torch.equal(h, at.head):
                return order, d
            tiled = tiled or torch.equal(h, tiled_head[terms.sample])
    if tiled:
        raise RefusedError("kv heads are repeated one after another, not each in place", NOT_A_ROTATION)
    raise RefusedError("elements of other rows or heads are mixed in", NOT_A_TABLE)


def _read_rotation(
    found: Rotation,
    terms: Terms,
    place: Place,
    lane: torch.Tensor,
    extent: Extent,
    samples: int,
    leaves: Sequence[fx.Node],
    sizes: Sizes,
) -> Rotation:
    own = place.lane[terms.sample]
    itself = lane == own
    straight, crossed = _pick(terms, itself), _pick(terms, ~itself)
    for picked in (straight, crossed):
        if picked.sample.unique().numel() != picked.sample.numel():
            raise RefusedError("an element is a sum of more than two products", NOT_A_ROTATION)
    plain = torch.zeros(samples, dtype=torch.bool, device="cpu")
    plain[straight.sample] = (straight.factor == 1.0) & (straight.leaf < 0)
    plain[crossed.sample] = False
    if bool(plain.all()):
        return found
    rotated = ~plain
    rotary_dim = int(place.lane[rotated].max()) + 1
    if not torch.equal(rotated, place.lane < rotary_dim):
        first = int(place.lane[plain].min())
        raise RefusedError(f"lane {first} is not rotated, lane {rotary_dim - 1} is", NOT_A_ROTATION)
    if rotary_dim % 2:
        raise RefusedError(f"an odd number of lanes is rotated: {rotary_dim}", NOT_A_ROTATION)
    if crossed.sample.numel() == 0:
        raise RefusedError("lanes are scaled and not rotated", NOT_LINEAR)
    count = int(rotated.sum())
    if straight.sample.numel() - int(plain.sum()) != count or crossed.sample.numel() != count:
        raise RefusedError("some lanes are multiplied by one number, others by two", NOT_A_ROTATION)
    ours, partner = own[~itself], lane[~itself]
    half = rotary_dim // 2
    pairings = {False: (ours + half) % rotary_dim, True: ours ^ 1}
    fitting = [kind for kind, expected in pairings.items() if torch.equal(partner, expected)]
    if not fitting:
        wrong = min((int(a), int(p)) for a, p in zip(ours, partner, strict=True))
        raise RefusedError(
            f"lane {wrong[0]} is paired with lane {wrong[1]}; of {rotary_dim} rotated lanes, half-split RoPE pairs it "
            f"with {(wrong[0] + half) % rotary_dim} and interleaved RoPE with {wrong[0] ^ 1}",
            NOT_A_ROTATION,
        )
    interleaved = fitting[0]
    turning = _pick(straight, rotated[straight.sample])
    # rot(x) has -x2 in the first lane of a pair, and x1 in the second.
    leading = place.lane[crossed.sample] % 2 == 0 if interleaved else place.lane[crossed.sample] < half
    sine = crossed.scaled(torch.where(leading, -1.0, 1.0).double())
    tables = [
        read_table(t, place.of(t.sample), extent, rotary_dim, interleaved, leaves, sizes) for t in (turning, sine)
    ]
    return replace(
        found,
        rotary_dim=rotary_dim,
        interleaved=interleaved if len(fitting) == 1 else None,
        cos=tables[0],
        sin=tables[1],
    )


def _pick(terms: Terms, mask: torch.Tensor) -> Terms:
    return Terms(terms.sample[mask], terms.index[mask], terms.factor[mask], terms.leaf[mask], terms.at[mask])
