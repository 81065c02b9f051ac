"""Who may import whom inside lpattn. `make check` runs this file too.

A part is a module or a package directly below ``lpattn``; ``ROOT`` stands for ``lpattn/__init__.py``. Every import
counts, wherever it is: in a function, under TYPE_CHECKING, or as ``import_module("lpattn.x")`` with a literal name.
Arrows inside a part are free, but no two modules may import each other, not even by a detour.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "lpattn"

ROOT = "__init__"
WORDS = {"types", "errors", "predicates"}
PUBLIC = {*WORDS, "backend", "hookspecs", "inventory", "registry", "policy", "dispatch", "functional", "eager"}

# From the bottom up. No arrow leads to `backends`: `registry` loads them by name, in the same way as plugins.
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "predicates": set(),
    "errors": {"types"},
    "rope": {*WORDS},
    "norm": {*WORDS},
    "tracing": set(),
    "backend": {"types"},
    "hookspecs": {"backend"},
    "calls": {*WORDS},
    "ledger": {"types"},
    "policy": {*WORDS},
    "registry": {"hookspecs", "backend", *WORDS},
    "settings": {"registry", "tracing", *WORDS},
    "dispatch": {"registry", "policy", "settings", *WORDS},
    "inventory": {"registry", "backend", *WORDS},
    "active": {"settings", "ledger"},
    "arguments": {"active", "registry", "settings", "tracing", *WORDS},
    "plan": {"dispatch", "registry", "backend", "settings", "calls", *WORDS},
    "execute": {"plan", "dispatch", "registry", "settings", "active", "calls", "ledger", "rope", "norm", *WORDS},
    "quantize": {*WORDS},
    "kernels": {"quantize", *WORDS},
    "backends": {"backend", "hookspecs", "quantize", "kernels", "policy", "rope", "norm", *WORDS},
    "varlen": {"execute", "dispatch", "registry", "settings", "active", "calls", "ledger", *WORDS},
    "ops": {"varlen", "execute", "dispatch", "settings", "ledger", *WORDS},
    "redirection": {"compile", "tracing", "active", "ops", "plan", "execute", "settings", "calls", *WORDS},
    "functional": {
        "redirection",
        "arguments",
        "tracing",
        "active",
        "ops",
        "varlen",
        "execute",
        "rope",
        "norm",
        "dispatch",
        "calls",
        *WORDS,
    },
    "eager": {"active", "tracing", "redirection", "ops", "execute", "dispatch", "settings", "policy", "ledger", *WORDS},
    "compile": {"ops", "dispatch", "registry", "settings", "calls", *WORDS},
    ROOT: PUBLIC,
    "testing": {ROOT, *PUBLIC, "quantize", "ops", "settings", "rope", "norm"},
    "cli": {ROOT, *PUBLIC, "settings", "calls", "compile", "testing"},
    "__main__": {"cli"},
}

# Packages that only some parts may import. The others must work, or at least import, without them.
ONLY_IN: dict[str, set[str]] = {
    "triton": {"quantize", "kernels", "backends"},
    "pluggy": {"hookspecs", "registry"},
    "rich": {"cli"},
    "transformers": {"eager", "compile", "cli"},
    "diffusers": {"eager", "compile", "cli"},
    "fa3_fwd_interface": {"backends"},
    "flash_attn_interface": {"backends"},
}


def modules_of(package: Path) -> dict[str, Path]:
    """Every module below the package by its dotted name, which starts with the package's own."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_of(module: str, path: Path, modules: Collection[str]) -> Iterator[tuple[str, int]]:
    """(name, line) of every import: a module of the package where the name is one, else as it is written."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        match node:
            case ast.Import(names=names):
                yield from ((name.name, node.lineno) for name in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                if level:
                    ancestors = package.split(".")
                    base = ".".join(ancestors[: len(ancestors) - level + 1])
                    source = f"{base}.{source}" if source else base
                assert source is not None
                for name in names:
                    submodule = f"{source}.{name.name}"
                    yield (submodule if submodule in modules else source), node.lineno
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name, node.lineno


def part_of(module: str) -> str:
    """The part that a module of the package belongs to."""
    return module.split(".")[1] if "." in module else ROOT


def violations(
    package: Path,
    may_import: Mapping[str, Collection[str]] = MAY_IMPORT,
    only_in: Mapping[str, Collection[str]] = ONLY_IN,
) -> list[str]:
    """One line for each import that the tables do not allow, and for each part that they do not know."""
    modules = modules_of(package)
    found = []
    for unknown in sorted({part_of(module) for module in modules} - set(may_import)):
        found.append(f"{unknown}: not in the table MAY_IMPORT; say there what it may import")
    for module, path in modules.items():
        part = part_of(module)
        for name, line in imports_of(module, path, modules):
            where = f"{path.relative_to(package.parent)}:{line}"
            top = name.split(".")[0]
            if top == package.name:
                target = part_of(name)
                if target != part and target not in may_import.get(part, ()):
                    allowed = ", ".join(sorted(may_import.get(part, ()))) or "nothing of lpattn"
                    found.append(f"{where}: {part} imports {target}; it may import {allowed}")
            elif part not in only_in.get(top, {part}):
                found.append(f"{where}: {part} imports {top}; only {', '.join(sorted(only_in[top]))} may")
    return list(dict.fromkeys(found))  # one statement may import several names


def cycle(package: Path) -> list[str]:
    """Modules that import each other in a circle, the first one repeated at the end; empty if there are none."""
    modules = modules_of(package)
    graph = {
        module: {name for name, _ in imports_of(module, path, modules) if name in modules and name != module}
        for module, path in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_import_is_allowed() -> None:
    found = violations(SOURCE)
    assert not found, "\n" + "\n".join(found)


def test_there_is_no_cycle() -> None:
    found = cycle(SOURCE)
    assert not found, " <- ".join(found)


def test_the_table_itself_points_one_way() -> None:
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()


def test_the_table_names_only_parts_that_it_lists() -> None:
    assert set().union(*MAY_IMPORT.values(), *ONLY_IN.values()) <= set(MAY_IMPORT)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that keeps the rules: ``types`` <- ``ops`` <- ``backends.fast``."""
    root = tmp_path / "lpattn"
    (root / "backends").mkdir(parents=True)
    (root / "__init__.py").write_text("from lpattn.ops import attend\n")
    (root / "types.py").write_text("import math\n")
    (root / "ops.py").write_text("from lpattn.types import Call\n")
    (root / "backends" / "__init__.py").write_text("")
    (root / "backends" / "fast.py").write_text("import triton.language as tl\nfrom ..types import Call\n")
    return root


