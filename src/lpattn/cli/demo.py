"""``lpattn demo``: applies lpattn to a small model and shows what ran, how exact it is, and how long it takes."""

from __future__ import annotations

import copy
import math
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lpattn.calls import build_call
from lpattn.cli.demo_model import MyModel, exact_output, interleaved_medians, sqnr
from lpattn.cli.text import (
    EMULATION,
    INSTALL_EMULATION,
    dtype_name,
    explanation_data,
    make_console,
    print_json,
)
from lpattn.dispatch import Explanation, explain_call
from lpattn.eager.apply import apply_low_precision_attention
from lpattn.eager.report import AttentionReport, attention_report
from lpattn.errors import LpattnError, LpattnWarning
from lpattn.registry import local_devices, registry
from lpattn.settings import make_settings
from lpattn.types import HadamardMode, Provenance


@dataclass(frozen=True)
class Setup:
    """What the demo runs on.

    Attributes:
        seq_len, embed_dim, num_heads: sizes; the batch is 1.
        repeats: measured forwards per model.
    """

    device: torch.device
    dtype: torch.dtype
    seq_len: int
    embed_dim: int
    num_heads: int
    repeats: int

    def describe(self) -> str:
        """One line for people."""
        where = f"{self.device} ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else "cpu"
        return (
            f"MyModel: causal self-attention, embed_dim {self.embed_dim}, {self.num_heads} heads of "
            f"{self.embed_dim // self.num_heads}, {self.seq_len} tokens, {dtype_name(self.dtype)} on {where}"
        )


@dataclass(frozen=True)
class Timing:
    """Median seconds per forward, of the model that lpattn was applied to and of the untouched one."""

    seconds: float
    untouched_seconds: float

    @property
    def ratio(self) -> float:
        """How many times as long as the untouched model it takes."""
        return self.seconds / self.untouched_seconds


@dataclass(frozen=True)
class Run:
    """One setting of ``backend=``, applied and measured."""

    requested: str | None
    explanation: Explanation
    report: AttentionReport
    sqnr_db: float
    eager: Timing
    compiled: Timing | None

    @property
    def backend(self) -> str:
        """The backend that ran."""
        assert self.explanation.choice is not None
        return self.explanation.choice.backend

    @property
    def hadamard_dropped(self) -> bool:
        """Whether a rotation was asked for, and the call ran exactly without it."""
        choice, hadamard = self.explanation.choice, self.explanation.call.hadamard
        return choice is not None and choice.exact_reason is not None and hadamard is not HadamardMode.NONE


def run(arguments: Namespace) -> int:
    """Run the demo. Returns 0, or raises an LpattnError where a setting that the user named cannot run."""
    setup = _setup(arguments.seq_len)
    hadamard = arguments.hadamard or "none"
    if arguments.backend is not None:
        requested: list[str | None] = [registry.resolve(arguments.backend)]
    else:
        make_settings(None, hadamard, None, Provenance.MODEL)
        requested = [None, *_low_precision_backends(setup.device)]
    runs: list[Run] = []
    failed: dict[str, str] = {}
    with warnings.catch_warnings():
        # The output says all that these would say.
        warnings.simplefilter("ignore", LpattnWarning)
        with _Progress(steps=1 + len(requested) * (3 if setup.device.type == "cuda" else 2)) as step:
            step("exact attention in float64")
            bench = Bench(setup)
            for backend in requested:
                try:
                    runs.append(bench.measure(backend, hadamard, step))
                except LpattnError as error:
                    if backend is None or arguments.backend is not None:
                        raise
                    failed[backend] = str(error)
    emulation_missing = arguments.backend is None and registry.get(EMULATION) is None
    if arguments.json:
        print_json(_document(setup, bench, runs, failed, emulation_missing))
    else:
        _show(setup, bench, runs, failed, emulation_missing)
    return 0


def _setup(seq_len: int | None) -> Setup:
    device = local_devices()[0]
    if device.type == "cuda":
        return Setup(device, torch.bfloat16, seq_len or 8192, embed_dim=2048, num_heads=16, repeats=30)
    return Setup(device, torch.float32, seq_len or 1024, embed_dim=512, num_heads=4, repeats=9)


def _low_precision_backends(device: torch.device) -> list[str]:
    return [n for n, backend in registry.backends().items() if not backend.exact and not registry.probe(n, device)]


