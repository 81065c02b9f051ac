"""fp8_fa3 on the CPU: what it hands to the kernel, and that a call means what it means to exact attention.

Triton's interpreter quantizes, and the kernel is a spy in plain PyTorch.
"""

from __future__ import annotations

import math

import pytest
import torch

import lpattn
from lpattn.ledger import Ledger
from lpattn.rope import rotate
from lpattn.settings import make_settings
from lpattn.types import HadamardMode, Provenance

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of inf times 0

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# e4m3 gives about 25 dB on such data; a wrong key, head, lane or scale gives less than 15.
FLOOR = 22.0


def inputs(batch=1, heads=2, kv_heads=1, q_len=33, kv_len=33, dim=64, dtype=torch.bfloat16, seed=0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def make(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)

    return make(heads, q_len), make(kv_heads, kv_len), make(kv_heads, kv_len)


def exact(q, k, v, scale=None, causal=False, used=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention and log-sum-exp in float64. Keys that are not used ([B, kv_len]) may hold anything."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    seen = torch.ones(len(q), 1, q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if used is not None:
        seen = seen & used[:, None, None]
        v = v.masked_fill(~used[:, None, :, None], 0.0)
    logits = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return weights @ v, logits.logsumexp(-1)


def attend(backend, q, k, v, **options):
    return lpattn.low_precision_sdpa(q, k, v, enable_gqa=True, backend=backend.name, **options)


def lse_limit(q, k, scale) -> float:
    """How far the rounding of q and k may move a log-sum-exp.

    2.65 % rms each (ulp^2 / 12 over a binade) move a logit by 0.0375 of the size of a term times sqrt(D); 6 standard
    deviations of that.
    """
    terms = q.float().square().mean().sqrt() * (k.float() - k.float().mean(2, keepdim=True)).square().mean().sqrt()
    return 6 * 0.0375 * float(terms) * math.sqrt(q.shape[-1]) * abs(scale) + 1e-5


# What the operator gets


@pytest.mark.parametrize("causal", [False, True])
def test_the_operator_gets_e4m3_and_descales_per_kv_head(backend, spy, causal) -> None:
    q, k, v = inputs(batch=2, heads=4, kv_heads=2, q_len=17, kv_len=17)
    attend(backend, q, k, v, is_causal=causal, scale=0.25)
    given = spy.given
    for name, x in (("q", q), ("k", k), ("v", v)):
        assert given[name].dtype == torch.float8_e4m3fn
        assert given[name].shape == x.transpose(1, 2).shape
        assert given[name].stride(3) == 1
        descale = given[f"{name}_descale"]
        assert (descale.dtype, tuple(descale.shape)) == (torch.float32, (2, 2))
        assert descale.is_contiguous()
    assert given["softmax_scale"] == 0.25
    assert given.get("is_causal", False) is causal
    assert given["num_splits"] == 1
    names = {"q", "k", "v", "q_descale", "k_descale", "v_descale", "softmax_scale", "num_splits", "is_causal"}
    assert set(given) | {"is_causal"} == names


def test_used_keys_come_first_and_zeros_follow(backend, spy) -> None:
    q, k, v = inputs(batch=2, kv_len=20, dtype=torch.float32)
    used = torch.zeros(2, 20, dtype=torch.bool)
    used[0, [3, 4, 11, 19]] = True
    used[1] = True
    k, v = (x.masked_fill(~used[:, None, :, None], torch.nan) for x in (k, v))
    attend(backend, q, k, v, attn_mask=used[:, None, None])
    lengths = spy.given["seqused_k"]
    assert lengths.dtype == torch.int32
    assert lengths.tolist() == [4, 20]
    assert lengths.is_contiguous()
    for name in "kv":
        data = spy.given[name].float()
        assert not data[0, 4:].any()
        assert data[0, :4].any()
    values = spy.given["v"][0, :4, 0].float() * spy.given["v_descale"][0, 0]
    direction = torch.nn.functional.cosine_similarity(values, v[0, 0, used[0]])
    assert (direction > 0.9).all()  # in their order; what was subtracted turns them a little


@pytest.mark.parametrize(("scale", "expected"), [(-0.5, 0.5), (0.0, 1.0), (1e-45, 1.0), (2.0, 2.0)])
def test_the_operator_only_sees_positive_scales(backend, spy, scale, expected) -> None:
    q, k, v = inputs(q_len=5, kv_len=5)
    attend(backend, q, k, v, scale=2.0)
    data = spy.given["q"].float()
    attend(backend, q, k, v, scale=scale)
    assert spy.given["softmax_scale"] == expected
    assert torch.equal(spy.given["q"].float(), data * (0.0 if abs(scale) < 1e-30 else math.copysign(1.0, scale)))


# What a call means


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.5, 0.0, -0.125, 1e-45])
def test_the_meaning_is_that_of_sdpa(backend, causal, scale) -> None:
    q, k, v = inputs()
    k = k + 3 * torch.randn(64).to(k)  # what smoothing takes from the logits must come back in the log-sum-exp
    out, lse = attend(backend, q, k, v, is_causal=causal, scale=scale, return_lse=True)
    expected, expected_lse = exact(q, k, v, scale, causal)
    assert sqnr_of(out, expected) > FLOOR
    assert (lse - expected_lse).abs().max() < lse_limit(q, k, 0.125 if scale is None else scale)
    assert (lse.dtype, lse.shape) == (torch.float32, q.shape[:3])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (6, 2)])
