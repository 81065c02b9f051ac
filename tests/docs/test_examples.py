"""The Python blocks of README.md, CONTRIBUTING.md and docs/ run on a CPU and print what the text below them says.

A block's expected output is the ``text`` block that follows it at once. A block below ``<!-- needs NAME -->`` runs only
where the plugin NAME is installed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lpattn
from lpattn.cli import build_parser
from lpattn.testing import run_checks, suite_for

REPOSITORY = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "docs").glob("*.md"))
EXAMPLES = [page for page in PAGES if "```python\n" in (REPOSITORY / page).read_text(encoding="utf-8")]

_BLOCK = re.compile(
    r"(?:<!-- needs (?P<needs>\S+) -->\n)?```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)

ENTRY = re.compile(r"  (?P<name>[a-z]\w*) +\S")
ALWAYS = {"bf16_reference", "fp8_triton"}
WHERE_NAMED = re.compile(r", except where it is named: \w+(, \w+)*")


@dataclass(frozen=True)
class Block:
    """One Python block of a page."""

    line: int
    code: str
    output: str | None
    needs: str | None


def blocks_of(text: str) -> Iterator[Block]:
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        yield Block(line, match["code"], match["output"], match["needs"])


def comparable(output: str) -> list[str]:
    """The lines without those of backends, and without lists of them, that depend on what is installed."""
    lines, keep = [], True
    for line in output.rstrip().splitlines():
        if entry := ENTRY.match(line):
            keep = entry["name"] in ALWAYS
        elif not line.startswith(" "):
            keep = True
        if keep:
            lines.append(WHERE_NAMED.sub("", line).rstrip())
    return lines


def is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run(page: Path, blocks: list[Block]) -> None:
    """Run the blocks in one namespace, in order."""
    namespace: dict[str, object] = {"__name__": "example"}
    for block in blocks:
        printed = io.StringIO()
        # Errors point at the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.output is not None:
            where = f"{page.name}, the block in line {block.line}"
            assert comparable(printed.getvalue()) == comparable(block.output), where


@pytest.fixture(autouse=True)
def _as_a_user_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LPATTN_BACKEND", raising=False)
    before = {backend.name for backend in lpattn.available_backends("cpu")}
    yield
    for backend in lpattn.available_backends("cpu"):
        if backend.name not in before:
            lpattn.unregister_backend(backend.name)


@pytest.mark.filterwarnings("ignore::lpattn.LpattnWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_run(name: str) -> None:
    page = REPOSITORY / name
    blocks = list(blocks_of(page.read_text(encoding="utf-8")))
    assert len(blocks) == page.read_text(encoding="utf-8").count("```python") > 0
    run(page, [block for block in blocks if block.needs is None])


@pytest.mark.filterwarnings("ignore::lpattn.LpattnWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_run_with_the_plugins_that_they_need(name: str) -> None:
    page = REPOSITORY / name
    blocks = list(blocks_of(page.read_text(encoding="utf-8")))
    missing = {block.needs for block in blocks if block.needs is not None and not is_installed(block.needs)}
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))} is not installed")
    run(page, blocks)


def test_the_quickstart_warns_once_without_a_gpu() -> None:
    page = REPOSITORY / "README.md"
    first = next(blocks_of(page.read_text(encoding="utf-8")))
    with pytest.warns(lpattn.LpattnWarning, match="no low-precision backend can run on cpu") as caught:
        run(page, [first])
    assert len(caught) == 1


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_that_are_shown_parse(name: str) -> None:
    for line in re.findall(r"^\$ lpattn (.*)$", (REPOSITORY / name).read_text(encoding="utf-8"), re.MULTILINE):
        build_parser().parse_args(shlex.split(line))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = REPOSITORY / name
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_backend_of_contributing_passes_the_conformance_suite() -> None:
    page = REPOSITORY / "CONTRIBUTING.md"
    block = next(block for block in blocks_of(page.read_text(encoding="utf-8")) if "(lpattn.Backend)" in block.code)
    code = block.code.partition("\nq = ")[0]
    assert len(code.splitlines()) < 60
    run(page, [Block(block.line, code, None, None)])
    outcomes = list(run_checks(suite_for("my_half"), skip=["import_is_pure"]))
    assert [(o.check, o.detail) for o in outcomes if o.status.is_failure] == []
    assert sum(o.status == "passed" for o in outcomes) > 25


@pytest.mark.parametrize("name", PAGES)
def test_all_outputs_are_those_of_one_installation(name: str) -> None:
    """lpattn with lpattn-emulated: what :func:`comparable` leaves out where others run the examples."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    said = re.findall(r"no low-precision backend can run on cpu(.*)", text)
    assert [rest for rest in said if not rest.startswith(", except where it is named: fp8_emulated")] == []


def test_a_wrong_output_is_noticed() -> None:
    wrong = next(blocks_of("```python\nprint(1)\n```\n\n```text\n2\n```\n"))
    with pytest.raises(AssertionError, match="the block in line 2"):
        run(Path("page.md"), [wrong])


def test_what_is_installed_does_not_change_the_comparison() -> None:
    shown = "q\n  bf16_reference chosen\n  fp8_fa3        one\n                 two\n  fp8_triton     none\n"
    assert comparable(shown) == ["q", "  bf16_reference chosen", "  fp8_triton     none"]
    assert comparable("exact (none on cpu, except where it is named: one, two) [x]") == ["exact (none on cpu) [x]"]
