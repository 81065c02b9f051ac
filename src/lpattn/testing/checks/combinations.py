"""What goes wrong only where two options meet: every value of each axis of a call beside every value of the others."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lpattn.testing.budget import LSE_OF_COUNTS, lse_limit, require_close, require_lse
from lpattn.testing.inputs import AIMS, Problem, level, spread
from lpattn.testing.outcome import NotApplicable, check
from lpattn.testing.subject import Subject
from lpattn.types import MaskKind

_MASKS = (
    "key padding [B, 1, 1, kv_len]",
    "bool [1, H, 1, kv_len]",
    "bool [B, H, q_len, kv_len]",
    "additive [q_len, kv_len]",
    "additive with -inf",
)
"""Of :meth:`Subject.masks`: each way to broadcast, and each kind."""

_CAUSAL = "causal"
"""Beside the masks: a call has the one or the other."""

_TRIES = 12
"""Combinations that are tried for two values before they count as ones that the backend does not take together."""

_COMPILED = ("dtype", "head_dim", "wider_v", "hadamard", "lse")
"""Axes for whose values kernels are compiled: as few combinations of these as the pairs of their values need."""

Row = dict[str, int]
"""One combination, or the part of it that some axes are: the index of a value, by axis."""

Pair = frozenset[tuple[str, int]]
"""Two values: (axis, index) of each."""


@check
def options_combine(subject: Subject) -> str:
    """Each dtype, head_dim, number of heads, length, mask, scale, layout and mode beside each of the others."""
    subject.device  # noqa: B018 - says why, where there is none
    axes = _axes(subject)

    def admitted(row: Row) -> bool:
        options = _options(axes, row)
        return not subject.refusal(_problem(subject, options), options["lse"])

    seen = 0
    parts = {axis: [{axis: index} for index in range(len(values))] for axis, values in axes.items()}
    kernels = list(_covering([parts.pop(axis) for axis in _COMPILED], lambda _: True))
    for row in _covering([kernels, *parts.values()], admitted):
        options = _options(axes, row)
        problem = _problem(subject, options)
        out, lse = subject.run_with_lse(problem) if options["lse"] else (subject.run(problem), None)
        require_close(subject, problem, out, "sharp")
        if lse is not None:
            require_lse(subject, problem, out, lse, _lse_limit(subject, problem, options["aim"]))
        seen += 1
    if not seen:
        raise NotApplicable("declines all such calls")
    return f"{seen} calls"


def _axes(subject: Subject) -> Mapping[str, Sequence[Any]]:
    capabilities = subject.capabilities
    masks = {text for text, _ in subject.masks(subject.sizes())}
    # Every row may be a kernel to compile, and those for many lanes take longest: they are tried elsewhere.
    dims = [dim for dim in subject.head_dims if dim <= 128] or subject.head_dims[:1]
    return {
        "dtype": subject.dtypes,
        "head_dim": list(dict.fromkeys((subject.head_dim, dims[len(dims) // 2], dims[-1]))),
        "wider_v": (0, 8) if capabilities.head_dim_v_differs else (0,),
        "heads": ((4, 4), (4, 2), (6, 2), (10, 2)) if capabilities.gqa else ((4, 4), (3, 3)),
        # Past the tiles that kernels have, alike and not.
        "lengths": ((subject.fitting(290),) * 2, (48, 333), (333, 48), (1, 257), (130, 1030)),
        "mask": ("no mask", *([_CAUSAL] if capabilities.causal else []), *(text for text in _MASKS if text in masks)),
        "float32_mask": (False, True) if MaskKind.ADDITIVE in capabilities.masks else (False,),
        "scale": (None, 0.003, 0.5, 0.0, -0.1),
        "aim": AIMS,
        "layout": ("[B, S, H, D] memory", "sliced heads", "sliced lanes"),
        "hadamard": sorted(capabilities.hadamard),
        "lse": (False, True) if capabilities.lse else (False,),
    }


def _options(axes: Mapping[str, Sequence[Any]], row: Row) -> dict[str, Any]:
    return {axis: values[row[axis]] for axis, values in axes.items()}


def _problem(subject: Subject, options: Mapping[str, Any]) -> Problem:
    (heads, kv_heads), (q_len, kv_len), dim = options["heads"], options["lengths"], options["head_dim"]
    sizes = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "q_len": q_len,
        "kv_len": kv_len,
        "head_dim": dim,
        "head_dim_v": dim + options["wider_v"],
        "causal": options["mask"] == _CAUSAL,
        "scale": options["scale"],
    }
    dtype, text = options["dtype"], options["mask"]
    if text in _MASKS:
        mask_dtype = torch.float32 if options["float32_mask"] else dtype
        (problem,) = subject.masked(only=(text,), dtype=dtype, mask_dtype=mask_dtype, **sizes)
    else:
        problem = subject.problem(dtype=dtype, **sizes)
    problem = options["aim"](problem.changed(hadamard=options["hadamard"]))
    label = f"{problem.label}, {text}, {options['layout']}{', with lse' if options['lse'] else ''}"
    return problem.laid_out(options["layout"]).changed(label=label)


def _lse_limit(subject: Subject, problem: Problem, aim: Any) -> float:
    """How far the log-sum-exp may be off: almost nothing where all weights are 1."""
    additive = problem.attn_mask is not None and problem.attn_mask.dtype != torch.bool
    if aim is level and not additive:
        return LSE_OF_COUNTS
    return lse_limit(subject, "normal" if aim in (spread, level) else "sharp")


def _covering(groups: Sequence[Sequence[Row]], admitted: Callable[[Row], bool]) -> Iterator[Row]:
    """Rows in which every two values meet at least once, where a row with them is admitted.

    Greedy: a row begins with two values that have not met yet, and takes of each group the part that has most to meet
    in what the row has so far.

    Args:
        groups: each has the parts of which a row has one; those of a group have the same axes.
        admitted: whether a row can be used.
    """
    chance = random.Random(0)
    both = itertools.chain.from_iterable(itertools.product(*two) for two in itertools.combinations(groups, 2))
    left = dict.fromkeys(pair for one, other in both for pair in _pairs({**one, **other}))

    def unmet(row: Row, part: Row) -> int:
        return sum(pair in left for pair in _pairs({**row, **part}))

    while left:
        wanted = next(iter(left))
        for _ in range(_TRIES):
            row: Row = {}
            # Those of the two values come first, so that the others can look at them.
            for group in sorted(chance.sample(groups, len(groups)), key=functools.partial(_lacks, wanted)):
                fitting = [part for part in group if all(part.get(axis, i) == i for axis, i in wanted)]
                row |= max(chance.sample(fitting, len(fitting)), key=functools.partial(unmet, dict(row)))
            if admitted(row):
                yield row
                for pair in _pairs(row):
                    left.pop(pair, None)
                break
        left.pop(wanted, None)


def _lacks(wanted: Pair, group: Sequence[Row]) -> bool:
    return not any(axis in group[0] for axis, _ in wanted)


def _pairs(row: Row) -> Iterator[Pair]:
    return map(frozenset, itertools.combinations(row.items(), 2))
