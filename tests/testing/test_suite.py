"""The suite itself: expected failures are strict, exceptions are failures, what cannot run is skipped with a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lpattn
from lpattn import InvalidArgumentError, Reason
from lpattn.registry import Source, registry
from lpattn.testing import CHECKS, BackendTests, Status, run_check, run_checks, suite_for
from lpattn.testing.exact import exact_attention, fitted_scales, sqnr, worst_row_sqnr
from lpattn.testing.inputs import KINDS, Sizes, make_problem
from lpattn.testing.subject import Subject


class Half(lpattn.Backend):
    """Attention in float16; wrong where `factor` is not 1."""

    name = "test_half"
    automatic = False
    capabilities = lpattn.Capabilities(dtypes=frozenset({torch.float32}), head_dims=frozenset({64}))
    factor = 1.0

    def probe(self, device):
        return [] if device.type == "cpu" else [Reason("device", f"{device}: runs on the CPU")]

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        out = torch.nn.functional.scaled_dot_product_attention(
            query.half(),
            key.half(),
            value.half(),
            is_causal=call.causal is lpattn.CausalKind.TOP_LEFT,
            scale=call.softmax_scale,
            enable_gqa=call.num_heads != call.num_kv_heads,
        )
        return (out * self.factor).to(call.dtype)


class Wrong(Half):
    name = "test_wrong"
    factor = 1.02


class Nowhere(Half):
    name = "test_nowhere"

    def probe(self, device):
        return [Reason("not_installed", "the wheel is missing", "pip install wheel")]


@pytest.fixture(autouse=True)
def _backends() -> None:
    for backend in (Half(), Wrong(), Nowhere()):
        lpattn.register_backend(backend)


def test_outcomes_of_a_correct_and_a_wrong_backend() -> None:
    assert run_check(Subject("test_half"), "scales_are_exact").status is Status.PASSED
    outcome = run_check(Subject("test_wrong"), "scales_are_exact")
    assert outcome.status is Status.FAILED
    assert outcome.status.is_failure
    assert "1.02" in outcome.detail
    assert outcome.seconds > 0


def test_what_is_expected_to_fail_and_fails_is_no_failure() -> None:
    outcome = run_check(Subject("test_wrong"), "scales_are_exact", {"scales_are_exact": "issue 12"})
    assert outcome.status is Status.EXPECTED
    assert not outcome.status.is_failure
    assert outcome.detail.startswith("issue 12 (")


def test_what_is_expected_to_fail_and_passes_is_a_failure() -> None:
    outcome = run_check(Subject("test_half"), "scales_are_exact", {"scales_are_exact": "issue 12"})
    assert outcome.status is Status.UNEXPECTED
    assert outcome.status.is_failure
    assert "issue 12" in outcome.detail


def test_expected_failures_name_checks_that_exist() -> None:
    with pytest.raises(InvalidArgumentError, match=r"TestIt\.expected_failures names acuracy; the checks are registr"):
        type("TestIt", (BackendTests,), {"backend": "test_half", "expected_failures": {"acuracy": "typing"}})


@pytest.mark.parametrize("argument", ["only", "skip"])
def test_names_of_checks_that_do_not_exist(argument: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{argument} names acuracy"):
        list(run_checks(suite_for("test_half"), **{argument: ["acuracy"]}))


def test_an_unknown_backend() -> None:
    with pytest.raises(lpattn.UnknownBackendError):
        list(run_checks(suite_for("test_halv")))


def test_a_backend_that_raises_fails_and_the_next_check_runs() -> None:
    backend = Half()
    lpattn.unregister_backend("test_half")
    backend.attention = lambda *args, **kwargs: 1 / 0
    lpattn.register_backend(backend)
    first, second = run_checks(suite_for("test_half"), only=["registration", "accuracy"])
    assert first.status is Status.PASSED
    assert second.status is Status.FAILED
    assert "ZeroDivisionError: division by zero" in second.detail


def test_without_a_device_the_protocol_is_checked_and_the_rest_is_skipped_with_the_reason() -> None:
    outcomes = {o.check: o for o in run_checks(suite_for("test_nowhere"), skip=["import_is_pure"])}
    assert outcomes["undeclared_is_refused"].status is Status.PASSED
    assert outcomes["refusals_reach_the_user"].status is Status.PASSED
    assert outcomes["accuracy"].status is Status.SKIPPED
    assert "the wheel is missing (pip install wheel)" in outcomes["accuracy"].detail
    assert not any(o.status.is_failure for o in outcomes.values())


def test_a_name_without_a_backend_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [Source("plugin", "lpattn-a", "1.0"), Source("plugin", "lpattn-b", "1.0")]
    monkeypatch.setitem(registry._conflicts, "shared", sources)
    for outcome in run_checks(suite_for("shared"), only=["registration", "accuracy"]):
        assert outcome.status is Status.SKIPPED
        assert "a name without a backend: it is claimed by lpattn-a 1.0 and lpattn-b 1.0" in outcome.detail


def test_the_recipe_is_a_second_budget() -> None:
    class Recipe(BackendTests):
        backend = "test_half"

        def emulate(self, problem):
            return problem.exact()

    (outcome,) = run_checks(Recipe, only=["accuracy"])
    assert outcome.status is Status.PASSED, outcome.detail  # half precision is within what outputs may round
    Recipe.backend = "test_wrong"
    (outcome,) = run_checks(Recipe, only=["accuracy"])
    assert "twice the recipe's is" in outcome.detail


def test_each_check_says_what_a_backend_has_to_do() -> None:
    assert all(function.__doc__ for function in CHECKS.values())
    assert {name for name in vars(BackendTests) if name.startswith("test_")} == {f"test_{name}" for name in CHECKS}


TEST_FILE = """
import pytest
from lpattn.testing import BackendTests

