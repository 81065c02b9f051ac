"""Numbers for symbolic sizes, so that a graph of any length can be judged at sizes that are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

_FACTORS = (2, 3, 5, 7, 11, 13)
"""What the second assignment multiplies sizes by: another one for each symbol, so that none stay equal by chance."""


class UnknownSizeError(Exception):
    """A size that no assignment gives a number: it depends on data."""


class Sizes:
    """A number for every symbol. Never asks a SymInt for its value, which would add a guard.

    Args:
        values: numbers by symbol; sizes without symbols need none.
    """

    def __init__(self, values: Mapping[Any, int]) -> None:
        self._values = {symbol: sympy.Integer(value) for symbol, value in values.items()}

    def __call__(self, size: Any) -> int:
        """The number of an int, of a SymInt, or of a node of the graph that holds one.

        Raises:
            UnknownSizeError: no symbol of the assignment gives its value.
        """
        if isinstance(size, fx.Node):
            size = size.meta.get("val")
        if isinstance(size, int):
            return int(size)
        if not isinstance(size, torch.SymInt):
            raise UnknownSizeError(f"{size!r} is not a size")
        value = size.node.expr.xreplace(self._values)
        if not value.is_number:
            raise UnknownSizeError(f"size {size} depends on data")
        return int(value)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node's tensor."""
        return tuple(self(size) for size in value_of(node).shape)


def value_of(node: fx.Node) -> Any:
    """The fake tensor of a node."""
    return node.meta["val"]


def assignments(nodes: Iterable[fx.Node]) -> list[Sizes]:
    """The sizes that a graph was traced with, and other ones where sizes are symbolic.

    What holds at both does not hold because two sizes happen to be equal.
    """
    hints: dict[Any, int] = {}
    for node in nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                # torch 2.11 has the older name only.
                hint = getattr(environment, "optimization_hint", None) or environment.size_hint
                for symbol in size.node.expr.free_symbols:
                    if symbol not in hints and not environment.is_unbacked_symint(symbol):
                        hints[symbol] = int(hint(symbol))
    if not hints:
        return [Sizes({})]
    # Multiples: guards on divisibility hold for them too.
    ordered = sorted(hints, key=str)
    larger = {symbol: hints[symbol] * _FACTORS[i % len(_FACTORS)] for i, symbol in enumerate(ordered)}
    return [Sizes(hints), Sizes(larger)]
