"""Compiled blocks: the best exact kernel, FP8 behind an opaque operator, FP8 with RoPE fused into its quantization.

A Llama-3-8B-shaped block (causal, grouped heads, half-split RoPE in bfloat16), a FLUX-shaped one (each head of q and k
normalized, interleaved RoPE in float32) and one shaped as Wan's 14B (the same, all heads normalized at a time), with
random weights, under torch.compile. Measured are the whole block, and what lies between its projections. Every variant
is compared with the untouched module before it is timed, and the report must say that RoPE, and the norm, were fused
where that is what is measured; the variants of one item are timed in turn. Every item has a process of its own; these
compile side by side, and are timed one after another. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blocks import BETWEEN, SHAPES, Between, Block, Sizes, tables
from cases import decibels
from common import DeviceTimer, captured, interleaved, median, parser, ratio, spread, table, write
from labels import EXACT
from torch import nn
from torch.nn.attention import sdpa_kernel
from turns import Turns
from variants import KERNELS, fa3_function

import lpattn
from lpattn.compile import install
from lpattn.registry import registry

LENGTHS = (1024, 4608, 8192, 16384)
PARTS = ("between", "block")
OPAQUE, ROPE_ONLY, FUSED = "opaque", "rope only", "fused"
RATIOS = ("fused_over_opaque", "opaque_over_exact", "fused_over_exact")
EXACT_FLOOR, LOW_FLOOR = 35.0, 12.0
"""dB below which a variant is wrong, not only imprecise."""

Run = Callable[[], torch.Tensor]
Timer = Callable[[Callable[[], object]], float]
Turn = contextlib.AbstractContextManager[None]


class FA3Exact(lpattn.Backend):
    """FlashAttention-3 in the inputs' own dtype, for comparison."""

    name = "benchmark_fa3_exact"
    automatic = False
    capabilities = lpattn.Capabilities(
        dtypes=frozenset({torch.bfloat16}), device_types=frozenset({"cuda"}), architectures=((9, 0), (9, 0))
    )

    def probe(self, device: torch.device) -> list[lpattn.Reason]:
        return [] if fa3_function() else [lpattn.Reason("not_installed", "FlashAttention-3 is not installed")]

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):  # type: ignore[no-untyped-def]
        function = fa3_function()
        assert function is not None
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        causal = call.causal is lpattn.CausalKind.TOP_LEFT
        return function(q, k, v, softmax_scale=call.softmax_scale, causal=causal).transpose(1, 2)


@contextlib.contextmanager
def without_fusion() -> Iterator[None]:
    """Graphs that are compiled inside keep their rotations."""
    kept = install.install
    install.install = lambda: None
    try:
        yield
    finally:
        install.install = kept


@contextlib.contextmanager
def declaring(name: str, **capabilities: Any) -> Iterator[None]:
    """In graphs that are compiled inside, a backend has other capabilities.

    Inductor's caches tell such graphs from others: what a backend can do is part of their key.
    """
    backend = registry.get(name)
    assert backend is not None
    kept = backend.capabilities
    backend.capabilities = dataclasses.replace(kept, **capabilities)
    try:
        yield
    finally:
        backend.capabilities = kept


def compiled(module: nn.Module, inputs: tuple[torch.Tensor, ...], how: str | None) -> Run:
    """The module as a function, compiled for these inputs now, and apart from all that was compiled before.

    Dynamo keeps what it compiles by code object, and would take a variant's code for another's.
    """

    def call() -> torch.Tensor:
        return module(*inputs)

    own = types.FunctionType(
        call.__code__.replace(co_name=f"call_{id(call)}"), globals(), "call", None, call.__closure__
    )
    options = {} if how is None else {"backend": how}
    under = torch.compile(own, fullgraph=True, dynamic=False, **options)
    under()
    return under


