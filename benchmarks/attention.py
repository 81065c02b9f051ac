"""Speed of whole attention calls, quantization included, against the best exact kernel that the machine has.

Every variant's output is checked against exact attention on sampled rows before it is timed; variants are timed in
turn. Times are medians of GPU events around several calls in a row, launched as in a model; for short lengths, where
the host's launches may be the limit, also of replayed CUDA graphs. Also measured: biased data, key padding, windows and
the accuracy on several kinds of data. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accuracy
import torch
from cases import DIMS, FLUX, LENGTHS, LONG, NAMED, PADDED, WINDOWED, Shape, Tensors, inputs, sqnr, sweep
from common import Budget, DeviceTimer, captured, gpu_state, interleaved, median, parser, ratio, spread, table, write
from labels import AUTO, EXACT
from variants import KernelAlone, Run, exact_variants, low_variants, options

import lpattn

EXACT_FLOOR = 40.0
LOW_FLOORS = {"randn": 15.0, "bias": 10.0}
"""dB below which a variant is wrong, not only imprecise, by kind of data."""

MODES = ("none", "qkv", "v_only")
KERNEL = "kernel alone"
GRAPH_CALLS = 20
GRAPHS_UP_TO = 4608
"""Length up to which calls are also measured as graphs: beyond it, the host is not the limit."""

Timer = Callable[[Callable[[], object]], float]


def candidates(qkv: Tensors, shape: Shape, device: str, modes: Sequence[str], extras: bool) -> dict[str, Run]:
    """What is measured, by name."""
    found = {**exact_variants(qkv, shape, device), **low_variants(qkv, shape, device, modes)}
    if extras:
        found[AUTO] = functools.partial(lpattn.low_precision_sdpa, *qkv, **options(shape, device))
        found[KERNEL] = KernelAlone(qkv, shape)
    return found


def checked(
    runs: Mapping[str, Run], qkv: Tensors, shape: Shape, floor: float
) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """What runs and is right, the SQNR of what runs, and why the others are refused."""
    usable, found, refused = {}, {}, {}
    for name, run in runs.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = run.restored() if isinstance(run, KernelAlone) else run()
                found[name] = sqnr(out, qkv, shape)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        if found[name] < (EXACT_FLOOR if name.startswith(EXACT) else floor):
            refused[name] = f"wrong: {found[name]:.1f} dB"
            continue
        usable[name] = run
    return usable, found, refused


def hopeless(usable: Mapping[str, Run], timer: Timer) -> dict[str, str]:
    """Exact kernels that cannot be the best one, since another was 1.5 times faster at once: why, by name."""
    trial = {name: timer(run) for name, run in usable.items() if name.startswith(EXACT)}
    best = min(trial, key=trial.__getitem__)
    return {
        name: f"slow: {seconds * 1e3:.3g} ms, where {best} takes {trial[best] * 1e3:.3g}"
        for name, seconds in trial.items()
        if seconds > 1.5 * trial[best]
    }


def graphs(usable: Mapping[str, Run]) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """GRAPH_CALLS calls of each variant as one graph, and what cannot be captured."""
    found, refused = {}, {}
    for name, run in usable.items():
        try:
            found[name] = captured([run] * GRAPH_CALLS)
        except Exception as error:
            refused[f"{name} as a graph"] = f"{type(error).__name__}: {error}"
    return found, refused


@torch.inference_mode()
def measure(
    shape: Shape,
    timer: Timer,
    rounds: int,
    seconds: float,
    *,
    data: str = "randn",
    modes: Sequence[str] = ("none",),
    extras: bool = False,
    graph_timer: Timer | None = None,
    device: str = "cuda",
    layout: str = "bhsd",
) -> dict[str, Any]:
    """Times and accuracy of one shape.

    Args:
        shape: the call.
        timer: seconds per call.
        rounds, seconds: as :func:`common.interleaved` takes them.
        data: kind of data.
        modes: Hadamard modes of the low-precision backends.
        extras: also the automatic choice, and FlashAttention-3's kernel alone.
        graph_timer: seconds per call of a graph's replay; None: no graphs.
        device: of the tensors.
        layout: of their memory, as :func:`cases.inputs` takes it.
    """
    qkv = inputs(shape, data, device, layout)
    usable, quality, refused = checked(candidates(qkv, shape, device, modes, extras), qkv, shape, LOW_FLOORS[data])
    if not any(name.startswith(EXACT) for name in usable):
        raise RuntimeError(f"no exact kernel to compare with: {refused}")
    if shape.length >= 16384:
        # Time is scarce, and a call takes long enough for one measurement to tell.
        slow = hopeless(usable, timer)
        refused |= slow
        usable = {name: run for name, run in usable.items() if name not in slow}
    times = interleaved(usable, timer, rounds, seconds)
    captures: dict[str, list[float]] = {}
    if graph_timer is not None:
        replays, not_captured = graphs(usable)
        refused |= not_captured
        captures = interleaved(replays, graph_timer, rounds, seconds / 2)
    whole = {name: t for name, t in times.items() if name != KERNEL}
    exact = {name: median(t) for name, t in whole.items() if name.startswith(EXACT)}
    best = min(exact, key=exact.__getitem__)
    result = {
        "shape": asdict(shape),
        "data": data,
        "layout": layout,
        "best_exact": best,
        "milliseconds": {n: median(t) * 1e3 for n, t in whole.items()},
        "spread": {n: round(spread(t), 4) for n, t in whole.items()},
        "speedup": {n: ratio(whole[best], t) for n, t in whole.items() if n not in exact},
        "teraflops": {n: shape.flop / median(t) / 1e12 for n, t in whole.items()},
        "sqnr_db": {n: round(s, 2) for n, s in quality.items() if n != KERNEL},
        "refused": refused,
        "rounds": min(map(len, times.values())),
        "gpu": gpu_state(),
    }
    if captures:
        result["graph_milliseconds"] = {n: median(t) * 1e3 for n, t in captures.items() if n != KERNEL}
        exact = {n: median(t) for n, t in captures.items() if n.startswith(EXACT)}
        if exact:
            best = min(exact, key=exact.__getitem__)
            found = {n: ratio(captures[best], t) for n, t in captures.items() if n not in exact and n != KERNEL}
            result["graph_speedup"] = found
    if AUTO in times:
        result["automatic"] = automatic(qkv, shape, device, times, captures)
    if KERNEL in times:
        result["kernel_alone"] = kernel_alone(shape, times, captures)
    return result


def automatic(
    qkv: Tensors, shape: Shape, device: str, times: Mapping[str, list[float]], captures: Mapping[str, list[float]]
) -> dict[str, Any]:
    """The automatic choice beside what it replaces: speed relative to PyTorch's own SDPA."""
    choice = lpattn.explain(*qkv, **options(shape, device)).choice
    found: dict[str, Any] = {"ran_on": None if choice is None else choice.backend}
    for key, measured in (("over_sdpa", times), ("graph_over_sdpa", captures)):
        if {AUTO, f"{EXACT}sdpa"} <= measured.keys():
            found[key] = ratio(measured[f"{EXACT}sdpa"], measured[AUTO])
    return found


