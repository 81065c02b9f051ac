"""Host time of lpattn's part of an attention call: planning, deciding, redirecting; medians, variants in turn.

The tensors are tiny, so that on the CPU too little of what is measured is attention itself. Where fp8_fa3 can run, its
calls are also measured, whole and by parts; the parts overlap: a call contains the backend, which contains the others.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from common import host_timer, interleaved, median, parser, spread, table, write
from torch import nn

import lpattn
from lpattn.backends.fa3 import FA3Backend
from lpattn.calls import build_call
from lpattn.dispatch import choose
from lpattn.plan import make_plan
from lpattn.registry import registry
from lpattn.settings import Settings, make_settings
from lpattn.types import HadamardMode, Provenance

TARGET_MICROSECONDS = 5.0


def fa3_parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What an eager call of fp8_fa3 consists of; nothing where it cannot run."""
    name = "fp8_fa3"
    if not any(info.name == name and info.available for info in lpattn.available_backends(q.device)):
        return {}
    from lpattn.quantize.fused import quantize_per_head, restore_output

    settings = make_settings(name, None, None, Provenance.ARGUMENT)
    call, _ = make_plan(q, k, v, None, 0.0, False, None, settings, False, False)
    backend = cast("FA3Backend", registry.get(name))
    assert call is not None
    operands = quantize_per_head(q, k, v)
    out = backend.forward(operands, call)[0]
    return {
        f"{name}: call": lambda: lpattn.low_precision_sdpa(q, k, v, backend=name),
        f"{name}: backend": lambda: backend.attention(q, k, v, call),
        f"{name}: quantize": lambda: quantize_per_head(q, k, v),
        f"{name}: forward": lambda: backend.forward(operands, call),
        f"{name}: restore": lambda: restore_output(out, operands, q.dtype),
    }


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@torch.inference_mode()
def main() -> int:
    given = parser(__doc__ or "", budget=60.0).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    # Calls this small run exactly.
    warnings.simplefilter("ignore", lpattn.LpattnWarning)
    q, k, v = (torch.randn(1, 2, 16, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    settings = Settings()
    call = build_call(q, k, v, None, 0.0, False, None, HadamardMode.NONE, False)
    plain = Attention()
    applied = lpattn.apply_low_precision_attention(Attention())
    exact = lpattn.apply_low_precision_attention(Attention(), "bf16_reference")
    variants = {
        "plan, seen before": lambda: make_plan(q, k, v, None, 0.0, False, None, settings, False, False),
        "choose, seen before": lambda: choose(call, settings),
        "plain SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        "low_precision_sdpa": lambda: lpattn.low_precision_sdpa(q, k, v),
        "module": lambda: plain(q, k, v),
        "module, applied": lambda: applied(q, k, v),
        "module, bf16_reference": lambda: exact(q, k, v),
        **fa3_parts(q, k, v),
    }
    for run in variants.values():
        run()
    rounds, calls = (5, 50) if given.quick else (60, 500)
    times = interleaved(variants, host_timer(calls), rounds, given.budget)
    micro = {name: median(t) * 1e6 for name, t in times.items()}
    rows = [["host time per call", "us", "+-"]]
    rows += [[name, f"{micro[name]:.2f}", f"{spread(times[name]):.0%}"] for name in variants]
    print(table(rows))
    added = micro["module, applied"] - micro["module"]
    print(f"\nan intercepted call costs {added:.1f} us more than a plain one, entering and leaving the module included")
    planning = micro["plan, seen before"]
    met = planning < TARGET_MICROSECONDS
    print(
        f"planning a call seen before: {planning:.2f} us; target {TARGET_MICROSECONDS:g}: {'met' if met else 'MISSED'}"
    )
    write(given.out, {"microseconds": micro, "added_microseconds": added, "target_met": met, "device": device})
    return 0


if __name__ == "__main__":
    sys.exit(main())
