"""Proves that what is rotated is an RMS norm of an earlier tensor, over each head or all of them, or says what it is.

A norm is a product: of the tensor before it, of one number per row, and of a weight per lane. The number is read off
the graph as one over the root of a mean of squares plus a constant. That it is of the very row that it scales, and that
the weight is the same for all tokens (and heads, where each is normalized by itself), is shown by where elements come
from, as for rotations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lpattn.compile.blocks import Block, Partition, block_of, elements
from lpattn.compile.linear import PullBack, args_of, constant_of, is_transparent, is_view
from lpattn.compile.proof import dependents
from lpattn.compile.rotation import Rotation, read_order
from lpattn.compile.sizes import Sizes, value_of
from lpattn.compile.tables import Extent, Place
from lpattn.compile.terms import Points, RefusedError, ravel, unravel

aten = torch.ops.aten

_MAX_ANCESTORS = 40
_SUMS = (aten.add.Tensor, aten.add.Scalar)
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
_ROOTS = (aten.rsqrt.default, aten.sqrt.default)
_POINTWISE = (
    *_SUMS,
    *_PRODUCTS,
    *_ROOTS,
    aten.sub.Tensor,
    aten.pow.Tensor_Scalar,
    aten.reciprocal.default,
    aten.mean.dim,
    aten.var_mean.correction,
)


@dataclass(frozen=True)
class Normalized:
    """What was proven of the source of a rotation.

    Attributes:
        source: the tensor before the norm, in the dtype of what it makes.
        order: how its elements, read as contiguous, hold [B, S, H, D].
        eps: what is added to the mean square of each head; None where the norm spans all heads.
        weight: a tensor of D elements, of all heads where it spans them; None is ones.
        rstd: where the norm spans all heads, one over the root mean square of each token, read as [B, S]; or the root
            mean square itself, where ``divides``.
    """

    source: fx.Node
    order: tuple[int, ...]
    eps: float | None
    weight: fx.Node | None
    rstd: fx.Node | None = None
    divides: bool = False

    @property
    def over_heads(self) -> bool:
        """Whether it spans all heads."""
        return self.rstd is not None


@dataclass(frozen=True)
class _Step:
    """One product of the chain: ``node = carrier * factor``, or divided by it."""

    node: fx.Node
    carrier: fx.Node
    factor: fx.Node


@dataclass(frozen=True)
class _Scale:
    """The factor of a row, followed back to the squares.

    Attributes:
        hops: stretches of views on the way from the factor to the mean: (begin, end). Between the end of one and the
            beginning of the next, elements stay where they are.
        averaged: what the mean is of: squares, or a view of them. ``axes``: how many of its last dimensions it is over.
        square: the squares themselves. ``squared``: the tensor that they are of.
        eps: what is added to the mean.
    """

    hops: tuple[tuple[fx.Node, fx.Node], ...]
    averaged: fx.Node
    axes: int
    square: fx.Node
    squared: fx.Node
    eps: float


def prove_norm(
    call: fx.Node, operand: fx.Node, rotations: Sequence[Rotation], sizes: Sequence[Sizes], beside_all_heads: bool
) -> Normalized | None:
    """The norm in front of a rotation; None where there is none.

    Args:
        call: the attention operator.
        operand: its q or k, [B, H, S, D].
        rotations: what was proven of the operand.
        sizes: assignments of symbolic sizes; what is proven holds at all of them.
        beside_all_heads: the other operand has a norm over all heads, so that one over a single head is one, too.

    Raises:
        RefusedError: there is a root in front of the rotation, and it is no norm that could be fused.
    """
    if not any(_has_root(rotation.source) for rotation in rotations):
        return None
    if len(rotations) > 1:
        raise RefusedError("streams of tokens are normalized and rotated apart, and then put together")
    rotation = rotations[0]
    steps = _steps(rotation.source)
    scale = _scale(steps[-1])
    source = _source(steps[-1].carrier, scale.squared, value_of(rotation.source).dtype)
    weights = [step.factor for step in steps[:-1]]
    inside = dependents(operand, source)
    for weight in weights:
        if weight in inside or weight is source:
            raise RefusedError(
                f"{weight.name}, by which {steps[0].node.name} multiplies, depends on what is normalized"
            )
        if not value_of(weight).dtype.is_floating_point:
            raise RefusedError(f"{weight.name}, by which {steps[0].node.name} multiplies, is {value_of(weight).dtype}")
    if len(weights) > 1:
        raise RefusedError(f"{steps[0].node.name} multiplies by a second weight")
    orders = {_check(operand, rotation, steps, scale, source, s, beside_all_heads) for s in sizes}
    if len(orders) > 1:
        raise RefusedError(f"{source.name} lies in another order at other lengths")
    order, spans_heads = orders.pop()
    # What is handed over is computed in any case.
    spared = dependents(steps[-1].factor, source) if spans_heads else set()
    for node in inside - spared:
        for user in node.users:
            if user not in inside and user is not call and _is_tensor(node) and _is_tensor(user):
                raise RefusedError(f"{node.name} is needed for something else, too")
    by_lane = weights[0] if weights else None
    if not spans_heads:
        return Normalized(source, order, scale.eps, by_lane)
    last = steps[-1]
    return Normalized(source, order, None, by_lane, last.factor, last.node.target is aten.div.Tensor)


def is_of_norm(node: fx.Node) -> bool:
    """Whether a node computes what norms consist of; nothing is lost with it where nothing reads it."""
    return node.target in _POINTWISE


def _has_root(node: fx.Node) -> bool:
    """Whether a root lies in front of a node, with no product of matrices in between."""
    seen, queue = {node}, deque([node])
    while queue and len(seen) < _MAX_ANCESTORS:
        current = queue.popleft()
        if _exponent(current) is not None:
            return True
        if is_transparent(current) or is_of_norm(current):
            queue += [n for n in current.all_input_nodes if n not in seen]
            seen.update(current.all_input_nodes)
    return False


def _exponent(node: fx.Node) -> float | None:
    """0.5 or -0.5 where a node takes that power of its first argument."""
    if node.target in _ROOTS:
        return -0.5 if node.target is aten.rsqrt.default else 0.5
    if node.target is aten.pow.Tensor_Scalar and args_of(node)[1] in (0.5, -0.5):
        return float(args_of(node)[1])
    return None


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node is no size, of which a tensor may be asked for nothing else."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def _keeps(node: fx.Node) -> bool:
    """Whether a node is a view or a cast of its first argument, or once as much."""
    return is_view(node) or (node.target is aten.mul.Tensor and constant_of(args_of(node)[1]) == 1.0)


def _behind_views(node: fx.Node) -> fx.Node:
    """What a node is a view or a cast of."""
    while _keeps(node):
        node = args_of(node)[0]
    return node


def _source(carrier: fx.Node, squared: fx.Node, dtype: torch.dtype) -> fx.Node:
    """What is normalized: the nearest tensor of a dtype that both what is scaled and what is squared are views of."""
    behind = {squared}
    while is_view(squared):
        squared = args_of(squared)[0]
        behind.add(squared)
    node = carrier
    while node not in behind or value_of(node).dtype != dtype:
        if not is_view(node):
            if node in behind:
                raise RefusedError(f"{node.name} is {value_of(node).dtype}, and what is rotated is {dtype}")
            # Nothing is: the proof says what is wrong.
            return carrier
        node = args_of(node)[0]
    return node


def _steps(normalized: fx.Node) -> list[_Step]:
    """The products that a normalized tensor is made by, nearest first."""
    steps: list[_Step] = []
    node = _behind_views(normalized)
    while True:
        if node.target is aten.cat.default:
            raise RefusedError(f"{node.name} puts streams of tokens together that are normalized apart")
        if node.target not in _PRODUCTS:
            raise RefusedError(f"{node.name} ({node.target}) is no product of a tensor and its scale")
        left, right = args_of(node)[:2]
        for argument in (left, right):
            if not isinstance(argument, fx.Node):
                raise RefusedError(f"{node.name} scales by {argument}")
        divides = node.target is aten.div.Tensor
        if _is_scale(right, divides):
            return [*steps, _Step(node, left, right)]
        if not divides and _is_scale(left, False):
            return [*steps, _Step(node, right, left)]
        if divides or _has_root(left) == _has_root(right):
            raise RefusedError(f"{node.name} is no product of a tensor and its scale")
        carrier, factor = (left, right) if _has_root(left) else (right, left)
        steps.append(_Step(node, carrier, factor))
        node = _behind_views(carrier)


def _is_scale(factor: fx.Node, divides: bool) -> bool:
    """Whether a factor is one over a root; or a divisor the root."""
    node = _behind_views(factor)
    if not divides and node.target is aten.reciprocal.default:
        node, divides = _behind_views(args_of(node)[0]), True
    return _exponent(node) == (0.5 if divides else -0.5)


def _scale(step: _Step) -> _Scale:
    """Follow the factor of a row back to the squares."""
    hops = []

    def hop(node: fx.Node) -> fx.Node:
        end = _behind_views(node)
        hops.append((node, end))
        return end

    node = hop(step.factor)
    if node.target is aten.reciprocal.default:
        node = hop(args_of(node)[0])
    node, eps = hop(args_of(node)[0]), 0.0
    if node.target in _SUMS:
        left, right = args_of(node)[:2]
        mean, constant = (left, right) if constant_of(left) is None else (right, left)
        number = constant_of(constant)
        if number is None or not isinstance(mean, fx.Node):
            raise RefusedError(f"{node.name} adds two tensors under the root: no number for eps")
        alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        if constant is left and alpha != 1.0:
            raise RefusedError(f"{node.name} adds {alpha} times the mean of squares")
        eps = number * alpha
        node = hop(mean)
    if not 0.0 <= eps < float("inf"):
        raise RefusedError(f"{eps} is added under the root")
    if node.target is not aten.mean.dim:
        raise RefusedError(f"{node.name} ({node.target}), of which the root is taken, is no mean of squares")
    averaged = args_of(node)[0]
    rank = value_of(averaged).dim()
    axes = sorted({int(axis) % rank for axis in args_of(node)[1] or ()})
    if axes != list(range(rank - len(axes), rank)) or not axes:
        raise RefusedError(f"{node.name} is the mean over dimensions {axes} of {rank}, not over the last ones")
    square = _behind_views(averaged)
    arguments = args_of(square)
    by_itself = square.target is aten.mul.Tensor and arguments[0] is arguments[1]
    if not by_itself and not (square.target is aten.pow.Tensor_Scalar and arguments[1] == 2):
        raise RefusedError(f"{square.name} ({square.target}), of which the mean is taken, is no square")
    return _Scale(tuple(hops), averaged, len(axes), square, arguments[0], eps)


def _check(
    operand: fx.Node,
    rotation: Rotation,
    steps: Sequence[_Step],
    scale: _Scale,
    source: fx.Node,
    sizes: Sizes,
    beside_all_heads: bool,
) -> tuple[tuple[int, ...], bool]:
    """Follow the elements of what is rotated: the order of [B, S, H, D] in the source; whether the norm spans heads.

    Raises:
        RefusedError: some element is scaled by another row's number, or by another lane's weight.
    """
    batch, heads, rows, dim = sizes.shape(operand)
    heads //= rotation.groups
    width = torch.Size(sizes.shape(scale.averaged)[-scale.axes :]).numel()
    if width not in (dim, heads * dim):
        raise RefusedError(
            f"{scale.squared.name} is normalized over {width} elements; a head has {dim}, all heads {heads * dim}"
        )
    spans_heads = width != dim or (beside_all_heads and heads == 1)
    for node in (rotation.source, source):
        if torch.Size(sizes.shape(node)).numel() != batch * heads * rows * dim:
            raise RefusedError(f"{source.name} is not all of what is normalized")

    def checked(blocks: list[Block]) -> tuple[int, ...]:
        row, lanes, counts = elements(blocks, dim)
        b, h, s = unravel(row, (batch, heads, rows))
        # Of what is normalized at a time.
        within = h * dim + lanes if spans_heads else lanes
        extents, coordinates = (batch, rows, heads, dim), (b, s, h, lanes)
        at = ravel([coordinates[o] for o in rotation.order], tuple(extents[o] for o in rotation.order))
        points = Points(torch.arange(len(row), device="cpu"), at, counts)

        node, of_row = rotation.source, None
        for step in steps:
            points = _followed(node, step.node, points, sizes)
            of_factor = PullBack(step.node, set(), sizes).broadcast(points, step.node, step.factor)
            if step is steps[-1]:
                of_row = of_factor
                in_order = torch.Size(sizes.shape(step.factor)).numel() == batch * rows
                if spans_heads and not (in_order and torch.equal(of_row.flat, b * rows + s)):
                    raise RefusedError(f"{step.factor.name} lies in another order than tokens of q and k do")
            elif torch.Size(sizes.shape(step.factor)).numel() != width or not torch.equal(of_factor.flat, within):
                raise RefusedError(f"{step.factor.name}, by which {step.node.name} multiplies, is no weight of a lane")
            points, node = PullBack(step.node, set(), sizes).broadcast(points, step.node, step.carrier), step.carrier
        points = _followed(node, source, points, sizes)

        assert of_row is not None
        for number, (begin, end) in enumerate(scale.hops):
            if number and sizes.shape(scale.hops[number - 1][1]) != sizes.shape(begin):
                raise RefusedError(f"{begin.name} is broadcast under the root")
            of_row = _followed(begin, end, of_row, sizes)
        squared = _followed(scale.averaged, scale.square, of_row.at(of_row.flat * width + within), sizes)
        squared = _followed(scale.squared, source, squared, sizes)
        if not torch.equal(squared.flat, points.flat):
            raise RefusedError(f"{steps[-1].node.name} scales a row by the root mean square of another one")
        itself = PullBack(source, set(), sizes)(source, points).at_corners()
        place = Place(*(c.flatten() for c in (b, s, h, lanes)))
        order, lane = read_order(itself, place, Extent(batch, rows, heads, dim), place.head)
        if not torch.equal(lane, place.lane):
            raise RefusedError(f"lanes change places between {source.name} and the rotation")
        return order

    whole = block_of(0, [(batch, heads * rows), (heads, rows), (rows, 1)])
    return Partition(whole, dim).prove(checked), spans_heads


def _followed(begin: fx.Node, end: fx.Node, points: Points, sizes: Sizes) -> Points:
    """Where in an earlier node elements of a view of it are."""
    if begin is end:
        return points
    try:
        terms = PullBack(end, dependents(begin, end), sizes, value_of(begin).dtype)(begin, points)
    except RefusedError as refused:
        raise RefusedError(f"{begin.name} is no view of {end.name}") from refused
    order = terms.sample.argsort()
    same = torch.equal(terms.sample[order], points.sample)
    if not same or bool((terms.factor != 1.0).any()) or bool((terms.leaf >= 0).any()):
        raise RefusedError(f"{begin.name} is no view of {end.name}")
    return points.at(terms.index[order])
