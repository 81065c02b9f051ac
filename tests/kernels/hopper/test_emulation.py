"""The numerics of the Hopper kernel, on its plain-PyTorch emulation: what the GPU tests hold the kernel to."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton, in which the passes are written, is not installed")

from lpattn.kernels.hopper import emulation
from lpattn.quantize import Exponential, e4m3_weights
from lpattn.quantize.fused import Keys, PerBlock, quantize_per_block
from lpattn.quantize.fused.launcher import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs Triton's interpreter or a GPU"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # numpy, of inf and NaN
]

KINDS = [emulation.LINEAR, emulation.STEP]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(DEVICE)


def quantized(q, k, v, scale=None, **options) -> PerBlock:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return quantize_per_block(q, k, v, factor=scale * math.log2(math.e), qk_max=5.5, **options)


def attend(q, k, v, kind=emulation.STEP, scale=None, causal=False, **options):
    found = quantized(q, k, v, scale, with_lse_shift=True, **options)
    return emulation.emulate(found, kind=kind, causal=causal)


def exact(q, k, v, scale=None, causal=False):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    logits = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def on_operands(found: PerBlock, kv_len: int) -> torch.Tensor:
    """Attention over what was quantized, in float64: what scores in float16 and P in e4m3 are judged by."""
    q = found.query.double() * found.q_scale[..., None]
    k = found.key.double() * found.k_scale.repeat_interleave(128, -1)[..., None]
    v = emulation.unpermuted(found.value).double() * found.v_scale.repeat_interleave(128, -1)[..., None]
    weights = ((q @ k.mT)[..., :kv_len] * math.log(2)).softmax(-1)
    return weights @ v[:, :, :kv_len] + found.v_constant[:, :, None, : v.shape[-1]]


def sqnr(reference: torch.Tensor, out: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - out).square().sum().clamp_min(1e-300)))


# The codes


@pytest.mark.parametrize(("kind", "most", "rms"), [(0, 0.125, 0.031), (1, 0.095, 0.027)])
def test_relative_errors_of_p(kind, most, rms) -> None:
    """P = 2^(x + 8) for x in (-8, 0], in steps of float16's 1/64; rounding to e4m3 alone has 2.46 % and 6.25 %."""
    steps = torch.arange(0, 8 * 64, dtype=torch.float64)
    x = -steps / 64
    t = x + emulation.TOP[kind]
    p = emulation._values(emulation._codes(t, kind))
    ratio = p / torch.exp2(x + 8)
    weight = torch.exp2(x + 8).square()
    mean = (ratio * weight).sum() / weight.sum()
    error = ratio / mean - 1
    assert float(error.abs().max()) < most
    assert float(((error.square() * weight).sum() / weight.sum()).sqrt()) < rms


@pytest.mark.parametrize(("kind", "exponential"), [(0, "linear"), (1, "step")])
def test_the_recipe_has_the_same_exponential(kind, exponential) -> None:
    """The kernel's float16 arithmetic moves ties, and no code by more than one."""
    x = -torch.arange(0, 14 * 64, dtype=torch.float64) / 64
    codes = emulation._codes(x + emulation.TOP[kind], kind)
    recipe = e4m3_weights(x * math.log(2), Exponential(exponential), 256.0).to(torch.float8_e4m3fn)
    apart = (codes - recipe.view(torch.uint8)).abs()
    assert float(apart.max()) <= 1
    assert float(apart.mean()) < 0.06


@pytest.mark.parametrize("kind", KINDS)
def test_codes_at_the_ends(kind) -> None:
    top = emulation.TOP[kind]
    t = torch.tensor([top, top - 8, top - 15, top - 16, -5.0, -torch.inf, torch.nan], dtype=torch.float64)
    values = emulation._values(emulation._codes(t, kind))
    assert values[:2].tolist() == [256.0, 1.0]
    assert values[2:6].tolist() == [0.0] * 4
    assert values[6].isnan()


@pytest.mark.parametrize(("kind", "most"), [(emulation.LINEAR, 0.009), (emulation.STEP, 0.003)])
def test_sums_have_no_bias(kind, most) -> None:
    x = -torch.arange(1, 6 * 64, dtype=torch.float64) / 64
    ratio = emulation._values(emulation._codes(x + emulation.TOP[kind], kind)) / torch.exp2(x + 8)
    assert abs(float(ratio.mean()) - 1) < most


# Whole calls


