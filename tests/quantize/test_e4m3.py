import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpattn.errors import InvalidArgumentError
from lpattn.quantize import (
    E4M3_MAX,
    Granularity,
    Recipe,
    channel_mean,
    hadamard_transform,
    quantize_e4m3,
    round_e4m3,
)

SHAPES = {
    Granularity.PER_HEAD: (2, 4),
    Granularity.PER_TOKEN: (2, 4, 37),
    Granularity.PER_BLOCK: (2, 4, 3),
    Granularity.PER_CHANNEL: (2, 4, 24),
}


def test_cast_rounds_to_nearest_even_and_saturates():
    x = torch.tensor([1.97, 1.0625, 1.1875, 2.0**-10, 1.5 * 2.0**-9, 449.0, 1e30, -1e30, math.inf, -math.inf, math.nan])
    want = torch.tensor([2.0, 1.0, 1.25, 0.0, 2.0**-8, 448.0, 448.0, -448.0, math.nan, math.nan, math.nan])
    assert torch.equal(round_e4m3(x).float().nan_to_num(-1), want.nan_to_num(-1))


def test_every_e4m3_value_survives_the_round_trip():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    again = round_e4m3(codes.float())
    assert torch.equal(again.float().nan_to_num(-1), codes.float().nan_to_num(-1))


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("qmax", [448.0, 14.0])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_largest_magnitude_of_each_group_maps_to_qmax(granularity, qmax, power_of_two):
    x = torch.randn(2, 4, 37, 24) * torch.tensor([1e-6, 1.0, 30.0, 1e5])[:, None, None]
    quantized = quantize_e4m3(x, granularity, block=16, qmax=qmax, power_of_two=power_of_two)
    assert quantized.scale.shape == SHAPES[granularity]
    assert quantized.scale.dtype == torch.float32
    data = quantized.data.float().abs()
    if granularity is Granularity.PER_BLOCK:
        top = torch.stack([b.amax((2, 3)) for b in data.split(16, dim=2)], -1)
    else:
        dims = {"per_head": (2, 3), "per_token": (3,), "per_channel": (2,)}[granularity.value]
        top = data.amax(dims)
    if power_of_two:
        assert (torch.frexp(quantized.scale)[0] == 0.5).all()
        assert ((top > qmax / 2 * (1 - 2**-4)) & (top <= qmax)).all()
    else:
        assert (top == qmax).all()
    # The error is at most half an ulp: 2^-4 of the value, or 2^-10 of the scale where e4m3 is subnormal.
    error = (quantized.dequantize() - x).abs()
    assert (error <= torch.maximum(x.abs() * 2**-4, quantized.broadcast_scale() * 2**-10) * (1 + 1e-6)).all()


def test_a_scale_that_is_a_power_of_two_already_stays():
    x = torch.full((1, 1, 4, 2), 448.0 * 2**-7)
    assert (quantize_e4m3(x, Granularity.PER_TOKEN, power_of_two=True).scale == 2**-7).all()
    assert (quantize_e4m3(x * 1.001, Granularity.PER_TOKEN, power_of_two=True).scale == 2**-6).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=24),
    st.sampled_from(list(Granularity)),
    st.floats(1.0, E4M3_MAX),
    st.booleans(),
)
def test_round_trip_error_is_bounded_for_any_values(values, granularity, qmax, power_of_two):
    x = torch.tensor(values).reshape(1, 1, -1, 1)
    quantized = quantize_e4m3(x, granularity, block=5, qmax=qmax, power_of_two=power_of_two)
    assert quantized.scale.isfinite().all()
    assert (quantized.scale > 0).all()
    scale = quantized.broadcast_scale().double()
    error = (quantized.data.double() * scale - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs() * 2**-4, scale * 2**-10) * (1 + 1e-6)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(-40, 40), st.integers(0, 1000))
def test_scaling_the_input_by_a_power_of_two_scales_only_the_scale(exponent, seed):
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(seed))
    one, other = (quantize_e4m3(y, Granularity.PER_BLOCK, block=4) for y in (x, x * 2.0**exponent))
    assert torch.equal(one.data.float(), other.data.float())
    assert torch.equal(one.scale * 2.0**exponent, other.scale)


@pytest.mark.parametrize("granularity", Granularity)
def test_zeros_and_denormals_give_no_nan(granularity):
    for fill in (0.0, 1e-45, 1e-40):
        quantized = quantize_e4m3(torch.full((1, 2, 8, 4), fill), granularity)
        assert quantized.dequantize().isfinite().all()


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_spoils_only_itself(granularity, bad):
    x = torch.randn(1, 2, 20, 8)
    spoiled = x.clone()
    spoiled[0, 1, 3, 2] = bad
    x[0, 1, 3, 2] = 0.0
    got, want = (quantize_e4m3(y, granularity, block=8) for y in (spoiled, x))
    assert torch.equal(got.scale, want.scale)
    assert got.data[0, 1, 3, 2].float().isnan()
    rest = torch.ones_like(x, dtype=torch.bool)
    rest[0, 1, 3, 2] = False
    assert torch.equal(got.data.float()[rest], want.data.float()[rest])


