"""`lpattn check`: the conformance suite as a command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

Cli = Any

QUICK = "registration,probe,cuda_graphs"


def test_a_line_for_each_check_and_a_summary(cli: Cli, half: str) -> None:
    result = cli("check", half, "--only", QUICK)
    assert result.code == 0
    first, *lines, last = result.out.splitlines()
    assert first == f"{half} on cpu"
    assert [line.split()[:2] for line in lines] == [
        ["registration", "passed"],
        ["probe", "passed"],
        ["cuda_graphs", "skipped"],
    ]
    assert lines[2].endswith("runs on cpu: needs a CUDA device")
    assert last == "2 passed, 1 skipped"


def test_a_failure_is_exit_code_1(cli: Cli, half: str) -> None:
    # The test's backend declares GQA and does not do it, and ignores the softmax scale.
    result = cli("check", half, "--only", "scale_is_applied,registration", "--device", "cpu")
    assert result.code == 1
    assert "FAILED" in result.out
    assert result.out.endswith("1 passed, 1 failed\n")


def test_the_document(cli: Cli, half: str) -> None:
    result = cli("check", half, "--only", "scale_is_applied,registration", "--json")
    document = json.loads(result.out)
    assert (document["backend"], document["device"]) == (half, "cpu")
    assert [check["status"] for check in document["checks"]] == ["passed", "failed"]
    assert document["failed"] == ["scale_is_applied"]
    assert set(document["checks"][0]) == {"check", "status", "detail", "seconds"}


def test_skip(cli: Cli, half: str) -> None:
    document = json.loads(cli("check", half, "--only", QUICK, "--skip", "probe", "--json").out)
    assert [check["check"] for check in document["checks"]] == ["registration", "cuda_graphs"]


def test_a_backend_that_no_device_can_run(cli: Cli, absent: str) -> None:
    result = cli("check", absent, "--only", "registration,accuracy")
    assert result.code == 0
    assert result.out.startswith(f"{absent} on no device of this machine\n")
    assert "the wheel [test] is missing (pip install test-wheel[all])" in result.out


def test_where_nothing_passes_the_command_fails(cli: Cli, absent: str) -> None:
    result = cli("check", absent, "--only", "accuracy")
    assert result.code == 1
    assert result.out.endswith("nothing was checked: every check was skipped, or failed as expected\n")
    assert cli("check", absent, "--only", "accuracy", "--json").code == 1


def test_the_suite_itself_says_what_is_wrong_with_it(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_suite.py").write_text(SUITE.replace('{"accuracy"', '{"acuracy"'))
    monkeypatch.chdir(tmp_path)
    result = cli("check", "bf16_reference", "--suite", "odd_suite:MySuite")
    assert result.code == 1
    assert "acuracy" in result.err
    assert "--suite must be" not in result.err


def test_built_in_backends_have_suites_of_their_own(cli: Cli) -> None:
    assert cli("check", "bf16_reference", "--only", "accuracy").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no_such",), "unknown backend 'no_such'"),
        (("bf16_reference", "--only", "acuracy"), "only names acuracy; the checks are registration, "),
        (("bf16_reference", "--only", "probe", "--skip", "probe"), "--only and --skip leave no check; got probe"),
        (("bf16_reference", "--suite", "nowhere:Suite"), "--suite must be MODULE:CLASS that can be imported; got"),
        (("bf16_reference", "--suite", "json:JSONDecoder"), "must be a subclass of lpattn.testing.BackendTests; got"),
        (("bf16_reference", "--suite", "json"), "--suite must be MODULE:CLASS"),
    ],
)
def test_what_does_not_exist_is_an_error(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    result = cli("check", *arguments)
    assert result.code == 1
    assert message in result.err
    assert result.out == ""


SUITE = """
from lpattn.testing import BackendTests

class MySuite(BackendTests):
    backend = "whatever"
    floor_db = 500.0
    expected_failures = {"accuracy": "nothing has 500 dB"}
"""


def test_a_suite_of_ones_own_from_the_current_folder(
    cli: Cli, half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_suite.py").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    document = json.loads(cli("check", half, "--only", "accuracy", "--suite", "my_suite:MySuite", "--json").out)
    monkeypatch.delitem(sys.modules, "my_suite")
    (check,) = document["checks"]
    assert check["status"] == "expected failure"
    assert check["detail"].startswith("nothing has 500 dB (")
    assert str(tmp_path) not in sys.path
