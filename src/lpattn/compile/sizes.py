"""Numbers for symbolic sizes, so that a graph of any length can be judged at sizes that are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx

_PRIMES = ((101, 2), (103, 3), (107, 5), (109, 7), (113, 11), (127, 13))
"""What other assignments are made with: other ones for each symbol, so that no two sizes stay equal by chance."""

_MOST = 32
"""Lengths near bends at most: each costs a proof."""


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

    What holds at all of them does not hold because two sizes happen to be equal, or a length to be short, or long, or a
    multiple of something; nor only between two lengths at which a size bends, such as 64 in max(0, s - 64). All keep
    the graph's guards: at other sizes it never runs.

    Raises:
        UnknownSizeError: sizes bend at too many lengths.
    """
    bends: set[Any] = set()
    hints: dict[Any, int] = {}
    environment: Any = None
    for node in nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                bends.update(part for part in sympy.preorder_traversal(size.node.expr) if _bends(part))
                # torch 2.11 has the older name only.
                hint = getattr(environment, "optimization_hint", None) or environment.size_hint
                for symbol in size.node.expr.free_symbols:
                    if symbol not in hints and not environment.is_unbacked_symint(symbol):
                        hints[symbol] = int(hint(symbol))
    if not hints:
        return [Sizes({})]
    long, short = dict(hints), dict(hints)
    for number, symbol in enumerate(sorted(hints, key=str)):
        large, small = _PRIMES[number % len(_PRIMES)]
        hint, least = hints[symbol], max(0, environment.var_to_range[symbol].lower)
        # Multiples and parts where the graph asks for such, and what is near where it has bounds.
        above = (hint * large + 1, hint * large, hint * small, hint + small)
        below = (least + number, hint // 8, hint // 4, hint // 2, hint * 3 // 4, hint * 7 // 8, hint - small)
        for values, tried in ((long, (*above, *below)), (short, (*below, *above))):
            allowed = (value for value in tried if _is_allowed(environment, {**values, symbol: value}))
            values[symbol] = next(allowed, hint)
    near = [hints]
    # From one bend the next one is found.
    for values in near:
        near += [at for at in _near_bends(bends, values) if at not in near and _is_allowed(environment, at)]
        if len(near) > _MOST:
            raise UnknownSizeError(f"sizes bend at too many lengths: {', '.join(sorted(map(str, bends)))[:100]}")
    return [Sizes(values) for values in (hints, long, short, *near[1:])]


def _bends(expression: Any) -> bool:
    """Whether it is the larger or the smaller one of others: sympy's, or PyTorch's own."""
    return type(expression).__name__ in ("Max", "Min")


def _near_bends(bends: Iterable[Any], values: Mapping[Any, int]) -> Iterator[dict[Any, int]]:
    """Sizes on both sides of where two sides of a bend are equal, as seen from some sizes: one symbol changes."""
    for bend in bends:
        for one, other in itertools.combinations(bend.args, 2):
            for symbol in (one - other).free_symbols & values.keys():
                here, next_to_it = (
                    (one - other).xreplace({s: sympy.Integer(n) for s, n in {**values, symbol: at}.items()})
                    for at in (values[symbol], values[symbol] + 1)
                )
                if here.is_number and next_to_it.is_number and here != next_to_it:
                    equal = values[symbol] + math.floor(here / (here - next_to_it))
                    yield from ({**values, symbol: equal + step} for step in (-1, 0, 1, 2))


def _is_allowed(environment: Any, values: Mapping[Any, int]) -> bool:
    """Whether a graph that was traced in an environment of shapes may run at some sizes."""
    numbers = {symbol: sympy.Integer(value) for symbol, value in values.items()}
    inside = all(number in environment.var_to_range[symbol] for symbol, number in numbers.items())
    return inside and not any(guard.expr.xreplace(numbers) == sympy.false for guard in environment.guards)
