"""What the benchmarks share: interleaved timing, a time budget, where a result comes from, and the command line."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
try:
    import lpattn
except ImportError:
    # From a checkout, without an installation.
    sys.path.insert(0, str(REPOSITORY / "src"))
    import lpattn


def parser(description: str, budget: float) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--out", type=Path, help="write the results as JSON to this file")
    arguments.add_argument("--quick", action="store_true", help="few shapes and repetitions: does it run at all?")
    arguments.add_argument("--budget", type=float, default=budget, help=f"seconds in all (default {budget:g})")
    return arguments


class Budget:
    """Time that a benchmark may take; items that would begin after its end are left out, and reported as such."""

    def __init__(self, seconds: float, per_item: float) -> None:
        self._end = time.monotonic() + seconds
        self.per_item = per_item

    def left(self) -> float:
        return self._end - time.monotonic()

    def item(self) -> float:
        """Seconds for the next item; 0 when nothing is left."""
        return max(0.0, min(self.per_item, self.left()))


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    measure: Callable[[Callable[[], object]], float],
    rounds: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Measure the variants in turn, in balanced orders, so that a change of the clock meets all of them alike.

    Args:
        variants: functions by name.
        measure: seconds of one measurement.
        rounds: how many measurements of each at most.
        seconds: no round begins after that time; the first three always run.

    Returns:
        Measurements in seconds by name, one of each round.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    end = time.monotonic() + seconds
    orders = balanced_orders(list(variants)) or [[]]
    for index in range(rounds):
        if index >= 3 and time.monotonic() > end:
            break
        for name in orders[index % len(orders)]:
            found[name].append(measure(variants[name]))
    return found


def balanced_orders(names: Sequence[str]) -> list[list[str]]:
    """Orders of the names in which each follows each other one equally often (Williams 1949).

    A chip at its power limit runs slower after a variant that took much power: so all have the same ones before them.
    There are as many orders as names, or twice as many where that number is odd; they are shuffled, always alike.
    """
    n = len(names)
    zigzag = [(i // 2 + 1 if i % 2 else n - i // 2) % n for i in range(n)]
    orders = [[names[(place + shift) % n] for place in zigzag] for shift in range(n)]
    if n % 2:
        orders += [order[::-1] for order in orders]
    random.Random(0).shuffle(orders)
    return orders


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """How many times one variant's measurements are another's: the median over the rounds.

    Within a round, the clock is more alike than over all of them.
    """
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def host_timer(calls: int) -> Callable[[Callable[[], object]], float]:
    """Seconds per call on the host, over a number of calls; the device is idle before and after."""

    def measure(run: Callable[[], object]) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        elapsed = time.perf_counter() - start
        wait()
        return elapsed / calls

    return measure


class DeviceTimer:
    """Seconds per call on the GPU, by events. The L2 cache is overwritten before each measurement.

    Args:
        calls: calls per measurement; the launches of the later ones hide behind the earlier ones.
        each: what one call counts for, such as the number of calls in a captured graph.
    """

    def __init__(self, calls: int = 1, each: int = 1) -> None:
        self.calls = calls
        self.each = each
        self._flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        self._flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.calls):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / self.calls / self.each


def captured(runs: Sequence[Callable[[], object]], pool: Any = None) -> Callable[[], None]:
    """The calls, one after another, as one CUDA graph: a replay takes the GPU's time, and next to none of the host's.

    Every call must have run before, and what it reads must stay alive. Graphs that are given one ``pool``, of
    ``torch.cuda.graph_pool_handle()``, write to the same memory.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for run in runs:
            run()
    return graph.replay


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


median = statistics.median


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    if len(values) < 4:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / median(values)


def provenance() -> dict[str, Any]:
    """Where a result comes from: device, versions, commit, date and command."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["capability"] = [properties.major, properties.minor]
        found["multiprocessors"] = properties.multi_processor_count
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        found["gpu"] = gpu_state()
    return found


PACKAGES = ("torch", "triton", "lpattn", "fa3-fwd", "flash-attn-3", "transformers", "diffusers")


def _version(name: str) -> str:
    if name == "lpattn":
        return lpattn.__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that runs: what LPATTN_COMMIT says, for a copy whose git does not know it, else what git says."""
    if given := os.environ.get("LPATTN_COMMIT"):
        return given
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=REPOSITORY, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def gpu_state() -> dict[str, str]:
    """Clocks, power and driver as nvidia-smi has them; empty where it cannot be asked."""
    fields = (
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.draw",
        "power.limit",
        "temperature.gpu",
    )
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [v.strip() for v in done.stdout.split("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else {}


def table(rows: list[list[str]]) -> str:
    """Rows as a table, the first one its head; all columns but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write results with their provenance as JSON."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"provenance": provenance(), **results}, indent=1) + "\n")
        print(f"\nwritten to {path}")
