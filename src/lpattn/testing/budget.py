"""How far an output may be from exact attention: the two budgets, and what has no direction and what has.

* The RECIPE budget: rounding to 8 bits costs 20 to 30 dB, depending on the data. It is a floor, for the whole and for
  every row. A floor that is meant for rounding errors lets small mistakes pass.
* The KERNEL budget: twice the error of the same recipe in plain PyTorch, where the suite is given one. How large the
  largest error is, is a matter of chance: it is taken over several roundings of the same problem.
* Rounding errors have no direction. A scale that is off by 1 % has: least squares finds it below the rounding. What has
  a direction by design, such as an approximate exponential, is in the recipe, and the kernel lies between that and
  exact attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from lpattn.testing.exact import fitted_scales, sqnr, worst_row_sqnr
from lpattn.testing.inputs import Problem
from lpattn.testing.outcome import CheckFailed, require
from lpattn.testing.subject import Subject

EXACT_FLOORS = {torch.float64: 200.0, torch.float32: 85.0, torch.float16: 50.0, torch.bfloat16: 38.0}
"""Least SQNR in dB of a backend that is exact; also what an output's own dtype allows at best."""

ALLOWANCES = {"sharp": 4.0, "outlier_channels": 8.0, "sink": 6.0, "peak_and_tails": 16.0}
"""dB below the floor on normal data that a kind of data may cost in 8 bits."""

ROW_ALLOWANCE = 14.0
"""dB below the floor of the whole that its worst row may be."""

FEW_LANES = 16
FEW_LANES_ALLOWANCE = 10.0
"""dB that a head_dim below FEW_LANES may cost: errors of so few products do not average out, and the large logits,
which have most of the weight, have the large errors. FP8 has 15 to 28 dB on one lane, where it has 24 or more on 16."""

RIGHT_ROW = 6.0
"""dB that a row which is right has at least, in any precision: rows of zeros have 0."""

ROUNDINGS = 5
"""Roundings of the recipe that the largest error is taken over. The largest error of one is more than twice that of
another in about 1 % of problems, and more than twice the largest of five was not seen in 1000."""

OUTPUT_ROUNDING = 2.0**-7
"""What may come on top of twice the recipe's error, relative: kernels write bfloat16, and some round twice."""

SCALE_TOLERANCE = 0.005
"""What may be left of rounding errors in a fitted scale, relative."""

RECIPE_BIAS = 0.02
"""How far a recipe's own scales may be off, relative."""

LSE_TOLERANCE = 0.35
"""Largest error of a log-sum-exp in low precision, on normal data: rounding moves single rows by up to 0.15."""

LSE_FACTORS = {"biased": 2.0, "sharp": 3.0}
"""What the kinds of data may cost the log-sum-exp: logits that are larger are rounded by more."""

LSE_OF_COUNTS = 1e-3
"""Largest error of a log-sum-exp that is the logarithm of a number of keys, in any precision."""

LSE_BIAS = 0.02
"""Largest mean error of a log-sum-exp in low precision: rounding moves as many rows up as down."""


def floor_for(subject: Subject, kind: str, dtype: torch.dtype) -> float:
    """The least SQNR in dB."""
    if subject.backend.exact:
        return EXACT_FLOORS[dtype]
    allowed = subject.allowances.get(kind, ALLOWANCES.get(kind, 0.0))
    return min(subject.floor_db - allowed, EXACT_FLOORS[dtype])


def require_close(subject: Subject, problem: Problem, output: torch.Tensor, kind: str = "normal") -> float:
    """Hold an output to both budgets; what PyTorch's own SDPA returns on the device will do as well.

    Returns:
        Its SQNR in dB.

    Raises:
        CheckFailed: it is over one of them.
    """
    exact, _ = problem.exact()
    quality = sqnr(exact, output)
    try:
        _require_within_floors(subject, problem, output, kind)
    except CheckFailed:
        if not as_wrong_as_pytorch(problem, output):
            raise
        return quality

    def errors(found: torch.Tensor, lse: torch.Tensor | None = None) -> dict[str, float]:
        error = found.double() - exact
        return {"largest error": float(error.abs().max()), "rms error": _rms(error)} if error.numel() else {}

    more = {"largest error": float(exact.abs().max()), "rms error": _rms(exact)} if exact.numel() else {}
    require_like_recipe(
        subject, problem, errors(output), errors, {name: OUTPUT_ROUNDING * size for name, size in more.items()}
    )
    return quality