def kernel_alone(
    shape: Shape, times: Mapping[str, list[float]], captures: Mapping[str, list[float]]
) -> dict[str, float | str]:
    """FlashAttention-3's kernel without quantization: no attention call, and kept apart from those."""
    found: dict[str, float | str] = {"backend": "fp8_fa3", "milliseconds": median(times[KERNEL]) * 1e3}
    if KERNEL in captures:
        found["graph_milliseconds"] = median(captures[KERNEL]) * 1e3
    return found | {"teraflops": shape.flop / median(times[KERNEL]) / 1e12}


class Bench:
    """Measures lists of shapes within one budget, and remembers what was left out."""

    def __init__(self, budget: Budget, rounds: int) -> None:
        self.left_out: list[str] = []
        self._budget = budget
        self._rounds = rounds
        # Several calls in a row, as in a model: the launches of one hide behind the work of the other.
        self._several, self._one = DeviceTimer(5), DeviceTimer()
        self._graph = DeviceTimer(each=GRAPH_CALLS)

    def __call__(self, shapes: Sequence[Shape], **changes: Any) -> list[dict[str, Any]]:
        """The results, printed as they come; ``changes`` are keywords of :func:`measure`."""
        results = []
        for shape in shapes:
            seconds = self._budget.item()
            if not seconds:
                self.left_out.append(str(shape))
                continue
            timer = self._several if shape.length <= 16384 else self._one
            graph_timer = self._graph if changes.get("extras") and shape.length <= GRAPHS_UP_TO else None
            try:
                result = measure(shape, timer, self._rounds, seconds, graph_timer=graph_timer, **changes)
            except RuntimeError as error:  # such as too little memory for the inputs
                self.left_out.append(f"{shape} ({type(error).__name__}: {error})")
                continue
            results.append(result)
            print(line(result), flush=True)
            torch.cuda.empty_cache()
        return results