class Bench:
    """The untouched model, its input and its float64 output, with which every run is compared."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.model = MyModel(setup.embed_dim, setup.num_heads).to(setup.device, setup.dtype).eval()
            self.x = torch.randn(1, setup.seq_len, setup.embed_dim).to(setup.device, setup.dtype)
        with torch.no_grad():
            self.reference = exact_output(copy.deepcopy(self.model).double(), self.x.double())
            self.untouched_sqnr_db = sqnr(self.reference, self.model(self.x))

    @torch.no_grad()
    def measure(self, backend: str | None, hadamard: str, step: Callable[[str], None]) -> Run:
        """Apply, run once, compare, then measure."""
        name = backend or "backend=None"
        step(f"{name}: one forward")
        model = copy.deepcopy(self.model)
        apply_low_precision_attention(model, backend, hadamard)
        out = model(self.x)
        report = attention_report(model)
        settings = make_settings(backend, hadamard, None, Provenance.MODEL)
        call = build_call(*model.heads(self.x), None, 0.0, True, None, settings.hadamard, return_lse=False)
        step(f"{name}: time")
        eager = self._time(self.model, model)
        compiled = None
        if self.setup.device.type == "cuda":
            step(f"{name}: torch.compile")
            compiled = self._time(torch.compile(self.model), torch.compile(model))
        return Run(backend, explain_call(call, settings), report, sqnr(self.reference, out), eager, compiled)

    def _time(self, untouched: Callable[..., object], applied: Callable[..., object]) -> Timing:
        forwards = [lambda: untouched(self.x), lambda: applied(self.x)]
        before, after = interleaved_medians(forwards, self.setup.repeats, self.setup.device)
        return Timing(after, before)


class _Progress:
    """A progress bar on stderr, which is gone when the work is done."""

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        console = make_console(stderr=True)
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=steps)
        self._started = 0

    def __enter__(self) -> Callable[[str], None]:
        self._bar.start()
        return self._step

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def _step(self, description: str) -> None:
        self._bar.update(self._task, completed=self._started, description=description)
        self._started += 1


def _document(
    setup: Setup, bench: Bench, runs: list[Run], failed: dict[str, str], emulation_missing: bool
) -> dict[str, Any]:
    sizes = {"seq_len": setup.seq_len, "embed_dim": setup.embed_dim, "num_heads": setup.num_heads}
    return {
        "device": str(setup.device),
        "dtype": dtype_name(setup.dtype),
        "model": sizes,
        "repeats": setup.repeats,
        "untouched_sqnr_db": _finite(bench.untouched_sqnr_db),
        "runs": [
            {
                "requested": r.requested,
                "backend": r.backend,
                "explanation": explanation_data(r.explanation),
                "report": {name: asdict(layer) for name, layer in r.report.items()},
                "sqnr_db": _finite(r.sqnr_db),
                "eager": _timing_data(r.eager),
                "compiled": None if r.compiled is None else _timing_data(r.compiled),
            }
            for r in runs
        ],
        "failed": failed,
        "install": {EMULATION: INSTALL_EMULATION} if emulation_missing else {},
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _timing_data(timing: Timing) -> dict[str, float]:
    return {**asdict(timing), "ratio": timing.ratio}


def _show(setup: Setup, bench: Bench, runs: list[Run], failed: dict[str, str], emulation_missing: bool) -> None:
    console = make_console()
    console.print(setup.describe())
    for r in runs:
        wanted = "None" if r.requested is None else f'"{r.requested}"'
        console.print(f"\napply_low_precision_attention(model, backend={wanted})", style="bold")
        console.print("The model's attention call:")
        console.print(_indented(str(r.explanation)))
        console.print("attention_report(model) after one forward:")
        console.print(_indented(str(r.report)))
        console.print(
            f"SQNR of the model's output against float64: {r.sqnr_db:.1f} dB "
            f"(the untouched model: {bench.untouched_sqnr_db:.1f} dB)"
        )
        console.print(f"Time of one forward: {_timing_text(r.eager)}")
        if r.compiled is not None:
            console.print(f"The same with torch.compile, both models: {_timing_text(r.compiled)}")
        if r.hadamard_dropped:
            console.print(f"hadamard={r.explanation.call.hadamard.value!r} is not applied to exact attention.")
        if r.backend == EMULATION and r.eager.ratio > 1.0:
            where = "a CPU" if setup.device.type == "cpu" else "a GPU"
            console.print(f"Slower on {where}: the emulation computes FP8 rounding in software.")
    for name, message in failed.items():
        console.print(f'\nbackend="{name}" could not run:', style="bold")
        console.print(_indented(message))
    console.print(
        f"\nTimes are medians of {setup.repeats} forwards in which the two models took turns, after two that were "
        "not measured."
    )
    if emulation_missing:
        console.print(f"{EMULATION} shows on any device what FP8 does to a model's output: {INSTALL_EMULATION}")


def _timing_text(timing: Timing) -> str:
    return (
        f"{_milliseconds(timing.seconds)}, {timing.ratio:.2f} times the untouched model's "
        f"{_milliseconds(timing.untouched_seconds)}"
    )


def _milliseconds(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.2f} ms" if milliseconds < 10.0 else f"{milliseconds:.1f} ms"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
