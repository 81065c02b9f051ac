"""What fp8_fa3 is meant to reach on a Hopper GPU, and what it reaches: one table, each line met or MISSED.

Every speed is a ratio within one run, quantization included: a variant against the best exact kernel of the machine, or
a quantization against a copy on the device. "graph" is a replayed CUDA graph, in which the host takes no part; "events"
is calls launched one by one, as eager code does. Each part runs apart from the others: one that fails costs its own
lines only. Needs a CUDA device of compute capability 9.0 with FlashAttention-3.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import accuracy
import attention
import quantization
import torch
from cases import FLUX, LONG, NAMED, PADDED
from common import Budget, DeviceTimer, parser, table, write
from labels import name_of
from quantizers import LAYOUTS, quantizers

BACKEND = "fp8_fa3"
QKV = name_of(BACKEND, "qkv")
SHORT = NAMED[-1]
SQNR = {
    "none": {"randn": 25.0, "outliers": 18.5, "bias": 45.0},
    "qkv": {"randn": 25.0, "outliers": 27.0, "bias": 45.0},
}
"""Least dB at 16k, head_dim 128, by Hadamard mode and kind of data."""

Parts = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One target.

    Attributes:
        what: what is measured, and how.
        wanted: the limit, with its direction and unit.
        found: the value; None where it was not measured.
        met: whether it keeps the limit; None where it was not measured, or has none.
        limited: whether there is a limit; without one, it is told for comparison.
    """

    what: str
    wanted: str
    found: float | None
    met: bool | None
    limited: bool = True

    @property
    def verdict(self) -> str:
        """A word for the table."""
        if self.found is None:
            return "not measured"
        return "" if not self.limited else "met" if self.met else "MISSED"


def at_least(what: str, limit: float, found: float | None, unit: str = "x") -> Line:
    return Line(what, f">= {limit:g}{unit}", found, None if found is None else found >= limit)


def at_most(what: str, limit: float, found: float | None, unit: str = "x") -> Line:
    return Line(what, f"<= {limit:g}{unit}", found, None if found is None else found <= limit)


def told(what: str, found: float | None, unit: str = "x") -> Line:
    return Line(what, f"({unit.strip()})", found, None, limited=False)


def lines(parts: Mapping[str, Any]) -> list[Line]:
    """The targets beside what was found in the parts, of which any may be missing."""
    found: list[Line] = []
    for layout in LAYOUTS:
        variants = dig(parts, f"quantization {layout}", "variants") or {}
        plain, qkv, v_only = (variants.get(name_of("per_head", mode)) for mode in ("none", "qkv", "v_only"))
        at = f"quantization, FLUX, {layout}, graph"
        found += [
            at_most(f"{at}, ms", 0.06, dig(plain, "milliseconds", "graph"), " ms"),
            at_least(f"{at}, of a copy's bandwidth", 0.6, dig(plain, "fraction_of_copy", "graph"), ""),
            at_most(f"{at}, Hadamard qkv over plain", 1.15, dig(qkv, "over_plain", "graph")),
            told(f"{at}, Hadamard v_only over plain", dig(v_only, "over_plain", "graph")),
        ]
    flux, long = parts.get("flux"), parts.get("long")
    found += [
        at_least("whole op, FLUX, events", 1.2, dig(flux, "speedup", BACKEND)),
        told("whole op, FLUX, graph", dig(flux, "graph_speedup", BACKEND)),
        at_least("whole op, 16k, head_dim 128, events", 1.33, dig(long, "speedup", BACKEND)),
        at_least("whole op, FLUX, Hadamard qkv, events", 1.1, dig(flux, "speedup", QKV)),
        told("whole op, FLUX, Hadamard qkv, graph", dig(flux, "graph_speedup", QKV)),
        told("whole op, 2 x 4608, key padding, events", dig(parts, "padding", "speedup", BACKEND)),
        told("kernel alone, FLUX, events", alone(flux)),
        told("kernel alone, 16k, head_dim 128, events", alone(long)),
    ]
    for layout in LAYOUTS:
        choice = dig(parts, f"short {layout}", "automatic")
        name = f"automatic choice, 512 tokens, {layout}, against plain SDPA"
        found += [
            at_least(f"{name}, graph", 0.98, dig(choice, "graph_over_sdpa")),
            at_least(f"{name}, events", 0.98, dig(choice, "over_sdpa")),
        ]
    for mode, floors in SQNR.items():
        for data, floor in floors.items():
            value = dig(parts, f"accuracy {data}", "sqnr_db", name_of(BACKEND, mode))
            found.append(at_least(f"SQNR at 16k, {data}, Hadamard {mode}", floor, value, " dB"))
    host = dig(parts, "host", "microseconds", "low_precision_sdpa, fp8_fa3")
    found += [
        at_most("host time of an eager call, us", 80.0, host, " us"),
        told("host time of plain SDPA, us", dig(parts, "host", "microseconds", "plain SDPA"), " us"),
    ]
    return found


