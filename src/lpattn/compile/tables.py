"""Tables of cosines and sines: from proven coefficients to a description of views of the tensors that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lpattn.compile.linear import NOT_A_TABLE, RefusedError, Terms, unravel
from lpattn.compile.sizes import Sizes, value_of


@dataclass(frozen=True)
class Axis:
    """What runs along one dimension of a leaf.

    Attributes:
        kind: ``"batch"``, ``"row"``, ``"head"``, ``"lane"``, ``"head_lane"`` (heads, each of ``width`` lanes, in one
            dimension), ``"fixed"`` (always at ``start``) or ``"single"`` (a dimension of size 1).
        start, step: lanes: the n-th lies at ``start + step * n``.
    """

    kind: str
    start: int = 0
    step: int = 1
    width: int = 0


@dataclass(frozen=True)
class Part:
    """Coefficients of evenly spaced lanes: ``factor`` times elements of a leaf.

    Attributes:
        leaf: a real or complex tensor of the graph; None where the coefficients are the factor itself.
        axes: one for each dimension of the leaf (of its real view, if it is complex).
    """

    leaf: fx.Node | None
    factor: float
    axes: tuple[Axis, ...] = ()


@dataclass(frozen=True)
class Table:
    """One coefficient for each rotated lane. One part holds all lanes in order, two are the halves or the parities."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Place:
    """Where in [B, S, H, D] output elements lie; int64 [N] each, by number of the sample."""

    batch: torch.Tensor
    row: torch.Tensor
    head: torch.Tensor
    lane: torch.Tensor

    def of(self, sample: torch.Tensor) -> Place:
        """The places of some samples."""
        return Place(self.batch[sample], self.row[sample], self.head[sample], self.lane[sample])


@dataclass(frozen=True)
class Extent:
    """Sizes of a pre-rotation tensor."""

    batch: int
    rows: int
    heads: int
    lanes: int


def read_table(
    terms: Terms,
    place: Place,
    extent: Extent,
    rotary_dim: int,
    interleaved: bool,
    leaves: Sequence[fx.Node],
    sizes: Sizes,
) -> Table:
    """Describe the coefficients of one kind.

    Args:
        terms: one for each sample in a rotated lane.
        place: where the samples lie; heads count kv heads.
        extent: sizes of what the place is in.
        rotary_dim, interleaved: the rotation.
        leaves: by number.
        sizes: the present assignment.

    Raises:
        RefusedError: they lie in no order that views could bring into that of a table.
    """
    lane = place.lane
    half = rotary_dim // 2
    try:
        return Table((_read_part(terms, place, lane, extent, leaves, sizes),))
    except RefusedError:
        second = lane % 2 == 1 if interleaved else lane >= half
        inner = lane // 2 if interleaved else lane % half
        found = []
        for mask in (~second, second):
            picked = Terms(*(getattr(terms, n)[mask] for n in ("sample", "index", "factor", "leaf", "at")))
            of = Place(place.batch[mask], place.row[mask], place.head[mask], lane[mask])
            found.append(_read_part(picked, of, inner[mask], extent, leaves, sizes))
        return Table(tuple(found))


def _read_part(
    terms: Terms, place: Place, lane: torch.Tensor, extent: Extent, leaves: Sequence[fx.Node], sizes: Sizes
) -> Part:
    factor = float(terms.factor[0])
    if bool((terms.factor != factor).any()) or bool((terms.leaf != terms.leaf[0]).any()):
        raise RefusedError("neighbouring lanes are multiplied by different tables", NOT_A_TABLE)
    if int(terms.leaf[0]) < 0:
        return Part(None, factor)
    leaf = leaves[int(terms.leaf[0])]
    shape = sizes.shape(leaf)
    if value_of(leaf).dtype.is_complex:
        shape = (*shape, 2)
    axes = []
    for size, coordinate in zip(shape, unravel(terms.at, shape), strict=True):
        axes.append(_axis(size, coordinate, place, lane, extent, leaf))
    kinds = [axis.kind for axis in axes if axis.kind not in ("fixed", "single")]
    heads = kinds.count("head") + kinds.count("head_lane")
    lanes = kinds.count("lane") + kinds.count("head_lane")
    if max(heads, lanes, kinds.count("batch"), kinds.count("row")) > 1:
        raise RefusedError(f"{leaf.name} is read along a diagonal", NOT_A_TABLE)
    return Part(leaf, factor, tuple(axes))


def _axis(size: int, coordinate: torch.Tensor, place: Place, lane: torch.Tensor, extent: Extent, leaf: fx.Node) -> Axis:
    if size == 1:
        return Axis("single")
    if bool((coordinate == coordinate[0]).all()):
        return Axis("fixed", int(coordinate[0]))
    for kind, along, length in (
        ("batch", place.batch, extent.batch),
        ("row", place.row, extent.rows),
        ("head", place.head, extent.heads),
    ):
        if size == length and torch.equal(coordinate, along):
            return Axis(kind)
    if (line := _line(lane, coordinate)) is not None:
        return Axis("lane", *line)
    if size % extent.heads == 0:
        width = size // extent.heads
        line = _line(lane, coordinate - place.head * width)
        if line is not None and line[0] + line[1] * int(lane.max()) < width:
            return Axis("head_lane", *line, width)
    raise RefusedError(f"{leaf.name} is read in an order that views cannot bring about", NOT_A_TABLE)


def _line(lane: torch.Tensor, coordinate: torch.Tensor) -> tuple[int, int] | None:
    """(start, step) if coordinates lie evenly spaced along the lanes, in rising order."""
    first, last = int(lane.argmin()), int(lane.argmax())
    distance = int(lane[last] - lane[first])
    if distance == 0:
        return None
    step = int(coordinate[last] - coordinate[first]) // distance
    start = int(coordinate[first]) - step * int(lane[first])
    if step < 1 or start < 0 or not torch.equal(coordinate, start + step * lane):
        return None
    return start, step
