"""What the GPU tests share: exact attention in float64, the same recipe in plain PyTorch, and inputs that find bugs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import lpattn
from lpattn.quantize import FA3_PER_HEAD, emulated_attention, hadamard_transform
from lpattn.types import HadamardMode

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# The recipe on operands that were smoothed before.
ON_OPERANDS = dataclasses.replace(FA3_PER_HEAD, smooth_k=False, smooth_v=False)


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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    causal: bool,
    scale: float,
    used: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention in float64 of some query rows, one head at a time: ([B, H, rows, D], lse [B, H, rows]).

    Keys that are not used (bool [B, kv_len]) may hold anything. A row without keys is zero, its lse -inf.
    """
    groups = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for head in range(q.shape[1]):
        keys, values = k[:, head // groups].double(), v[:, head // groups].double()
        logits = q[:, head, rows].double() @ keys.mT * scale
        if causal:
            logits = logits.masked_fill(torch.arange(k.shape[2], device=q.device) > rows[:, None], -torch.inf)
        if used is not None:
            logits = logits.masked_fill(~used[:, None], -torch.inf)
            values = values.masked_fill(~used[:, :, None], 0.0)
        weights = logits.softmax(-1)
        if used is not None:
            weights = weights.masked_fill(~used.any(-1)[:, None, None], 0.0)
        outs.append(weights @ values)
        lses.append(logits.logsumexp(-1))
    return torch.stack(outs, 1), torch.stack(lses, 1)


def poison(like: torch.Tensor) -> None:
    """Leave NaN in memory that the caching allocator is about to hand out again for an output of this size."""
    stale = [torch.full_like(like, torch.nan) for _ in range(3)]
    torch.cuda.synchronize()
    del stale


def poison_all() -> None:
    """Leave NaN bytes (in e4m3, bfloat16 and float32; -1 in integers) in all memory that small tests are handed."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # The allocator's segments, filled to the brim: 2 MiB for small tensors, one of its own for each of the others.
    stale = [
        torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in [2**20] * 8 + [2**23] * 4 + [2**26] * 4
    ]
    torch.cuda.synchronize()
    del stale


@dataclass(frozen=True)
class Operands:
    """What the backend quantized, in float32, where the kernel works: rotated by Hadamard, without the constants.

    Attributes:
        q, k, v: [B, H or Hkv, S, D], values that e4m3 has times powers of two.
        v_constant: [B, H, 1, D], to be added to the output.
        lse_shift: [B, H, q_len], to be added to the log-sum-exp after scaling.
        rotated: whether the output is to be rotated back.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    v_constant: torch.Tensor
    lse_shift: torch.Tensor
    rotated: bool

    def restored(self, out: torch.Tensor) -> torch.Tensor:
        """An attention output as the caller gets it."""
        out = out.double() + self.v_constant
        return hadamard_transform(out) if self.rotated else out


def quantized_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hadamard: str = "none") -> Operands:
    """The operands that fp8_fa3 gives to its kernel."""
    from lpattn.quantize.fused import quantize_per_head

    found = quantize_per_head(q, k, v, hadamard=HadamardMode(hadamard), with_lse_shift=True)
    groups, dim = q.shape[1] // k.shape[1], q.shape[3]
    assert found.lse_shift is not None
    return Operands(
        found.query.transpose(1, 2).float() * found.q_descale.repeat_interleave(groups, 1)[..., None, None],
        found.key.transpose(1, 2).float() * found.k_descale[..., None, None],
        found.value.transpose(1, 2).float() * found.v_descale[..., None, None],
        found.constants[1][:, :, None, :dim].repeat_interleave(groups, 1),
        found.lse_shift,
        hadamard != "none",
    )


