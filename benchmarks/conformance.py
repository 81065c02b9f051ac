"""Run the conformance suite on every backend that this machine can run, each in a process of its own.

A kernel that hangs or breaks CUDA's context ends its own process alone. Plugins on the path count, installed or not.

    python benchmarks/conformance.py --out benchmarks/results/h200-conformance.json
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import Any

from common import Budget, parser, write  # first: it finds lpattn in a checkout

import lpattn

BACKENDS = (
    "bf16_reference",
    "fp8_fa3",
    "fp8_triton",
    "fp8_triton_fast",
    "int8_triton",
    "sageattention",
    "cudnn_fp8",
    "fp8_emulated",
)
PLUGINS = {"sageattention": "lpattn_sageattention", "cudnn_fp8": "lpattn_cudnn", "fp8_emulated": "lpattn_emulated"}


def register(name: str) -> None:
    """Register a plugin's backend that is on the path and not installed."""
    if name in PLUGINS and name not in [info.name for info in lpattn.available_backends()]:
        for backend in importlib.import_module(PLUGINS[name]).lpattn_backends():
            lpattn.register_backend(backend)


def check_here(name: str, skip: str) -> int:
    """``lpattn check NAME --json`` in this process."""
    from lpattn.cli import main

    register(name)
    return main(["check", name, "--json", *(["--skip", skip] if skip else [])])


def check(name: str, seconds: float, skip: str) -> dict[str, Any]:
    """The document of ``lpattn check``; what the process said where there is none."""
    command = [sys.executable, __file__, "--one", name, "--skip", skip]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"backend": name, "error": f"not done after {seconds:.0f} s"}
    try:
        return {**json.loads(done.stdout), "version": version(name)}
    except ValueError:
        return {"backend": name, "error": (done.stderr or done.stdout)[-2000:]}


def version(name: str) -> str:
    """What runs underneath."""
    register(name)
    return next((info.version for info in lpattn.available_backends() if info.name == name), "")


def main() -> int:
    """Check all; 1 where a backend that runs here fails something."""
    arguments = parser(__doc__ or "", budget=540.0)
    arguments.add_argument("--backends", default=",".join(BACKENDS), help="names, separated by commas")
    arguments.add_argument("--skip", default="", help="checks that do not run, separated by commas")
    arguments.add_argument("--one", help="only this backend, in this process")
    options = arguments.parse_args()
    if options.one:
        return check_here(options.one, options.skip)
    budget = Budget(options.budget, 300.0)
    found: list[dict[str, Any]] = []
    names = options.backends.split(",")
    if options.quick:
        names = names[:1]
    try:
        for name in names:
            seconds = budget.item()
            found.append(check(name, seconds, options.skip) if seconds else {"backend": name, "error": "no time left"})
            show(found[-1])
    finally:  # what was found is written, whatever came next
        write(options.out, {"conformance": found})
    return 1 if any(document.get("failed") or document.get("error") for document in found) else 0


def show(document: dict[str, Any]) -> None:
    """One line for a backend, and one for each failure."""
    if "error" in document:
        print(f"{document['backend']}: {document['error']}", flush=True)
        return
    passed = sum(check["status"] == "passed" for check in document["checks"])
    where = document["device"] or "no device of this machine"
    seconds = sum(check["seconds"] for check in document["checks"])
    print(f"{document['backend']} on {where}: {passed} passed, {len(document['failed'])} failed, {seconds:.0f} s")
    for outcome in document["checks"]:
        if outcome["check"] in document["failed"]:
            print(f"  {outcome['check']}: {outcome['detail']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