def test_grouped_heads(backend, heads, kv_heads) -> None:
    q, k, v = inputs(batch=2, heads=heads, kv_heads=kv_heads, q_len=9, kv_len=21)
    # Groups of different magnitudes: a descale or constant taken from the wrong group shows.
    k = k * torch.logspace(-1, 1, kv_heads).to(k.dtype)[:, None, None]
    v = (v + 1) * torch.logspace(1, -2, kv_heads).to(v.dtype)[:, None, None]
    out, lse = attend(backend, q, k, v, return_lse=True)
    expected, expected_lse = exact(q, k, v)
    for head in range(heads):
        assert sqnr_of(out[:, head], expected[:, head]) > FLOOR - 4  # where logits are large, errors are
    assert (lse - expected_lse).abs().max() < lse_limit(q, 10 * k, 0.125)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 40), (40, 1), (70, 130)])
def test_queries_and_keys_of_different_lengths(backend, q_len, kv_len) -> None:
    q, k, v = inputs(q_len=q_len, kv_len=kv_len)
    assert sqnr_of(attend(backend, q, k, v), exact(q, k, v)[0]) > FLOOR


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("hadamard", ["qkv", "v_only"])
def test_hadamard_modes(backend, spy, dtype, hadamard) -> None:
    spy.dtype = torch.float32
    q, k, v = inputs(dtype=dtype)
    k[..., 5] += 20
    v[..., 9] *= 30
    out, lse = attend(backend, q, k, v, hadamard=hadamard, return_lse=True)
    expected, expected_lse = exact(q, k, v)
    assert sqnr_of(out, expected) > FLOOR
    assert (lse - expected_lse).abs().max() < lse_limit(q, k, 0.125)
    # A rotated v has its outlier channel spread: each has a share of it.
    data = spy.given["v"].float()[0, :, 0]
    assert data.square().mean(0).min() > 0.1 * data.square().mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_output_has_the_dtype_of_the_inputs(backend, dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    out = attend(backend, q, k, v)
    assert out.dtype == dtype
    assert sqnr_of(out, exact(q, k, v)[0]) > FLOOR


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_mean_of_v_is_not_quantized(backend, dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    v = v + 30 * torch.randn(64).to(dtype)
    # The mean is 29.5 dB above what is quantized with 22 dB or more.
    assert sqnr_of(attend(backend, q, k, v), exact(q, k, v)[0]) > FLOOR + 25


def test_float16_at_the_end_of_its_range_stays_finite(backend) -> None:
    q, k, v = inputs(dtype=torch.float16)
    v = torch.full_like(v, 65504.0)
    assert (attend(backend, q, k, v) == 65504.0).all()


# Key padding


def padding() -> dict[str, torch.Tensor]:
    at = torch.arange(40)
    return {
        "right": at < torch.tensor([[40], [23]]),
        "left": at >= torch.tensor([[31], [0]]),
        "gaps": torch.stack((at % 3 != 1, (at * 7) % 11 < 4)),
        "none and one": torch.stack((at < 0, at == 17)),
    }


@pytest.mark.parametrize("name", padding())
@pytest.mark.parametrize("hadamard", ["none", "qkv"])
def test_key_padding(backend, spy, name, hadamard) -> None:
    spy.dtype = torch.float32 if hadamard != "none" else torch.bfloat16
    used = padding()[name]
    q, k, v = inputs(batch=2, q_len=9, kv_len=40, dtype=torch.float32)
    k, v = (x + 2 * torch.randn(64) for x in (k, v))
    k, v = (x.masked_fill(~used[:, None, :, None], torch.nan) for x in (k, v))
    masks = [used[:, None, None], used[:, None, None].expand(2, 2, 9, 40)]
    if name == "left":
        masks.append(used[:1, None, None].expand(2, 1, 9, 40))
    for mask in masks:
        out, lse = attend(backend, q, k, v, attn_mask=mask, hadamard=hadamard, return_lse=True)
        seen = mask[:, 0, 0]
        expected, expected_lse = exact(q, k, v.masked_fill(~seen[:, None, :, None], 0.0), used=seen)
        for b in range(2):
            if seen[b].any():
                assert sqnr_of(out[b], expected[b]) > FLOOR
                assert (lse[b] - expected_lse[b]).abs().max() < lse_limit(q, k[:, :, seen[b]][b : b + 1], 0.125)
            else:
                assert not out[b].any()
                assert (lse[b] == -torch.inf).all()


def test_an_entry_without_keys_is_as_the_reference_has_it(backend) -> None:
    q, k, v = inputs(batch=2, q_len=5, kv_len=12)
    mask = torch.tensor([[False], [True]]).expand(2, 12)[:, None, None]
    ours = attend(backend, q, k, v, attn_mask=mask, return_lse=True)
    theirs = lpattn.low_precision_sdpa(
        q, k, v, attn_mask=mask, enable_gqa=True, backend="bf16_reference", return_lse=True
    )
    assert torch.equal(ours[0][0], theirs[0][0])
    assert torch.equal(ours[1][0], theirs[1][0])


def test_other_masks_run_exactly_or_not_at_all(backend, spy) -> None:
    q, k, v = inputs(q_len=9, kv_len=12, kv_heads=2)
    causal = torch.ones(9, 12, dtype=torch.bool).tril(3)
    for mask in (causal, causal.expand(1, 2, 9, 12), torch.zeros(9, 12, dtype=q.dtype), torch.zeros(1, 1, 1, 12).to(q)):
        with pytest.raises(lpattn.UnsupportedCallError, match="takes key-padding masks only"):
            attend(backend, q, k, v, attn_mask=mask)
    assert spy.calls == 0


# Rotation


def tables(shape: tuple[int, ...], seed: int = 1) -> Tensors:
    angle = 3 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return angle.cos(), angle.sin()  # whose halves differ


ROTATIONS = {
    "half-split": ((20, 1, 64), False),
    "interleaved": ((20, 1, 64), True),
    "half-split on some lanes": ((20, 1, 24), False),
    "interleaved on some lanes": ((20, 1, 24), True),
    "a table per sequence": ((2, 20, 1, 64), False),
    "a table per sequence and head": ((2, 20, 2, 32), True),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotation(backend, spy, name) -> None:
    shape, interleaved = ROTATIONS[name]
    q, k, v = (x.transpose(1, 2) for x in inputs(batch=2, kv_heads=2, q_len=20, kv_len=20, dtype=torch.float32))
    cos, sin = tables(shape)
    ledger = Ledger()
    settings = make_settings(backend.name, None, None, Provenance.ARGUMENT)
    fused = lpattn.execute.attend_rope(
        q, k, v, cos, sin, interleaved=interleaved, settings=settings, ledger=ledger, return_lse=True
    )
    assert ledger.rope == "fused"
    assert ledger.low == {backend.name: 1}
    q, k = (rotate(x, cos, sin, interleaved).transpose(1, 2) for x in (q, k))
    v = v.transpose(1, 2)
    expected, expected_lse = exact(q, k, v)
    assert sqnr_of(fused[0], expected) > FLOOR
    assert (fused[1] - expected_lse).abs().max() < lse_limit(q, k, 0.125)
    # float32 leaves so little between the two that hardly a value is rounded to another neighbour.
    before = spy.given
    assert sqnr_of(fused[0], attend(backend, q, k, v).double()) > 35
    for name in "qk":
        assert (before[name].float() != spy.given[name].float()).float().mean() < 1e-3


@pytest.mark.parametrize("hadamard", HadamardMode)
def test_rotation_of_keys_at_other_positions(backend, spy, hadamard) -> None:
    spy.dtype = torch.float32 if hadamard is not HadamardMode.NONE else torch.bfloat16
    q, k, v = (x.transpose(1, 2) for x in inputs(q_len=7, kv_len=20, dtype=torch.float16))
    cos, sin = tables((7, 1, 64))
    cos_k, sin_k = tables((1, 20, 1, 64), seed=2)
    out = lpattn.low_precision_rope_sdpa(
        q, k, v, cos, sin, cos_k=cos_k, sin_k=sin_k, hadamard=hadamard, backend=backend.name
    )
    q, k = rotate(q, cos, sin, False), rotate(k, cos_k, sin_k, False)
    assert sqnr_of(out, exact(*(x.transpose(1, 2) for x in (q, k, v)))[0]) > FLOOR


def test_rotation_with_key_padding(backend) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(q_len=20, kv_len=20))
    used = torch.arange(20)[None] % 3 != 0
    k, v = (x.masked_fill(~used[:, :, None, None], torch.nan) for x in (k, v))
    cos, sin = tables((20, 1, 64))
    out = lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, attn_mask=used[:, None, None], backend=backend.name)
    q, k = (rotate(x, cos, sin, False) for x in (q, k))
    assert sqnr_of(out, exact(*(x.transpose(1, 2) for x in (q, k, v)), used=used)[0]) > FLOOR


# Memory


def test_inputs_are_not_changed_and_the_output_has_bshd_memory(backend) -> None:
    q, k, v = inputs()
    before = [x.clone() for x in (q, k, v)]
    out = attend(backend, q, k, v)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
    assert out.transpose(1, 2).is_contiguous()


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    batch, heads, tokens, dim = x.shape
    wide = torch.full((batch, heads, tokens + 3, 2 * dim), torch.nan, dtype=x.dtype)
    wide[:, :, 2:-1, :dim] = x
    every_other = torch.full((batch, heads, tokens, 2 * dim), torch.nan, dtype=x.dtype)
    every_other[..., ::2] = x
    return [
        x.contiguous(),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        wide[:, :, 2:-1, :dim],
        every_other[..., ::2],
    ]


def test_strides_make_no_difference_and_no_copies(backend, monkeypatch) -> None:
    q, k, v = inputs()
    read = []
    from lpattn.quantize.fused.launcher import Launch

    run = Launch.on
    monkeypatch.setattr(
        Launch,
        "on",
        lambda self, stream, pointers, tensors: (read.append(pointers[:3]), run(self, stream, pointers, tensors)),
    )
    results = []
    for views in zip(layouts(q), layouts(k), layouts(v), strict=True):
        read.clear()
        results.append(attend(backend, *views))
        assert tuple(x.data_ptr() for x in views) == read[0] == read[1]
    assert all(torch.equal(r, results[0]) for r in results)


# What is not finite


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_where_exact_attention_has_a_nan(backend, which, bad) -> None:
    q, k, v = inputs(batch=2, heads=2, kv_heads=2, q_len=9, kv_len=9)
    tensors = {"q": q, "k": k, "v": v}
    clean = attend(backend, q, k, v)
    tensors[which][1, 1, 5, 9] = torch.nan
    expected, expected_lse = exact(q, k, v)
    tensors[which][1, 1, 5, 9] = bad
    out, lse = attend(backend, q, k, v, return_lse=True)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())
    assert out[~out.isnan()].isfinite().all()
    touched = expected.isnan()
    assert sqnr_of(out[~touched], clean[~touched].double()) > FLOOR


def test_a_group_of_bad_tokens_only_leaves_the_others_alone(backend) -> None:
    q, k, v = inputs(batch=2, heads=2, kv_heads=2, q_len=9, kv_len=9)
    k[0, 1] = torch.nan
    out = attend(backend, q, k, v)
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()
    assert out[1].isfinite().all()


def sqnr_of(out: torch.Tensor, ref: torch.Tensor) -> float:
    noise = (ref.double() - out.double()).square().sum()
    assert noise.isfinite()
    return float(10 * torch.log10(ref.double().square().sum() / noise.clamp_min(1e-300)))
