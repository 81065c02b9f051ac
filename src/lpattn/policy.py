"""When low precision pays: measured speeds by architecture, and rules that pick layers.

The speeds ship as data (``speedups.json``) that ``benchmarks/calibrate.py`` writes from a run on the hardware; nothing
here is estimated. This module knows only the vocabulary of :mod:`lpattn.types`.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.resources
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lpattn.errors import InvalidArgumentError
from lpattn.types import AttentionCall, CausalKind, MaskKind

EXACT = "exact"
AUTO = "auto"

LayerRules = Mapping[str, str] | Callable[[str, nn.Module], str | bool | None]
"""``{pattern: EXACT | AUTO | backend name}``, first match wins; or a callable of (name, module) that returns one of
these, True (as the model's setting), False (exact) or None (no rule: as the model's setting)."""


def measured_speedup(backend: str, call: AttentionCall) -> float:
    """Speed of a backend relative to the best exact kernel, as measured on the architecture of the call.

    Interpolated in log(kv_len) between measured lengths, and constant beyond both ends. Calls with a single query, or
    on hardware, head_dims, causality or kinds of masks that nobody measured, give 0.0: nothing is known, so nothing is
    promised. Dense bool masks were measured with holes everywhere, additive ones without any: what whole tiles hide
    comes on top.

    Args:
        backend: name of the backend.
        call: the call.

    Returns:
        A ratio; 1.0 is as fast as exact attention.
    """
    if call.capability is None or call.q_len <= 1:
        return 0.0
    additive, whole_keys = call.mask is MaskKind.ADDITIVE, call.mask is MaskKind.NONE or call.key_padding
    mask = "additive" if additive else "none" if whole_keys else "dense"
    grouped = call.num_kv_heads != call.num_heads
    points = _tables().get(
        (
            backend,
            call.capability,
            call.head_dim,
            call.causal is CausalKind.TOP_LEFT,
            grouped,
            str(call.hadamard),
            mask,
        )
    )
    if not points:
        return 0.0
    # Attention costs q_len * kv_len: a chunk of queries over many keys pays like the square of the same area.
    length = math.sqrt(call.q_len * call.kv_len)
    if length <= points[0][0]:
        return points[0][1]
    for (low, slow), (high, fast) in itertools.pairwise(points):
        if length <= high:
            weight = math.log(length / low) / math.log(high / low)
            return slow + weight * (fast - slow)
    return points[-1][1]


_Key = tuple[str, tuple[int, int], int, bool, bool, str, str]


@functools.cache
def _tables() -> dict[_Key, list[tuple[int, float]]]:
    data: dict[str, Any] = json.loads(importlib.resources.files("lpattn").joinpath("speedups.json").read_text())
    return {
        (
            row["backend"],
            (row["capability"][0], row["capability"][1]),
            row["head_dim"],
            row["causal"],
            row["gqa"],
            row["hadamard"],
            row.get("mask", "none"),
        ): sorted((length, ratio) for length, ratio in row["speedup_by_length"])
        for row in data["tables"]
    }


def rule_for(rules: LayerRules | None, names: Sequence[str], module: nn.Module) -> tuple[str | None, str | None]:
    """The pattern that decides on a layer and its rule: EXACT, AUTO, a backend name, or None where none applies.

    Args:
        rules: the user's rules.
        names: fully qualified names of the module (a shared one has several); patterns match them by :mod:`fnmatch`,
            and a pattern that matches a container (``"blocks.0"`` or ``"blocks.0.*"``) covers everything below it.
        module: the module, for callables, which get its first name.

    Raises:
        InvalidArgumentError: a callable returned something that is not a rule.
    """
    if rules is None:
        return None, None
    if callable(rules):
        rule = rules(names[0], module)
        if rule is None or rule is True:
            return None, None
        if rule is False:
            return None, EXACT
        if not isinstance(rule, str):
            raise InvalidArgumentError(
                f"layers({names[0]!r}, ...) returned {rule!r}; it must return a backend name, {EXACT!r}, {AUTO!r}, "
                "True (as the model), False (exact) or None"
            )
        return None, rule
    for pattern, rule in rules.items():
        if any(covers(pattern, name) for name in names):
            return pattern, rule
    return None, None


def covers(pattern: str, name: str) -> bool:
    """Whether an fnmatch pattern matches the name or a container that the name lies in."""
    parts = name.split(".")
    ancestors = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    trimmed = pattern[:-2] if pattern.endswith(".*") else pattern
    return any(fnmatch.fnmatchcase(a, pattern) or fnmatch.fnmatchcase(a, trimmed) for a in ancestors) or (
        fnmatch.fnmatchcase(name, pattern)
    )


def exact_ends(model: nn.Module, first: int = 1, last: int = 1) -> dict[str, str]:
    """Layer rules that keep the first and last blocks of every stack exact, where models are most sensitive.

    A stack is an ``nn.ModuleList`` that lies in no other one. Pass the result as ``layers=``, alone or merged with
    further rules.

    Args:
        model: the model; it is only looked at.
        first: how many blocks at the start of each stack.
        last: how many at its end.

    Returns:
        Rules such as ``{"blocks.0": "exact", "blocks.27": "exact"}``.

    Raises:
        InvalidArgumentError: a count is negative, or the model has no nn.ModuleList.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if not all(isinstance(count, int) and count >= 0 for count in (first, last)):
        raise InvalidArgumentError(
            f"first and last must be whole numbers, 0 or more; got first={first!r}, last={last!r}"
        )
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    names = [name for name, _ in stacks]
    outer = [(n, m) for n, m in stacks if not any(n != o and n.startswith(o + ".") for o in names)]
    if not outer:
        raise InvalidArgumentError(
            f"{type(model).__name__} has no nn.ModuleList, so it has no first and last blocks; "
            "name the layers in a dict instead, such as layers={'encoder.*': 'exact'}"
        )
    rules = {}
    for name, stack in outer:
        keep = set(range(min(first, len(stack)))) | set(range(max(len(stack) - last, 0), len(stack)))
        rules.update({f"{name}.{index}": EXACT for index in sorted(keep)})
    return rules
