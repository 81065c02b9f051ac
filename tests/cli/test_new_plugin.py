"""`lpattn new-plugin`: what it writes has the shape of plugins/lpattn-emulated, and runs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lpattn.cli.new_plugin import words, write

Cli = Any
REPOSITORY = Path(__file__).parents[2]
EMULATED = REPOSITORY / "plugins" / "lpattn-emulated"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template with the names of lpattn-emulated."""
    folder = tmp_path_factory.mktemp("rendered")
    write("emulated", folder)
    return folder


def test_it_writes_the_files_and_says_what_comes_next(cli: Cli, tmp_path: Path) -> None:
    result = cli("new-plugin", "my_fp8", "--into", str(tmp_path))
    assert result.code == 0
    folder = tmp_path / "lpattn-my-fp8"
    assert f"pip install -e {folder}" in result.out
    assert "lpattn check my_fp8" in result.out
    source = (folder / "src" / "lpattn_my_fp8" / "__init__.py").read_text()
    assert "class MyFp8Backend(Backend):" in source
    assert 'name = "my_fp8"' in source
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "lpattn-my-fp8"
    assert project["entry-points"] == {"lpattn": {"my_fp8": "lpattn_my_fp8"}}
    for path in folder.rglob("*"):
        if path.is_file():
            assert not set(words("x")) & set(path.read_text().replace("(", " ").replace('"', " ").split()), path


def test_the_document(cli: Cli, tmp_path: Path) -> None:
    document = json.loads(cli("new-plugin", "my_fp8", "--into", str(tmp_path), "--json").out)
    assert document["backend"] == "my_fp8"
    assert all((Path(document["folder"]) / file).is_file() for file in document["files"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-FP8", "must be a lower-case identifier such as 'my_fp8'; got 'My-FP8'"),
        ("fp8_triton", "backend name 'fp8_triton' is reserved by lpattn"),
        ("exact", "backend name 'exact' is reserved by lpattn"),
    ],
)
def test_names_that_no_backend_can_have(cli: Cli, tmp_path: Path, name: str, message: str) -> None:
    result = cli("new-plugin", name, "--into", str(tmp_path))
    assert result.code == 1
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_taken(cli: Cli, half: str, tmp_path: Path) -> None:
    result = cli("new-plugin", half, "--into", str(tmp_path))
    assert (result.code, "is already taken by registered" in result.err) == (1, True)


def test_a_folder_that_exists_is_left_alone(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "lpattn-my-fp8").mkdir()
    result = cli("new-plugin", "my_fp8", "--into", str(tmp_path))
    assert (result.code, "exists already" in result.err) == (1, True)
    assert list((tmp_path / "lpattn-my-fp8").iterdir()) == []


# The template and plugins/lpattn-emulated, which CONTRIBUTING.md shows, are one thing.


def test_it_has_the_files_of_lpattn_emulated(rendered: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        return {name for name in found if "__pycache__" not in name}

    # Its licence and the tests of its numbers are lpattn-emulated's own.
    assert files(EMULATED) - files(rendered) == {"LICENSE", "tests/test_emulated.py"}
    assert files(rendered) <= files(EMULATED)


def test_it_has_the_metadata_of_lpattn_emulated(rendered: Path) -> None:
    def metadata(folder: Path) -> dict[str, Any]:
        return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))

    ours, theirs = metadata(EMULATED), metadata(rendered)
    for key in ("description", "keywords", "license", "authors"):
        ours["project"].pop(key)
        theirs["project"].pop(key, None)
    assert theirs == ours


def code(path: Path) -> str:
    """The module without docstrings and names of its own."""
    text = path.read_text(encoding="utf-8").replace("fp8_emulated", "emulated")
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)


def test_it_has_the_code_of_lpattn_emulated(rendered: Path) -> None:
    module = Path("src", "lpattn_emulated", "__init__.py")
    assert code(rendered / module) == code(EMULATED / module)


def test_it_has_the_conformance_test_of_lpattn_emulated(rendered: Path) -> None:
    test = Path("tests", "test_conformance.py")
    assert code(rendered / test) == code(EMULATED / test)


def test_it_is_formatted_and_typed(rendered: Path) -> None:
    for command in (["ruff", "format", "--check"], ["ruff", "check"]):
        done = subprocess.run(
            [sys.executable, "-m", *command, "--config", str(REPOSITORY / "pyproject.toml"), str(rendered)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["mine_", "my__own"])
def test_a_name_that_no_distribution_can_have(cli: Cli, name: str, tmp_path: Path) -> None:
    result = cli("new-plugin", name, "--into", str(tmp_path))
    assert result.code == 1
    assert "single underscores between words" in result.err
    assert not list(tmp_path.iterdir())
