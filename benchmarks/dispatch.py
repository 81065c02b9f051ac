"""Host time of an attention call, in microseconds: medians, variants in turn.

What is measured is the host alone: shapes are so small that the GPU is done before the host is. On a machine without a
GPU, fp8_fa3 and fp8_triton run with nothing behind their launches (see stand_ins.py): what Triton, FlashAttention-3 and
the driver take for those is then left out, and names begin with "host_".

"plan, seen before" is what is looked up for a call like one before. Parts of a call overlap: a call contains the
backend, which contains the others.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, cast

import stand_ins
import torch
import torch.nn.functional as F
from common import host_timer, interleaved, median, parser, spread, table, write
from torch import nn

import lpattn
from lpattn.backends.fa3 import FA3Backend
from lpattn.backends.triton.kernels import HopperKernel, kernel_for
from lpattn.calls import build_call
from lpattn.dispatch import choose
from lpattn.plan import make_plan
from lpattn.registry import registry
from lpattn.settings import Settings, make_settings
from lpattn.types import AttentionCall, HadamardMode, Provenance

PLAN_TARGET = 5.0
CALL_TARGET = 80.0
"""Microseconds of a whole call of a low-precision backend, on a machine with a GPU."""

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Runs = dict[str, Callable[[], object]]


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def inputs(device: str, length: int, bshd: bool = False) -> Tensors:
    """q, k, v in [B, H, S, D], or in the memory that projections leave them in."""
    if bshd:
        return tuple(torch.randn(1, length, 4, 128, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv")  # type: ignore[return-value]
    return tuple(torch.randn(1, 4, length, 128, device=device, dtype=torch.bfloat16) for _ in "qkv")  # type: ignore[return-value]


def whole_calls(qkv: Tensors, bshd: Tensors, names: list[str]) -> Runs:
    """SDPA, and what stands for it: called by name, and redirected inside of a module."""
    runs: Runs = {
        "plain SDPA": lambda: F.scaled_dot_product_attention(*qkv),
        "low_precision_sdpa": lambda: lpattn.low_precision_sdpa(*qkv),
        "plain SDPA, [B, S, H, D]": lambda: F.scaled_dot_product_attention(*bshd),
        "low_precision_sdpa, [B, S, H, D]": lambda: lpattn.low_precision_sdpa(*bshd),
    }
    tokens = qkv[0].shape[2]
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=qkv[0].device).tril()
    for name in names:
        run = functools.partial(lpattn.low_precision_sdpa, *qkv, backend=name)
        runs[name] = run
        runs[f"{name}, Hadamard qkv"] = functools.partial(run, hadamard="qkv")
        if name.endswith("fp8_triton"):
            runs[f"{name}, bool mask"] = functools.partial(run, attn_mask=mask)
    plain = Attention()
    runs["module"] = lambda: plain(*qkv)
    for label, name in {"applied": None, "bf16_reference": "bf16_reference", **{name: name for name in names}}.items():
        applied = lpattn.apply_low_precision_attention(Attention(), name, on_unsupported="fallback")
        runs[f"module, {label}"] = lambda applied=applied: applied(*qkv)  # type: ignore[misc]
    return runs


def planned(qkv: Tensors, name: str) -> AttentionCall:
    """The call as the backend sees it."""
    settings = make_settings(name, None, None, Provenance.ARGUMENT)
    call = make_plan(*qkv, None, 0.0, False, None, settings, False, False).call
    assert call is not None
    return call


def parts(qkv: Tensors, name: str) -> Runs:
    """What a call of fp8_fa3, or of fp8_triton on Hopper, consists of."""
    from lpattn.quantize.fused import quantize_per_block, quantize_per_head, restore_output

    call = planned(qkv, name)
    backend = registry.get(name)
    assert backend is not None
    found: Runs = {f"{name}: backend": lambda: backend.attention(*qkv, call)}
    if name.endswith("fp8_fa3"):
        fa3 = cast("FA3Backend", backend)
        heads = quantize_per_head(*qkv)
        out = fa3.forward(heads, call)[0]
        found[f"{name}: quantize"] = lambda: quantize_per_head(*qkv)
        found[f"{name}: forward"] = lambda: fa3.forward(heads, call)
        found[f"{name}: restore"] = lambda: restore_output(out, heads, call.dtype)
    elif isinstance(kernel_for(call, int8=False), HopperKernel):
        from lpattn.kernels.hopper.launch import QK_MAX, attend

        blocks = quantize_per_block(*qkv, qk_max=QK_MAX)
        found[f"{name}: quantize"] = lambda: quantize_per_block(*qkv, qk_max=QK_MAX)
        found[f"{name}: attend"] = lambda: attend(blocks, call.dtype)
    return found


def dispatching(qkv: Tensors) -> Runs:
    """What precedes every call."""
    settings = Settings()
    call = build_call(*qkv, None, 0.0, False, None, HadamardMode.NONE, False)
    return {
        "plan, seen before": lambda: make_plan(*qkv, None, 0.0, False, None, settings, False, False),
        "choose, seen before": lambda: choose(call, settings),
    }


def verdicts(micro: dict[str, float], names: list[str], on_gpu: bool) -> dict[str, Any]:
    """What is more than PyTorch's own, and whether targets are met."""
    planning = micro["plan, seen before"]
    added = {
        "automatic": micro["low_precision_sdpa"] - micro["plain SDPA"],
        "automatic, [B, S, H, D]": micro["low_precision_sdpa, [B, S, H, D]"] - micro["plain SDPA, [B, S, H, D]"],
        "module, automatic": micro["module, applied"] - micro["module"],
    }
    for what, much in added.items():
        print(f"{what}: {much:.1f} us more than PyTorch's own")
    targets = {"plan, seen before": planning < PLAN_TARGET}
    print(f"planning a call seen before: {planning:.2f} us; target {PLAN_TARGET:g}: {said(planning < PLAN_TARGET)}")
    for name in names if on_gpu else ():
        targets[name] = micro[name] <= CALL_TARGET
        print(f"a call of {name}: {micro[name]:.1f} us; target {CALL_TARGET:g}: {said(targets[name])}")
    return {"added_microseconds": added["module, automatic"], "added": added, "targets_met": targets}