def _require_within_floors(subject: Subject, problem: Problem, output: torch.Tensor, kind: str) -> None:
    exact, _ = problem.exact()
    floor = floor_for(subject, kind, output.dtype)
    if problem.query.shape[-1] < FEW_LANES and not subject.backend.exact:
        floor -= FEW_LANES_ALLOWANCE
    require(bool(output.isfinite().all()), f"{problem}: the output is not finite")
    quality, row = sqnr(exact, output), worst_row_sqnr(exact, output)
    require(quality >= floor, f"{problem}: {quality:.1f} dB against exact attention; the floor is {floor:.1f} dB")
    limit = floor - ROW_ALLOWANCE
    require(row >= limit, f"{problem}: the worst row has {row:.1f} dB; the floor for rows is {limit:.1f} dB")


def as_wrong_as_pytorch(problem: Problem, output: torch.Tensor) -> bool:
    """Whether PyTorch's own SDPA gets the call wrong, and the output is what it returns.

    Some of its kernels make NaN of causal calls with a scale of 0 or below, for example, and a backend that calls them
    does so too: it gives the user what the call gives without lpattn.
    """
    exact, _ = problem.exact()
    # In each dtype that the backend may compute in: its kernels are others, and wrong in other ways.
    for dtype in dict.fromkeys((problem.query.dtype, torch.float32, torch.bfloat16, torch.float16)):
        cast = problem.cast(dtype)
        wrong = cast.by_pytorch()
        same_call = worst_row_sqnr(exact, cast.exact()[0]) >= RIGHT_ROW  # a bias may be too large for the dtype
        if same_call and wrong is not None and worst_row_sqnr(exact, wrong) < RIGHT_ROW:
            known = wrong.isfinite()
            alike = worst_row_sqnr(torch.where(known, wrong, 0.0), torch.where(known, output, 0.0)) >= RIGHT_ROW
            if alike and torch.equal(known, output.isfinite()):
                return True
    return False


def lse_limit(subject: Subject, kind: str) -> float:
    """The largest error of a log-sum-exp."""
    return 1e-2 if subject.backend.exact else LSE_TOLERANCE * LSE_FACTORS.get(kind, 1.0)


