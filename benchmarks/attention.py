"""Speed of whole attention calls, quantization included, against the best exact kernel that the machine has.

Every variant's output is checked against exact attention on sampled rows before it is timed; variants are timed in
turn. Times are medians of GPU events. Needs a CUDA device.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from common import Budget, DeviceTimer, gpu_state, interleaved, median, parser, spread, table, write
from torch.nn.attention import SDPBackend, sdpa_kernel

import lpattn

EXACT_FLOOR = 40.0
LOW_FLOOR = 15.0
"""dB below which a variant is wrong, not only imprecise, on normal data."""


@dataclass(frozen=True)
class Shape:
    """One attention call; bfloat16, [B, H, S, D], q_len = kv_len."""

    batch: int
    num_heads: int
    num_kv_heads: int
    length: int
    head_dim: int
    causal: bool

    @property
    def flop(self) -> float:
        return 4.0 * self.batch * self.num_heads * self.length**2 * self.head_dim / (2 if self.causal else 1)

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"{self.batch},{self.num_heads}/{self.num_kv_heads},{self.length},{self.head_dim},{kind}"


NAMED = [
    Shape(1, 24, 24, 4608, 128, False),  # FLUX.1 at 1024x1024
    Shape(1, 32, 32, 16384, 128, False),
    Shape(1, 32, 32, 16384, 64, False),
    Shape(1, 32, 8, 8192, 128, True),  # Llama-3-8B prefill
    Shape(2, 24, 24, 512, 128, False),
]
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
DIMS = (64, 128, 256)


def sweep(lengths: tuple[int, ...], dims: tuple[int, ...]) -> list[Shape]:
    """Lengths x causal x grouped x head_dim, the short ones first, so that what the budget cuts off is the long end."""
    shapes = []
    for length in lengths:
        for dim in dims:
            # Hidden size 4096 at one batch; fewer heads where a call would take seconds.
            heads = max(4, min(4096 // dim, 2**20 // length))
            for causal in (False, True):
                shapes += [Shape(1, heads, kv, length, dim, causal) for kv in (heads, max(1, heads // 4))]
    return shapes


def fa3_function() -> Callable[..., torch.Tensor] | None:
    """FlashAttention-3's own function, from whichever build is installed."""
    for module in ("fa3_fwd_interface", "flash_attn_interface"):
        if importlib.util.find_spec(module) is not None:
            return importlib.import_module(module).flash_attn_func
    return None


