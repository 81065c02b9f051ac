"""The approximate exponentials: their documented errors, their ends, and what they do to attention."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lpattn.errors import InvalidArgumentError
from lpattn.quantize import PER_BLOCK, Exponential, Recipe, RowSum, e4m3_weights, emulated_attention, round_e4m3

APPROXIMATE = [e for e in Exponential if e is not Exponential.EXACT]
OCTAVES = -torch.arange(0, 8 * 4096, dtype=torch.float64) / 4096


def weights(exponential: Exponential, octaves: torch.Tensor = OCTAVES) -> torch.Tensor:
    if exponential is Exponential.EXACT:
        return round_e4m3(torch.exp2(octaves + 8).float()).double()
    return e4m3_weights(octaves * math.log(2), exponential, 256.0)


@pytest.mark.parametrize(
    ("exponential", "bias", "most", "around", "rms"),
    [
        ("exact", -0.0007, 0.059, 0.0595, 0.0265),
        ("step", 0.002, 0.074, 0.072, 0.0283),
        ("linear", 0.007, 0.073, 0.080, 0.0324),
    ],
)
def test_the_errors_are_those_of_the_docstring(exponential, bias, most, around, rms) -> None:
    error = weights(Exponential(exponential)) / torch.exp2(OCTAVES + 8) - 1
    mean = float(error.mean())
    assert mean == pytest.approx(bias, abs=5e-4)
    assert float(error.abs().max()) == pytest.approx(most, abs=5e-4)
    assert float((error - mean).abs().max()) == pytest.approx(around, abs=5e-4)
    assert float(error.square().mean().sqrt()) == pytest.approx(rms, abs=1e-4)


@pytest.mark.parametrize(
    ("exponential", "spread", "alike"), [("exact", 0.001, 0.018), ("step", 0.003, 0.023), ("linear", 0.008, 0.04)]
)
def test_sums_of_rows_are_off_more_where_logits_are_nearly_equal(exponential, spread, alike) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(64, 4096, dtype=torch.float64, generator=generator) / math.log(2)

    def bias(deviation: float) -> float:
        octaves = deviation * (normal - normal.amax(-1, keepdim=True))
        sums = torch.exp2(octaves + 8).sum(-1)
        return abs(float((weights(Exponential(exponential), octaves).sum(-1) / sums).mean() - 1))

    assert max(bias(deviation) for deviation in (0.3, 1.0)) < spread
    assert max(map(bias, (0.003, 0.005, 0.006, 0.008, 0.01, 0.03, 0.1))) == pytest.approx(alike, abs=1e-3)


@pytest.mark.parametrize("exponential", APPROXIMATE)
def test_the_ends(exponential) -> None:
    logits = torch.tensor([0.0, -20.0, -torch.inf, torch.nan]).double()
    assert weights(exponential, logits)[:3].tolist() == [256.0, 0.0, 0.0]
    assert weights(exponential, logits)[3].isnan()
    powers = torch.arange(-14.0, 1.0).double()  # down to e4m3's smallest normal number
    assert torch.equal(weights(exponential, powers), torch.exp2(powers + 8))
    scaled = e4m3_weights(powers[5:].float() * math.log(2), exponential, 16.0)
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled, torch.exp2(powers[5:].float() + 4))


@pytest.mark.parametrize("exponential", APPROXIMATE)
def test_more_logit_is_never_less_weight(exponential) -> None:
    assert (weights(exponential).diff() <= 0).all()


@pytest.mark.parametrize("exponential", APPROXIMATE)
def test_attention_is_that_of_the_weights(exponential) -> None:
    """One tile, and operands that e4m3 holds: the weights are the formula's, divided by their sum."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randint(-8, 9, (1, 1, 100, 4), generator=generator).double()
    q = torch.ones(1, 1, 1, 4).double()
    v = torch.randint(-8, 9, (1, 1, 100, 4), generator=generator).double()
    recipe = Recipe(smooth_k=False, smooth_v=False, power_of_two=True, exponential=exponential)
    logits = (q @ k.mT) * 0.25
    p = e4m3_weights(logits - logits.amax(), exponential, 256.0)
    out, lse = emulated_attention(q, k, v, recipe=recipe, softmax_scale=0.25, return_lse=True)
    torch.testing.assert_close(out, p @ v / p.sum())
    torch.testing.assert_close(lse.double(), logits.amax(-1) + (p.sum(-1) / 256).log(), atol=1e-6, rtol=0)
    exact = emulated_attention(q, k, v, recipe=dataclasses.replace(recipe, exponential="exact"), softmax_scale=0.25)
    assert not torch.equal(out, exact)


def test_what_does_not_go_together_is_refused() -> None:
    for change in ({"row_sum": RowSum.UNROUNDED}, {"p_scale": 100.0}, {"p_scale": 448.0}):
        with pytest.raises(InvalidArgumentError, match="where exponential is step"):
            dataclasses.replace(PER_BLOCK, exponential="step", **change)
    with pytest.raises(InvalidArgumentError, match="exponential must be one of exact, linear, step"):
        Recipe(exponential="cubic")
