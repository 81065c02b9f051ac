"""Inputs on which low-precision attention goes wrong easily: against exact attention, with floors in dB."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F


def recipes(kernel):
    return {"fp8": kernel.fused.Precision.E4M3, "int8": kernel.fused.Precision.INT8_F16}


def run(kernel, q, k, v, recipe, **options):
    return kernel.check(q, k, v, precision=recipes(kernel)[recipe], **options)[:2]


def exact(q, k, v, **options):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True, **options)


@pytest.fixture(params=["fp8", "int8"])
def recipe(request):
    return request.param


def test_normal_inputs(kernel, recipe, sqnr) -> None:
    q, k, v = (kernel.normal(1, 1, 256, 64) for _ in range(3))
    out, lse = run(kernel, q, k, v, recipe)
    assert sqnr(out, exact(q, k, v)) > {"fp8": 24.5, "int8": 35}[recipe]
    assert (lse - (q @ k.mT / 8).logsumexp(-1)).abs().max() < {"fp8": 0.05, "int8": 0.02}[recipe]


def test_a_bias_per_channel_costs_nothing(kernel, recipe, sqnr) -> None:
    q, k, v = (kernel.normal(1, 1, 300, 64) for _ in range(3))
    k += 4 * kernel.normal(64)
    v += kernel.normal(64) * 4
    assert sqnr(run(kernel, q, k, v, recipe)[0], exact(q, k, v)) > 45


def test_v_of_ones_gives_ones(kernel, recipe) -> None:
    q, k = (3 * kernel.normal(1, 2, 200, 32) for _ in range(2))
    out, _ = run(kernel, q, k, torch.ones_like(k), recipe)
    assert (out - 1).abs().max() < 1e-6


def test_weights_sum_to_one_whatever_v_is_smoothed_by(kernel, recipe) -> None:
    q, k = (kernel.normal(1, 2, 200, 32) for _ in range(2))
    v = torch.ones_like(k)
    v[:, :, 100:] = -1.0  # the mean is 0: what comes out is the difference of two sums of weights
    out, _ = run(kernel, q, k, v, recipe)
    assert (out.amax(-1) - out.amin(-1)).abs().max() < 1e-6
    assert (out - exact(q, k, v)).abs().max() < {"fp8": 0.05, "int8": 0.01}[recipe]


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_large_logits(kernel, recipe, size, sqnr) -> None:
    q, k, v = (kernel.normal(1, 1, 200, 32) for _ in range(3))
    out, _ = run(kernel, q * size, k, v, recipe)
    # From some size on, which key wins is a matter of the last bits of q and k.
    floor = {"fp8": {1: 24, 4: 15, 16: 8, 64: 5}, "int8": {1: 35, 4: 27, 16: 20, 64: 13}}[recipe][size]
    assert sqnr(out, exact(q * size, k, v)) > floor


def test_one_hot_rows(kernel, recipe, sqnr) -> None:
    k = torch.eye(32, device=kernel.device).repeat(5, 1)[None, None, :150]
    q, v = 900 * torch.eye(32, device=kernel.device)[None, None], kernel.normal(1, 1, 150, 32)
    out, lse = run(kernel, q, k, v, recipe)
    assert sqnr(out, exact(q, k, v)) > {"fp8": 24, "int8": 20}[recipe]
    assert lse.isfinite().all()


@pytest.mark.parametrize("first", [0, 149])
def test_a_sink(kernel, recipe, first, sqnr) -> None:
    q, k, v = (kernel.normal(1, 1, 150, 32) for _ in range(3))
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, first, 0] = 12.0
    v[:, :, first] *= 0.01
    assert sqnr(run(kernel, q, k, v, recipe)[0], exact(q, k, v)) > {"fp8": 12, "int8": 25}[recipe]


def test_many_small_weights_beside_a_peak(kernel, recipe, sqnr) -> None:
    """3999 keys with 2^-11 of the largest weight: together, two thirds of the row."""
    q, k = torch.zeros(1, 1, 4, 32, device=kernel.device), torch.zeros(1, 1, 4000, 32, device=kernel.device)
    q[..., 0], k[:, :, 0, 0] = 1.0, 11 * math.log(2) * 32**0.5
    v = kernel.normal(1, 1, 4000, 32) + 2
    v[:, :, 0] = 0.0
    # How large the peak is depends on how one value of k is rounded.
    assert sqnr(run(kernel, q, k, v, recipe)[0], exact(q, k, v)) > {"fp8": 18, "int8": 30}[recipe]


def test_a_needle_at_the_last_key_and_one_behind_it(kernel, recipe, sqnr) -> None:
    q, k, v = (kernel.normal(1, 1, 130, 32) for _ in range(3))
    q[:, :, 128] = 3.0
    k[:, :, 128] = 3.0
    k[:, :, 129] = 30.0
    out, _ = run(kernel, q, k, v, recipe, band=kernel.Band(after=0))
    assert sqnr(out[:, :, 128], v[:, :, 128]) > 25


@pytest.mark.parametrize("channel", ["zero", "constant", "outlier"])
def test_channels_that_are_unlike_the_others(kernel, recipe, channel, sqnr) -> None:
    q, k, v = (kernel.normal(1, 1, 150, 32) for _ in range(3))
    for x in (k, v):
        x[..., 3] = {"zero": 0.0, "constant": 50.0, "outlier": 30 * x[..., 3]}[channel]
    floor = {"fp8": 14, "int8": 14}[recipe]
    assert sqnr(run(kernel, q, k, v, recipe)[0], exact(q, k, v)) > floor


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_scales(kernel, recipe, scale, sqnr) -> None:
    q, k, v = (kernel.normal(1, 1, 150, 32) for _ in range(3))
    out, _ = run(kernel, q, k, v + 1, recipe, scale=scale)
    assert sqnr(out, exact(q, k, v + 1, scale=scale)) > 20


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_where_exact_attention_has_them(kernel, recipe, which, bad) -> None:
    if kernel.interpreted and recipe == "fp8":
        pytest.skip("the interpreter takes e4m3's NaN for 480")
    tensors = kernel.make(batch=2, heads=2, kv_heads=2, q_len=300, kv_len=300)
    tensors[which][1, 0, 200, 3] = bad
    out, lse = run(kernel, *tensors, recipe, band=kernel.Band(after=0))
    spoiled = out.isnan().any(-1)
    assert spoiled[1, 0].any()
    assert not spoiled[0].any()
    assert not spoiled[1, 1].any()
    if recipe == "fp8" or which != 1:  # int8 has no NaN: the scale of k's block is
        assert not spoiled[1, 0, :128].any()  # no tile of these has it
    if which == 0:
        assert spoiled[1, 0].nonzero().flatten().tolist() == [200]
    assert lse.isnan().any() or which == 2


def test_blocks_of_v_that_are_zero_or_hugely_different(kernel) -> None:
    q, k, v = kernel.make(heads=1, q_len=16, kv_len=700)
    v[:, :, :128] *= 1e30
    v[:, :, 128:384] = v[:, :, :128].mean(2, keepdim=True)
    v[:, :, 384:512] *= 1e-25
    out, _, _ = kernel.check(q, k, v)
    assert out.isfinite().all()


@pytest.mark.parametrize("first", [1e-30, 1e30])
def test_an_accumulator_survives_scales_of_v_that_are_far_apart(kernel, first) -> None:
    """Whatever the quantization makes of V, acc and what it is multiplied with from block to block stay finite."""
    q, k, v = kernel.make(heads=1, kv_heads=1, q_len=16, kv_len=256)
    quantized = kernel.fused.quantize_per_block(q, k, v, factor=32**-0.5 * math.log2(math.e), qk_max=14.0)
    quantized.v_scale[..., 0], quantized.v_scale[..., 1] = first, 1.0 / first
    out, _ = kernel.attention.attend(quantized, kernel.shape(32), torch.float32)
    assert out.isfinite().all()


def test_tokens_that_a_mask_hides_from_all_enter_no_scale(kernel, recipe) -> None:
    q, k, v = kernel.make(q_len=20, kv_len=200)
    mask = torch.rand(20, 200, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, ::3] = False
    mask = mask.to(kernel.device)
    out, lse = run(kernel, q, k, v, recipe, mask=mask)
    for x in (k, v):
        x[:, :, ::3] = 1e4
    again, lse_again = run(kernel, q, k, v, recipe, mask=mask)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
