"""Time and bandwidth of quantizing q, k and v, against a plain copy on the device that moves as many bytes.

"per_head" has the scales that FlashAttention-3 reads, "per_block" those that lpattn's own kernels read. The bytes of a
call are those that must move: every input (with RoPE its tables, too) read once, every e4m3 output written once. The
copy reads half of them and writes the other half. Both are timed in the same rounds, in two ways:

* events: GPU events around several calls in a row. Where the host launches more slowly than the GPU works, this is the
  host's time.
* graph: a replayed CUDA graph of several calls, which is the GPU's time alone.

Calls take turns on several sets of inputs, so that none finds its inputs in the L2 cache. A variant whose output is
not its input, up to the error of e4m3, is not timed. The host's time per call is measured apart. Needs a CUDA device.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import FLUX, NAMED, Shape
from common import (
    Budget,
    DeviceTimer,
    captured,
    gpu_state,
    host_timer,
    interleaved,
    median,
    parser,
    ratio,
    spread,
    table,
    write,
)
from quantizers import KINDS, LAYOUTS, Kind, Quantizer, bound, make, quality, quantizers

import lpattn

FLOOR = 30.0
"""dB; e4m3 with a scale that fits leaves 31.5 of normal data."""

EVENT_CALLS = 10
GRAPH_CALLS = 20
HOST_SHAPE = Shape(1, 24, 24, 512, 128, False)  # so short that the host is the limit
HOST_TARGET_MICROSECONDS = 80.0


def input_sets(size: int, cache: int) -> int:
    """How many sets of inputs of that size take turns, so that none is cached when its turn comes; bytes."""
    return 1 + math.ceil(3 * cache / size)


def copies(size: int, sets: int, device: str) -> list[Callable[[], object]]:
    """Copies that move ``size`` bytes each: half of them are read, half of them written, from ``sets`` places to one.

    One place, as the outputs of the quantization too go to the same memory each time, which was just freed.
    """
    source = torch.randint(-128, 128, (sets, size // 2), dtype=torch.int8, device=device)
    to = torch.empty_like(source[0])
    return [functools.partial(to.copy_, one) for one in source]


def rotating(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A function that calls them in turn, one at a time."""
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


@dataclass(frozen=True)
class Timers:
    """Seconds per call: ``events`` of what runs one call, ``graph`` of what replays GRAPH_CALLS."""

    events: Callable[[Callable[[], object]], float]
    graph: Callable[[Callable[[], object]], float]


@torch.inference_mode()
def measure(
    shape: Shape,
    layout: str,
    tested: Mapping[str, Quantizer],
    timers: Timers,
    rounds: int,
    seconds: float,
    *,
    cache: int,
    device: str = "cuda",
    capture: Callable[[Sequence[Callable[[], object]]], Callable[[], None]] = captured,
) -> dict[str, Any]:
    """Times of all variants of one shape and layout, and of copies.

    Args:
        shape, layout: of q, k and v.
        tested: the quantizers by name.
        timers: how to time.
        rounds, seconds: as :func:`common.interleaved` takes them; half of the seconds for either way of timing.
        cache: size of the L2 cache in bytes.
        device: of the tensors.
        capture: makes one function of GRAPH_CALLS calls.
    """
    torch.manual_seed(0)
    first = make(shape, layout, shape == FLUX, device)
    sets = [first]
    sets += [make(shape, layout, shape == FLUX, device) for _ in range(1, input_sets(first.bytes(False), cache))]
    runs: dict[str, list[Callable[[], object]]] = {}
    found: dict[str, dict[str, Any]] = {}
    refused = {}
    for (label, quantizer), kind in itertools.product(tested.items(), KINDS):
        name = kind.name(label)
        try:
            sqnr = quality(quantizer, kind, first)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if min(sqnr.values()) < FLOOR:
            refused[name] = f"wrong: {sqnr} dB"
            continue
        size = first.bytes(kind.rope)
        found[name] = {"bytes": size, "plain": Kind().name(label), "sqnr_db": sqnr}
        runs[name] = [bound(quantizer, kind, one) for one in sets]
        if copy_name(size) not in runs:
            runs[copy_name(size)] = copies(size, len(sets), device)
    for calls in runs.values():
        calls[0]()
    graphs = {n: capture(list(itertools.islice(itertools.cycle(calls), GRAPH_CALLS))) for n, calls in runs.items()}
    times = {
        "events": interleaved({n: rotating(calls) for n, calls in runs.items()}, timers.events, rounds, seconds / 2),
        "graph": interleaved(graphs, timers.graph, rounds, seconds / 2),
    }
    return {
        "shape": asdict(shape),
        "layout": layout,
        "rope": "interleaved" if first.interleaved else "half-split",
        "input_sets": len(sets),
        "variants": {name: variant | summary(name, variant, times) for name, variant in found.items()},
        "refused": refused,
        "rounds": {how: min(map(len, measured.values()), default=0) for how, measured in times.items()},
        "gpu": gpu_state(),
    }


def copy_name(size: int) -> str:
    return f"copy of {size} bytes"


