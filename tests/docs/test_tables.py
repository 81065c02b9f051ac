"""The tables that are made from code are up to date, and every code and hook is documented."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lpattn import testing
from lpattn.hookspecs import Hooks
from lpattn.testing import CHECKS, BackendTests

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))

_SPEC = importlib.util.spec_from_file_location("lpattn_docs_tables", REPOSITORY / "docs" / "tables.py")
assert _SPEC is not None
assert _SPEC.loader is not None
tables = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tables)

# `Reason("code", ...)`, `refuse("code", ...)`, and pairs of code and message that become a Reason later.
_CODE = re.compile(r'(?:\bReason\(|\brefuse\(|\breturn |count_exact\(\w+\.\w+, )\s*"([a-z][a-z0-9_]*)",')
_TABLE = re.compile(r"^\| (`[a-z0-9_]+`(?:, `[a-z0-9_]+`)*) \|", re.MULTILINE)


def codes_of(text: str) -> set[str]:
    return set(_CODE.findall(text))


def used_codes() -> set[str]:
    sources = [*(REPOSITORY / "src" / "lpattn").rglob("*.py"), *REPOSITORY.glob("plugins/*/src/**/*.py")]
    return {code for path in sources for code in codes_of(path.read_text(encoding="utf-8"))}


def documented_codes() -> set[str]:
    text = (REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8").partition("## Codes of reasons")[2]
    return {code for row in _TABLE.findall(text) for code in re.findall(r"`([a-z0-9_]+)`", row)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.rendered(text) == text, f"{page.name} is out of date: run python docs/tables.py"


def test_every_table_is_on_a_page() -> None:
    named = {match["name"] for page in PAGES for match in tables.BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert named == set(tables.TABLES)


def test_a_stale_table_is_noticed() -> None:
    stale = "<!-- table: checks -->\n| check |\n<!-- end -->"
    assert tables.rendered(stale) != stale


def test_every_code_is_documented() -> None:
    used = used_codes()
    assert {"head_dim", "requires_grad", "not_faster", "kv_len", "need_weights"} <= used
    assert used - documented_codes() == set()


def test_no_code_is_explained_twice() -> None:
    rows = re.findall(r"^\| `([a-z0-9_]+)` \|", (REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 20
    assert len(rows) == len(set(rows))


def test_every_documented_code_is_used() -> None:
    assert documented_codes() - used_codes() == set()


def test_codes_are_found() -> None:
    text = 'Reason("one", f"x")\nrefuse(\n    "two",\n    "y")\nreturn "three", "z"\nReason(code, "no")'
    assert codes_of(text) == {"one", "two", "three"}


def test_every_hook_is_documented() -> None:
    text = (REPOSITORY / "docs" / "plugins.md").read_text(encoding="utf-8")
    hooks = [name for name, member in inspect.getmembers(Hooks, inspect.isfunction) if not name.startswith("_")]
    assert hooks
    assert [name for name in hooks if f"`{name}()`" not in text] == []


def test_every_attribute_of_the_suite_is_documented() -> None:
    text = (REPOSITORY / "docs" / "conformance.md").read_text(encoding="utf-8")
    names = [*BackendTests.__annotations__, "emulate"]
    assert [name for name in names if not re.search(rf"`{name}[`(]", text)] == []


def test_every_name_of_the_suite_is_documented() -> None:
    text = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in testing.__all__ if not re.search(rf"`{name}[`(]", text)] == []


def test_every_check_is_documented() -> None:
    text = (REPOSITORY / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert [name for name in CHECKS if f"| `{name}` |" not in text] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="building the site needs mkdocs (extra docs, a part of dev)")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert "Softmax scale" in page or "softmax scale" in page
    assert (tmp_path / "site" / "CONTRIBUTING" / "index.html").is_file()


def test_every_page_is_in_the_navigation() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert {"CONTRIBUTING.md", *(page.name for page in PAGES)} == set(re.findall(r"(\w+\.md)", navigation))
