"""Reads linear forms as a rotation: how its source lies in memory, which lanes pair up, and with which tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from lpattn.compile.sizes import Sizes
from lpattn.compile.tables import Extent, Place, Table, read_table
from lpattn.compile.terms import NOT_A_ROTATION, NOT_A_TABLE, NOT_LINEAR, RefusedError, Terms, unravel

BATCH, ROW, HEAD, LANE = range(4)
# Orders in which a pre-rotation tensor may hold [B, S, H, D]; lanes lie together in all of them.
ORDERS = [(*order, LANE) for order in itertools.permutations((BATCH, ROW, HEAD))]


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


def read_order(
    terms: Terms, place: Place, extent: Extent, tiled_head: torch.Tensor
) -> tuple[tuple[int, ...], torch.Tensor]:
    """How the source holds [B, S, H, D], and the lane in it of every term.

    Args:
        terms: over the source.
        place: where the samples lie, heads counted as the source's.
        extent: of the source.
        tiled_head: int64 [N], the heads as they would be if heads were repeated one after another: for the reason.

    Raises:
        RefusedError: samples are made of other rows or heads.
    """
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


def read_rotation(
    found: Rotation,
    terms: Terms,
    place: Place,
    lane: torch.Tensor,
    extent: Extent,
    samples: int,
    leaves: Sequence[fx.Node],
    sizes: Sizes,
) -> Rotation:
    """Complete what is known of a rotation.

    Args:
        found: source, order and groups.
        terms, place, extent: as in :func:`read_order`; ``lane`` is what that returned.
        samples: their number. All lanes of each sampled row are among them.
        leaves: by number.
        sizes: the present assignment.

    Raises:
        RefusedError: it is none.
    """
    own = place.lane[terms.sample]
    itself = lane == own
    straight, crossed = _pick(terms, itself), _pick(terms, ~itself)
    for picked in (straight, crossed):
        if picked.sample.unique().numel() != picked.sample.numel():
            raise RefusedError("an element is a sum of more than two products", NOT_A_ROTATION)
    empty = torch.ones(samples, dtype=torch.bool, device="cpu")
    empty[terms.sample] = False
    if bool(empty.any()):
        raise RefusedError(f"{_first(place, empty)} is 0, whatever is rotated", NOT_A_ROTATION)
    plain = torch.zeros(samples, dtype=torch.bool, device="cpu")
    plain[straight.sample] = (straight.factor == 1.0) & (straight.leaf < 0)
    plain[crossed.sample] = False
    if bool(plain.all()):
        return found
    rotated = ~plain
    rotary_dim = int(place.lane[rotated].max()) + 1
    if not torch.equal(rotated, place.lane < rotary_dim):
        first = int(place.lane[plain].min())
        if bool((place.lane[rotated] == first).any()):
            where = _first(place, plain & (place.lane == first))
            raise RefusedError(f"{where} is not rotated, and in other rows it is", NOT_A_ROTATION)
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


def _first(place: Place, mask: torch.Tensor) -> str:
    """Where the first of some samples lies, in words."""
    batch, head, row, lane = (int(c[mask][0]) for c in (place.batch, place.head, place.row, place.lane))
    return f"lane {lane} of row {row}, head {head}, batch {batch}"


def _pick(terms: Terms, mask: torch.Tensor) -> Terms:
    return Terms(terms.sample[mask], terms.index[mask], terms.factor[mask], terms.leaf[mask], terms.at[mask])
