"""How far an output may be from exact attention: the two budgets, and what has no direction and what has.

* The RECIPE budget: rounding to 8 bits costs 20 to 30 dB, depending on the data. It is a floor, for the whole and for
  every row. A floor that is meant for rounding errors lets small mistakes pass.
* The KERNEL budget: twice the error of the same recipe in plain PyTorch, where the suite is given one.
* Rounding errors have no direction. A scale that is off by 1 % has: least squares finds it below the rounding.
"""

from __future__ import annotations

import torch

from lpattn.testing.exact import fitted_scales, sqnr, worst_row_sqnr
from lpattn.testing.inputs import Problem
from lpattn.testing.outcome import require
from lpattn.testing.subject import Subject

EXACT_FLOORS = {torch.float64: 200.0, torch.float32: 85.0, torch.float16: 50.0, torch.bfloat16: 38.0}
"""Least SQNR in dB of a backend that is exact; also what an output's own dtype allows at best."""

ALLOWANCES = {"sharp": 4.0, "outlier_channels": 8.0, "sink": 6.0, "peak_and_tails": 16.0}
"""dB below the floor on normal data that a kind of data may cost in 8 bits."""

ROW_ALLOWANCE = 14.0
"""dB below the floor of the whole that its worst row may be."""

OUTPUT_ROUNDING = 2.0**-7
"""What may come on top of twice the recipe's error, relative: kernels write bfloat16, and some round twice."""

LSE_TOLERANCE = 0.35
"""Largest error of a log-sum-exp in low precision, on normal data: rounding moves single rows by up to 0.15."""

LSE_BIAS = 0.02
"""Largest mean error of a log-sum-exp in low precision: rounding moves as many rows up as down."""


def floor_for(subject: Subject, kind: str, dtype: torch.dtype) -> float:
    """The least SQNR in dB."""
    if subject.backend.exact:
        return EXACT_FLOORS[dtype]
    return min(subject.floor_db - ALLOWANCES.get(kind, 0.0), EXACT_FLOORS[dtype])


def require_close(subject: Subject, problem: Problem, output: torch.Tensor, kind: str = "normal") -> float:
    """Hold an output to both budgets.

    Returns:
        Its SQNR in dB.

    Raises:
        CheckFailed: it is over one of them.
    """
    exact, _ = problem.exact()
    floor = floor_for(subject, kind, output.dtype)
    require(bool(output.isfinite().all()), f"{problem}: the output is not finite")
    quality, row = sqnr(exact, output), worst_row_sqnr(exact, output)
    require(quality >= floor, f"{problem}: {quality:.1f} dB against exact attention; the floor is {floor:.1f} dB")
    limit = floor - ROW_ALLOWANCE
    require(row >= limit, f"{problem}: the worst row has {row:.1f} dB; the floor for rows is {limit:.1f} dB")
    if subject.emulate is not None:
        _require_like_recipe(problem, output, exact, subject.emulate(problem)[0])
    return quality


def _require_like_recipe(problem: Problem, output: torch.Tensor, exact: torch.Tensor, recipe: torch.Tensor) -> None:
    error, budget = output.double() - exact, recipe.double() - exact
    found, limit = float(error.abs().max()), 2 * float(budget.abs().max()) + OUTPUT_ROUNDING * float(exact.abs().max())
    require(found <= limit, f"{problem}: largest error {found:.3g}; twice the recipe's is {limit:.3g}")
    found, limit = _rms(error), 2 * _rms(budget) + OUTPUT_ROUNDING * _rms(exact)
    require(found <= limit, f"{problem}: rms error {found:.3g}; twice the recipe's is {limit:.3g}")


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def require_unbiased(problem: Problem, output: torch.Tensor, tolerance: float = 0.005) -> str:
    """Fail where the output as a whole is too large or too small, or softmax too sharp or too soft.

    Args:
        problem: of a kind whose weights are neither uniform nor one-hot.
        output: the backend's.
        tolerance: relative, of the factor on the output and of the softmax scale.

    Returns:
        What was measured.
    """
    step = 0.02
    low, exact, high = (problem.with_scale(factor).exact()[0] for factor in (1 - step, 1.0, 1 + step))
    factor, sharpness = fitted_scales((low, exact, high), step, output)
    require(
        abs(factor - 1) <= tolerance,
        f"{problem}: the output is {factor:.4f} times what it should be, far beyond what rounding explains "
        f"(tolerance {tolerance:g}): a scale is off",
    )
    require(
        abs(sharpness - 1) <= tolerance,
        f"{problem}: softmax is {sharpness:.4f} times as sharp as it should be, far beyond what rounding explains "
        f"(tolerance {tolerance:g}): the softmax scale, or a scale of q or k, is off",
    )
    return f"gain {factor:.4f}, softmax scale {sharpness:.4f}"
