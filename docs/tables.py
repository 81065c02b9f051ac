"""Writes the tables of the documentation that are made from code: ``python docs/tables.py``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. The tests fail where one is out of date.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lpattn import Backend, Capabilities, MaskKind
from lpattn.backends.fa3 import FA3Backend
from lpattn.backends.reference import ReferenceBackend
from lpattn.backends.triton import FastTritonBackend, Int8TritonBackend, TritonBackend
from lpattn.testing import CHECKS

REPOSITORY = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(folder: str, name: str) -> Any:
    """A module of the repository that is not installed everywhere."""
    sys.path.insert(0, str(REPOSITORY / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def backends() -> dict[str, Backend]:
    """Every backend of this repository by its heading; sageattention for both of its versions."""
    emulated = load("plugins/lpattn-emulated/src", "lpattn_emulated")
    sage = load("plugins/lpattn-sageattention/src", "lpattn_sageattention")
    cudnn = load("plugins/lpattn-cudnn/src", "lpattn_cudnn")
    return {
        "bf16_reference": ReferenceBackend(),
        "fp8_fa3": FA3Backend(),
        "fp8_triton": TritonBackend(),
        "fp8_triton_fast": FastTritonBackend(),
        "int8_triton": Int8TritonBackend(),
        "fp8_emulated": emulated.EmulatedBackend(),
        "sageattention 1.0.6": sage.SageAttentionBackend(sage.Wheel("1.0.6")),
        "sageattention 2.x": sage.SageAttentionBackend(sage.Wheel("2.2.0")),
        "cudnn_fp8": cudnn.CudnnBackend(),
    }


def rows(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *(list(row) for row in body)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def capabilities_table() -> str:
    """What each backend takes, a column for each."""
    known = backends()
    axes: dict[str, Callable[[Capabilities], str]] = {
        "devices": devices,
        "dtypes": lambda c: ", ".join(str(d).removeprefix("torch.") for d in sorted(c.dtypes, key=str)),
        "head_dim": head_dims,
        "head_dim_v": lambda c: "any" if c.head_dim_v_differs else "as head_dim",
        "masks": masks,
        "causal": lambda c: yes(c.causal),
        "causal, rectangular": lambda c: yes(c.causal and c.causal_rectangular),
        "grouped heads": lambda c: yes(c.gqa),
        "log-sum-exp": lambda c: yes(c.lse),
        "dropout": lambda c: yes(c.dropout),
        "Hadamard": lambda c: ", ".join(sorted(m for m in c.hadamard if m != "none")) or "no",
        "fused rotation": lambda c: yes(c.rope),
        "gradients": lambda c: yes(c.backward),
    }
    body = [[f"`{name}`", *(axis(backend.capabilities) for axis in axes.values())] for name, backend in known.items()]
    columns = list(zip(*[["", *axes], *body], strict=True))
    return rows(columns[0], columns[1:])


def yes(flag: bool) -> str:
    """A flag in words."""
    return "yes" if flag else "no"


def devices(capabilities: Capabilities) -> str:
    """Device types, with the architectures."""
    if capabilities.device_types is None:
        return "any"
    names = ", ".join(sorted(capabilities.device_types))
    if capabilities.architectures is None:
        return names
    low, high = (f"sm_{major}{minor}" for major, minor in capabilities.architectures)
    return f"{names}, {low}" if low == high else f"{names}, {low} to {high}"


def head_dims(capabilities: Capabilities) -> str:
    """Head dims; a range with its step where there are many."""
    if capabilities.head_dims is None:
        return "any"
    dims = sorted(capabilities.head_dims)
    steps = {high - low for low, high in itertools.pairwise(dims)}
    if len(dims) > 6 and len(steps) == 1:
        step = steps.pop()
        return f"{dims[0]} to {dims[-1]}" + (f" in steps of {step}" if step > 1 else "")
    return ", ".join(map(str, dims))


def masks(capabilities: Capabilities) -> str:
    """Kinds of masks."""
    kinds = [str(kind) for kind in MaskKind if kind in capabilities.masks and kind is not MaskKind.NONE]
    return ", ".join(kinds + (["key padding"] if capabilities.key_padding and "bool" not in kinds else [])) or "none"


def capability_fields_table() -> str:
    """The fields of Capabilities with their defaults."""
    body = []
    for field in dataclasses.fields(Capabilities):
        if field.default is dataclasses.MISSING:
            default = "required"
        elif isinstance(field.default, frozenset):
            default = "`{" + ", ".join(sorted(str(x) for x in field.default)) + "}`"
        else:
            default = f"`{field.default}`"
        body.append([f"`{field.name}`", default])
    return rows(["field", "default"], body)


def checks_table() -> str:
    """Every check with what it asks for."""
    return rows(
        ["check", "what a backend has to do"],
        ([f"`{name}`", " ".join((f.__doc__ or "").split("\n\n")[0].split())] for name, f in CHECKS.items()),
    )


def bugs_table() -> str:
    """Every planted bug with the check that finds it."""
    planted = load("tests/testing", "planted_bugs")
    named = ([name.replace("_", " "), f"`{bug.check}`"] for name, bug in planted.BUGS.items())
    at_import = ([text, "`import_is_pure`"] for text in ("CUDA is called at import", "something is printed at import"))
    on_gpu = (
        ["work goes to the default stream", "`other_streams`"],
        ["looks at values during capture", "`cuda_graphs`"],
        ["keeps a scale across replays", "`cuda_graphs`"],
    )
    return rows(["planted bug", "found by"], [*named, *at_import, *on_gpu])


def hardware_table() -> str:
    """What the suite found on hardware, a row per backend, from the committed result files."""
    body = []
    for path in sorted((REPOSITORY / "benchmarks" / "results").glob("*-conformance*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        provenance = document["provenance"]
        where = provenance.get("device") or provenance.get("cpu", "")
        for found in document["conformance"]:
            name = f"`{found['backend']}`" + (f", {found['version']}" if found.get("version") else "")
            counts = Counter(check["status"] for check in found["checks"])
            failed = ", ".join(f"`{check}`" for check in found["failed"]) or "none"
            ran = where if found["device"] else f"not on {where}"
            body.append([f"`{path.name}`", name, ran, str(counts["passed"]), str(counts["skipped"]), failed])
    if not body:
        return "No results are committed.\n"
    return rows(["file", "backend", "ran on", "passed", "skipped", "failed"], body)


TABLES: dict[str, Callable[[], str]] = {
    "capabilities": capabilities_table,
    "capability fields": capability_fields_table,
    "checks": checks_table,
    "bugs": bugs_table,
    "hardware": hardware_table,
}


def rendered(text: str) -> str:
    """A page with its tables made anew."""
    return BLOCK.sub(lambda match: match[1] + TABLES[match["name"]]() + match[3], text)


def main() -> None:
    """Write all pages."""
    for page in sorted((REPOSITORY / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = rendered(text)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