def as_graphs(runs: Mapping[str, Run], device: str) -> dict[str, Callable[[], object]]:
    """The runs as replays of CUDA graphs: what is fused saves work of the GPU, which the host's launches would hide.

    They share their memory: how fast a product of matrices is depends on where these lie.
    """
    if device != "cuda":
        return dict(runs)
    pool = torch.cuda.graph_pool_handle()
    return {name: captured([run], pool) for name, run in runs.items()}


def exact(module: nn.Module, inputs: tuple[torch.Tensor, ...], how: str | None, device: str) -> dict[str, Run]:
    """The untouched module on PyTorch's kernels, and on FlashAttention-3 where that is installed."""
    found: dict[str, Run] = {f"{EXACT}sdpa": compiled(module, inputs, how)}
    for name in ("cudnn", "flash") if device == "cuda" else ():
        with contextlib.suppress(RuntimeError), sdpa_kernel(KERNELS[name]):
            run = compiled(module, inputs, how)

            def inside(run: Run = run, name: str = name) -> torch.Tensor:
                with sdpa_kernel(KERNELS[name]):
                    return run()

            found[f"{EXACT}{name}"] = inside
    return found


def low(
    build: Callable[[], nn.Module], inputs: tuple[torch.Tensor, ...], backend: str, how: str | None
) -> dict[str, Run]:
    """A backend with and without fusion, each on a module of its own, whose report says which it was."""
    found = {}
    (norm,) = {part.norm for part in build().modules() if isinstance(part, Between)}
    # Also at lengths at which the backend leaves a rotation to the compiler: whether it should is what is measured.
    contexts: dict[str, contextlib.AbstractContextManager[None]] = {
        OPAQUE: without_fusion(),
        FUSED: declaring(backend, rope_from=0),
    }
    # Where the compiler normalizes all heads of a token, it keeps the rotation.
    if norm == "head":
        contexts[ROPE_ONLY] = declaring(backend, rope_from=0, norm=False)
    for kind, context in contexts.items():
        module = lpattn.apply_low_precision_attention(build(), backend, on_unsupported="raise")
        with context:
            found[f"{backend} {kind}"] = compiled(module, inputs, how)
        (layer,) = lpattn.attention_report(module).values()
        if (layer.rope == FUSED) is not (kind != OPAQUE):
            raise RuntimeError(f"{backend} {kind}: the report says of RoPE: {layer.rope}")
        if (layer.norm == FUSED) is not (norm is not None and kind == FUSED):
            raise RuntimeError(f"{backend} {kind}: the report says of the norm: {layer.norm}")
    return found


