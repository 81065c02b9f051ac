"""What `import lpattn` costs and pulls in, each measured in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]

MEASURE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import lpattn
seconds = time.perf_counter() - start
added = sorted(set(sys.modules) - before)
print(json.dumps({"seconds": seconds, "added": added, "cuda": torch.cuda.is_initialized()}))
"""

PLUGIN_IS_LOADED = "import sys, lpattn; {statement}; print('planted_plugin' in sys.modules)"


def run(code: str, **variables: str) -> str:
    """The last line that the code prints in a new interpreter, in which lpattn is found as it is here."""
    # Without byte code, compiling lpattn at every start would be measured too.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "LPATTN_BACKEND")}
    environment.update(variables)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    return [json.loads(run(MEASURE)) for _ in range(3)]


def test_it_takes_less_than_a_third_of_a_second(measured: list[dict[str, Any]]) -> None:
    best = min(m["seconds"] for m in measured)
    assert best < 0.3, f"import lpattn took {best:.3f} s on top of import torch, in the best of {len(measured)} runs"


@pytest.mark.parametrize("package", ["triton", "transformers", "diffusers", "rich", "fa3_fwd_interface"])
def test_it_imports_no_package_that_only_some_calls_need(measured: list[dict[str, Any]], package: str) -> None:
    # Modules that torch had imported before are not among these.
    assert [name for name in measured[-1]["added"] if name.split(".")[0] == package] == []


def test_it_imports_no_plugin(measured: list[dict[str, Any]]) -> None:
    plugins = {point.module.split(".")[0] for point in entry_points(group="lpattn")}
    plugins |= {path.parent.name for path in REPOSITORY.glob("plugins/*/src/*/__init__.py")}
    assert {name.split(".")[0] for name in measured[-1]["added"]} & plugins == set()


def test_it_imports_neither_kernels_nor_the_command_line(measured: list[dict[str, Any]]) -> None:
    late = ("lpattn.kernels", "lpattn.backends.", "lpattn.cli", "lpattn.testing", "lpattn.compile")
    assert [name for name in measured[-1]["added"] if name.startswith(late)] == []


def test_it_does_not_touch_the_gpu(measured: list[dict[str, Any]]) -> None:
    assert not measured[-1]["cuda"]


def test_a_plugin_is_imported_at_the_first_question_and_not_before(tmp_path: Path) -> None:
    metadata = tmp_path / "planted_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lpattn]\nplanted = planted_plugin\n")
    (tmp_path / "planted_plugin.py").write_text("")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": path, "LPATTN_DISABLE_PLUGINS": ""}
    assert run(PLUGIN_IS_LOADED.format(statement="pass"), **variables) == "False"
    assert run(PLUGIN_IS_LOADED.format(statement="lpattn.available_backends()"), **variables) == "True"