def require_lse(subject: Subject, problem: Problem, output: torch.Tensor, lse: torch.Tensor, limit: float) -> float:
    """Hold a log-sum-exp to a limit, and to twice the error of the recipe's; -inf where a row sees nothing.

    Args:
        subject: with or without a recipe.
        problem: the call.
        output, lse: what the backend returned.
        limit: of :func:`lse_limit`, or a smaller one.

    Returns:
        The largest error.

    Raises:
        CheckFailed: it is over one of them.
    """
    _, exact = problem.exact()
    nothing = exact == -torch.inf
    require(bool((lse[nothing] == -torch.inf).all()), f"{problem}: lse of rows without keys must be -inf")
    # Beside the lowest number of float64, exact ones are no numbers of float32.
    counted = exact.float().isfinite()
    require(bool(lse[counted].isfinite().all()), f"{problem}: lse of rows with keys must be finite")
    if not bool(counted.any()):
        return 0.0
    of_rows = exact[counted]

    def errors(_: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
        return {"largest error of lse": float((found[counted].double() - of_rows).abs().max())}

    found = errors(output, lse)
    (off,) = found.values()
    row = int((lse[counted].double() - of_rows).abs().argmax())
    require(
        off <= limit,
        f"{problem}: lse is off by {off:.3g} (limit {limit:g}); it is {float(lse[counted][row]):.4f} where it should "
        f"be {float(of_rows[row]):.4f}",
    )
    more = dict.fromkeys(found, 1e-3 * max(1.0, float(of_rows.abs().max())))
    require_like_recipe(subject, problem, found, errors, more)
    return off


def require_like_recipe(
    subject: Subject,
    problem: Problem,
    found: Mapping[str, float],
    errors: Callable[[torch.Tensor, torch.Tensor], Mapping[str, float]],
    more: Mapping[str, float],
) -> None:
    """Fail where an error is more than twice the recipe's, in the worst of several roundings of the problem.

    Args:
        subject: with or without a recipe; without one there is nothing to hold the kernel to.
        problem: the call.
        found: the kernel's errors by name.
        errors: the same of (output, lse), in float64.
        more: what may come on top of twice the recipe's.
    """
    if subject.emulate is None:
        return
    largest = dict.fromkeys(found, 0.0)
    # One rounding is enough nearly always.
    for again, factor in _roundings(problem):
        output, lse = subject.emulate(again)
        of_recipe = errors(output.double() / factor, lse.double())
        largest = {name: max(largest[name], of_recipe[name]) for name in largest}
        if all(found[name] <= 2 * largest[name] + more[name] for name in found):
            return
    for name in found:
        limit = 2 * largest[name] + more[name]
        require(found[name] <= limit, f"{problem}: {name} {found[name]:.3g}; twice the recipe's is {limit:.3g}")


def _roundings(problem: Problem) -> Iterator[tuple[Problem, float]]:
    """(problem, factor): the problem, and others whose output is its times the factor, but whose mantissas differ."""
    yield problem, 1.0
    for index in range(1, ROUNDINGS):
        logits, values = 2 ** (index / ROUNDINGS), 2 ** (index * 2 % ROUNDINGS / ROUNDINGS)
        yield (
            problem.changed(query=problem.query * logits, key=problem.key / logits, value=problem.value * values),
            values,
        )


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def require_same_quality(problem: Problem, output: torch.Tensor, other: torch.Tensor, what: str) -> None:
    """Fail where two outputs of a call in low precision differ by more than the better one from exact attention.

    For ways to compute the same call that may round otherwise, and share what costs most: the rounding of q, k and v.
    """
    exact, _ = problem.exact()
    apart, off = _rms(output.double() - other.double()), min(_rms(x.double() - exact) for x in (output, other))
    require(
        apart <= off,
        f"{problem}, {what}: the output differs by {apart:.3g} rms, and the better of both from exact attention by "
        f"{off:.3g} only",
    )


_STEP = 0.02
"""How far apart, relative, are the softmax scales between which the slope is taken."""


def require_unbiased(subject: Subject, problem: Problem, outputs: Mapping[str, torch.Tensor]) -> str:
    """Fail where an output as a whole is too large or too small, or softmax too sharp or too soft.

    Args:
        subject: its recipe says how far off they are by design.
        problem: of a kind whose weights are neither uniform nor one-hot.
        outputs: the backend's, by what sets them apart, for messages: "" is the plain one.

    Returns:
        What was measured on the first one.
    """
    low, exact, high = (problem.with_scale(factor).exact()[0] for factor in (1 - _STEP, 1.0, 1 + _STEP))
    measured = [
        _unbiased(subject, problem, f"{problem}{what and f', {what}'}", (low, exact, high), output)
        for what, output in outputs.items()
    ]
    return measured[0]


def _unbiased(
    subject: Subject,
    problem: Problem,
    label: str,
    outputs_at: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    output: torch.Tensor,
) -> str:
    found = fitted_scales(outputs_at, _STEP, output)
    recipe = (1.0, 1.0)
    if subject.emulate is not None and max(abs(x - 1) for x in found) > SCALE_TOLERANCE:
        recipe = fitted_scales(outputs_at, _STEP, subject.emulate(problem)[0])
    told = {
        "the output is {:.4f} times what it should be": "a scale is off",
        "softmax is {:.4f} times as sharp as it should be": "the softmax scale, or a scale of q or k, is off",
    }
    for (text, cause), factor, designed in zip(told.items(), found, recipe, strict=True):
        # A recipe that is off by chance must not make as much room for a kernel that is.
        room = SCALE_TOLERANCE if abs(designed - 1) > SCALE_TOLERANCE else SCALE_TOLERANCE / 2
        require(
            abs(designed - 1) <= RECIPE_BIAS,
            f"{label}: in the recipe itself, {text.format(designed)} (limit {RECIPE_BIAS:g})",
        )
        low, high = min(1.0 - SCALE_TOLERANCE, designed - room), max(1.0 + SCALE_TOLERANCE, designed + room)
        by_design = "" if designed == 1.0 else f", and by the recipe {designed:.4f}"
        require(
            low <= factor <= high,
            f"{label}: {text.format(factor)}{by_design}, far beyond what rounding explains "
            f"(tolerance {SCALE_TOLERANCE:g}): {cause}",
        )
    return f"gain {found[0]:.4f}, softmax scale {found[1]:.4f}"