@pytest.mark.parametrize("kind", [*KINDS, emulation.EX2])
def test_v_of_ones_gives_one(kind) -> None:
    q, k = normal(1, 2, 40, 64), normal(1, 2, 300, 64)
    out, _ = attend(q * 2, k, torch.ones_like(k), kind)
    assert float((out - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", [*KINDS, emulation.EX2])
@pytest.mark.parametrize(("heads", "kv_heads", "q_len", "kv_len", "dim", "causal"), [
    (2, 1, 40, 300, 64, False), (4, 2, 150, 150, 64, True), (1, 1, 7, 129, 96, True), (2, 2, 130, 1, 32, False),
])  # fmt: skip
def test_near_exact_attention(kind, heads, kv_heads, q_len, kv_len, dim, causal) -> None:
    q, k, v = normal(2, heads, q_len, dim), normal(2, kv_heads, kv_len, dim), normal(2, kv_heads, kv_len, dim)
    out, lse = attend(q, k, v, kind, causal=causal)
    expected, expected_lse = exact(q, k, v, causal=causal)
    assert sqnr(expected, out) > 23.0
    assert float((lse - expected_lse).abs().max()) < 0.25


def test_the_usual_exponential_costs_a_fifth_of_a_decibel() -> None:
    q, k, v = (normal(1, 4, 1024, 64) for _ in range(3))
    expected, _ = exact(q, k, v)
    found = {kind: sqnr(expected, attend(q, k, v, kind)[0]) for kind in (emulation.STEP, emulation.EX2)}
    assert found[emulation.STEP] > found[emulation.EX2] - 0.2, found


def test_a_mean_of_v_costs_nothing() -> None:
    q, k, v = normal(1, 2, 30, 64), normal(1, 2, 600, 64), normal(1, 2, 600, 64) + 3
    assert sqnr(exact(q, k, v)[0], attend(q, k, v)[0]) > 45.0


def test_rounding_v_has_no_direction() -> None:
    """With scales that are powers of two, bfloat16 less a constant would be rounded the same way at every midpoint."""
    v = normal(1, 1, 4608, 64).bfloat16()
    found = quantized(v[:, :, :1], v, v)
    scale = found.v_scale.repeat_interleave(128, -1)[..., None]
    error = emulation.unpermuted(found.value) * scale + found.v_constant[:, :, None] - v.float()
    by_chance = float(error.std()) / 4608**0.5
    assert float(error.mean(2).square().mean().sqrt()) < 1.4 * by_chance


@pytest.mark.parametrize("size", [1, 4, 16, 64, 256, 4096])
def test_large_logits_are_as_exact_as_their_quantization_allows(size) -> None:
    """Against the same q, k and v in e4m3 with float64 in between: the float16 scores and codes add little."""
    q, k, v = normal(1, 2, 64, 64) * size, normal(1, 2, 512, 64), normal(1, 2, 512, 64)
    found = quantized(q, k, v)
    out, _ = emulation.emulate(found, kind=emulation.STEP)
    assert out.isfinite().all()
    # What 11 bits of a score leave of it, as P moves by it.
    assert sqnr(on_operands(found, 512), out) > {1: 27, 4: 27, 16: 27, 64: 25, 256: 17, 4096: 5}[size]


@pytest.mark.parametrize("place", [0, 127, 128, 299])
def test_one_key_has_it_all(place) -> None:
    q = torch.ones(1, 1, 5, 64, device=DEVICE)
    k, v = normal(1, 1, 300, 64) * 0.1, normal(1, 1, 300, 64)
    k[0, 0, place] += 12.0
    out, _ = attend(q, k, v)
    assert sqnr(v[:, :, place : place + 1].double().expand_as(out), out) > 28.0


def test_a_sink_and_many_small_weights() -> None:
    q, k, v = normal(1, 1, 50, 64), normal(1, 1, 700, 64) * 0.2, normal(1, 1, 700, 64)
    q[..., 0], k[..., 0, 0], v[..., 0, :] = 6.0, 10.0, 0.0
    found = quantized(q, k, v)
    out, _ = emulation.emulate(found, kind=emulation.STEP)
    assert sqnr(on_operands(found, 700), out) > 22.0


def test_keys_that_are_not_used_do_not_matter() -> None:
    q, k, v = normal(2, 2, 20, 64), normal(2, 2, 200, 64), normal(2, 2, 200, 64)
    indices = torch.arange(200, dtype=torch.int32, device=DEVICE).expand(2, -1).contiguous()
    counts = torch.tensor([130, 0], dtype=torch.int32, device=DEVICE)
    k[0, :, 130:], v[0, :, 130:] = torch.nan, torch.inf
    out, lse = attend(q, k, v, keys=Keys(indices, counts))
    expected, _ = exact(q[:1], k[:1, :, :130], v[:1, :, :130])
    assert sqnr(expected, out[:1]) > 23.0
    assert out[1].abs().max() == 0
    assert (lse[1] == -torch.inf).all()


def test_a_nan_stays_in_its_row() -> None:
    q, k, v = normal(1, 1, 20, 64), normal(1, 1, 200, 64), normal(1, 1, 200, 64)
    clean, _ = attend(q, k, v)
    q[0, 0, 3, 5] = torch.nan
    out, _ = attend(q, k, v)
    assert out[0, 0, 3].isnan().all()
    rest = torch.arange(20, device=DEVICE) != 3
    assert torch.equal(out[0, 0, rest], clean[0, 0, rest])