class TestEmulated(BackendTests):
    backend = "fp8_emulated"
    expected_failures = {"registration": "passes, in truth"}
"""


def test_a_class_of_three_lines_runs_under_pytest(tmp_path: Path) -> None:
    pytest.importorskip("lpattn_emulated", reason="the plugin lpattn-emulated is not on the path")
    (tmp_path / "test_it.py").write_text(TEST_FILE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "registration or probe or streams"]
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "passed, but is expected to fail: passes, in truth" in done.stdout


# The measures


def test_exact_attention_is_that_of_pytorch() -> None:
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 13, 8), torch.randn(2, 2, 13, 5)
    for mask, causal in (
        (None, False),
        (None, True),
        (torch.rand(2, 1, 9, 13) > 0.3, False),
        (torch.randn(9, 13), False),
    ):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.double(),
            k.double(),
            v.double(),
            mask if mask is None or mask.dtype == torch.bool else mask.double(),
            is_causal=causal,
            scale=0.3,
            enable_gqa=True,
        )
        torch.testing.assert_close(exact_attention(q, k, v, mask, causal, 0.3)[0], expected)


def test_exact_attention_next_to_the_lowest_number_is_uniform() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    for dtype in (torch.float32, torch.float64):
        out, lse = exact_attention(q, k, v, torch.full((9, 9), torch.finfo(dtype).min, dtype=dtype))
        torch.testing.assert_close(out, v.double().mean(2, keepdim=True).expand_as(out))
        assert bool(lse.isfinite().all())


def test_ratios() -> None:
    reference = torch.ones(1, 1, 2, 100)
    assert sqnr(reference, reference) == float("inf")
    assert sqnr(reference, reference * 1.1) == pytest.approx(20.0)
    assert sqnr(reference, reference * torch.nan) == -float("inf")
    spoiled = reference.clone()
    spoiled[:, :, 1] = 0
    assert worst_row_sqnr(reference, spoiled) == pytest.approx(0.0)
    assert sqnr(reference, spoiled) > worst_row_sqnr(reference, spoiled)


@pytest.mark.parametrize(("factor", "scale"), [(1.0, 1.0), (1.01, 1.0), (1.0, 1.01), (0.97, 1.02)])
def test_the_fit_tells_factor_from_scale(factor: float, scale: float) -> None:
    problem = make_problem("normal", Sizes(1, 2, 2, 64, 64, 32, 32), torch.float32, torch.device("cpu"))
    low, exact, high = (problem.with_scale(f).exact()[0] for f in (0.98, 1.0, 1.02))
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)) * 0.02 * exact.square().mean().sqrt()
    output = problem.with_scale(scale).exact()[0] * factor + noise
    assert fitted_scales((low, exact, high), 0.02, output) == pytest.approx((factor, scale), abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_data_of_every_kind_fits_into_float16(kind: str, causal: bool) -> None:
    sizes = Sizes(2, 4, 2, 50, 50, 64, 64, causal)
    problem = make_problem(kind, sizes, torch.float16, torch.device("cpu"))
    assert all(x.isfinite().all() for x in (problem.query, problem.key, problem.value))
    assert problem.exact()[0].half().isfinite().all()
