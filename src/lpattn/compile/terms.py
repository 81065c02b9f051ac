"""Elements of tensors that are asked for, the sums that they come to, and what stands in the way of a proof."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

NOT_FROM_IT, NOT_LINEAR, NOT_A_TABLE, NOT_A_ROTATION = range(4)
"""How far a candidate came before it was refused; the reason of the one that came furthest is reported."""


class RefusedError(Exception):
    """What stands in the way of a proof.

    Attributes:
        progress: how far it came.
    """

    def __init__(self, message: str, progress: int = NOT_LINEAR) -> None:
        super().__init__(message)
        self.progress = progress


class Cut(Exception):
    """Indices are no sum of multiples within blocks of rows, which are to be cut.

    Attributes:
        places: by sample, (axis of its block, where pieces begin, whether one such place stands for all its multiples).
        where: name of the node that sees to it.
    """

    def __init__(self, places: dict[int, tuple[int, list[int], bool]]) -> None:
        super().__init__()
        self.places = places
        self.where = ""


@dataclass
class Points:
    """Elements of one tensor that are asked for: one for each row of a block, for every sample.

    Of each block there are its corners: the first row, and the last one along each axis. In between, indices rise
    evenly.

    Attributes:
        sample: int64 [N], the lane of a block of the output that they belong to.
        flat: int64 [N, 1 + K], index in the tensor as if it were contiguous, at the corners.
        counts: int64 [N, K], rows along each axis of the block.
        part: int64 [N], 0 for the real and 1 for the imaginary part; None in a real tensor.
    """

    sample: torch.Tensor
    flat: torch.Tensor
    counts: torch.Tensor
    part: torch.Tensor | None = None

    def at(self, flat: torch.Tensor) -> Points:
        """The same samples at other places."""
        return replace(self, flat=flat)

    def moved(self, coordinates: list[torch.Tensor], shape: tuple[int, ...]) -> Points:
        """The same samples at coordinates of another tensor."""
        return self.at(ravel(coordinates, shape) if shape else torch.zeros_like(self.flat))

    def only(self, mask: torch.Tensor) -> Points:
        """Those that the mask picks."""
        part = None if self.part is None else self.part[mask]
        return Points(self.sample[mask], self.flat[mask], self.counts[mask], part)

    def unravel(self, shape: tuple[int, ...]) -> list[torch.Tensor]:
        """Coordinates of the elements in a tensor of a shape, [N, 1 + K] each.

        Raises:
            Cut: in some block, one carries over into the next.
        """
        spans = (self.counts - 1).clamp(min=1)
        # In column 0 the first element, in the others what is added from one row to the next.
        rest = torch.cat((self.flat[:, :1], (self.flat[:, 1:] - self.flat[:, :1]) // spans), 1)
        found = []
        for size in reversed(shape):
            coordinate = rest % size
            coordinate[:, 1:] *= spans
            last = coordinate.sum(1)
            coordinate[:, 1:] += coordinate[:, :1]
            if bool((last >= size).any()):
                self.part_of(coordinate, [size], periodic=True)
            found.append(coordinate)
            rest = rest // size
        return found[::-1]

    def part_of(self, coordinate: torch.Tensor, bounds: list[int], periodic: bool = False) -> torch.Tensor:
        """Which part of a dimension the elements lie in; int64 [N].

        Args:
            coordinate: [N, 1 + K], of the elements along the dimension. No rule turns an order around: it rises.
            bounds: where parts begin, besides the first, in rising order.
            periodic: boundaries lie at all multiples of the one that is given.

        Raises:
            Cut: in some block, elements lie in several parts.
        """
        edges = torch.tensor(bounds, dtype=torch.int64, device="cpu")
        low, rises = coordinate[:, 0].contiguous(), coordinate[:, 1:] - coordinate[:, :1]
        part = torch.bucketize(low, edges, right=True)
        torn = part != torch.bucketize(low + rises.sum(1), edges, right=True)
        if bool(torn.any()):
            counts = self.counts[torn]
            steps = rises[torn] // (counts - 1).clamp(min=1)
            # Not max, which starts threads for however few elements.
            axis = steps.argmax(1, keepdim=True)
            longest, count = (t.gather(1, axis).flatten() for t in (steps, counts))
            of = zip(*(t.tolist() for t in (self.sample[torn], axis.flatten(), low[torn], longest, count)), strict=True)
            raise Cut({s: (a, *_places(first, step, n, bounds, periodic)) for s, a, first, step, n in of})
        return part


def _places(first: int, step: int, count: int, bounds: list[int], periodic: bool) -> tuple[list[int], bool]:
    """Where ``first + step * i``, i < count, reaches bounds, and whether it reaches one more each time after as many i.

    The middle, where only other axes bring a block across a bound.
    """
    places = sorted({place for bound in bounds if 0 < (place := -((first - bound) // step)) < count})
    if not places:
        return [count // 2], False
    return places, periodic and first < step and bounds[0] % step == 0 and places[0] > 1


@dataclass
class Terms:
    """Sums, as a list of their terms: ``out[sample] = sum of factor * leaf[at] * source[index]``.

    Attributes:
        sample: int64 [T], the output element that the term belongs to.
        index: int64 [T, 1 + K], flat index in the source, at the corners of the sample's block.
        factor: float64 [T].
        leaf: int64 [T], number of the leaf; -1 without one.
        at: int64 [T, 1 + K], flat index in the leaf, of real numbers (a complex one counts twice).
    """

    sample: torch.Tensor
    index: torch.Tensor
    factor: torch.Tensor
    leaf: torch.Tensor
    at: torch.Tensor

    def scaled(self, factor: float | torch.Tensor) -> Terms:
        """The terms times a number, or times one number each."""
        return Terms(self.sample, self.index, self.factor * factor, self.leaf, self.at)

    def at_corners(self) -> Terms:
        """The terms of every corner as those of a sample, numbered sample by sample: indices [T * (1 + K)]."""
        corners = self.index.shape[1]
        sample = self.sample[:, None] * corners + torch.arange(corners, device="cpu")
        factor, leaf = (t.repeat_interleave(corners) for t in (self.factor, self.leaf))
        return Terms(sample.flatten(), self.index.flatten(), factor, leaf, self.at.flatten())


def joined(parts: list[Terms]) -> Terms:
    """The sum of several."""
    names = ("sample", "index", "factor", "leaf", "at")
    return Terms(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def unravel(flat: torch.Tensor, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Coordinates of flat indices."""
    found = []
    for size in reversed(shape):
        found.append(flat % size)
        flat = flat // size
    return found[::-1]


def ravel(coordinates: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Flat indices of coordinates."""
    flat = torch.zeros_like(coordinates[0])
    for coordinate, size in zip(coordinates, shape, strict=True):
        flat = flat * size + coordinate
    return flat
