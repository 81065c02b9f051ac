"""What the GPU tests share: exact attention in float64, the same recipe in plain PyTorch, and inputs that find bugs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import lpattn
from lpattn.quantize import FA3_PER_HEAD, Granularity, emulated_attention, quantize_e4m3

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Keys per sum that Hopper's FP8 accumulator loses of a V with a mean: 1.4e-5 of the mean per key was measured.
DRIFT_PER_KEY = 3e-5


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # An error of a kernel shows in the test that launched it.
    torch.cuda.synchronize()


@pytest.fixture
def fa3() -> str:
    """The backend's name; skips where this machine cannot run it."""
    (info,) = [i for i in lpattn.available_backends("cuda") if i.name == "fp8_fa3"]
    if not info.available:
        pytest.skip(f"fp8_fa3: {'; '.join(map(str, info.reasons))}")
    return "fp8_fa3"


@pytest.fixture
def emulated() -> Iterator[str]:
    """The name of the emulated backend, registered here where its plugin is importable but not installed."""
    name = "fp8_emulated"
    if name in [i.name for i in lpattn.available_backends("cuda")]:
        yield name
        return
    plugin = pytest.importorskip("lpattn_emulated", reason="the plugin lpattn-emulated is not on the path")
    hook = getattr(plugin, "lpattn_backends", None)
    if hook is None:
        pytest.skip("lpattn_emulated has no lpattn_backends")
    backends = hook()
    for backend in backends:
        lpattn.register_backend(backend)
    yield name
    for backend in backends:
        lpattn.unregister_backend(backend.name)


def sqnr(ref: torch.Tensor, out: torch.Tensor) -> float:
    """10 * log10(signal / noise) in dB; -inf where the output is not finite."""
    noise = (ref.double() - out.double()).square().sum()
    if not noise.isfinite():
        return -math.inf
    return float(10 * torch.log10(ref.double().square().sum() / noise.clamp_min(1e-300)))


def exact_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention in float64 of some query rows, one head at a time: ([B, H, rows, D], lse [B, H, rows])."""
    groups = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for head in range(q.shape[1]):
        keys, values = k[:, head // groups].double(), v[:, head // groups].double()
        logits = q[:, head, rows].double() @ keys.mT * scale
        if causal:
            logits = logits.masked_fill(torch.arange(k.shape[2], device=q.device) > rows[:, None], -torch.inf)
        outs.append(logits.softmax(-1) @ values)
        lses.append(logits.logsumexp(-1))
    return torch.stack(outs, 1), torch.stack(lses, 1)


def poison(like: torch.Tensor) -> None:
    """Leave NaN in memory that the caching allocator is about to hand out again for an output of this size."""
    stale = [torch.full_like(like, torch.nan) for _ in range(3)]
    torch.cuda.synchronize()
    del stale


@dataclass
class Result:
    """A kernel's output beside what it should be. Errors are against exact attention on the dequantized operands."""

    out: torch.Tensor
    lse: torch.Tensor
    exact_out: torch.Tensor
    exact_lse: torch.Tensor
    emulated_out: torch.Tensor
    logits: float

    def check(self, drift: float = 0.0) -> None:
        """Hold the kernel to twice the error of the emulated recipe; ``drift`` is what the hardware may add."""
        assert self.out.isfinite().all()
        error, budget = (self.out.double() - self.exact_out), (self.emulated_out.double() - self.exact_out)
        peak = float(self.exact_out.abs().max())
        limit = 2 * float(budget.abs().max()) + 2**-7 * peak + drift * peak
        assert float(error.abs().max()) <= limit, f"max error {error.abs().max():.3g}, limit {limit:.3g}"
        rms, budget_rms, size = (float(x.square().mean().sqrt()) for x in (error, budget, self.exact_out))
        limit = 1.5 * budget_rms + 2**-8 * size + drift * peak
        assert rms <= limit, f"rms error {rms:.3g}, limit {limit:.3g}"
        # By chance, the rounding of P may spare a row in one order of the keys and not in the other.
        row_error, row_budget = (x.square().mean(-1).sqrt() for x in (error, budget))
        worst = float((row_error - 2 * row_budget).max())
        limit = 0.5 * float(row_budget.max()) + 2**-7 * peak + drift * peak
        assert worst <= limit, f"a row is off by {worst:.3g} more than its budget, limit {limit:.3g}"
        # Hopper's FP8 tensor cores keep about 14 bits when they add up S (DeepSeek-V3, arXiv:2412.19437, 3.3.2);
        # each of the head_dim / 32 additions loses up to 2^-13 of a partial sum, which may exceed the largest logit.
        lse_error = float((self.lse.double() - self.exact_lse).abs().max())
        assert lse_error <= 1e-3 + 16 * 2**-13 * self.logits, (
            f"lse is off by {lse_error:.3g}, logits reach {self.logits:.3g}"
        )


def compare(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Result:
    """Run a backend, the emulated recipe, and exact attention on the operands that the recipe leaves."""
    poison(q)
    out, lse = lpattn.low_precision_sdpa(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=True, backend=backend, return_lse=True
    )
    kv_heads = k.shape[1]
    dequantized = [quantize_e4m3(x, Granularity.PER_HEAD, num_kv_heads=kv_heads).dequantize() for x in (q, k, v)]
    rows = torch.arange(q.shape[2], device=q.device)
    exact_out, exact_lse = exact_rows(*dequantized, rows, causal, scale)
    # The kernel walks over the keys from the last to the first, and P is rounded relative to the maximum so far.
    mask = None
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril().flip(-1)
    emulated_out = emulated_attention(q, k.flip(2), v.flip(2), recipe=FA3_PER_HEAD, attn_mask=mask, softmax_scale=scale)
    norms = [x.float().norm(dim=-1).max() for x in dequantized[:2]]
    return Result(out, lse, exact_out, exact_lse, emulated_out, float(norms[0] * norms[1]) * abs(scale))


def make(
    batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """Normal q, k, v [B, H, S, D] on the GPU."""

    def one(h: int, s: int) -> torch.Tensor:
        return torch.randn(batch, h, s, dim, device="cuda", dtype=dtype)

    return one(heads, q_len), one(kv_heads, kv_len), one(kv_heads, kv_len)


@pytest.fixture
def tools() -> Any:
    """The functions above."""

    class Tools:
        make = staticmethod(make)
        compare: Callable[..., Result] = staticmethod(compare)
        exact_rows = staticmethod(exact_rows)
        sqnr = staticmethod(sqnr)
        poison = staticmethod(poison)
        drift_per_key = DRIFT_PER_KEY

    return Tools
