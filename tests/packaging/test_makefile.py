"""The setup is done when it has to be, and a run without a GPU does not pass for one with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # This may itself run below `make test`, whose flags would be inherited.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON")}
    environment |= variables
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one plugin, set up a minute ago."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / "plugins" / "one").mkdir(parents=True)
    (tmp_path / "plugins" / "one" / "pyproject.toml").write_text("")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    stamp = tmp_path / ".venv" / ".installed"
    stamp.touch()
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    os.utime(stamp, (1e9 + 60, 1e9 + 60))
    return tmp_path


def is_set_up(folder: Path) -> bool:
    done = make(folder, "--question", "setup")
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


def test_setup_is_done_once(checkout: Path) -> None:
    assert is_set_up(checkout)


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "plugins/one/pyproject.toml"])
def test_setup_is_done_again_when_what_it_reads_has_changed(checkout: Path, name: str) -> None:
    (checkout / name).touch()
    assert not is_set_up(checkout)


def test_setup_is_done_again_for_a_new_plugin(checkout: Path) -> None:
    (checkout / "plugins" / "two").mkdir()
    (checkout / "plugins" / "two" / "pyproject.toml").touch()
    assert not is_set_up(checkout)
    assert "-e ./plugins/one -e ./plugins/two" in make(checkout, "--dry-run", "setup").stdout


def test_a_setup_that_fails_is_done_again(checkout: Path) -> None:
    (checkout / "constraints.txt").touch()
    assert make(checkout, "setup", "PYTHON=false").returncode != 0
    assert not (checkout / ".venv" / ".installed").exists()
    assert not is_set_up(checkout)


def test_setup_names_the_python_that_is_too_old(checkout: Path) -> None:
    old = checkout / "old-python"
    fake = "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (main)'; exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{fake}" "$2"\n')
    old.chmod(0o755)
    (checkout / "constraints.txt").touch()
    done = make(checkout, "setup", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"lpattn needs Python 3.11 or newer; {old} is Python 3.9.2." in done.stderr


def test_gpu_tests_fail_where_there_is_no_gpu() -> None:
    done = make(REPOSITORY, "test-gpu", f"PYTHON={sys.executable}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert "sees no CUDA device" in done.stderr
