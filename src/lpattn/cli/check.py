"""``lpattn check``: the conformance suite without pytest."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lpattn.cli.text import make_console, print_json
from lpattn.errors import InvalidArgumentError, LpattnError
from lpattn.registry import registry
from lpattn.testing import BackendTests, Outcome, Status, run_checks, suite_for
from lpattn.testing.builtin import SUITES

if TYPE_CHECKING:
    from rich.console import Console

_MARKS = {
    Status.PASSED: ("passed", "green"),
    Status.FAILED: ("FAILED", "bold red"),
    Status.SKIPPED: ("skipped", "dim"),
    Status.EXPECTED: ("xfail", "yellow"),
    Status.UNEXPECTED: ("XPASS", "bold red"),
}


def run(arguments: Namespace) -> int:
    """Print each check's outcome as it comes. Returns 0 where some pass and none fails, else 1.

    Raises:
        UnknownBackendError: no backend has the name.
        InvalidArgumentError: a check or a suite does not exist, or no check is left.
    """
    name = registry.resolve(arguments.backend)
    suite = suite_for(name, arguments.device, _suite_class(arguments.suite, name))
    only = None if arguments.only is None else _names(arguments.only)
    skip = _names(arguments.skip or "")
    if only is not None and set(only) <= set(skip):
        raise InvalidArgumentError(
            f"--only and --skip leave no check; got {arguments.only} and {arguments.skip or ''!r}"
        )
    outcomes = run_checks(suite, only, skip)
    document = _show(suite, outcomes, None if arguments.json else make_console())
    if arguments.json:
        print_json(document)
    passed = any(check["status"] == Status.PASSED for check in document["checks"])
    if not passed and not document["failed"] and not arguments.json:
        print("nothing was checked: every check was skipped, or failed as expected")
    return 0 if passed and not document["failed"] else 1


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _suite_class(text: str | None, name: str) -> type[BackendTests]:
    if text is None:
        return SUITES.get(name, BackendTests)
    module, _, attribute = text.partition(":")
    with _current_folder_on_path():
        try:
            found = getattr(importlib.import_module(module), attribute)
        except LpattnError:
            raise  # it says itself what is wrong with the suite
        except (ImportError, AttributeError, ValueError) as error:
            raise InvalidArgumentError(
                f"--suite must be MODULE:CLASS that can be imported; got {text!r}: {error}"
            ) from None
    if not (isinstance(found, type) and issubclass(found, BackendTests)):
        raise InvalidArgumentError(f"--suite {text}: must be a subclass of lpattn.testing.BackendTests; got {found!r}")
    return found


@contextlib.contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """As ``python -m`` has it: test modules lie in the folder in which their author works."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def _show(suite: BackendTests, outcomes: Iterator[Outcome], console: Console | None) -> dict[str, Any]:
    """Collect the outcomes as JSON data; on a console, print a line for each at once."""
    subject = suite.subject()
    runs_on = [str(device) for device, reasons in subject.probed.items() if not reasons]
    where = runs_on[0] if runs_on else None
    if console is not None:
        console.print(f"{subject.name} on {where or 'no device of this machine'}")
    collected = []
    for outcome in outcomes:
        collected.append(outcome)
        if console is not None:
            mark, style = _MARKS[outcome.status]
            console.print(f"  {outcome.check:31s} [{style}]{mark:8s}[/] {outcome.seconds:6.2f} s", markup=True, end="")
            console.print(f"  {outcome.detail}" if outcome.detail else "")
    counts = Counter(outcome.status for outcome in collected)
    if console is not None:
        console.print(", ".join(f"{count} {status}" for status, count in counts.items()) or "no checks")
    return {
        "backend": subject.name,
        "device": where,
        "checks": [
            {"check": o.check, "status": o.status.value, "detail": o.detail, "seconds": round(o.seconds, 4)}
            for o in collected
        ],
        "failed": [o.check for o in collected if o.status.is_failure],
    }
