"""Every public name, environment variable, backend name and command-line option is in the user's documentation."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lpattn
from lpattn.cli import build_parser

REPOSITORY = Path(__file__).parents[2]
TEXT = "\n".join(
    page.read_text(encoding="utf-8") for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
)


def is_documented(name: str, text: str = TEXT) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


def variables() -> set[str]:
    source = REPOSITORY / "src" / "lpattn"
    return {name for path in source.rglob("*.py") for name in re.findall(r"\bLPATTN_[A-Z_]+[A-Z]\b", path.read_text())}


def options(parser: argparse.ArgumentParser, section: str = "") -> Iterator[tuple[str, str]]:
    """(command, option or command) of a parser and its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield name, f"lpattn {name}"
                yield from options(command, name)
        else:
            yield from ((section, option) for option in action.option_strings if option.startswith("--"))


@pytest.mark.parametrize("name", lpattn.__all__)
def test_public_names(name: str) -> None:
    assert is_documented(name)


@pytest.mark.parametrize("kind", [lpattn.AttentionBackend, lpattn.HadamardMode])
def test_members_and_values(kind: type[lpattn.AttentionBackend]) -> None:
    assert [m for m in kind if not (is_documented(m.name) and is_documented(m.value))] == []


def test_environment_variables() -> None:
    assert {"LPATTN_BACKEND", "LPATTN_DISABLE_PLUGINS"} <= variables()
    assert [name for name in sorted(variables()) if not is_documented(name)] == []


@pytest.mark.parametrize(("command", "option"), list(options(build_parser())))
def test_options_are_in_the_section_of_their_command(command: str, option: str) -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    section = page.partition(f"## `lpattn {command}`")[2].partition("\n## ")[0] if command else page
    # --help is described once, for all commands.
    assert is_documented(option, page if option == "--help" or option.startswith("lpattn ") else section)


def test_options_that_are_documented_exist() -> None:
    known = {option for _, option in options(build_parser())}
    page = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)) <= known


def test_targets_of_make_exist() -> None:
    text = TEXT + (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test", "check", "setup", "test-gpu"} <= named <= targets


def test_a_part_of_a_name_is_not_the_name() -> None:
    assert not is_documented("explain", "unexplained --explain-it")
    assert is_documented("--kv-len", "`--kv-len N`")
