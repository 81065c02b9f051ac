"""The conformance suite in processes: merged in order, and a check that hangs or crashes costs itself alone."""

from __future__ import annotations

import json
import subprocess
import time
from types import SimpleNamespace

import conformance
import pytest


def test_two_checks_of_a_backend(monkeypatch, tmp_path, capsys) -> None:
    out = tmp_path / "found.json"
    only = "probe,registration"
    options = ["--backends", "bf16_reference", "--only", only, "--jobs", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["conformance.py", *options])
    assert conformance.main() == 0
    (document,) = json.loads(out.read_text(encoding="utf-8"))["conformance"]
    assert [c["check"] for c in document["checks"]] == ["registration", "probe"]  # in their order, not as they end
    assert (document["backend"], document["failed"]) == ("bf16_reference", [])
    assert "bf16_reference on cpu" in capsys.readouterr().out.replace("cuda:0", "cpu")


def document(check: str, failed: bool = False) -> str:
    outcome = {"check": check, "status": "failed" if failed else "passed", "detail": "", "seconds": 1.0}
    found = {"backend": "mine", "device": "cuda:0", "checks": [outcome], "failed": [check] if failed else []}
    return json.dumps(found) + "\n"


def run_as(answers):
    """A process: what it says of its checks, up to one that ends it."""

    def run(command, **options):
        said = ""
        for check in command[-1].split(","):
            answer = answers.get(check, document(check))
            if answer == "hang":
                raise subprocess.TimeoutExpired(command, options["timeout"], output=said.encode())
            said += answer
            if answer != document(check):
                break
        return SimpleNamespace(stdout=said, stderr="Segmentation fault")

    return run


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_what_goes_wrong_is_a_failure_of_its_check(monkeypatch, jobs) -> None:
    checks = ["accuracy", "threads", "probe", "layouts", "outputs"]
    answers = {"accuracy": "hang", "threads": "", "layouts": document("layouts", failed=True)}
    monkeypatch.setattr(subprocess, "run", run_as(answers))
    found = conformance.merged(list(conformance.check_all(["mine"], checks, time.monotonic() + 60, jobs)))
    # In the order of the suite, whichever process ends first.
    assert [c["check"] for c in found["checks"]] == ["probe", "accuracy", "outputs", "layouts", "threads"]
    assert found["device"] == "cuda:0"
    assert sorted(found["failed"]) == ["accuracy", "layouts", "threads"]
    details = {c["check"]: c["detail"] for c in found["checks"]}
    assert details["accuracy"].startswith("not done after")
    assert details["threads"] == "Segmentation fault"


def test_without_time_nothing_is_said_to_have_passed(monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", run_as({"probe": "hang", "outputs": "hang"}))
    found = conformance.merged(conformance.check_share("mine", ["probe", "outputs"], time.monotonic() - 1))
    assert sorted(found["failed"]) == ["outputs", "probe"]
    assert found["checks"][0]["detail"] == "no time left"


def test_what_was_found_is_written_when_the_run_is_interrupted(monkeypatch, tmp_path) -> None:
    def check_all(backends, checks, end, jobs):
        yield {**json.loads(document("probe")), "backend": "bf16_reference"}
        raise KeyboardInterrupt

    out = tmp_path / "found.json"
    monkeypatch.setattr(conformance, "check_all", check_all)
    monkeypatch.setattr("sys.argv", ["conformance.py", "--backends", "bf16_reference", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        conformance.main()
    (found,) = json.loads(out.read_text(encoding="utf-8"))["conformance"]
    assert [c["check"] for c in found["checks"]] == ["probe"]
