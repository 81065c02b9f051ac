"""docs/performance.md holds what the committed result files hold, and nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def render():
    spec = importlib.util.spec_from_file_location("render", REPOSITORY / "benchmarks" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_generated(render):
    assert render.PAGE.read_text() == render.page(), "run python benchmarks/render.py"


def test_the_shipped_speeds_are_those_of_the_sweep(render):
    """speedups.json decides for users: it must be the committed measurement."""
    shipped = json.loads((REPOSITORY / "src" / "lpattn" / "speedups.json").read_text())["tables"]
    points = {
        (row["backend"], row["head_dim"], row["causal"], row["gqa"], length): ratio
        for row in shipped
        for length, ratio in row["speedup_by_length"]
    }
    measured = {}
    for result in render.load("h200-sweep.json")["results"]:
        shape = result["shape"]
        grouped = shape["num_heads"] != shape["num_kv_heads"]
        for backend, ratio in result["speedup"].items():
            measured[(backend, shape["head_dim"], shape["causal"], grouped, shape["length"])] = round(ratio, 3)
    assert points == measured
