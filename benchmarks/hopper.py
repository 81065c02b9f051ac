"""The Hopper and the portable kernel alone and as whole calls, beside FlashAttention-3 in FP8 and the best exact one.

Each variant is checked against exact attention first, then captured in a CUDA graph, so that the host is out of the
picture; graphs are replayed in turn. Needs a Hopper GPU and FlashAttention-3 (the wheel fa3-fwd).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from cases import FLUX, LONG, Shape, Tensors, inputs, sqnr
from common import Budget, DeviceTimer, captured, gpu_state, interleaved, median, parser, spread, table, write
from labels import EXACT
from variants import KernelAlone, exact_variants, options

import lpattn
from lpattn.backends.triton.kernels import PortableKernel
from lpattn.calls import build_call
from lpattn.types import HadamardMode

SHAPES = [
    LONG,
    FLUX,
    Shape(1, 32, 32, 4096, 128, False),
    Shape(1, 32, 8, 8192, 128, True),
    Shape(1, 32, 8, 32768, 128, True),
    Shape(1, 32, 32, 16384, 64, False),
    Shape(1, 16, 16, 16384, 256, False),
]
FA3_FP8 = "kernel:fa3_fp8"
KERNEL = "kernel:"
WHOLE = "whole:"
FLOOR = 20.0

Run = Callable[[], torch.Tensor]


def kernels(qkv: Tensors, shape: Shape) -> tuple[dict[str, Run], dict[str, Run]]:
    """Kernels on operands that are quantized beforehand: what is timed, and what is held to exact attention."""
    from lpattn.kernels.hopper.launch import EXPONENTIALS, QK_MAX, attend
    from lpattn.quantize.fused import Precision, quantize_per_block

    factor = shape.head_dim**-0.5 * 1.4426950408889634
    quantized = quantize_per_block(*qkv, factor=factor, qk_max=QK_MAX)
    fa3 = KernelAlone(qkv, shape)
    timed: dict[str, Run] = {FA3_FP8: fa3}
    judged: dict[str, Run] = {FA3_FP8: fa3.restored}

    def ours(exponential: str) -> torch.Tensor:
        return attend(quantized, torch.bfloat16, causal=shape.causal, exponential=exponential)[0].transpose(1, 2)

    for name in EXPONENTIALS:
        timed[KERNEL + name] = judged[KERNEL + name] = functools.partial(ours, name)
    for name, precision in (("portable", Precision.E4M3), ("portable_int8", Precision.INT8_F16)):
        operands = quantize_per_block(*qkv, factor=factor, precision=precision)
        int8 = precision is Precision.INT8_F16
        timed[KERNEL + name] = judged[KERNEL + name] = functools.partial(portable, operands, shape, int8)
    return timed, judged


def portable(operands: Any, shape: Shape, int8: bool) -> torch.Tensor:
    """[B, H, S, D] by the kernel that runs where the Hopper kernel cannot."""
    from lpattn.kernels import attention, shapes

    tile = shapes.tile_shape(torch.cuda.get_device_capability(), shape.head_dim, int8=int8)
    band = attention.Band(after=0 if shape.causal else None)
    return attention.attend(operands, tile, torch.bfloat16, band=band)[0].transpose(1, 2)


def whole_calls(qkv: Tensors, shape: Shape) -> dict[str, Run]:
    """Calls with quantization."""
    found = {}
    for backend in ("fp8_triton", "fp8_triton_fast", "int8_triton", "fp8_fa3"):
        found[WHOLE + backend] = functools.partial(
            lpattn.low_precision_sdpa, *qkv, **options(shape, "cuda"), backend=backend, on_unsupported="raise"
        )
    # On Hopper fp8_triton runs it for what its own kernel there cannot.
    call = build_call(*qkv, None, 0.0, shape.causal, None, HadamardMode.NONE, False, None)
    kernel = PortableKernel(int8=False)
    found[WHOLE + "portable"] = lambda: kernel.attend(*qkv, call, None, None)[0].transpose(1, 2)
    return found


@torch.inference_mode()
def measure(shape: Shape, timer: DeviceTimer, rounds: int, seconds: float) -> dict[str, Any]:
    """Times and accuracy of one shape."""
    qkv = inputs(shape, "randn", "cuda")
    timed, judged = kernels(qkv, shape)
    rest = {**exact_variants(qkv, shape, "cuda"), **whole_calls(qkv, shape)}
    quality = {name: sqnr(run(), qkv, shape) for name, run in {**judged, **rest}.items()}
    wrong = {name: db for name, db in quality.items() if not db >= FLOOR}
    runs = {name: captured([run]) for name, run in {**timed, **rest}.items() if name not in wrong}
    times = interleaved(runs, timer, rounds, seconds)
    seen = {name: median(t) for name, t in times.items()}
    best = min((name for name in seen if name.startswith(EXACT)), key=seen.__getitem__)
    return {
        "shape": asdict(shape),
        "best_exact": best,
        "milliseconds": {name: t * 1e3 for name, t in seen.items()},
        "spread": {name: round(spread(t), 4) for name, t in times.items()},
        "raw_milliseconds": {name: [round(x * 1e3, 5) for x in t] for name, t in times.items()},
        "teraflops": {name: shape.flop / t / 1e12 for name, t in seen.items()},
        "over_fa3_fp8": {n: seen[FA3_FP8] / t for n, t in seen.items() if n.startswith(KERNEL)},
        "over_best_exact": {n: seen[best] / t for n, t in seen.items() if not n.startswith(EXACT)},
        "sqnr_db": {name: round(db, 2) for name, db in quality.items()},
        "wrong": wrong,
        "rounds": min(map(len, times.values())),
        "gpu": gpu_state(),
    }


def report(results: list[dict[str, Any]]) -> str:
    """All variants of all shapes as a table."""
    rows = [["B,H/Hkv,S,D", "what", "ms", "TFLOP/s", "x FA3 FP8", "x best exact", "dB"]]
    for r in results:
        for name, ms in r["milliseconds"].items():
            ratios = [f"x{r[key][name]:.3f}" if name in r[key] else "" for key in ("over_fa3_fp8", "over_best_exact")]
            numbers = [f"{ms:.4f}", f"{r['teraflops'][name]:.0f}", *ratios, f"{r['sqnr_db'][name]:.1f}"]
            rows.append([str(Shape(**r["shape"])), name, *numbers])
    return table(rows)


def main() -> int:
    given = parser(__doc__ or "", budget=120.0).parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("hopper.py needs a CUDA device of compute capability 9.0", file=sys.stderr)
        return 1
    budget, rounds = Budget(given.budget, given.budget / len(SHAPES) * 0.6), 5 if given.quick else 40
    results, left_out = [], []
    for shape in SHAPES:
        if not (seconds := budget.item()):
            left_out.append(str(shape))
            continue
        # Several replays in a row where one is short.
        timer = DeviceTimer(8 if shape.flop < 1e12 else 1)
        results.append(measure(shape, timer, rounds, seconds))
        torch.cuda.empty_cache()
    print(report(results))
    if left_out:
        print(f"left out, for want of time: {'; '.join(left_out)}")
    write(given.out, {"results": results, "left_out": left_out})
    return 0


if __name__ == "__main__":
    sys.exit(main())
