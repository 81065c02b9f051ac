"""Run the conformance suite on every backend that this machine can run, in several processes.

A check that fails, hangs or breaks CUDA's context ends its process, and the next one begins in another; kernels compile
side by side. Plugins on the path count, installed or not.

    python benchmarks/conformance.py --out benchmarks/results/h100-conformance.json
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from common import parser, write  # first: it finds lpattn in a checkout

import lpattn
from lpattn.testing import CHECKS, Status

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
LONGEST = ("options_combine", "scales_are_exact", "accuracy")
"""Checks that begin first, each in a process of its own."""

PLUGINS = {"sageattention": "lpattn_sageattention", "cudnn_fp8": "lpattn_cudnn", "fp8_emulated": "lpattn_emulated"}


def register(name: str) -> None:
    """Register a plugin's backend that is on the path and not installed."""
    if name in PLUGINS and name not in [info.name for info in lpattn.available_backends()]:
        for backend in importlib.import_module(PLUGINS[name]).lpattn_backends():
            lpattn.register_backend(backend)


def check_here(name: str, checks: list[str]) -> None:
    """``lpattn check NAME --json`` of each check in this process, a line each, up to the first that fails.

    Nobody knows what a failure left behind on the device, so the next check begins in another process.
    """
    from lpattn.cli import main

    register(name)
    for one in checks:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            main(["check", name, "--json", "--only", one])
        document = json.loads(said.getvalue())
        print(json.dumps(document), flush=True)
        if document["failed"]:
            break


def check_all(backends: list[str], checks: list[str], end: float, jobs: int) -> Iterator[dict[str, Any]]:
    """The documents of ``lpattn check``, as they end; ``jobs`` processes at a time."""
    others = [check for check in checks if check not in LONGEST]
    # Checks next to each other are alike, and compile alike: every process gets some of each kind.
    count = min(len(others), -(-2 * jobs // len(backends)))
    shares = [[check] for check in LONGEST if check in checks] + [others[i::count] for i in range(count)]
    threads = ThreadPoolExecutor(jobs)
    try:
        waiting = [threads.submit(check_share, name, share, end) for share in shares for name in backends]
        for future in as_completed(waiting):
            yield from future.result()
    finally:  # an interrupted run does not wait to write what it found
        threads.shutdown(wait=False, cancel_futures=True)


def check_share(name: str, checks: list[str], end: float) -> list[dict[str, Any]]:
    """A document for each check; a failure where the process says something else, or nothing in time."""
    found: list[dict[str, Any]] = []
    # Processes whose threads want all cores each take several times as long.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    while left := checks[len(found) :]:
        seconds = max(end - time.monotonic(), 0.0)
        command = [sys.executable, __file__, "--one", name, "--only", ",".join(left)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=alone)
            said, detail = done.stdout, (done.stderr or done.stdout)[-2000:]
        except subprocess.TimeoutExpired as ended:
            # What was said until then is bytes even where text was asked for.
            said = ended.stdout.decode() if isinstance(ended.stdout, bytes) else ended.stdout or ""
            detail = f"not done after {seconds:.0f} s" if seconds else "no time left"
        documents = list(documents_in(said))
        found += documents
        if len(documents) < len(left) and not (documents and documents[-1]["failed"]):
            one = left[len(documents)]
            outcome = {"check": one, "status": Status.FAILED.value, "detail": detail, "seconds": round(seconds, 4)}
            found.append({"backend": name, "device": None, "checks": [outcome], "failed": [one]})
    return found


def documents_in(said: str) -> Iterator[dict[str, Any]]:
    """What a process said, up to the first line that is no document."""
    for line in said.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One document of a backend's, with the checks in their order."""
    order = list(CHECKS)
    checks = sorted((c for document in documents for c in document["checks"]), key=lambda c: order.index(c["check"]))
    return {
        "backend": documents[0]["backend"],
        "device": next((document["device"] for document in documents if document["device"]), None),
        "checks": checks,
        "failed": [
            c["check"] for document in documents for c in document["checks"] if c["check"] in document["failed"]
        ],
    }


def version(name: str) -> str:
    """What runs underneath."""
    register(name)
    return next((info.version for info in lpattn.available_backends() if info.name == name), "")


def main() -> int:
    """Check all; 1 where a backend that runs here fails something."""
    arguments = parser(__doc__ or "", budget=540.0)
    arguments.add_argument("--backends", default=",".join(BACKENDS), help="names, separated by commas")
    arguments.add_argument("--skip", default="", help="checks that do not run, separated by commas")
    arguments.add_argument("--only", default="", help="checks that run, separated by commas; all if empty")
    arguments.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)), help="processes")
    arguments.add_argument("--one", help="only this backend, in this process")
    options = arguments.parse_args()
    checks = [c for c in options.only.split(",") if c] or [c for c in CHECKS if c not in options.skip.split(",")]
    if options.one:
        check_here(options.one, checks)
        return 0
    names = options.backends.split(",")
    if options.quick:
        names, checks = names[:1], checks[:3]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for document in check_all(names, checks, time.monotonic() + options.budget, options.jobs):
            told = found[document["backend"]]
            told.append(document)
            if len(told) == len(checks):
                show(merged(told))
    finally:  # what was found is written, whatever came next
        documents = [{**merged(told), "version": version(name)} for name, told in found.items() if told]
        write(options.out, {"conformance": documents})
    return 1 if any(document["failed"] for document in documents) else 0


def show(document: dict[str, Any]) -> None:
    """One line for a backend, and one for each failure."""
    passed = sum(check["status"] == "passed" for check in document["checks"])
    where = document["device"] or "no device of this machine"
    seconds = sum(check["seconds"] for check in document["checks"])
    print(f"{document['backend']} on {where}: {passed} passed, {len(document['failed'])} failed, {seconds:.0f} s")
    for outcome in document["checks"]:
        if outcome["check"] in document["failed"]:
            print(f"  {outcome['check']}: {outcome['detail']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
