"""The budgets: what a recipe makes room for and what not, roundings of a problem, and allowances."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lpattn
from lpattn import CausalKind, InvalidArgumentError
from lpattn.quantize import PER_BLOCK_F16, emulated_attention
from lpattn.testing import BackendTests, Problem, Status, run_checks
from lpattn.testing import budget as budgets
from lpattn.testing.budget import FEW_LANES_ALLOWANCE, floor_for, require_like_recipe
from lpattn.testing.exact import worst_row_sqnr
from lpattn.testing.inputs import Sizes, make_problem
from lpattn.testing.outcome import CheckFailed
from lpattn.testing.subject import Subject

SOFT = 0.987
"""How sharp softmax is by the recipe."""


class Coarse(lpattn.Backend):
    """A kernel whose softmax is softer by design; wrong where `factor`, on the softmax scale, is not SOFT."""

    name = "test_coarse"
    automatic = False
    capabilities = lpattn.Capabilities(dtypes=frozenset({torch.float32}), lse=True)
    factor = SOFT
    recipe = PER_BLOCK_F16

    def probe(self, device):
        return [] if device.type == "cpu" else [lpattn.Reason("device", f"{device}: runs on the CPU")]

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        return emulated_attention(
            query,
            key,
            value,
            recipe=self.recipe,
            is_causal=call.causal is CausalKind.TOP_LEFT,
            softmax_scale=call.softmax_scale * self.factor,
            return_lse=call.return_lse,
        )


class CoarseTests(BackendTests):
    backend = Coarse.name
    recipe = PER_BLOCK_F16
    factor = SOFT

    def emulate(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        soft = problem.with_scale(self.factor)
        options = {"is_causal": soft.is_causal, "softmax_scale": soft.scale, "recipe": self.recipe}
        return emulated_attention(soft.query, soft.key, soft.value, **options, return_lse=True)


def outcome_of(check: str, suite: type[BackendTests], backend: lpattn.Backend | None = None):
    lpattn.register_backend(backend or Coarse())
    (outcome,) = run_checks(suite, only=[check])
    return outcome


def test_a_recipe_that_is_off_by_design_makes_room_for_its_kernel() -> None:
    plain = type("WithoutRecipe", (BackendTests,), {"backend": Coarse.name})
    outcome = outcome_of("scales_are_exact", plain)
    assert outcome.status is Status.FAILED
    assert "far beyond what rounding explains" in outcome.detail
    (outcome,) = run_checks(CoarseTests, only=["scales_are_exact"])
    assert outcome.status is Status.PASSED, outcome.detail


@pytest.mark.parametrize("factor", [0.972, 1.012])
def test_and_not_for_more(factor: float) -> None:
    """Beyond the recipe, and beyond exact attention."""
    wrong = Coarse()
    wrong.factor = factor
    outcome = outcome_of("scales_are_exact", CoarseTests, wrong)
    assert outcome.status is Status.FAILED
    assert "and by the recipe 0.98" in outcome.detail


def test_an_exact_kernel_passes_beside_a_coarse_recipe() -> None:
    better = Coarse()
    better.factor = 1.0
    assert outcome_of("scales_are_exact", CoarseTests, better).status is Status.PASSED


def test_a_recipe_that_is_off_by_more_than_approximations_are_is_no_excuse() -> None:
    class Bent(CoarseTests):
        def emulate(self, problem):
            return super().emulate(problem.with_scale(0.96))

    wrong = Coarse()
    wrong.factor = 0.96
    outcome = outcome_of("scales_are_exact", Bent, wrong)
    assert "in the recipe itself, softmax is 0.9" in outcome.detail


def test_small_weights_balance_as_in_the_recipe() -> None:
    class Bent(CoarseTests):
        """P without the factor of 2^8: small weights vanish, in recipe and kernel alike."""

        recipe = dataclasses.replace(PER_BLOCK_F16, p_scale=1.0)
        factor = 1.0

    wrong, right = Coarse(), Coarse()
    wrong.recipe, wrong.factor, right.factor = Bent.recipe, 1.0, 1.0
    outcome = outcome_of("small_weights_count", Bent, wrong)
    assert outcome.status is Status.FAILED
    assert "of the recipe +" in outcome.detail
    lpattn.unregister_backend(Coarse.name)
    Bent.recipe = right.recipe
    assert outcome_of("small_weights_count", Bent, right).status is Status.PASSED


@pytest.mark.parametrize("kind", ["normal", "biased", "large_values", "small_values"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_roundings_are_the_same_problem(kind: str, dtype: torch.dtype) -> None:
    problem = make_problem(kind, Sizes(1, 2, 1, 20, 30, 64, 64), dtype, torch.device("cpu"))
    exact, lse = problem.exact()
    found = list(budgets._roundings(problem))
    assert len(found) == budgets.ROUNDINGS
    for again, factor in found:
        output, lse_again = again.exact()
        torch.testing.assert_close(output / factor, exact, rtol=5e-3, atol=5e-3 * float(exact.abs().max()))
        torch.testing.assert_close(lse_again, lse, rtol=0, atol=2e-2)
    assert len({float(again.value[0, 0, 0, 0]) for again, _ in found}) == budgets.ROUNDINGS
    assert len({float(again.query[0, 0, 0, 0]) for again, _ in found}) == budgets.ROUNDINGS


def test_the_largest_error_is_that_of_several_roundings() -> None:
    """The recipe's error depends on the rounding; a kernel may have twice the largest, and no more."""
    lpattn.register_backend(Coarse())
    problem = make_problem("normal", Sizes(1, 1, 1, 4, 4, 8, 8), torch.float32, torch.device("cpu"))
    asked = []

    def emulate(again: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(again)
        return torch.full((1,), float(len(asked))), torch.zeros(1)

    def errors(output: torch.Tensor, lse: torch.Tensor) -> dict[str, float]:
        return {"error": float(output)}

    subject = Subject(Coarse.name, emulate=emulate)
    factors = [factor for _, factor in budgets._roundings(problem)]
    largest = max((index + 1) / factor for index, factor in enumerate(factors))
    require_like_recipe(subject, problem, {"error": 1.9}, errors, {"error": 0.0})
    assert len(asked) == 1  # one is enough where the kernel is within it
    asked.clear()
    require_like_recipe(subject, problem, {"error": 1.99 * largest}, errors, {"error": 0.0})
    asked.clear()
    with pytest.raises(CheckFailed, match=r"error .*; twice the recipe's is"):
        require_like_recipe(subject, problem, {"error": 2.01 * largest}, errors, {"error": 0.0})
    assert len(asked) == budgets.ROUNDINGS


def test_allowances_take_the_place_of_the_suites_own() -> None:
    lpattn.register_backend(Coarse())
    subject = Subject(Coarse.name, allowances={"outlier_channels": 13.0, "normal": 1.0})
    floors = {kind: floor_for(subject, kind, torch.float32) for kind in ("outlier_channels", "normal", "sharp")}
    assert floors == {"outlier_channels": 7.0, "normal": 19.0, "sharp": 16.0}
    with pytest.raises(InvalidArgumentError, match=r"Typo\.allowances names outliers; the kinds of data are normal, "):
        type("Typo", (BackendTests,), {"backend": Coarse.name, "allowances": {"outliers": 3.0}})


def test_one_lane_has_another_floor() -> None:
    lpattn.register_backend(Coarse())
    problem = make_problem("normal", Sizes(1, 2, 2, 60, 60, 1, 1), torch.float32, torch.device("cpu"))
    wide = make_problem("normal", Sizes(1, 2, 2, 60, 60, 16, 16), torch.float32, torch.device("cpu"))
    subject = Subject(Coarse.name)
    noisy = {p: p.exact()[0] + 0.15 * p.exact()[0].square().mean().sqrt() for p in (problem, wide)}
    assert budgets.require_close(subject, problem, noisy[problem]) == pytest.approx(16.5, abs=0.1)
    with pytest.raises(CheckFailed, match=r"16\.5 dB against exact attention; the floor is 20\.0 dB"):
        budgets.require_close(subject, wide, noisy[wide])
    assert FEW_LANES_ALLOWANCE < 20 - 6  # a kernel that computes something else is found on one lane too


def test_a_row_of_one_lane_counts_as_much_as_the_others() -> None:
    reference = torch.tensor([1.0, 1e-6, -1.0]).view(1, 1, 3, 1)
    assert worst_row_sqnr(reference, reference + 0.1) == pytest.approx(18.2, abs=0.1)
    many = reference.expand(1, 1, 3, 200)
    assert worst_row_sqnr(many, many + 0.1) == pytest.approx(-1.8, abs=0.1)
