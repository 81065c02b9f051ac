"""What a check is, and what it found: passed, failed, or did not apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Status(str, Enum):
    """How a check ended.

    * ``PASSED``, ``FAILED``: as they say.
    * ``SKIPPED``: it does not apply, or cannot run on this machine; the detail says why.
    * ``EXPECTED``: it failed, as ``expected_failures`` says.
    * ``UNEXPECTED``: it passed although ``expected_failures`` lists it. Counts as a failure: the list is out of date.
    """

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    EXPECTED = "expected failure"
    UNEXPECTED = "unexpected pass"

    __str__ = str.__str__

    @property
    def is_failure(self) -> bool:
        """Whether it counts against the backend."""
        return self in (Status.FAILED, Status.UNEXPECTED)


class CheckFailed(AssertionError):
    """The backend broke what a check asks for. The message says what was given, what came, and what is needed."""


class NotApplicable(Exception):
    """A check has nothing to look at: the backend does not declare it, or the machine lacks what it needs."""


@dataclass(frozen=True)
class Outcome:
    """The result of one check.

    Attributes:
        check: its name.
        status: how it ended.
        detail: why it failed or was skipped; what was measured where it passed. May be empty.
        seconds: how long it took.
    """

    check: str
    status: Status
    detail: str = ""
    seconds: float = 0.0


CheckFunction = Callable[[Any], str | None]
"""Takes a Subject. Raises CheckFailed or NotApplicable; may return a line about what it measured."""

_marked: set[CheckFunction] = set()


def check(function: CheckFunction) -> CheckFunction:
    """Mark a function as a check. Its name is the check's name, its docstring says what a backend has to do."""
    _marked.add(function)
    return function


def is_check(thing: object) -> bool:
    """Whether :func:`check` marked it."""
    return callable(thing) and thing in _marked


def require(condition: object, message: str) -> None:
    """Fail the check with the message unless the condition holds.

    Raises:
        CheckFailed: it does not hold.
    """
    if not condition:
        raise CheckFailed(message)
