"""The conformance suite: what a backend has to do, as checks that its author runs.

::

    from lpattn.testing import BackendTests

    class TestMyBackend(BackendTests):
        backend = "my_fp8"

runs under pytest, and ``lpattn check my_fp8`` runs the same without. The grid comes from what the backend declares:
what it declares must be right, and what it does not declare must be refused for the right reason.
"""

from lpattn.testing.checks import CHECKS
from lpattn.testing.exact import exact_attention, sqnr
from lpattn.testing.inputs import KINDS, Problem
from lpattn.testing.outcome import CheckFailed, Outcome, Status
from lpattn.testing.suite import BackendTests, run_check, run_checks, suite_for

__all__ = [
    "CHECKS",
    "KINDS",
    "BackendTests",
    "CheckFailed",
    "Outcome",
    "Problem",
    "Status",
    "exact_attention",
    "run_check",
    "run_checks",
    "sqnr",
    "suite_for",
]
