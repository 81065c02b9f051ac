"""Puts what was proven into the graph: the tensor before rotation as [B, S, H, D], and tables made of views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from lpattn.compile.rotation import BATCH, HEAD, LANE, ROW, Rotation
from lpattn.compile.sizes import value_of
from lpattn.compile.tables import Axis, Part, Table
from lpattn.compile.terms import RefusedError

aten = torch.ops.aten
prims = torch.ops.prims

Shape = Sequence[Any]
"""Sizes: ints and SymInts."""


class Emitter:
    """Adds operations in front of a node. Only such as inductor has after decomposition.

    Args:
        before: the node.
    """

    def __init__(self, before: fx.Node) -> None:
        self._before = before
        self._graph = before.graph
        self._added: list[fx.Node] = []

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, with the fake value that inductor's later passes expect."""
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, args, kwargs)
        self._added.append(node)

        def value(argument: Any) -> Any:
            return argument.meta["val"] if isinstance(argument, fx.Node) else argument

        real_args: Any = fx.node.map_aggregate(args, value)
        real_kwargs: Any = fx.node.map_aggregate(kwargs, value)
        mode = detect_fake_mode([n.meta["val"] for n in node.all_input_nodes] or [value_of(self._before)])
        assert mode is not None
        with mode:
            node.meta["val"] = target(*real_args, **real_kwargs)
        return node

    def undo(self) -> None:
        """Erase what was added; nothing else reads it yet."""
        for node in reversed(self._added):
            self._graph.erase_node(node)
        self._added.clear()

    def size(self, node: fx.Node, dim: int) -> Any:
        """A size of a node, as an argument of another: an int, or a node where it is symbolic."""
        size = value_of(node).shape[dim]
        return int(size) if isinstance(size, int) else self.call(aten.sym_size.int, node, dim)

    def heads_last(self, rotation: Rotation, shape: Shape) -> fx.Node:
        """The tensor before rotation, as [B, S, H, D].

        Args:
            rotation: what was proven.
            shape: its (B, S, H, D).
        """
        node, order = rotation.source, rotation.order
        ordered = [shape[o] for o in order]
        current = list(value_of(node).shape)
        if len(current) != 4 or any(not _same(a, b) for a, b in zip(current, ordered, strict=True)):
            node = self.call(aten.reshape.default, node, self._reshaped(node, ordered))
        back = [order.index(o) for o in (BATCH, ROW, HEAD, LANE)]
        return node if back == [0, 1, 2, 3] else self.call(aten.permute.default, node, back)

    def _reshaped(self, node: fx.Node, sizes: Shape) -> list[Any]:
        """Sizes as arguments of a reshape: symbolic ones are taken from the node, at most one is left to infer."""
        given: list[Any] = []
        for size in sizes:
            if isinstance(size, int):
                given.append(size)
                continue
            dims = [i for i, own in enumerate(value_of(node).shape) if not isinstance(own, int) and _same(own, size)]
            given.append(self.size(node, dims[0]) if dims else -1)
        if given.count(-1) > 1:
            raise RefusedError(f"{node.name} cannot be brought into [B, S, H, D] at every length")
        return given

    def flat(self, node: fx.Node) -> fx.Node:
        """The tensor in one dimension."""
        shape = value_of(node).shape
        return node if len(shape) == 1 else self.call(aten.reshape.default, node, [-1])

    def table(self, table: Table, rotary_dim: int, interleaved: bool, like: fx.Node) -> fx.Node:
        """A table, [B or 1, S or 1, H or 1, rotary_dim].

        Args:
            table: its parts.
            rotary_dim, interleaved: the rotation.
            like: what is rotated: its device and dtype serve where the coefficients are plain numbers.
        """
        if len(table.parts) == 1:
            return self._part(table.parts[0], rotary_dim, like)
        half = rotary_dim // 2
        if not interleaved:
            return self._cat([self._part(part, half, like) for part in table.parts], 3)
        first, second = table.parts
        if first == second:
            one = self.call(aten.unsqueeze.default, self._part(first, half, like), -1)
            pairs = self.call(aten.expand.default, one, [-1, -1, -1, -1, 2])
        else:
            parts = [self.call(aten.unsqueeze.default, self._part(part, half, like), -1) for part in table.parts]
            pairs = self._cat(parts, 4)
        sizes = [self.size(pairs, dim) for dim in range(3)]
        return self.call(aten.reshape.default, pairs, [*sizes, rotary_dim])

    def _part(self, part: Part, lanes: int, like: fx.Node) -> fx.Node:
        """[B or 1, S or 1, H or 1, lanes]."""
        if part.leaf is None:
            return self.constant(part.factor, 1, lanes, like)
        node, axes = part.leaf, list(part.axes)
        if value_of(node).dtype.is_complex:
            node = self.call(aten.view_as_real.default, node)
        for dim in reversed(range(len(axes))):
            axis = axes[dim]
            if axis.kind in ("fixed", "single"):
                node = self.call(aten.select.int, node, dim, axis.start)
                del axes[dim]
            elif axis.kind == "head_lane":
                sizes = [self.size(node, d) for d in range(len(axes))]
                node = self.call(aten.reshape.default, node, [*sizes[:dim], -1, axis.width, *sizes[dim + 1 :]])
                axes[dim : dim + 1] = [Axis("head"), Axis("lane", axis.start, axis.step)]
        kinds = [axis.kind for axis in axes]
        if "lane" in kinds:
            dim = kinds.index("lane")
            axis = axes[dim]
            if value_of(node).shape[dim] != lanes:
                end = axis.start + axis.step * (lanes - 1) + 1
                node = self.call(aten.slice.Tensor, node, dim, axis.start, end, axis.step)
        order = ["batch", "row", "head", "lane"]
        present = [kind for kind in order if kind in kinds]
        if present != kinds:
            node = self.call(aten.permute.default, node, [kinds.index(kind) for kind in present])
        for dim, kind in enumerate(order):
            if kind not in kinds:
                node = self.call(aten.unsqueeze.default, node, dim)
        if "lane" not in kinds and lanes != 1:
            node = self.call(aten.expand.default, node, [-1, -1, -1, lanes])
        if part.factor == -1.0:
            return self.call(aten.neg.default, node)
        return node if part.factor == 1.0 else self.call(aten.mul.Tensor, node, part.factor)

    def constant(self, number: float, rows: Any, lanes: int, like: fx.Node) -> fx.Node:
        """[1, rows, 1, lanes] of one number."""
        value = value_of(like)
        return self.call(
            aten.full.default, [1, rows, 1, lanes], number, dtype=value.dtype, device=value.device, pin_memory=False
        )

    def stacked(self, tables: Sequence[fx.Node], rows: Sequence[Any]) -> fx.Node:
        """Tables of stretches of rows, one after another. ``rows``: how many each stretch has."""
        spread = []
        for table, count in zip(tables, rows, strict=True):
            sizes = [-1, count, -1, -1]
            single = _same(value_of(table).shape[1], 1)
            spread.append(self.call(aten.expand.default, table, sizes) if single else table)
        return self._cat(spread, 1)

    def _cat(self, nodes: Sequence[fx.Node], dim: int) -> fx.Node:
        """Concatenate tensors that differ in dimensions of size 1, and in dtype."""
        values = [value_of(node) for node in nodes]
        dtype = values[0].dtype
        for value in values[1:]:
            dtype = torch.promote_types(dtype, value.dtype)
        brought = []
        for node, value in zip(nodes, values, strict=True):
            sizes: list[Any] = []
            for d, size in enumerate(value.shape):
                others = [n for n, v in zip(nodes, values, strict=True) if not _same(v.shape[d], 1)]
                sizes.append(self.size(others[0], d) if d != dim and _same(size, 1) and others else -1)
            if any(size != -1 for size in sizes):
                node = self.call(aten.expand.default, node, sizes)
            brought.append(self.cast(node, dtype))
        return self.call(aten.cat.default, brought, dim)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The node in a dtype."""
        return node if value_of(node).dtype == dtype else self.call(prims.convert_element_type.default, node, dtype)


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression. Adds no guard."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)
