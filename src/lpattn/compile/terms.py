"""Elements of tensors that are asked for, the sums that they come to, and what stands in the way of a proof."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass
class Points:
    """Elements of one tensor that are asked for.

    Attributes:
        sample: int64 [N], the output element that each belongs to.
        flat: int64 [N], index in the tensor as if it were contiguous.
        part: int64 [N], 0 for the real and 1 for the imaginary part; None in a real tensor.
    """

    sample: torch.Tensor
    flat: torch.Tensor
    part: torch.Tensor | None = None

    def at(self, flat: torch.Tensor) -> Points:
        """The same samples at other places."""
        return Points(self.sample, flat, self.part)

    def where(self, mask: torch.Tensor, flat: torch.Tensor) -> Points:
        """Those that the mask picks, at other places."""
        return Points(self.sample[mask], flat[mask], None if self.part is None else self.part[mask])


@dataclass
class Terms:
    """Sums, as a list of their terms: ``out[sample] = sum of factor * leaf[at] * source[index]``.

    Attributes:
        sample: int64 [T], the output element that the term belongs to.
        index: int64 [T], flat index in the source.
        factor: float64 [T].
        leaf: int64 [T], number of the leaf; -1 without one.
        at: int64 [T], flat index in the leaf, of real numbers (a complex one counts twice).
    """

    sample: torch.Tensor
    index: torch.Tensor
    factor: torch.Tensor
    leaf: torch.Tensor
    at: torch.Tensor

    def scaled(self, factor: float | torch.Tensor) -> Terms:
        """The terms times a number, or times one number each."""
        return Terms(self.sample, self.index, self.factor * factor, self.leaf, self.at)


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
    flat = torch.zeros_like(coordinates[0]) if coordinates else torch.zeros(1, dtype=torch.int64, device="cpu")
    for coordinate, size in zip(coordinates, shape, strict=True):
        flat = flat * size + coordinate
    return flat
