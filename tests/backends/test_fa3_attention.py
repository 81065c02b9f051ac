"""What fp8_fa3 hands to the kernel, and what it makes of the result; the kernel is a spy on the CPU."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lpattn.backends.fa3 import FA3Backend
from lpattn.backends.fa3.operands import quantize_qk, quantize_v
from lpattn.quantize import Granularity, quantize_e4m3
from lpattn.types import AttentionCall, CausalKind


def call_for(query: torch.Tensor, key: torch.Tensor, **changes) -> AttentionCall:
    batch, heads, q_len, dim = query.shape
    call = AttentionCall(batch, heads, key.shape[1], q_len, key.shape[2], dim, dim, query.dtype, "cuda")
    return dataclasses.replace(call, **({"softmax_scale": dim**-0.5} | changes))


def inputs(batch=2, heads=4, kv_heads=2, q_len=33, kv_len=33, dim=64, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)

    return make(heads, q_len), make(kv_heads, kv_len), make(kv_heads, kv_len)


def exact(q, k, v, scale, causal=False):
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    logits = q @ k.mT * scale
    if causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def sqnr(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float(10 * torch.log10(ref.square().sum() / (ref - out.double()).square().sum()))


@pytest.fixture
def backend(install, monkeypatch) -> FA3Backend:
    install({})
    return FA3Backend()


@pytest.mark.parametrize("causal", [CausalKind.NONE, CausalKind.TOP_LEFT])
def test_the_operator_gets_e4m3_in_bshd_and_descales_per_kv_head(backend, spy, causal) -> None:
    q, k, v = inputs()
    backend.attention(q, k, v, call_for(q, k, causal=causal, softmax_scale=0.25))
    given = spy.given
    for name, x in (("q", q), ("k", k), ("v", v)):
        assert given[name].dtype == torch.float8_e4m3fn
        assert given[name].shape == x.transpose(1, 2).shape
        assert given[name].is_contiguous()
        descale = given[f"{name}_descale"]
        assert (descale.dtype, tuple(descale.shape)) == (torch.float32, (2, 2))
        assert descale.is_contiguous()
    assert given["softmax_scale"] == 0.25
    assert given.get("is_causal", False) is (causal is CausalKind.TOP_LEFT)
    assert given["num_splits"] == 1
    names = {"q", "k", "v", "q_descale", "k_descale", "v_descale", "softmax_scale", "num_splits", "is_causal"}
    assert set(given) | {"is_causal"} == names


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.125, 0.5, 0.0, -0.125, 1e-45])
def test_the_meaning_is_that_of_sdpa(backend, spy, causal, scale) -> None:
    q, k, v = inputs()
    kind = CausalKind.TOP_LEFT if causal else CausalKind.NONE
    out, lse = backend.attention(q, k, v, call_for(q, k, causal=kind, softmax_scale=scale, return_lse=True))
    expected, expected_lse = exact(q, k, v, scale, causal)
    assert sqnr(out, expected) > 22
    # Logits are off by e4m3's rounding, in proportion to the scale.
    assert (lse - expected_lse).abs().max() < 0.05 + 1.6 * abs(scale)
    assert spy.given["softmax_scale"] > 0
    if abs(scale) < 1e-30:
        assert (lse - expected_lse).abs().max() < 1e-5


def test_inputs_are_not_changed_and_the_output_has_bshd_memory(backend) -> None:
    q, k, v = inputs()
    before = [x.clone() for x in (q, k, v)]
    out = backend.attention(q, k, v, call_for(q, k))
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


def test_strides_make_no_difference(backend, spy) -> None:
    q, k, v = inputs()
    results = []
    for q_, k_, v_ in zip(layouts(q), layouts(k), layouts(v), strict=True):
        results.append(backend.attention(q_, k_, v_, call_for(q, k)))
    assert all(torch.equal(r, results[0]) for r in results)


def test_strided_inputs_are_read_in_place(backend) -> None:
    q, k, v = inputs()
    copies = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
                copies.append((func, args))
            return func(*args, **(kwargs or {}))

    with Watch():
        backend.attention(q, k, v, call_for(q, k))
    # The spy itself casts, below the mode's sight or not: what counts is copies of the model's own tensors.
    sizes = {x.numel() for x in (q, k, v)}
    assert [c for c in copies if c[1][0].dtype == q.dtype and c[1][0].numel() in sizes] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_output_has_the_dtype_of_the_inputs(backend, dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    out, lse = backend.attention(q, k, v, call_for(q, k, return_lse=True))
    assert out.dtype == dtype
    assert (lse.dtype, tuple(lse.shape)) == (torch.float32, (2, 4, 33))
    assert sqnr(out, exact(q, k, v, 0.125)[0]) > 22


def test_float16_at_the_end_of_its_range_stays_finite(backend) -> None:
    q, k, v = inputs(dtype=torch.float16)
    v = torch.full_like(v, 65504.0)
    assert backend.attention(q, k, v, call_for(q, k)).isfinite().all()


# Quantization


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_the_per_head_recipe_bit_for_bit(dtype, kv_heads) -> None:
    q, _, v = inputs(dtype=dtype, kv_heads=4)
    q = q * torch.tensor([0.01, 1.0, 30.0, 500.0])[:, None, None].to(dtype)
    for x, groups, (data, descale) in (
        (q, kv_heads, quantize_qk(q, kv_heads)),
        (v, 4, quantize_v(v)),
        (v, 4, quantize_qk(v, 4)),
    ):
        expected = quantize_e4m3(x, Granularity.PER_HEAD, num_kv_heads=groups)
        assert torch.equal(descale, expected.scale)
        assert torch.equal(data.transpose(1, 2).float(), expected.data.float())


def test_the_sign_of_a_scale_goes_into_the_data() -> None:
    q, _, _ = inputs()
    data, descale = quantize_qk(q, 2)
    negative, same = quantize_qk(q, 2, -1.0)
    zero, _ = quantize_qk(q, 2, 0.0)
    assert torch.equal(descale, same)
    assert torch.equal(negative.float(), -data.float())
    assert not zero.float().any()


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-30, 1e30, 3e38])
def test_no_magnitude_makes_a_descale_or_value_that_is_not_finite(magnitude) -> None:
    x = torch.full((1, 2, 5, 64), magnitude, dtype=torch.bfloat16)
    for data, descale in (quantize_qk(x, 1), quantize_qk(x, 1, -1.0), quantize_qk(x, 1, 0.0), quantize_v(x)):
        assert data.float().isfinite().all()
        assert (descale.isfinite() & (descale > 0)).all()


def test_products_of_the_smallest_descales_are_normal_numbers() -> None:
    zero = torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16)
    descale = quantize_qk(zero, 1)[1].item()
    assert descale * descale / math.sqrt(256) * math.log2(math.e) > 1e3 * torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_element_of_q_or_k_takes_its_token_and_no_other(bad) -> None:
    q, _, _ = inputs()
    expected, scale = quantize_qk(q, 2)
    q = q.clone()
    largest = q.abs().amax()
    q[0, 1, 7, 3] = bad
    data, descale = quantize_qk(q, 2)
    assert data[0, 7, 1].float().isnan().all()
    data[0, 7, 1] = expected[0, 7, 1]
    if not (q[0, 1, 7].abs() == largest).any():
        assert torch.equal(descale, scale)
    assert torch.equal(data.float(), expected.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_element_of_v_takes_nothing_else(bad) -> None:
    _, _, v = inputs()
    v = v.clone()
    v[0, 1, 7, 3] = 0.0
    expected, scale = quantize_v(v)
    v[0, 1, 7, 3] = bad
    data, descale = quantize_v(v)
    assert torch.equal(descale, scale)
    assert data[0, 7, 1, 3].float().isnan()
    data[0, 7, 1, 3] = 0.0
    assert torch.equal(data.float(), expected.float())


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_nan_stays_where_exact_attention_has_one(backend, which) -> None:
    q, k, v = inputs()
    tensors = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
    tensors[which][1, 1, 5, 9] = torch.nan
    q, k, v = tensors.values()
    out, lse = backend.attention(q, k, v, call_for(q, k, return_lse=True))
    expected, expected_lse = exact(q, k, v, 0.125)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())


def test_a_group_of_bad_tokens_only_leaves_the_others_alone(backend) -> None:
    q, k, v = inputs()
    k = k.clone()
    k[0, 1] = torch.nan
    out = backend.attention(q, k, v, call_for(q, k))
    assert out[0, 2:].isnan().all()
    assert out[0, :2].isfinite().all()
    assert out[1].isfinite().all()
