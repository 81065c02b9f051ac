"""fp8_fa3 through the conformance suite on the CPU: the checks that Triton's interpreter runs in seconds.

All of it passes there but for two: NaN patterns, which are known to be lost in the interpreter, and threads, which the
interpreter itself does not support. tests/gpu runs the whole suite on the kernel.
"""

from __future__ import annotations

import pytest
import torch

from lpattn.testing import run_checks
from lpattn.testing.builtin import FA3Tests

CHECKS = (
    "registration",
    "probe",
    "decisions",
    "declared_is_taken",
    "undeclared_is_refused",
    "refusals_reach_the_user",
    "keys_are_read_in_order",
    "empty_calls",
    "rows_without_keys",
    "hidden_keys_have_no_influence",
)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of inf times 0
def test_it_passes_what_the_interpreter_runs_quickly(backend, spy) -> None:
    spy.dtype = torch.float32
    suite = type("OnTheCPU", (FA3Tests,), {"backend": backend.name})
    outcomes = list(run_checks(suite, only=CHECKS))
    assert [(o.check, o.detail) for o in outcomes if o.status != "passed"] == []
    assert len(outcomes) == len(CHECKS)
