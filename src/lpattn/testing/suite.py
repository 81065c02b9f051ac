"""Running the checks: all of them by a function, one by one as the tests of a class."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from lpattn.errors import InvalidArgumentError
from lpattn.testing.checks import CHECKS
from lpattn.testing.inputs import KINDS, Problem
from lpattn.testing.outcome import CheckFailed, NotApplicable, Outcome, Status
from lpattn.testing.subject import Subject


class BackendTests:
    """The conformance suite as a test class: each check is a test.

    ::

        from lpattn.testing import BackendTests

        class TestMyBackend(BackendTests):
            backend = "my_fp8"

    pytest collects the subclass. ``lpattn check my_fp8 --suite my_tests:TestMyBackend`` runs the same without pytest.

    Attributes:
        backend: name of a registered backend.
        device: where it runs; None is the first device of the machine that its probe admits.
        floor_db: least SQNR in dB against exact attention on normal data; other data may cost a few dB more.
        allowances: ``{kind of data: dB}`` below ``floor_db``, for kinds of :data:`KINDS` that cost this backend's
            format more than the suite allows.
        expected_failures: ``{check: reason}``. A check that is listed must fail: one that passes is an error.
    """

    backend: ClassVar[str]
    device: ClassVar[torch.device | str | None] = None
    floor_db: ClassVar[float] = 20.0
    allowances: ClassVar[Mapping[str, float]] = {}
    expected_failures: ClassVar[Mapping[str, str]] = {}

    def emulate(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The backend's recipe in plain PyTorch: override it, and the kernel is held to twice the recipe's error.

        Where the recipe itself is off in one direction (an approximate exponential can make softmax softer), the kernel
        may be as far off as that. :class:`lpattn.quantize.Recipe` has what kernels do.

        Args:
            problem: the call.

        Returns:
            (output, lse) in float32 or float64, of the shapes of the kernel's; None where there is no such thing.
        """
        return None

    def subject(self) -> Subject:
        """The backend on its device."""
        has_recipe = type(self).emulate is not BackendTests.emulate
        return Subject(
            self.backend,
            self.device,
            floor_db=self.floor_db,
            allowances=self.allowances,
            emulate=self.emulate if has_recipe else None,  # type: ignore[arg-type]
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _require_known(cls.expected_failures, f"{cls.__name__}.expected_failures")
        if unknown := sorted(set(cls.allowances) - set(KINDS)):
            raise InvalidArgumentError(
                f"{cls.__name__}.allowances names {', '.join(unknown)}; the kinds of data are {', '.join(KINDS)}"
            )


def _test_of(name: str) -> Callable[[BackendTests], None]:
    def test(self: BackendTests) -> None:
        outcome = run_check(self.subject(), name, self.expected_failures)
        if outcome.status.is_failure:
            raise CheckFailed(outcome.detail)
        if outcome.status in (Status.SKIPPED, Status.EXPECTED):
            import pytest  # only pytest calls this method

            (pytest.skip if outcome.status is Status.SKIPPED else pytest.xfail)(outcome.detail)

    test.__doc__ = CHECKS[name].__doc__
    return test


for _name in CHECKS:
    setattr(BackendTests, f"test_{_name}", _test_of(_name))


def run_check(subject: Subject, name: str, expected_failures: Mapping[str, str] | None = None) -> Outcome:
    """Run one check.

    Args:
        subject: the backend.
        name: of the check.
        expected_failures: ``{check: reason}``.

    Returns:
        What it found. A backend's exception is a failure, with its type and text.
    """
    expected = (expected_failures or {}).get(name)
    start = time.perf_counter()
    try:
        detail = CHECKS[name](subject) or ""
        status = Status.PASSED
    except NotApplicable as why:
        status, detail = Status.SKIPPED, str(why)
    except CheckFailed as failure:
        status, detail = Status.FAILED, str(failure)
    except Exception as error:
        status, detail = Status.FAILED, f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    if expected is not None and status is Status.FAILED:
        status, detail = Status.EXPECTED, f"{expected} ({detail})"
    elif expected is not None and status is Status.PASSED:
        status, detail = Status.UNEXPECTED, f"passed, but is expected to fail: {expected}"
    return Outcome(name, status, detail, seconds)


def run_checks(
    suite: type[BackendTests] | BackendTests, only: Sequence[str] | None = None, skip: Sequence[str] = ()
) -> Iterator[Outcome]:
    """Run the checks of a suite, one after the other.

    Args:
        suite: the class, or an instance.
        only: names of checks; None runs all.
        skip: names of checks that do not run.

    Returns:
        The outcome of each, as it ends.

    Raises:
        InvalidArgumentError: a name is not that of a check.
        UnknownBackendError: no backend has the suite's name.
    """
    _require_known(only or (), "only")
    _require_known(skip, "skip")
    suite = suite() if isinstance(suite, type) else suite
    subject = suite.subject()
    names = [name for name in CHECKS if (only is None or name in only) and name not in skip]
    return (run_check(subject, name, suite.expected_failures) for name in names)


def suite_for(
    name: str, device: torch.device | str | None = None, base: type[BackendTests] = BackendTests
) -> BackendTests:
    """A suite for a backend: an instance of ``base`` with another name and device."""
    made = type(f"{base.__name__}Of{name}", (base,), {"backend": name, "device": device or base.device})
    return made()


def _require_known(names: Sequence[str] | Mapping[str, str], where: str) -> None:
    if unknown := [name for name in names if name not in CHECKS]:
        raise InvalidArgumentError(f"{where} names {', '.join(unknown)}; the checks are {', '.join(CHECKS)}")
