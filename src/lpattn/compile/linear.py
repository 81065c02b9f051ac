"""Pulls elements of a tensor back through a functional graph, to sums of coefficient * element of an earlier tensor.

This is arithmetic on indices: nothing of the model is run. A coefficient is a number, or a number times one element of
a tensor that does not depend on the earlier one (a *leaf*, such as the table of cosines).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lpattn.compile.sizes import Sizes, UnknownSizeError, value_of
from lpattn.compile.terms import (
    NOT_A_TABLE,
    NOT_FROM_IT,
    Cut,
    Points,
    RefusedError,
    Terms,
    joined,
)

aten = torch.ops.aten
prims = torch.ops.prims

_MAX_VISITS = 4000
"""Nodes that one pull-back may pass through, repetitions counted: a graph that needs more is no rotation."""


class PullBack:
    """Linear forms over one tensor of a graph, at one assignment of sizes.

    Args:
        source: the tensor that the forms are over.
        dependent: the nodes that depend on it; all others are constants here.
        sizes: numbers for symbolic sizes.
        dtype: what every step must hold; by default the source's.

    Attributes:
        leaves: tensors that coefficients are elements of, by number.
    """

    def __init__(
        self, source: fx.Node, dependent: set[fx.Node], sizes: Sizes, dtype: torch.dtype | None = None
    ) -> None:
        self.source = source
        self._dtype = dtype or value_of(source).dtype
        self.leaves: list[fx.Node] = []
        self._dependent = dependent
        self._sizes = sizes
        self._visits = 0

    def __call__(self, node: fx.Node, points: Points) -> Terms:
        """The terms of elements of a node.

        Raises:
            RefusedError: they are no linear form over the source.
            Cut: they are not the same one in all of a block.
        """
        self._visits += 1
        if self._visits > _MAX_VISITS:
            raise RefusedError("too many operations lie between the projections and the attention")
        if node is self.source:
            none, ones = torch.full_like(points.flat, -1), torch.ones_like(points.sample, dtype=torch.float64)
            return Terms(points.sample, points.flat, ones, none[:, 0], none)
        if points.flat.numel() == 0 or constant_of(node) == 0:
            none, at = points.sample[:0], points.flat[:0]
            return Terms(none, at, none.double(), none, at)
        if node not in self._dependent:
            raise RefusedError(
                f"{node.name} is added or written, which does not depend on what is rotated", NOT_FROM_IT
            )
        rule = _RULES.get(node.target)
        if rule is None:
            raise RefusedError(f"{node.name} ({node.target}) is neither linear nor a view")
        try:
            return rule(self, node, points)
        except UnknownSizeError as error:
            raise RefusedError(f"{node.name}: {error}") from None
        except Cut as cut:
            cut.where = cut.where or node.name
            raise

    def depends(self, value: Any) -> bool:
        """Whether an argument depends on the source."""
        return value is self.source or value in self._dependent

    def number_of(self, leaf: fx.Node) -> int:
        """The number of a leaf, new or not."""
        if leaf not in self.leaves:
            self.leaves.append(leaf)
        return self.leaves.index(leaf)

    # Rules, one per kind of operation. `points` are elements of the node's own tensor.

    def same_memory(self, node: fx.Node, points: Points) -> Terms:
        """The same elements in the same order, under another shape or dtype."""
        return self(_first(node), points)

    def cast(self, node: fx.Node, points: Points) -> Terms:
        """The same elements in another floating-point dtype, which must hold at least what is kept."""
        before, after, kept = value_of(_first(node)).dtype, value_of(node).dtype, self._dtype
        if not {before, after} <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
            raise RefusedError(f"{node.name} casts {before} to {after}")
        if torch.finfo(after).eps > torch.finfo(kept).eps or torch.finfo(after).max < torch.finfo(kept).max:
            raise RefusedError(f"{node.name} casts to {after}, which does not hold what {kept} does")
        return self(_first(node), points)

    def expand(self, node: fx.Node, points: Points) -> Terms:
        """A tensor along new dimensions, or along ones of size 1."""
        return self(_first(node), self.broadcast(points, node, _first(node)))

    def broadcast(self, points: Points, node: fx.Node, argument: fx.Node) -> Points:
        """Where in an argument the elements of a node lie that it is broadcast to."""
        outer, inner = self._sizes.shape(node), self._sizes.shape(argument)
        if outer == inner:
            return points
        kept = points.unravel(outer)[len(outer) - len(inner) :]
        found = [c if n != 1 else torch.zeros_like(c) for c, n in zip(kept, inner, strict=True)]
        return points.moved(found, inner)

    def repeat(self, node: fx.Node, points: Points) -> Terms:
        """A tensor several times along its dimensions, as a whole each time."""
        outer, inner = self._sizes.shape(node), self._sizes.shape(_first(node))
        new = len(outer) - len(inner)
        kept = zip(points.unravel(outer)[new:], outer[new:], inner, strict=True)
        # As if each dimension were two, the outer one for how often the tensor has gone before.
        within = [points.at(coordinate).unravel((several // n, n))[1] for coordinate, several, n in kept]
        return self(_first(node), points.moved(within, inner))

    def permute(self, node: fx.Node, points: Points) -> Terms:
        """Dimensions in another order."""
        shape = self._sizes.shape(_first(node))
        order = [int(d) % len(shape) for d in args_of(node)[1]]
        coordinates = points.unravel(self._sizes.shape(node))
        moved = [coordinates[order.index(dim)] for dim in range(len(shape))]
        return self(_first(node), points.moved(moved, shape))

    def slice(self, node: fx.Node, points: Points) -> Terms:
        """Every so many places along a dimension."""
        dim, start, _, step = self.range_of(node, _first(node), 1)
        coordinates = points.unravel(self._sizes.shape(node))
        coordinates[dim] = coordinates[dim] * step + start
        return self(_first(node), points.moved(coordinates, self._sizes.shape(_first(node))))

    def range_of(self, node: fx.Node, of: fx.Node, first: int) -> tuple[int, int, int, int]:
        """(dim, start, end, step) of a slice of a tensor, whose arguments begin at a position."""
        shape = self._sizes.shape(of)
        given = [*args_of(node)[first:], None, None, None, None]
        dim = _int(given[0], 0) % len(shape)
        size = shape[dim]
        start = 0 if given[1] is None else self._sizes(given[1])
        end = size if given[2] is None else self._sizes(given[2])
        start, end = (min(max(value + size if value < 0 else value, 0), size) for value in (start, end))
        return dim, start, end, _int(given[3], 1)

    def select(self, node: fx.Node, points: Points) -> Terms:
        """One place along a dimension."""
        return self._at(node, points, _int(args_of(node)[1]), self._sizes(args_of(node)[2]))

    def _at(self, node: fx.Node, points: Points, dim: int, index: int, of: fx.Node | None = None) -> Terms:
        """The elements of a tensor at one place along a dimension that the node no longer has."""
        source = of or _first(node)
        shape = self._sizes.shape(source)
        dim %= len(shape)
        coordinates = points.unravel(self._sizes.shape(node))
        coordinates.insert(dim, torch.full_like(points.flat, index % shape[dim]))
        return self(source, points.moved(coordinates, shape))

    def item(self, node: fx.Node, points: Points) -> Terms:
        """One of the tensors that an operator returned."""
        several, which = args_of(node)[:2]
        source = _first(several)
        shape = self._sizes.shape(source)
        if several.target is aten.unbind.int:
            return self._at(node, points, dim_of(several, 1, 0), which, source)
        if several.target is aten.split.Tensor:
            start = which * self._sizes(args_of(several)[1])
        elif several.target is aten.split_with_sizes.default:
            start = sum(self._sizes(size) for size in args_of(several)[1][:which])
        else:
            raise RefusedError(f"{several.name} ({several.target}) is neither linear nor a view")
        dim = dim_of(several, 2, 0) % len(shape)
        coordinates = points.unravel(self._sizes.shape(node))
        coordinates[dim] = coordinates[dim] + start
        return self(source, points.moved(coordinates, shape))

    def cat(self, node: fx.Node, points: Points) -> Terms:
        """Tensors one after another."""
        shape = self._sizes.shape(node)
        dim = dim_of(node, 1, 0) % len(shape)
        coordinates = points.unravel(shape)
        # An empty tensor of one dimension is left out of a cat of others.
        inputs = [part for part in args_of(node)[0] if len(self._sizes.shape(part)) == len(shape)]
        ends = list(itertools.accumulate(self._sizes.shape(part)[dim] for part in inputs))
        place, of = coordinates[dim], points.part_of(coordinates[dim], ends)
        parts = []
        for number, (part, start) in enumerate(zip(inputs, [0, *ends[:-1]], strict=True)):
            moved = points.moved([*coordinates[:dim], place - start, *coordinates[dim + 1 :]], self._sizes.shape(part))
            parts.append(self(part, moved.only(of == number)))
        return joined(parts)

    def slice_scatter(self, node: fx.Node, points: Points) -> Terms:
        """A tensor with a slice of it replaced: what an indexed write has become."""
        base, patch = _first(node), args_of(node)[1]
        shape = self._sizes.shape(base)
        dim, start, end, step = self.range_of(node, base, 2)
        coordinates = points.unravel(shape)
        place = coordinates[dim] - start
        inside = points.part_of(place, [0, max(end - start, 0)]) == 1
        of_step = points.only(inside).at(place[inside])
        nth = of_step.unravel((-(shape[dim] // -step), step))[1]
        inside[inside.clone()] = of_step.part_of(nth, [1]) == 0
        moved = [*coordinates[:dim], place // step, *coordinates[dim + 1 :]]
        return self._patched(base, patch, points, inside, moved)

    def select_scatter(self, node: fx.Node, points: Points) -> Terms:
        """A tensor with one place along a dimension replaced."""
        base, patch = _first(node), args_of(node)[1]
        shape = self._sizes.shape(base)
        dim = _int(args_of(node)[2]) % len(shape)
        coordinates = points.unravel(shape)
        index = self._sizes(args_of(node)[3]) % shape[dim]
        inside = points.part_of(coordinates[dim], [index, index + 1]) == 1
        return self._patched(base, patch, points, inside, [*coordinates[:dim], *coordinates[dim + 1 :]])

    def _patched(
        self, base: fx.Node, patch: fx.Node, points: Points, inside: torch.Tensor, moved: list[torch.Tensor]
    ) -> Terms:
        """A tensor with a patch over it. ``moved``: coordinates in the patch, of what lies inside."""
        under = points.moved(moved, self._sizes.shape(patch)).only(inside)
        return joined([self(patch, under), self(base, points.only(~inside))])

    def copy(self, node: fx.Node, points: Points) -> Terms:
        """What is written over all of a tensor."""
        written = args_of(node)[1]
        return self(written, self.broadcast(points, node, written))

    def negate(self, node: fx.Node, points: Points) -> Terms:
        """Elements times -1."""
        return self(_first(node), points).scaled(-1.0)

    def add(self, node: fx.Node, points: Points) -> Terms:
        """Sums and differences."""
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        parts = []
        for argument, factor in zip(args_of(node)[:2], (1.0, sign * alpha), strict=True):
            if not _is_tensor(argument):
                raise RefusedError(f"{node.name} adds the number {argument}")
            parts.append(self(argument, self.broadcast(points, node, argument)).scaled(factor))
        return joined(parts)

    def multiply(self, node: fx.Node, points: Points) -> Terms:
        """Products with a number, or with a leaf."""
        left, right = args_of(node)[:2]
        if not self.depends(left):
            left, right = right, left
        if self.depends(right):
            raise RefusedError(f"{node.name} multiplies two tensors that both depend on what is rotated")
        inner = self.broadcast(points, node, left)
        if (number := constant_of(right)) is not None:
            return self(left, inner).scaled(number)
        if not _is_tensor(right):
            raise RefusedError(f"{node.name} multiplies by the number {right}")
        return self._times_leaf(node, left, inner, right, self.broadcast(points, node, right).flat)

    def _times_leaf(self, node: fx.Node, left: fx.Node, inner: Points, leaf: fx.Node, at: torch.Tensor) -> Terms:
        dtype = value_of(leaf).dtype
        if dtype.is_complex:
            # (a + bi)(c + di) = (ac - bd) + (bc + ad)i: the part itself with c, the other part with d.
            if inner.part is None:
                raise RefusedError(f"{node.name} multiplies real by complex numbers")
            other = replace(inner, part=1 - inner.part)
            turned = self(left, other)
            # Samples are unique here: each element of a tensor is asked for once.
            sign = torch.zeros(int(inner.sample.max()) + 1, dtype=torch.float64, device="cpu")
            sign[inner.sample] = torch.where(inner.part == 0, -1.0, 1.0).double()
            straight = self._with_leaf(node, self(left, inner), inner.sample, leaf, at * 2)
            crossed = self._with_leaf(node, turned.scaled(sign[turned.sample]), inner.sample, leaf, at * 2 + 1)
            return joined([straight, crossed])
        if not dtype.is_floating_point:
            raise RefusedError(f"{node.name} multiplies by {dtype}")
        return self._with_leaf(node, self(left, inner), inner.sample, leaf, at)

    def _with_leaf(self, node: fx.Node, terms: Terms, sample: torch.Tensor, leaf: fx.Node, at: torch.Tensor) -> Terms:
        if bool((terms.leaf >= 0).any()):
            raise RefusedError(f"{node.name} multiplies by a second tensor", NOT_A_TABLE)
        place = at.new_zeros(int(sample.max()) + 1, at.shape[1])
        place[sample] = at
        number = torch.full_like(terms.leaf, self.number_of(leaf))
        return Terms(terms.sample, terms.index, terms.factor, number, place[terms.sample])

    def divide(self, node: fx.Node, points: Points) -> Terms:
        """Quotients by a number."""
        left, right = args_of(node)[:2]
        number = constant_of(right)
        if not self.depends(left) or number is None:
            raise RefusedError(f"{node.name} divides by a tensor")
        if node.kwargs.get("rounding_mode") is not None or number == 0:
            raise RefusedError(f"{node.name} is no linear division")
        return self(left, self.broadcast(points, node, left)).scaled(1.0 / number)

    def view_as_complex(self, node: fx.Node, points: Points) -> Terms:
        """Pairs of numbers as complex ones."""
        assert points.part is not None
        return self(_first(node), replace(points, flat=points.flat * 2 + points.part[:, None], part=None))

    def view_as_real(self, node: fx.Node, points: Points) -> Terms:
        """Complex numbers as pairs."""
        shape = self._sizes.shape(_first(node))
        *number, part = points.unravel((*shape, 2))
        return self(_first(node), replace(points.moved(number, shape), part=points.part_of(part, [1])))


Rule = Callable[[PullBack, fx.Node, Points], Terms]

_VIEWS: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.unsqueeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.squeeze.default,
            aten.clone.default,
            aten.alias.default,
            aten.detach.default,
        ),
        PullBack.same_memory,
    ),
    prims.convert_element_type.default: PullBack.cast,
    aten._to_copy.default: PullBack.cast,
    aten.expand.default: PullBack.expand,
    aten.repeat.default: PullBack.repeat,
    aten.permute.default: PullBack.permute,
    aten.slice.Tensor: PullBack.slice,
    aten.select.int: PullBack.select,
}

_RULES: dict[Any, Rule] = {
    **_VIEWS,
    operator.getitem: PullBack.item,
    aten.cat.default: PullBack.cat,
    aten.slice_scatter.default: PullBack.slice_scatter,
    aten.select_scatter.default: PullBack.select_scatter,
    aten.copy.default: PullBack.copy,
    aten.neg.default: PullBack.negate,
    aten.add.Tensor: PullBack.add,
    aten.sub.Tensor: PullBack.add,
    aten.mul.Tensor: PullBack.multiply,
    aten.div.Tensor: PullBack.divide,
    aten.view_as_complex.default: PullBack.view_as_complex,
    aten.view_as_real.default: PullBack.view_as_real,
}

_SEVERAL = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default)


def is_transparent(node: fx.Node) -> bool:
    """Whether forms can be pulled back through a node, at least for some arguments."""
    return node.target in _RULES or node.target in _SEVERAL


def is_view(node: fx.Node) -> bool:
    """Whether a node holds elements of its first argument, cast or not, and nothing else."""
    return node.target in _VIEWS


def args_of(node: fx.Node) -> Any:
    """The positional arguments of a node: nodes, numbers, lists of these."""
    return node.args


def dim_of(node: fx.Node, position: int, default: int | None = None) -> int:
    """The argument ``dim`` of a node, which may be left out or given by name."""
    return _int(node.args[position] if len(node.args) > position else node.kwargs.get("dim"), default)


def _first(node: fx.Node) -> fx.Node:
    return args_of(node)[0]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value_of(value), torch.Tensor)


def _int(value: Any, default: int | None = None) -> int:
    if value is None and default is not None:
        return default
    if not isinstance(value, int):
        raise RefusedError(f"{value!r} is not a constant")
    return value


def constant_of(value: Any) -> float | None:
    """A real number, also where a tensor is full of it; None for anything else."""
    if isinstance(value, fx.Node) and value.target is aten.full.default:
        filled = value.args[1]
        # As its dtype rounds it: 2.7 among integers is 2.
        value = torch.full((), filled, dtype=value_of(value).dtype).item() if isinstance(filled, (int, float)) else None
    return float(value) if isinstance(value, (int, float)) else None
