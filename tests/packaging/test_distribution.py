"""What is published: names, versions, metadata, and the wheel."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
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


def build(project: Path, folder: Path) -> Path:
    """The wheel of a project, built without a network."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling (extra dev)")
    pytest.importorskip("build", reason="building a wheel needs build (extra dev)")
    return build(REPOSITORY, tmp_path_factory.mktemp("wheel"))


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


# A plugin as its author makes it, in an environment in which nothing is installed from the checkout.

CRASHING = "raise OSError('libmissing.so.1: cannot open shared object file')\n"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a new environment with the wheels of lpattn and of a new plugin, and with a plugin that crashes.

    PyTorch and the other dependencies are those of this environment: installing them anew would take minutes.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    packages = Path(
        sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    )
    new = folder / "projects"
    command = [sys.executable, "-m", "lpattn", "new-plugin", "shiny_fp8", "--into", str(new)]
    subprocess.run(command, check=True, capture_output=True)
    crashing = new / "lpattn-crashing"
    (crashing / "src" / "lpattn_crashing").mkdir(parents=True)
    (crashing / "src" / "lpattn_crashing" / "__init__.py").write_text(CRASHING)
    project = (new / "lpattn-shiny-fp8" / "pyproject.toml").read_text()
    (crashing / "README.md").write_text("# It crashes\n")
    (crashing / "pyproject.toml").write_text(project.replace("shiny-fp8", "crashing").replace("shiny_fp8", "crashing"))
    wheels = [wheel]
    for path in (new / "lpattn-shiny-fp8", crashing):
        (folder / path.name).mkdir()
        wheels.append(build(path, folder / path.name))
    for path in wheels:
        with zipfile.ZipFile(path) as archive:  # what pip does with a wheel that has no scripts
            archive.extractall(packages)
    # Behind the wheels on the path, and without the .pth files that lead into the checkout.
    site = next(p for p in map(Path, sys.path) if (p / "torch").is_dir())
    (packages / "dependencies.pth").write_text(f"{site}\n")
    return python


def run_in(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it as a user does, from a folder that has nothing to do with the checkout."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("LPATTN_", "PYTHON", "COV_"))}
    return subprocess.run(
        [str(python), *arguments], cwd=python.parent, env=variables, capture_output=True, text=True, check=False
    )


def test_a_new_plugin_is_found_next_to_one_that_crashes(environment: Path) -> None:
    done = run_in(environment, "-m", "lpattn", "info", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    plugins = {plugin["distribution"]: plugin for plugin in document["plugins"]}
    assert plugins["lpattn-shiny-fp8"]["backends"] == ["shiny_fp8"]
    assert plugins["lpattn-shiny-fp8"]["protocol_version"] == document["protocol_version"]
    assert plugins["lpattn-crashing"]["failed"]
    (failure,) = [f for f in document["failures"] if f["source"]["distribution"] == "lpattn-crashing"]
    assert failure["message"] == "OSError: libmissing.so.1: cannot open shared object file"
    assert "lpattn_crashing/__init__.py" in failure["traceback"]


def test_a_new_plugin_passes_the_conformance_suite(environment: Path) -> None:
    done = run_in(environment, "-m", "lpattn", "check", "shiny_fp8", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["failed"] == []
    assert sum(check["status"] == "passed" for check in document["checks"]) > 30


def test_the_environment_has_lpattn_from_the_wheel(environment: Path) -> None:
    done = run_in(environment, "-c", "import lpattn, lpattn_shiny_fp8 as p; print(lpattn.__file__, p.__file__)")
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(environment.parents[1]) for file in done.stdout.split())