def dig(tree: Any, *path: str) -> Any:
    """What lies at the end of a path; None where it ends before."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def alone(result: Mapping[str, Any] | None) -> float | None:
    """How many times the FP8 kernel without quantization is faster than the best exact kernel."""
    milliseconds = dig(result, "kernel_alone", "milliseconds")
    return (
        None if result is None or milliseconds is None else result["milliseconds"][result["best_exact"]] / milliseconds
    )


def report(found: Sequence[Line]) -> str:
    rows = [["target", "wanted", "found", ""]]
    rows += [[x.what, x.wanted, "-" if x.found is None else f"{x.found:.3f}", x.verdict] for x in found]
    return table(rows)


def items(budget: Budget, rounds: int) -> dict[str, Callable[[], Any]]:
    """Everything that is measured, the most important first, since the budget may cut off the end."""
    several, graph = DeviceTimer(5), DeviceTimer(each=attention.GRAPH_CALLS)
    timers = quantization.Timers(DeviceTimer(quantization.EVENT_CALLS), DeviceTimer(each=quantization.GRAPH_CALLS))
    cache = torch.cuda.get_device_properties(0).L2_cache_size

    def whole(shape: Any, **changes: Any) -> Callable[[], Any]:
        seconds = budget.per_item
        return lambda: attention.measure(shape, several, rounds, seconds, **changes)

    def quantize(layout: str) -> Callable[[], Any]:
        tested = {"per_head": quantizers()["per_head"]}
        return lambda: quantization.measure(FLUX, layout, tested, timers, rounds, budget.per_item, cache=cache)

    both = {"modes": ("none", "qkv"), "extras": True}
    found: dict[str, Callable[[], Any]] = {
        "host": lambda: quantization.host({}, rounds, budget.per_item),
        "flux": whole(FLUX, graph_timer=graph, **both),
        "long": whole(LONG, **both),
    }
    found |= {f"quantization {layout}": quantize(layout) for layout in LAYOUTS}
    for layout in LAYOUTS:
        found[f"short {layout}"] = whole(SHORT, extras=True, graph_timer=graph, layout=layout)
    found["padding"] = whole(PADDED)
    for data in SQNR["none"]:
        found[f"accuracy {data}"] = lambda data=data: accuracy.measure_one(accuracy.shape_of(16384), data, "cuda")
    return found


def main() -> int:
    arguments = parser(__doc__ or "", budget=210.0)
    arguments.add_argument("--per-item", type=float, default=6.0, help="seconds of timing per part (default 6)")
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        print(f"targets.py needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    budget = Budget(given.budget, 0.3 if given.quick else given.per_item)
    parts: Parts = {}
    failed: dict[str, str] = {}
    for name, run in items(budget, 5 if given.quick else 200).items():
        if not budget.item():
            failed[name] = "left out, for want of time"
            continue
        try:
            parts[name] = run()
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{name}: {failed.get(name, 'measured')}, {budget.left():.0f} s left", flush=True)
        torch.cuda.empty_cache()
    found = lines(parts)
    print(f"\n{report(found)}")
    write(given.out, {"targets": [asdict(x) for x in found], "failed": failed, "parts": parts})
    return 0


if __name__ == "__main__":
    sys.exit(main())