@pytest.mark.parametrize("granularity", Granularity)
def test_unused_tokens_enter_no_scale_and_become_zero(granularity):
    x, used = torch.randn(2, 2, 20, 8), torch.rand(2, 1, 20) < 0.6
    junk = torch.where(used[..., None], x, torch.tensor([math.nan, 1e30]).repeat(4))
    got, want = (quantize_e4m3(y, granularity, block=8, used=used) for y in (junk, x))
    assert torch.equal(got.scale, want.scale)
    assert torch.equal(got.data.float(), want.data.float())
    assert (got.data.float()[~used.expand(2, 2, 20)] == 0).all()


def test_heads_that_share_a_kv_head_share_the_scale():
    x = torch.randn(2, 6, 5, 8)
    quantized = quantize_e4m3(x, Granularity.PER_HEAD, num_kv_heads=2)
    want = torch.stack([x[:, :3].abs().amax((1, 2, 3)), x[:, 3:].abs().amax((1, 2, 3))], 1) / 448
    torch.testing.assert_close(quantized.scale, want)
    torch.testing.assert_close(quantized.dequantize(), x, rtol=2**-4, atol=0.02)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)])
@pytest.mark.parametrize("granularity", Granularity)
def test_empty_tensors(shape, granularity):
    assert quantize_e4m3(torch.empty(shape), granularity).dequantize().shape == shape


def test_wrong_arguments_are_refused_with_the_value():
    x = torch.randn(1, 3, 4, 8)
    with pytest.raises(InvalidArgumentError, match=r"qmax must be in \(0, 448\].*got 500"):
        quantize_e4m3(x, Granularity.PER_HEAD, qmax=500.0)
    with pytest.raises(InvalidArgumentError, match="num_kv_heads must divide the number of heads, 3; got 2"):
        quantize_e4m3(x, Granularity.PER_HEAD, num_kv_heads=2)
    with pytest.raises(InvalidArgumentError, match="block must be at least 1"):
        quantize_e4m3(x, Granularity.PER_BLOCK, block=0)
    with pytest.raises(InvalidArgumentError, match=r"\[B, H, S, D\]; got 2 dimensions"):
        quantize_e4m3(x[0, 0], Granularity.PER_HEAD)
    with pytest.raises(InvalidArgumentError, match=r"block must be a multiple of tile, 128.*got 64"):
        Recipe(block=64)
    with pytest.raises(InvalidArgumentError, match="k_granularity must be one of per_block, per_head; got per_token"):
        Recipe(k_granularity="per_token")
    with pytest.raises(InvalidArgumentError, match="p_scale must be in"):
        Recipe(p_scale=1000.0)
    assert Recipe(k_granularity="per_head").k_granularity is Granularity.PER_HEAD


@pytest.mark.parametrize("dim", [1, 2, 16, 64, 256])
def test_hadamard_is_the_sylvester_matrix_and_orthonormal(dim):
    matrix = hadamard_transform(torch.eye(dim, dtype=torch.float64))
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)], dtype=torch.float64)
    torch.testing.assert_close(matrix, signs * dim**-0.5)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(dim, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 256), st.integers(0, 1000))
def test_hadamard_keeps_dot_products_and_undoes_itself(dim, seed):
    x, y = torch.randn(2, 3, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()
    a, b = hadamard_transform(x), hadamard_transform(y)
    assert a.shape[-1] == 2 ** math.ceil(math.log2(dim))
    torch.testing.assert_close(a @ b.mT, x @ y.mT)
    torch.testing.assert_close(hadamard_transform(a)[..., :dim], x)


def test_hadamard_spreads_an_outlier_channel():
    x = torch.zeros(1, 128)
    x[0, 5] = 1.0
    torch.testing.assert_close(hadamard_transform(x).abs(), torch.full((1, 128), 128**-0.5))


def test_channel_mean_counts_used_finite_sampled_tokens():
    x, used = torch.randn(2, 3, 40, 4), torch.rand(2, 1, 40) < 0.5
    used[1] = False
    want = torch.zeros(2, 3, 1, 4)
    tokens = [t for t in range(0, 40, 4) if used[0, 0, t]]
    want[0] = x[0, :, tokens].mean(1, keepdim=True)
    torch.testing.assert_close(channel_mean(x, used, 4), want)
    junk = torch.where(used[..., None], x, math.nan)
    torch.testing.assert_close(channel_mean(junk, used, 4), want)
    x[0, 1, 0, 2] = math.inf
    assert channel_mean(x).isfinite().all()
    torch.testing.assert_close(channel_mean(torch.full((1, 1, 9, 2), 3e38)), torch.full((1, 1, 1, 2), 3e38))
    with pytest.raises(InvalidArgumentError, match="every must be at least 1"):
        channel_mean(x, every=0)
