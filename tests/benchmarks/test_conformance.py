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


def run_as(answers):
    def run(command, **options):
        answer = answers[command[-1]]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer, stderr="Segmentation fault")

    return run


def passing(check: str) -> str:
    outcome = {"check": check, "status": "passed", "detail": "", "seconds": 1.0}
    return json.dumps({"backend": "mine", "device": "cuda:0", "checks": [outcome], "failed": []})


def test_what_goes_wrong_is_a_failure_of_its_check(monkeypatch) -> None:
    hung = subprocess.TimeoutExpired("python", 1)
    answers = {"accuracy": hung, "threads": "", "probe": passing("probe"), "outputs": passing("outputs")}
    monkeypatch.setattr(subprocess, "run", run_as(answers))
    documents = list(conformance.check("mine", list(answers), time.monotonic() + 60, jobs=2))
    document = conformance.merged(documents)
    assert [c["check"] for c in document["checks"]] == ["probe", "accuracy", "outputs", "threads"]
    assert document["device"] == "cuda:0"
    assert sorted(document["failed"]) == ["accuracy", "threads"]
    details = {c["check"]: c["detail"] for c in document["checks"]}
    assert details["accuracy"].startswith("not done after")
    assert details["threads"] == "Segmentation fault"


def test_without_time_nothing_is_said_to_have_passed(monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", run_as({"probe": subprocess.TimeoutExpired("python", 0)}))
    (document,) = conformance.check("mine", ["probe"], time.monotonic() - 1, jobs=1)
    assert document["failed"] == ["probe"]
    assert document["checks"][0]["detail"] == "no time left"


def test_what_was_found_is_written_when_the_run_is_interrupted(monkeypatch, tmp_path) -> None:
    def check(name, checks, end, jobs):
        yield json.loads(passing("probe"))
        raise KeyboardInterrupt

    out = tmp_path / "found.json"
    monkeypatch.setattr(conformance, "check", check)
    monkeypatch.setattr("sys.argv", ["conformance.py", "--backends", "bf16_reference", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        conformance.main()
    (document,) = json.loads(out.read_text(encoding="utf-8"))["conformance"]
    assert [c["check"] for c in document["checks"]] == ["probe"]
