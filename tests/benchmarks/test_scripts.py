"""Every benchmark says how it is used; those that need a GPU say so; a sweep becomes a picture."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import labels
import plot
import pytest
import torch

SCRIPTS = (
    "attention",
    "calibrate",
    "compiled",
    "conformance",
    "dispatch",
    "eager_overhead",
    "hopper",
    "plot",
    "quantization",
    "sanitize",
    "targets",
)
ON_GPU = ("attention", "calibrate", "compiled", "hopper", "quantization", "sanitize", "targets")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main()
    assert stopped.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_no_script_hides_a_module_of_python():
    """A script's folder comes first where modules are looked for, also by those that it imports."""
    names = {path.stem for path in Path(labels.__file__).parent.glob("*.py")}
    assert not names & sys.stdlib_module_names


@pytest.mark.parametrize("name", ON_GPU)
def test_without_a_gpu_it_says_so(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert importlib.import_module(name).main() == 1
    assert f"{name}.py needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "mode"), [("fp8_fa3", "none"), ("fp8_fa3", "qkv"), ("my_own", "v_only")])
def test_names_have_two_parts(backend, mode):
    assert labels.parts_of(labels.name_of(backend, mode)) == (backend, mode)


def result(length: int, kv_heads: int = 8, causal: bool = False) -> dict:
    shape = {"num_heads": 8, "num_kv_heads": kv_heads, "length": length, "head_dim": 128, "causal": causal}
    return {"shape": shape, "speedup": {"a": 1.1, "a+hadamard_qkv": 0.9, "auto": 1.0}}


RESULTS = [result(4096), result(512), result(512, kv_heads=2), result(512, causal=True)]


def test_panels():
    found = plot.panels(RESULTS)
    assert list(found) == [("causal", 128), ("full", 128)]
    assert found["full", 128][("a", "none", False)] == [(512, 1.1), (4096, 1.1)]
    assert {plot.label(line) for line in found["full", 128]} == {
        "a",
        "a, GQA",
        "a, Hadamard qkv",
        "a, Hadamard qkv, GQA",
    }


@pytest.mark.parametrize(("field", "panel"), [("holes", "dense mask"), ("bias", "additive mask")])
def test_masks_have_panels_of_their_own(field, panel):
    masked = result(512)
    masked["shape"][field] = True
    assert list(plot.panels([result(512), masked])) == [(panel, 128), ("full", 128)]


def test_the_picture_says_what_it_was_made_from(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra dev)")
    data = {"results": RESULTS, "provenance": {"cpu": "a cpu", "date": "2026-01-01T00:00"}}
    plot.draw(data, "sweep.json", tmp_path / "sweep.png")
    assert b"sweep.json 2026-01-01T00:00" in (tmp_path / "sweep.png").read_bytes()


def test_the_picture_of_kernels(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra dev)")
    found = {"shape": RESULTS[0]["shape"], "teraflops": {"exact:a": 1.0, "kernel:b": 2.0, "whole:c": 1.5}}
    data = {
        "results": [found | {"over_fa3_fp8": {}}] * 3,
        "provenance": {"device": "a GPU", "date": "2026-01-01T00:00"},
    }
    source = tmp_path / "kernels.json"
    source.write_text(json.dumps(data))
    monkeypatch.setattr("sys.argv", ["plot.py", str(source)])
    assert plot.main() == 0
    assert b"kernels.json 2026-01-01T00:00" in source.with_suffix(".png").read_bytes()
