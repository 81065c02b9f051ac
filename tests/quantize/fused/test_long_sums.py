"""What V's constant is worth where Hopper's tensor cores add up long rows in FP8: why a sample's mean may do, or not.

They add a step of 32 products to the accumulator by shifting all of them to the largest one's exponent and cutting off
what lies below 13 bits. Products of one sign, which a V with a mean has, so lose more the larger the sum has grown.
"""

from __future__ import annotations

import pytest
import torch

from lpattn.quantize import round_e4m3

BITS = 13
STEP = 32
DIM = 16
ROWS = 8


def hopper_product(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """p @ v, [R, S] and [S, D], as one accumulator of Hopper's FP8 tensor cores has it."""
    sums = torch.zeros(p.shape[0], v.shape[1])
    for start in range(0, p.shape[1], STEP):
        products = p[:, start : start + STEP, None] * v[None, start : start + STEP]
        largest = torch.maximum(sums.abs(), products.abs().amax(1))
        unit = torch.exp2(torch.frexp(largest)[1] - 1.0 - BITS)
        sums = (torch.trunc(sums / unit) + torch.trunc(products / unit[:, None]).sum(1)) * unit
    return sums


def weights(length: int) -> torch.Tensor:
    """Some rows of P, [R, S], before they are normalized."""
    logits = torch.randn(ROWS, length, generator=torch.Generator().manual_seed(1))
    return (logits - logits.amax(1, keepdim=True)).exp()


def values(length: int, mean: torch.Tensor | float = 0.0) -> torch.Tensor:
    return torch.randn(length, DIM, generator=torch.Generator().manual_seed(2)) + mean


def bias(size: float) -> torch.Tensor:
    return size * torch.randn(DIM, generator=torch.Generator().manual_seed(3))


def decibels(v: torch.Tensor, data: torch.Tensor, descale: float, constant: torch.Tensor | float) -> float:
    """What is left of the output, V being data * descale + constant."""
    p = weights(len(v))
    rounded = round_e4m3(256 * p).float() / 256
    out = hopper_product(rounded, data.float()) * descale / p.sum(1, keepdim=True) + constant
    exact = p.double() / p.double().sum(1, keepdim=True) @ v.double()
    return float(10 * torch.log10(exact.square().sum() / (exact - out).square().sum()))


def with_constant(v: torch.Tensor, constant: torch.Tensor | float) -> float:
    descale = float((v - constant).abs().max()) / 448
    return decibels(v, round_e4m3((v - constant) / descale), descale, constant)


# On an H200, torchao's FP8 attention (which subtracts nothing) keeps 39.2, 23.0 and 13.3 dB of data with such a mean,
# and 25.4 dB or more of data without one at each length.
@pytest.mark.parametrize(("length", "measured"), [(512, 39.2), (4608, 23.0), (16384, 13.3)])
def test_the_sums_lose_what_they_were_measured_to_lose(length, measured) -> None:
    assert abs(with_constant(values(length, bias(1.0)), 0.0) - measured) < 3.5
    assert with_constant(values(length), 0.0) > 24.0


MEANS = {
    "none": 0.0,
    "hardly significant": bias(0.1),
    "significant": bias(0.4),
    "in one channel": 0.5 * (torch.arange(DIM) == 7),
}


@pytest.mark.parametrize("length", [4096, 8160])
def test_what_is_subtracted_keeps_what_the_exact_mean_keeps(fused, length) -> None:
    """In 2 dB, of a mean of any size: a sample is enough where sums are no longer than that."""
    v = torch.stack([values(length, mean) for mean in MEANS.values()])[None]
    on_device = v.to(fused.device)
    found = fused.quantize_per_head(on_device[:, :, :1], on_device, on_device)
    data, descales = found.value.cpu()[0], found.v_descale.cpu()[0]
    constants = found.constants[1].cpu()[0, :, :DIM]
    kept = {}
    for h, name in enumerate(MEANS):
        one = decibels(v[0, h], data[:, h], float(descales[h]), constants[h])
        kept[name] = (one, with_constant(v[0, h], v[0, h].mean(0)), with_constant(v[0, h], 0.0))
    for name, (one, exact, nothing) in kept.items():
        assert one > 24.0, name
        assert one > exact - 2.0, name
        assert one > nothing - 1.0, name