TABLE = {"types": set(), "ops": {"types"}, "backends": {"types"}, ROOT: {"ops"}}
OWNERS = {"triton": {"backends"}}


def test_the_checker_passes_what_is_allowed(package: Path) -> None:
    assert violations(package, TABLE, OWNERS) == []
    assert cycle(package) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import lpattn.backends.fast",
        "from lpattn import backends",
        "from lpattn.backends import fast",
        "from lpattn.backends.fast import kernel",
        "from . import backends",
        "from .backends.fast import kernel",
        "def late():\n    from lpattn.backends import fast",
        "if TYPE_CHECKING:\n    from lpattn.backends import fast",
        "importlib.import_module('lpattn.backends.fast')",
    ],
)
def test_the_checker_finds_a_planted_arrow(package: Path, statement: str) -> None:
    (package / "ops.py").write_text(statement)
    (found,) = violations(package, TABLE, OWNERS)
    line = 2 if "\n" in statement else 1
    assert found == f"lpattn/ops.py:{line}: ops imports backends; it may import types"


def test_the_checker_finds_relative_imports_that_climb(package: Path) -> None:
    (package / "backends" / "fast.py").write_text("from ..ops import attend\nfrom .. import ops\nfrom . import other\n")
    assert violations(package, TABLE, OWNERS) == [
        f"lpattn/backends/fast.py:{line}: backends imports ops; it may import types" for line in (1, 2)
    ]


def test_the_checker_finds_an_import_of_the_root(package: Path) -> None:
    (package / "types.py").write_text("from lpattn import attend\n")
    assert violations(package, TABLE, OWNERS) == [
        "lpattn/types.py:1: types imports __init__; it may import nothing of lpattn"
    ]


def test_the_checker_finds_an_owned_package(package: Path) -> None:
    (package / "types.py").write_text("import triton\n")
    assert violations(package, TABLE, OWNERS) == ["lpattn/types.py:1: types imports triton; only backends may"]


def test_the_checker_finds_a_part_that_the_table_does_not_know(package: Path) -> None:
    (package / "extra").mkdir()
    (package / "extra" / "__init__.py").write_text("")
    assert violations(package, TABLE, OWNERS) == ["extra: not in the table MAY_IMPORT; say there what it may import"]


def test_the_checker_finds_a_cycle(package: Path) -> None:
    (package / "backends" / "fast.py").write_text("from lpattn.backends import slow\n")
    (package / "backends" / "slow.py").write_text("def late():\n    from lpattn.backends.fast import kernel\n")
    assert violations(package, TABLE, OWNERS) == []
    assert set(cycle(package)) == {"lpattn.backends.fast", "lpattn.backends.slow"}