def said(met: bool) -> str:
    return "met" if met else "MISSED"


@torch.inference_mode()
def main() -> int:
    given = parser(__doc__ or "", budget=60.0).parse_args()
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.set_num_threads(1)
    # Calls this small run exactly.
    warnings.simplefilter("ignore", lpattn.LpattnWarning)
    length = 512 if on_gpu else 16  # on a CPU, attention itself is on the host
    qkv, bshd = inputs(device, length), inputs(device, length, bshd=True)
    with contextlib.nullcontext() if on_gpu else stand_ins.registered():
        names = [stand_ins.FA3, stand_ins.TRITON]
        if on_gpu:
            usable = {info.name for info in lpattn.available_backends(device) if info.available}
            names = [name for name in ("fp8_fa3", "fp8_triton") if name in usable]
        runs = {**whole_calls(qkv, bshd, names), **dispatching(qkv)}
        for name in names:
            runs |= parts(qkv, name)
        for run in runs.values():
            run()
        rounds, calls = (5, 50) if given.quick else (60, 300)
        times = interleaved(runs, host_timer(calls), rounds, given.budget)
    micro = {name: median(t) * 1e6 for name, t in times.items()}
    rows = [["host time per call", "us", "+-"]]
    rows += [[name, f"{micro[name]:.2f}", f"{spread(times[name]):.0%}"] for name in runs]
    print(table(rows) + "\n")
    found = verdicts(micro, names, on_gpu)
    shape = [1, 4, length, 128]
    write(
        given.out,
        {"microseconds": micro, **found, "device": device, "shape": shape, "rounds": len(times[next(iter(times))])},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
