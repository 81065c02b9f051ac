"""NVIDIA's compute-sanitizer over the kernels, on short inputs of every kind: what each of its tools finds.

The outputs are held to exact attention too. PyTorch's memory cache is off, so that memcheck knows where every tensor
ends. Needs a CUDA device and compute-sanitizer.

    python benchmarks/sanitize.py --out benchmarks/results/h100-sanitizer.json
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from cases import Shape, inputs, sqnr
from common import parser, table, write
from variants import options

import lpattn

TOOLS = ("memcheck", "racecheck", "synccheck")
CALLS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "hopper": ("attention", "fp8_triton", {}, {}),
    "hopper causal": ("attention", "fp8_triton", {"causal": True}, {}),
    "hopper lse": ("attention", "fp8_triton", {}, {"return_lse": True}),
    "hopper masked, Hadamard": ("attention", "fp8_triton", {"holes": True}, {"hadamard": "qkv"}),
    "a mask's tiles": ("look_at_tiles", "fp8_triton", {"holes": True}, {}),
    "lists of tiles": ("list_tiles", "fp8_triton", {"window": 100}, {}),
    "portable e4m3, masked": ("attend_tiles", "fp8_triton", {"holes": True, "head_dim": 60}, {}),
    "portable int8, causal": ("attend_tiles", "int8_triton", {"causal": True}, {"return_lse": True}),
    "quantization per block": ("_blocks", "fp8_triton", {}, {"hadamard": "qkv", "return_lse": True}),
    "quantization per head": ("_heads", "fp8_fa3", {}, {"hadamard": "qkv"}),
}
"""By name: part of the names of the device's kernels, a backend that launches them, what shapes have, and options."""

SHAPES = [Shape(1, 2, 1, length, dim, False) for length, dim in ((1, 64), (130, 64), (700, 128), (300, 256))]
FLOOR = 18.0


def run_calls(name: str) -> None:
    """The calls, in this process."""
    import triton

    launched: set[str] = set()
    kernel, backend, of_shape, asked = CALLS[name]
    hook, note = triton.knobs.runtime.launch_enter_hook, lambda metadata: launched.add(metadata.get()["name"])
    hook.add(note)
    for shape in (replace(shape, **of_shape) for shape in SHAPES):
        qkv = inputs(shape, "randn", "cuda")
        found = lpattn.low_precision_sdpa(
            *qkv, **options(shape, "cuda"), **asked, backend=backend, on_unsupported="raise"
        )
        # From then on launches go the short way.
        hook.remove(note)
        reached = sqnr(found[0] if "return_lse" in asked else found, qkv, shape)
        if not reached > FLOOR:
            raise RuntimeError(f"{name}, {shape}: {reached:.1f} dB")
    torch.cuda.synchronize()
    if not any(kernel in seen for seen in launched):
        raise RuntimeError(f"{name}: launched {', '.join(sorted(launched))}, none of which is called {kernel}")


def examine(name: str, tool: str, seconds: float) -> dict[str, Any]:
    """What a tool says of the calls."""
    command = [
        "compute-sanitizer",
        f"--tool={tool}",
        f"--kernel-name=kernel_substring={CALLS[name][0]}",
        "--print-limit=20",
        sys.executable,
        __file__,
        "--calls",
        name,
    ]
    start = time.monotonic()
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds, env=environment, errors="replace"
        )
        said, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as ended:
        said = ended.stdout.decode(errors="replace") if isinstance(ended.stdout, bytes) else ended.stdout or ""
        status = None
    summary = re.findall(r"={9} ((?:ERROR|RACECHECK) SUMMARY: .*)", said)
    return {
        "kernels": name,
        "tool": tool,
        "finished": status == 0 and bool(summary),
        "summary": summary[-1] if summary else said[-1500:],
        "seconds": round(time.monotonic() - start, 1),
        "details": [] if not summary or re.search(r": 0 (errors|hazards)", summary[-1]) else said.splitlines()[:80],
    }


def main() -> int:
    arguments = parser(__doc__ or "", budget=400.0)
    arguments.add_argument("--tools", default=",".join(TOOLS), help="some of its tools, separated by commas")
    arguments.add_argument("--kernels", nargs="*", default=list(CALLS), help="some of the calls")
    arguments.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes at a time")
    arguments.add_argument("--calls", help="only the calls of these kernels, in this process")
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        print("sanitize.py needs a CUDA device", file=sys.stderr)
        return 1
    if given.calls:
        run_calls(given.calls)
        return 0
    if not shutil.which("compute-sanitizer"):
        print("sanitize.py needs compute-sanitizer, of the CUDA toolkit, on the path", file=sys.stderr)
        return 1
    pairs = [(name, tool) for tool in given.tools.split(",") for name in given.kernels]
    with ThreadPoolExecutor(given.jobs) as threads:
        results = list(threads.map(lambda pair: examine(*pair, given.budget), pairs))
    print(
        table(
            [
                ["kernels", "tool", "summary", "s"],
                *([r["kernels"], r["tool"], r["summary"][:90], str(r["seconds"])] for r in results),
            ]
        )
    )
    write(given.out, {"sanitizer": results})
    return 0 if all(r["finished"] and not r["details"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
