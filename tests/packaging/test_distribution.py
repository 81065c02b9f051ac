"""What is published: names, versions, metadata, and the wheel."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import lpattn

REPOSITORY = Path(__file__).parents[2]

# Other people's code calls these names.
FIXED_NAMES = {
    "AttentionBackend",
    "AttentionCall",
    "Backend",
    "HadamardMode",
    "Reason",
    "apply_low_precision_attention",
    "attention_report",
    "available_backends",
    "explain",
    "hookimpl",
    "low_precision_attention",
    "low_precision_rope_sdpa",
    "low_precision_sdpa",
    "register_backend",
    "remove_low_precision_attention",
    "unregister_backend",
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def test_all_is_sorted_and_complete() -> None:
    assert list(lpattn.__all__) == sorted(set(lpattn.__all__))
    assert set(lpattn.__all__) >= FIXED_NAMES
    public = {
        name
        for name, value in vars(lpattn).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert public <= set(lpattn.__all__)


@pytest.mark.parametrize("name", sorted(FIXED_NAMES | set(lpattn.__all__)))
def test_public_names_exist_and_say_what_they_are(name: str) -> None:
    value = getattr(lpattn, name)
    if callable(value):
        assert value.__doc__, f"lpattn.{name} has no docstring"


def test_version_is_the_top_entry_of_the_changelog() -> None:
    headings = re.findall(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == lpattn.__version__


def test_the_command_exists(project: dict[str, Any]) -> None:
    module, _, name = project["scripts"]["lpattn"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_constraints_are_within_what_the_project_allows(project: dict[str, Any]) -> None:
    declared = list(project["dependencies"])
    for requirements in project["optional-dependencies"].values():
        declared += requirements
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {c.name: s.version for c in constraints for s in c.specifier if s.operator == "=="}
    assert "torch" in pinned
    for requirement in map(Requirement, declared):
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_plugins_depend_on_lpattn_and_name_their_entry_point() -> None:
    for path in REPOSITORY.glob("plugins/*/pyproject.toml"):
        plugin = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        assert "lpattn" in {Requirement(r).name for r in plugin["dependencies"]}, path
        assert plugin["entry-points"]["lpattn"], path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling (extra dev)")
    pytest.importorskip("build", reason="building a wheel needs build (extra dev)")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    source = REPOSITORY / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "lpattn").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert "lpattn/py.typed" in names


def test_the_wheel_states_version_licence_and_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    assert f"\nVersion: {lpattn.__version__}\n" in metadata
    assert "\nLicense-Expression: BSD-3-Clause\n" in metadata
    required = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)]
    always = {r.name: r for r in required if "extra" not in str(r.marker or "")}
    assert set(always) == {"pluggy", "rich", "torch", "triton"}
    assert always["triton"].marker is not None
    assert not always["triton"].marker.evaluate({"platform_system": "Darwin"})


def test_the_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lpattn; lpattn.available_backends(); "
    code += "print(lpattn.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(tmp_path)
