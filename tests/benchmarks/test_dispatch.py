"""Host time on a machine without a GPU: that it can be measured there, and what a call has to do at the least."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton, whose launches are left out, is not installed")

HERE = Path(__file__).parent
BENCHMARK = HERE.parents[1] / "benchmarks" / "dispatch.py"


def output_of(*command: str) -> str:
    """What a script prints where Triton compiles, and finds no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def operators() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(output_of(str(HERE / "host_operators.py")))
    return found


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "step"])
def test_the_hopper_kernel_takes_two_allocations_and_a_view(operators, layout):
    assert operators[f"host_fp8_triton {layout}"] == ["empty", "empty", "transpose"]


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "step"])
def test_fp8_fa3_takes_two_allocations_and_the_views_that_its_operator_wants(operators, layout):
    views = ["as_strided"] * 3 + ["select"] * 3
    assert sorted(operators[f"host_fp8_fa3 {layout}"]) == sorted(["empty", "empty", *views, "transpose"])


@pytest.mark.parametrize("layout", ["bshd", "step"])
def test_exact_attention_copies_nothing_that_lies_right(operators, layout):
    assert not {"copy_", "clone", "new_empty_strided"} & set(operators[f"bf16_reference {layout}"])


def test_the_benchmark_measures_whole_calls(tmp_path: Path):
    out = tmp_path / "found.json"
    printed = output_of(str(BENCHMARK), "--quick", "--budget", "2", "--out", str(out))
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["device"] == "cpu"
    for name in ("host_fp8_fa3", "host_fp8_triton"):
        for label in (name, f"module, {name}", f"{name}: backend", f"{name}: quantize"):
            assert 0.0 < found["microseconds"][label] < 1e5
    assert found["added"]["automatic"] == pytest.approx(
        found["microseconds"]["low_precision_sdpa"] - found["microseconds"]["plain SDPA"]
    )
    assert "planning a call seen before" in printed