@torch.no_grad()
def measure(
    name: str,
    part: str,
    length: int,
    timer: Timer,
    rounds: int,
    seconds: float,
    *,
    backend: str = "fp8_triton",
    sizes: Sizes | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    how: str | None = None,
    turn: Callable[[], Turn] = contextlib.nullcontext,
) -> dict[str, Any]:
    """Times and quality of one block, or of what lies between its projections.

    Args:
        name: ``"llama"``, ``"flux"`` or ``"wan"``.
        part: ``"block"`` or ``"between"``.
        length: tokens.
        timer: seconds per call.
        rounds, seconds: as :func:`common.interleaved` takes them.
        backend: low-precision backend.
        sizes: of the block; None is the model's.
        device, dtype: of weights and inputs.
        how: backend of torch.compile; None is inductor.
        turn: makes a context in which this process may measure.
    """
    sizes = sizes or SHAPES[name]

    def build() -> nn.Module:
        torch.manual_seed(0)
        between: Between = BETWEEN[name](sizes)
        module: nn.Module = between if part == "between" else Block(sizes, between)
        return module.to(device, dtype).eval()

    untouched = build()

    def again() -> nn.Module:
        """One more, with the same memory for its weights."""
        module = build()
        for own, shared in zip(module.parameters(), untouched.parameters(), strict=True):
            own.data = shared.data
        return module

    torch.manual_seed(1)
    widths = (sizes.heads, sizes.kv_heads, sizes.kv_heads) if part == "between" else (sizes.heads,)
    xs = [torch.randn(1, length, heads * sizes.head_dim, device=device, dtype=dtype) for heads in widths]
    inputs = (*xs, *tables(length, sizes.head_dim, BETWEEN[name](sizes).interleaved, device))
    want = untouched(*inputs).double()
    runs = {**exact(untouched, inputs, how, device), **low(again, inputs, backend, how)}
    if fa3_function() is not None and device == "cuda":
        module = lpattn.apply_low_precision_attention(again(), FA3Exact.name)
        runs[f"{EXACT}fa3_bf16"] = compiled(module, inputs, how)
    quality = {
        n: decibels(float(want.square().sum()), float((want - run().double()).square().sum()))
        for n, run in runs.items()
    }
    for label, found in quality.items():
        if found < (EXACT_FLOOR if label.startswith(EXACT) else LOW_FLOOR):
            raise RuntimeError(f"{label} is wrong: {found:.1f} dB")
    with turn():
        raw = interleaved(as_graphs(runs, device), timer, rounds, seconds)
    times = {n: median(t) for n, t in raw.items()}
    best = min((n for n in times if n.startswith(EXACT)), key=times.__getitem__)
    opaque, fused = f"{backend} {OPAQUE}", f"{backend} {FUSED}"
    return {
        "model": name,
        "part": part,
        "length": length,
        "backend": backend,
        "best_exact": best,
        "milliseconds": {n: t * 1e3 for n, t in times.items()},
        "spread": {n: round(spread(t), 4) for n, t in raw.items()},
        "sqnr_db": {n: round(q, 2) for n, q in quality.items()},
        "fused_over_opaque": ratio(raw[opaque], raw[fused]),
        "opaque_over_exact": ratio(raw[best], raw[opaque]),
        "fused_over_exact": ratio(raw[best], raw[fused]),
        "rounds": min(map(len, raw.values())),
    }