def variants(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape) -> dict[str, Callable[[], torch.Tensor]]:
    """What can run the call on this machine, by name; exact kernels start with ``exact:``."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    grouped = shape.num_heads != shape.num_kv_heads
    options = {"is_causal": shape.causal, "enable_gqa": grouped}

    def sdpa(kernel: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, **options)

    for name, kernel in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        found[f"exact:{name}"] = functools.partial(sdpa, kernel)
    found["exact:sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, **options)
    if (flash_attn_func := fa3_function()) is not None:
        bshd = [x.transpose(1, 2) for x in (q, k, v)]
        found["exact:fa3_bf16"] = lambda: flash_attn_func(*bshd, causal=shape.causal).transpose(1, 2)
    for info in lpattn.available_backends("cuda"):
        if info.available and info.automatic and info.name != "bf16_reference":
            found[info.name] = functools.partial(
                lpattn.low_precision_sdpa, q, k, v, **options, backend=info.name, on_unsupported="raise"
            )
    return found


def check(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape) -> float:
    """SQNR in dB on sampled rows of the first and the last head."""
    rows = torch.linspace(0, shape.length - 1, 24, device="cuda").long()
    signal = noise = 0.0
    for head in {0, shape.num_heads - 1}:
        kv = head // (shape.num_heads // shape.num_kv_heads)
        logits = q[-1, head, rows].double() @ k[-1, kv].double().T * shape.head_dim**-0.5
        if shape.causal:
            logits = logits.masked_fill(torch.arange(shape.length, device="cuda") > rows[:, None], -math.inf)
        expected = logits.softmax(-1) @ v[-1, kv].double()
        signal += float(expected.square().sum())
        noise += float((expected - out[-1, head, rows].double()).square().sum())
    return 10 * math.log10(signal / max(noise, 1e-300)) if math.isfinite(noise) else -math.inf


@torch.inference_mode()
def measure(shape: Shape, timer: DeviceTimer, rounds: int, seconds: float) -> dict[str, object]:
    """Times and accuracy of one shape."""
    torch.manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(shape.batch, heads, shape.length, shape.head_dim, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(shape.num_heads), normal(shape.num_kv_heads), normal(shape.num_kv_heads)
    usable, accuracy, refused = {}, {}, {}
    for name, run in variants(q, k, v, shape).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                accuracy[name] = check(run(), q, k, v, shape)
                run()
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if accuracy[name] < (EXACT_FLOOR if name.startswith("exact:") else LOW_FLOOR):
            refused[name] = f"wrong: {accuracy[name]:.1f} dB"
            continue
        usable[name] = run
    times = interleaved(usable, timer, rounds, seconds)
    exact = {n: median(t) for n, t in times.items() if n.startswith("exact:")}
    best = min(exact, key=exact.__getitem__)
    return {
        "shape": asdict(shape),
        "best_exact": best,
        "milliseconds": {n: median(t) * 1e3 for n, t in times.items()},
        "spread": {n: round(spread(t), 4) for n, t in times.items()},
        "speedup": {n: exact[best] / median(t) for n, t in times.items() if n not in exact},
        "teraflops": {n: shape.flop / median(t) / 1e12 for n, t in times.items()},
        "sqnr_db": {n: round(s, 2) for n, s in accuracy.items()},
        "refused": refused,
        "rounds": min(map(len, times.values())),
        "gpu": gpu_state(),
    }


def measure_all(shapes: list[Shape], budget: Budget, rounds: int) -> tuple[list[dict[str, object]], list[str]]:
    """Measure shapes until the budget ends: the results, and what was left out."""
    # Several calls in a row, as in a model: the launches of one hide behind the work of the other.
    results, left_out = [], []
    timers = {calls: DeviceTimer(calls) for calls in (1, 5)}
    for shape in shapes:
        seconds = budget.item()
        if not seconds:
            left_out.append(str(shape))
            continue
        try:
            result = measure(shape, timers[5 if shape.length <= 16384 else 1], rounds, seconds)
        except torch.OutOfMemoryError:
            left_out.append(f"{shape} (out of memory)")
            continue
        results.append(result)
        print(line(result), flush=True)
        torch.cuda.empty_cache()
    return results, left_out


def line(result: dict) -> str:
    times = ", ".join(f"{n} {t:.3f}" for n, t in result["milliseconds"].items())
    ratios = ", ".join(f"{n} x{r:.2f}" for n, r in result["speedup"].items())
    return f"{Shape(**result['shape'])}: {times} ms; {ratios or 'no low-precision variant'}"


def report(results: list[dict]) -> str:
    names = list(dict.fromkeys(n for r in results for n in r["milliseconds"]))
    low = [n for n in names if not n.startswith("exact:")]
    head = ["B,H/Hkv,S,D", *(f"{n.removeprefix('exact:')} ms" for n in names), *(f"{n} x" for n in low)]
    head += [f"{n} dB" for n in low]
    rows = [head]
    for r in results:
        times = [f"{r['milliseconds'][n]:.3f}" if n in r["milliseconds"] else "-" for n in names]
        ratios = [f"{r['speedup'][n]:.2f}" if n in r["speedup"] else "-" for n in low]
        accuracy = [f"{r['sqnr_db'][n]:.1f}" if n in r["sqnr_db"] else "-" for n in low]
        rows.append([str(Shape(**r["shape"])), *times, *ratios, *accuracy])
    return table(rows)


def main() -> int:
    arguments = parser(__doc__ or "", budget=420.0)
    arguments.add_argument("--sweep", action="store_true", help="also lengths 512 to 131072 at head_dim 64, 128, 256")
    arguments.add_argument("--per-item", type=float, default=2.0, help="seconds of timing per shape (default 2)")
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        print(f"attention.py needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    shapes = NAMED + (sweep(LENGTHS, DIMS) if given.sweep else [])
    if given.quick:
        shapes = [*NAMED[:1], *NAMED[-2:]]
    results, left_out = measure_all(shapes, Budget(given.budget, given.per_item), 5 if given.quick else 60)
    print(f"\n{report(results)}")
    if left_out:
        print(f"\nleft out, for want of time or memory: {'; '.join(left_out)}")
    write(given.out, {"results": results, "left_out": left_out})
    return 0


if __name__ == "__main__":
    sys.exit(main())
