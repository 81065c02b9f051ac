"""``lpattn info``: the backends, their plugins and the environment. The text shows the JSON document's content."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import torch

import lpattn
from lpattn.backend import PROTOCOL_VERSION
from lpattn.calls import device_capability
from lpattn.cli.text import make_console, print_json, reason_data
from lpattn.errors import LpattnError
from lpattn.hookspecs import ENTRY_POINT_GROUP
from lpattn.registry import DISABLE_VARIABLE, Source, local_devices, registry
from lpattn.settings import BACKEND_VARIABLE, Settings, with_environment

if TYPE_CHECKING:
    from rich.console import Console

_TRITON = ("triton", "pytorch-triton", "triton-windows")
"""Distributions that carry Triton."""


def run(arguments: Namespace) -> int:
    """Print the document, as text or as JSON. Returns 0, also where plugins failed: to say so is the task."""
    document = collect()
    if arguments.json:
        print_json(document)
    else:
        _show(document, make_console(), arguments.verbose)
    return 0


def collect() -> dict[str, Any]:
    """All that is known about this installation, as JSON data."""
    devices = local_devices()
    return {
        "lpattn": lpattn.__version__,
        "protocol_version": PROTOCOL_VERSION,
        "environment": _environment(),
        "devices": [_device(device) for device in devices],
        "backends": [_backend(name, devices) for name in registry.names()],
        "plugins": _plugins(),
        "failures": [
            {"source": _source(f.source), "message": f.message, "traceback": f.traceback} for f in registry.failures()
        ],
        "conflicts": [
            {"name": name, "sources": [_source(source) for source in sources]}
            for name, sources in registry.conflicts().items()
        ],
    }


def _environment() -> dict[str, Any]:
    problem = None
    try:
        with_environment(Settings())
    except LpattnError as error:
        problem = str(error)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": next(filter(None, map(_version, _TRITON)), None),
        "variables": {name: os.environ.get(name) for name in (BACKEND_VARIABLE, DISABLE_VARIABLE)},
        "problem": problem,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: torch.device) -> dict[str, Any]:
    capability = device_capability(device.type, device.index)
    return {
        "name": str(device),
        "description": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "architecture": None if capability is None else f"sm_{capability[0]}{capability[1]}",
    }


def _backend(name: str, devices: list[torch.device]) -> dict[str, Any]:
    backend, source = registry.get(name), registry.source(name)
    probed = {str(device): registry.probe(name, device) for device in devices}
    return {
        "name": name,
        "version": backend.version if backend is not None else "",
        "source": None if source is None else _source(source),
        "automatic": backend is not None and backend.automatic,
        "exact": backend is not None and backend.exact,
        "protocol_version": None if backend is None else backend.protocol_version,
        "devices": {
            device: {"available": not reasons, "reasons": [reason_data(r) for r in reasons]}
            for device, reasons in probed.items()
        },
    }


def _source(source: Source) -> dict[str, Any]:
    return {
        "kind": source.kind,
        "distribution": source.distribution,
        "version": source.version,
        "entry_point": source.entry_point,
        "load_seconds": source.load_seconds,
    }


def _plugins() -> list[dict[str, Any]]:
    """Every installed plugin, also one that is kept out or failed: with the backends that it has in force."""
    backends = {name: source for name in registry.names() if (source := registry.source(name)) is not None}
    loads = registry.loads()
    plugins = []
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        distribution = point.dist.name if point.dist else "?"
        own = [name for name, source in backends.items() if _is_of(source, distribution, point.name)]
        load = next((x for x in loads if _is_of(x.source, distribution, point.name)), None)
        plugins.append(
            {
                "distribution": distribution,
                "version": point.dist.version if point.dist else "?",
                "entry_point": point.name,
                "protocol_version": next(iter(load.protocol_versions), None) if load is not None else None,
                "load_seconds": None if load is None else load.source.load_seconds,
                "backends": own,
                "conflicts": [
                    name
                    for name, sources in registry.conflicts().items()
                    if any(_is_of(source, distribution, point.name) for source in sources)
                ],
                "failed": any(_is_of(f.source, distribution, point.name) for f in registry.failures()),
            }
        )
    return plugins


def _is_of(source: Source, distribution: str, entry_point: str) -> bool:
    return (source.kind, source.distribution, source.entry_point) == ("plugin", distribution, entry_point)


def _show(document: dict[str, Any], console: Console, verbose: bool) -> None:
    from rich import box
    from rich.table import Table

    environment = document["environment"]
    console.print(f"lpattn {document['lpattn']}, backend protocol {document['protocol_version']}")
    console.print(
        f"Python {environment['python']}, torch {environment['torch']} (CUDA {environment['cuda'] or 'none'}), "
        f"triton {environment['triton'] or 'not installed'}"
    )
    for device in document["devices"]:
        known = ", ".join(filter(None, (device["description"], device["architecture"])))
        console.print(f"{device['name']}: {known}")
    for name, value in environment["variables"].items():
        console.print(f"{name} is not set" if value is None else f"{name}={value}")
    if environment["problem"]:
        console.print(environment["problem"], style="red")

    table = Table("Backend", "Runs on", "Automatic", "Version", "Source", box=box.SIMPLE_HEAD, pad_edge=False)
    for backend in document["backends"]:
        devices = [device for device, answer in backend["devices"].items() if answer["available"]]
        automatic = "fallback" if backend["exact"] else "yes" if backend["automatic"] else "no"
        source = backend["source"]
        cells = (backend["name"], ", ".join(devices) or "-", automatic, backend["version"] or "-", _label(source))
        table.add_row(*cells if source else (cells[0], "-", "-", "-", "-"))
    console.print(table)

    blocked = [(b, where, r) for b in document["backends"] for where, r in _grouped(b["devices"])]
    if blocked:
        console.print("Not available:")
    for backend, where, reasons in blocked:
        for reason in reasons:
            console.print(f"  {backend['name']} on {where}: {reason['message']}")
            if reason["remedy"]:
                console.print(f"    {reason['remedy']}")
    _show_plugins(document, console, verbose)


def _show_plugins(document: dict[str, Any], console: Console, verbose: bool) -> None:
    if document["plugins"]:
        console.print("Plugins:")
    for plugin in document["plugins"]:
        if plugin["backends"]:
            ran = f"{', '.join(plugin['backends'])}, loaded in {plugin['load_seconds']:.3f} s"
        elif plugin["conflicts"]:
            ran = f"{', '.join(plugin['conflicts'])}, claimed by several plugins: see below"
        elif plugin["failed"]:
            ran = "failed"
        else:
            kept_out = document["environment"]["variables"][DISABLE_VARIABLE]
            ran = "no backends" + (f" ({DISABLE_VARIABLE}={kept_out})" if kept_out else "")
        console.print(f"  {plugin['distribution']} {plugin['version']} (entry point {plugin['entry_point']}): {ran}")
    for conflict in document["conflicts"]:
        claimants = " and ".join(_label(source) for source in conflict["sources"])
        console.print(f"Nobody has the name {conflict['name']}: claimed by {claimants}.", style="red")
        console.print(f"  Uninstall all but one of them, or name them in {DISABLE_VARIABLE}")
    if document["failures"]:
        console.print("Failed to load:", style="red")
    for failure in document["failures"]:
        console.print(f"  {_label(failure['source'])} ({failure['source']['entry_point']}): {_first_line(failure)}")
        if verbose and failure["traceback"]:
            console.print("\n".join(f"    {line}" for line in failure["traceback"].splitlines()))
    if not verbose and any(failure["traceback"] for failure in document["failures"]):
        console.print("  lpattn info --verbose shows the tracebacks")


def _grouped(devices: dict[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """The devices on which a backend cannot run, those with the same reasons together."""
    groups: list[tuple[list[str], list[dict[str, str]]]] = []
    for device, answer in devices.items():
        if answer["available"]:
            continue
        for names, reasons in groups:
            if reasons == answer["reasons"]:
                names.append(device)
                break
        else:
            groups.append(([device], answer["reasons"]))
    return [(", ".join(names), reasons) for names, reasons in groups]


def _first_line(failure: dict[str, Any]) -> str:
    return str(failure["message"]).partition("\n")[0]


def _label(source: dict[str, Any] | None) -> str:
    if source is None:
        return "-"
    if source["kind"] != "plugin":
        return str(source["kind"])
    return f"{source['distribution']} {source['version']}".strip() or "plugin"