def merged(results: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of one item from several processes: medians over them, and the ratios of each.

    How fast products of matrices are depends on where a process has its memory, by more than what fusion saves of them.
    """
    names = results[0]["milliseconds"]
    times = {name: median([r["milliseconds"][name] for r in results]) for name in names}
    return {
        **results[0],
        "best_exact": min((n for n in times if n.startswith(EXACT)), key=times.__getitem__),
        "milliseconds": times,
        "spread": {name: max(r["spread"][name] for r in results) for name in names},
        "sqnr_db": {name: min(r["sqnr_db"][name] for r in results) for name in names},
        **{name: median([r[name] for r in results]) for name in RATIOS},
        "rounds": min(r["rounds"] for r in results),
        "processes": [{name: r[name] for name in RATIOS} for r in results],
    }


def report(results: list[Mapping[str, Any]]) -> str:
    """Ratios as a table."""
    named = [f"{kind} ms" for kind in (OPAQUE, ROPE_ONLY, FUSED)]
    rows = [["part", "tokens", "backend", "best exact", "ms", *named, "fused/opaque", "opaque/exact", "fused/exact"]]
    for r in results:
        times = r["milliseconds"]
        kinds = [
            next((f"{t:.3f}" for n, t in times.items() if n.endswith(kind)), "-") for kind in (OPAQUE, ROPE_ONLY, FUSED)
        ]
        ratios = [f"x{r[key]:.3f}" for key in RATIOS]
        exact_ms = [r["best_exact"].removeprefix(EXACT), f"{times[r['best_exact']]:.3f}"]
        rows.append([f"{r['model']} {r['part']}", str(r["length"]), r["backend"], *exact_ms, *kinds, *ratios])
    return table(rows)


class Item(NamedTuple):
    """What one process measures."""

    model: str
    part: str
    length: int
    backend: str

    def __str__(self) -> str:
        return f"{self.model} {self.part} {self.length} {self.backend}"


def items(models: list[str], parts: list[str], lengths: list[int], backends: list[str]) -> list[Item]:
    """All of them."""
    return [
        Item(model, part, length, backend)
        for length, part, model, backend in itertools.product(lengths, parts, models, backends)
    ]


def measure_here(item: Item, seconds: float, rounds: int, turns: Turns) -> dict[str, Any]:
    """Measure an item in this process, when it is its turn."""
    lpattn.register_backend(FA3Exact())
    warnings.simplefilter("ignore")
    timer = DeviceTimer(calls=5)
    return measure(item.model, item.part, item.length, timer, rounds, seconds, backend=item.backend, turn=turns.mine)


def files_of(folder: str, index: int) -> tuple[Path, Path]:
    """Where a process writes what it says, and its errors. A pipe that nobody reads yet would stop it."""
    return Path(folder) / f"said-{index}", Path(folder) / f"errors-{index}"


def measure_all(
    waiting: list[Item], seconds: float, rounds: int, budget: float, jobs: int
) -> Iterator[tuple[Item, dict[str, Any] | str]]:
    """Each item with its result, or with why there is none; ``jobs`` at a time."""
    end = time.monotonic() + budget
    for start in range(0, len(waiting), jobs):
        some = waiting[start : start + jobs]
        with tempfile.TemporaryDirectory() as folder:
            told = json.dumps([folder, len(some), budget, seconds, rounds])
            # Inductor's own workers would be one for every core, in each process.
            environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
            processes = []
            for index, item in enumerate(some):
                command = [sys.executable, __file__, "--item", json.dumps([*item, told])]
                with files_of(folder, index)[0].open("w") as said, files_of(folder, index)[1].open("w") as errors:
                    processes.append(subprocess.Popen(command, stdout=said, stderr=errors, env=environment))
            for index, (item, process) in enumerate(zip(some, processes, strict=True)):
                try:
                    status = process.wait(max(end - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    yield item, "no time left"
                    continue
                told_by, failed_by = (file.read_text().strip().splitlines() for file in files_of(folder, index))
                if status:
                    yield item, (failed_by or [f"exit status {status}"])[-1]
                else:
                    yield item, json.loads(told_by[-1])


def main() -> int:
    arguments = parser(__doc__ or "", budget=420.0)
    arguments.add_argument("--backends", default="fp8_triton", help="separated by commas (default fp8_triton)")
    arguments.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (default all)")
    arguments.add_argument("--models", default=",".join(SHAPES), help=f"some of {', '.join(SHAPES)} (default all)")
    arguments.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="numbers of tokens")
    arguments.add_argument("--per-item", type=float, default=4.0, help="seconds in which one is timed (default 4)")
    arguments.add_argument("--processes", type=int, default=1, help="that measure each of them (default 1)")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    arguments.add_argument("--item", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    parts, models = given.parts.split(","), given.models.split(",")
    for option, asked, known in (("--parts", parts, PARTS), ("--models", models, SHAPES)):
        if unknown := [name for name in asked if name not in known]:
            arguments.error(f"argument {option}: no {', '.join(unknown)}; there are {', '.join(known)}")
    if not torch.cuda.is_available():
        print(f"compiled.py needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    if given.item:
        *what, told = json.loads(given.item)
        folder, count, patience, seconds, rounds = json.loads(told)
        turns = Turns(Path(folder), count, patience)
        try:
            print(json.dumps(measure_here(Item(*what), seconds, rounds, turns)))
        finally:
            turns.ready()
        return 0
    lengths = [4608] if given.quick else [int(length) for length in given.lengths.split(",")]
    waiting = items(models, parts, lengths, given.backends.split(",")) * given.processes
    of_items: dict[Item, list[Mapping[str, Any]]] = {}
    left_out: list[str] = []
    for item, found in measure_all(waiting, given.per_item, 10 if given.quick else 200, given.budget, given.jobs):
        if isinstance(found, str):
            left_out.append(f"{item} ({found})")
            print(left_out[-1], flush=True)
        else:
            of_items.setdefault(item, []).append(found)
            print(report([found]), flush=True)
    results: list[Mapping[str, Any]] = [merged(found) for found in of_items.values()]
    print(f"\n{report(results)}")
    if left_out:
        print(f"\nleft out: {'; '.join(left_out)}")
    write(given.out, {"results": results, "left_out": left_out})
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