def summary(
    name: str, variant: Mapping[str, Any], times: Mapping[str, Mapping[str, list[float]]]
) -> dict[str, dict[str, float]]:
    """Times and ratios of a variant, each by the way of timing."""
    size = variant["bytes"]
    own = {how: median(measured[name]) for how, measured in times.items()}
    copy = {how: median(measured[copy_name(size)]) for how, measured in times.items()}
    of_copy = {how: ratio(measured[copy_name(size)], measured[name]) for how, measured in times.items()}
    plain = variant["plain"]
    over_plain = {how: ratio(measured[name], measured[plain]) for how, measured in times.items() if plain in measured}
    return {
        "milliseconds": {how: t * 1e3 for how, t in own.items()},
        "spread": {how: round(spread(measured[name]), 4) for how, measured in times.items()},
        "copy_milliseconds": {how: t * 1e3 for how, t in copy.items()},
        "terabytes_per_second": {how: size / t / 1e12 for how, t in own.items()},
        "copy_terabytes_per_second": {how: size / t / 1e12 for how, t in copy.items()},
        "fraction_of_copy": of_copy,
        "over_plain": over_plain,
    }


@torch.inference_mode()
def host(
    tested: Mapping[str, Quantizer], rounds: int, seconds: float, shape: Shape = HOST_SHAPE, device: str = "cuda"
) -> dict[str, Any]:
    """Host time of quantization and of one whole eager call, in microseconds."""
    inputs = make(shape, "bhsd", False, device)
    qkv = (inputs.q, inputs.k, inputs.v)
    call = "low_precision_sdpa, fp8_fa3"
    runs: dict[str, Callable[[], object]] = {
        f"{name}: quantize q, k, v": bound(quantizer, Kind(), inputs) for name, quantizer in tested.items()
    }
    runs[call] = functools.partial(lpattn.low_precision_sdpa, *qkv, backend="fp8_fa3")
    runs["plain SDPA"] = functools.partial(F.scaled_dot_product_attention, *qkv)
    refused = {}
    for name, run in list(runs.items()):
        try:
            run()
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del runs[name]
    times = interleaved(runs, host_timer(100), rounds, seconds)
    micro = {name: median(t) * 1e6 for name, t in times.items()}
    return {
        "shape": asdict(shape),
        "microseconds": micro,
        "spread": {name: round(spread(t), 4) for name, t in times.items()},
        "target_microseconds": HOST_TARGET_MICROSECONDS,
        "target_met": micro[call] <= HOST_TARGET_MICROSECONDS if call in micro else None,
        "refused": refused,
    }


def report(results: Sequence[Mapping[str, Any]]) -> str:
    head = [
        "B,H/Hkv,S,D",
        "layout",
        "variant",
        "MB",
        "graph ms",
        "TB/s",
        "of copy",
        "/ plain",
        "events ms",
        "of copy",
        "dB",
    ]
    rows = [head]
    lines = []
    for r in results:
        shape = Shape(**r["shape"])
        size = f"{shape.batch},{shape.num_heads}/{shape.num_kv_heads},{shape.length},{shape.head_dim}"
        for name, v in r["variants"].items():
            times, of_copy = v["milliseconds"], v["fraction_of_copy"]
            plain = v["over_plain"].get("graph")
            rows.append(
                [
                    size,
                    r["layout"],
                    name,
                    f"{v['bytes'] / 1e6:.1f}",
                    f"{times['graph']:.4f}",
                    f"{v['terabytes_per_second']['graph']:.2f}",
                    f"{of_copy['graph']:.2f}",
                    "-" if plain is None else f"{plain:.2f}",
                    f"{times['events']:.4f}",
                    f"{of_copy['events']:.2f}",
                    f"{min(v['sqnr_db'].values()):.1f}",
                ]
            )
        lines += [f"{size} {r['layout']} {name}: {why}" for name, why in r["refused"].items()]
    return "\n".join([table(rows), *lines])


def host_report(found: Mapping[str, Any]) -> str:
    micro = found["microseconds"]
    rows = [["host time per call", "us", "+-"]]
    rows += [[name, f"{value:.1f}", f"{found['spread'][name]:.0%}"] for name, value in micro.items()]
    lines = [f"{name}: {why}" for name, why in found["refused"].items()]
    if found["target_met"] is not None:
        verdict = "met" if found["target_met"] else "MISSED"
        lines.append(f"target of a whole call: {found['target_microseconds']:g} us, {verdict}")
    return "\n".join([table(rows), *lines])


def main() -> int:
    arguments = parser(__doc__ or "", budget=60.0)
    arguments.add_argument("--per-item", type=float, default=1.0, help="seconds per shape and layout (default 1)")
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        print(f"quantization.py needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    budget = Budget(given.budget, given.per_item)
    rounds = 5 if given.quick else 50
    tested = quantizers()
    timers = Timers(DeviceTimer(EVENT_CALLS), DeviceTimer(each=GRAPH_CALLS))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    hosted = host(tested, rounds, given.per_item)
    print(f"{host_report(hosted)}\n", flush=True)
    results: list[dict[str, Any]] = []
    left_out = []
    for shape, layout in itertools.product([NAMED[0], NAMED[-1]] if given.quick else NAMED, LAYOUTS):
        if seconds := budget.item():
            results.append(measure(shape, layout, tested, timers, rounds, seconds, cache=cache))
            torch.cuda.empty_cache()
        else:
            left_out.append(f"{shape} {layout}")
    print(report(results))
    if left_out:
        print(f"\nleft out, for want of time: {'; '.join(left_out)}")
    write(given.out, {"results": results, "host": hosted, "left_out": left_out})
    return 0


if __name__ == "__main__":
    sys.exit(main())