@dataclass
class Result:
    """A kernel's output beside what it should be.

    Two budgets. The kernel is held to exact attention on the operands that it was given, with twice the error of
    emulated attention on the same operands: the recipe takes its constants and scales from all tokens and the backend
    from a sample, which would hide a small error of the kernel behind another rounding of k and v. The whole is held
    to exact attention on the inputs, with the error of the emulated recipe.

    Neither allows for what Hopper's FP8 accumulator loses of a V with a mean (1.4e-5 of it per key): smoothing leaves
    no mean that is significant.

    Attributes:
        out, lse: the kernel's.
        operands_out, operands_lse: exact attention on the operands.
        emulated_out: the recipe on the operands.
        exact_out: exact attention on the inputs.
        recipe_out: the recipe on the inputs.
        logits: a bound on the logits of the operands.
    """

    out: torch.Tensor
    lse: torch.Tensor
    operands_out: torch.Tensor
    operands_lse: torch.Tensor
    emulated_out: torch.Tensor
    exact_out: torch.Tensor
    recipe_out: torch.Tensor
    logits: float

    def check(self) -> None:
        """Hold the kernel to both budgets."""
        assert self.out.isfinite().all()
        error, budget = self.out.double() - self.operands_out, self.emulated_out.double() - self.operands_out
        peak = float(self.operands_out.abs().max())
        limit = 2 * float(budget.abs().max()) + 2**-7 * peak
        assert float(error.abs().max()) <= limit, f"max error {error.abs().max():.3g}, limit {limit:.3g}"
        size = rms(self.operands_out)
        limit = 1.5 * rms(budget) + 2**-8 * size
        assert rms(error) <= limit, f"rms error {rms(error):.3g}, limit {limit:.3g}"
        # By chance, the rounding of P may spare a row in one order of the keys and not in the other.
        row_error, row_budget = (x.square().mean(-1).sqrt() for x in (error, budget))
        worst = float((row_error - 2 * row_budget).max())
        limit = 0.5 * float(row_budget.max()) + 2**-7 * peak
        assert worst <= limit, f"a row is off by {worst:.3g} more than its budget, limit {limit:.3g}"
        # Hopper's FP8 tensor cores keep about 14 bits when they add up S (DeepSeek-V3, arXiv:2412.19437, 3.3.2);
        # each of the head_dim / 32 additions loses up to 2^-13 of a partial sum, which may exceed the largest logit.
        lse_error = float((self.lse.double() - self.operands_lse).abs().max())
        assert lse_error <= 1e-3 + 16 * 2**-13 * self.logits, (
            f"lse is off by {lse_error:.3g}, logits reach {self.logits:.3g}"
        )
        # Where a row sees few keys, it is chance how near to e4m3's values either constant leaves them.
        limit = 2 * rms(self.recipe_out.double() - self.exact_out) + 2**-7 * size
        found = rms(self.out.double() - self.exact_out)
        assert found <= limit, f"rms error of kernel and quantization {found:.3g}, limit {limit:.3g}"


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def compare(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    hadamard: str = "none",
) -> Result:
    """Run a backend; emulated and exact attention on the operands that it quantizes, and on the inputs."""
    poison(q)
    out, lse = lpattn.low_precision_sdpa(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=True, backend=backend, hadamard=hadamard, return_lse=True
    )
    operands = quantized_operands(q, k, v, hadamard)
    rows = torch.arange(q.shape[2], device=q.device)
    operands_out, operands_lse = exact_rows(operands.q, operands.k, operands.v, rows, causal, scale)
    # The kernel walks over the keys from the last to the first, and P is rounded relative to the maximum so far.
    mask = None
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril().flip(-1)
    last_first = {"attn_mask": mask, "softmax_scale": scale}
    emulated_out = emulated_attention(
        operands.q, operands.k.flip(2), operands.v.flip(2), recipe=ON_OPERANDS, **last_first
    )
    recipe = dataclasses.replace(FA3_PER_HEAD, hadamard=hadamard)
    norms = [x.norm(dim=-1).max() for x in (operands.q, operands.k)]
    return Result(
        out,
        lse,
        operands.restored(operands_out),
        operands_lse + scale * operands.lse_shift,
        operands.restored(emulated_out),
        exact_rows(q, k, v, rows, causal, scale)[0],
        emulated_attention(q.float(), k.float().flip(2), v.float().flip(2), recipe=recipe, **last_first),
        float(norms[0] * norms[1]) * abs(scale),
    )


def make(
    batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """Normal q, k, v [B, H, S, D] on the GPU."""

    def one(h: int, s: int) -> torch.Tensor:
        return torch.randn(batch, h, s, dim, device="cuda", dtype=dtype)

    return one(heads, q_len), one(kv_heads, kv_len), one(kv_heads, kv_len)


def data(kind: str, heads: int, length: int, dim: int = 128, seed: int = 0) -> Tensors:
    """q, k, v [1, H, S, D] of a kind of benchmarks/cases.py, for a seed always the same."""
    torch.manual_seed(seed)

    def one(bias: float) -> torch.Tensor:
        x = torch.randn(1, heads, length, dim, device="cuda")
        if kind == "outliers":
            x += (torch.rand_like(x) < 0.001) * 10 * torch.randn_like(x)
        elif kind == "bias":
            x += bias * torch.randn(1, heads, 1, dim, device="cuda")
        return x.bfloat16()

    return one(0.0), one(4.0), one(1.0)


def some_rows(length: int, number: int = 64) -> torch.Tensor:
    """Query rows to look at, the first and the last among them."""
    return torch.linspace(0, length - 1, min(number, length), device="cuda").long()


@pytest.fixture
def tools() -> Any:
    """The functions above."""

    class Tools:
        make = staticmethod(make)
        data = staticmethod(data)
        compare: Callable[..., Result] = staticmethod(compare)
        exact_rows = staticmethod(exact_rows)
        some_rows = staticmethod(some_rows)
        sqnr = staticmethod(sqnr)
        poison = staticmethod(poison)
        poison_all = staticmethod(poison_all)

    return Tools