def line(result: Mapping[str, Any]) -> str:
    times = ", ".join(f"{n} {t:.3f}" for n, t in result["milliseconds"].items())
    ratios = ", ".join(f"{n} x{r:.2f}" for n, r in result["speedup"].items())
    return f"{Shape(**result['shape'])}: {times} ms; {ratios or 'no low-precision variant'}"


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """Whole calls as a table, and below it what is no comparison with the best exact kernel."""
    rows = [["B,H/Hkv,S,D", "best exact", "ms", "against it", "ms", "speed", "dB"]]
    lines = []
    for r in results:
        shape, best, times = str(Shape(**r["shape"])), r["best_exact"], r["milliseconds"]
        for name, speed in r["speedup"].items():
            exact = [best.removeprefix(EXACT), f"{times[best]:.3f}"]
            rows.append([shape, *exact, name, f"{times[name]:.3f}", f"x{speed:.3f}", f"{r['sqnr_db'][name]:.1f}"])
        if alone := r.get("kernel_alone"):
            lines.append(
                f"{shape}: {alone['backend']}'s kernel alone, without quantization: {alone['milliseconds']:.3f} ms"
                f" ({alone['teraflops']:.0f} TFLOP/s)"
            )
        if choice := r.get("automatic"):
            ratios = [f"x{choice[key]:.3f}{how}" for key, how in OVER_SDPA.items() if key in choice]
            lines.append(f"{shape}: automatic runs {choice['ran_on']}, against plain SDPA {', '.join(ratios)}")
        if captures := r.get("graph_milliseconds"):
            lines.append(f"{shape} as a graph: {', '.join(f'{n} {t:.4f}' for n, t in captures.items())} ms")
        lines += [f"{shape}: {name}: {why}" for name, why in r["refused"].items()]
    return "\n".join([table(rows), *lines])


OVER_SDPA = {"over_sdpa": "", "graph_over_sdpa": " as a graph"}


def main() -> int:
    arguments = parser(__doc__ or "", budget=240.0)
    arguments.add_argument("--sweep", action="store_true", help="also lengths 512 to 131072 at head_dim 64, 128, 256")
    arguments.add_argument("--sweep-out", type=Path, metavar="FILE", help="write the sweep as JSON to this file")
    add_hadamard(arguments)
    arguments.add_argument("--per-item", type=float, default=1.5, help="seconds of timing per shape (default 1.5)")
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        print(f"attention.py needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    budget, rounds = Budget(given.budget, given.per_item), 5 if given.quick else 60
    bench = Bench(budget, rounds)
    results = bench([*NAMED[:1], *NAMED[-2:]] if given.quick else NAMED, modes=MODES, extras=True)
    biased = bench([FLUX] if given.quick else [FLUX, LONG], data="bias", modes=MODES)
    padding = bench([PADDED])
    windows = bench(WINDOWED[:1] if given.quick else WINDOWED)
    quality, unknown = accuracy.measure(budget, accuracy.LENGTHS[:2] if given.quick else accuracy.LENGTHS)
    titles = ("normal data", "biased data", "key padding", "windows")
    for title, part in zip(titles, (results, biased, padding, windows), strict=True):
        print(f"\n{title}\n{report(part)}")
    print(f"\nSQNR in dB against float64\n{accuracy.report(quality)}")
    parts = {"results": results, "biased": biased, "padding": padding, "windows": windows, "accuracy": quality}
    write(given.out, {**parts, "left_out": print_left_out(bench.left_out + unknown)})
    if given.sweep:
        run_sweep(Bench(budget, rounds), sweep(LENGTHS, DIMS), sweep_modes(given.hadamard), given.sweep_out)
    return 0


def add_hadamard(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument(
        "--hadamard",
        nargs="*",
        choices=MODES[1:],
        metavar="MODE",
        help="Hadamard modes in the sweep besides none: qkv (the one without MODE), v_only",
    )


def sweep_modes(given: list[str] | None) -> tuple[str, ...]:
    """Hadamard modes of a sweep, from the values of --hadamard: None where it is not there."""
    return ("none",) if given is None else ("none", *(given or ["qkv"]))


def run_sweep(bench: Bench, shapes: Sequence[Shape], modes: Sequence[str], out: Path | None) -> list[dict[str, Any]]:
    """Measure many shapes for the table of speeds; without extras, which are no backends."""
    results = bench(shapes, modes=modes)
    write(out, {"results": results, "left_out": print_left_out(bench.left_out)})
    return results


def print_left_out(names: list[str]) -> list[str]:
    if names:
        print(f"\nleft out, for want of time where no reason is given: {'; '.join(names)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
