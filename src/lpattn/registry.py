"""Finds backends (built-in and from entry points), probes them, and records what failed.

Nothing is loaded at import: the first question loads everything, each plugin apart, so that one which crashes is
recorded with its traceback and harms nothing else.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import os
import re
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import pluggy
import torch

from lpattn.backend import PROTOCOL_VERSION, Backend, Capabilities
from lpattn.errors import InvalidArgumentError, RegistrationError, UnknownBackendError
from lpattn.hookspecs import ENTRY_POINT_GROUP, Hooks
from lpattn.types import AttentionBackend, Reason

BUILTIN_MODULES = ("lpattn.backends.reference", "lpattn.backends.fa3", "lpattn.backends.triton")
DISABLE_VARIABLE = "LPATTN_DISABLE_PLUGINS"
_PLUGIN_PACKAGES = {
    "fp8_emulated": "lpattn-emulated",
    "sageattention": "lpattn-sageattention",
    "cudnn_fp8": "lpattn-cudnn",
}
"""Backends of the plugins that lpattn's own repository holds, for the error that names what to install."""
_RESERVED_NAMES = {"auto", "exact", *(backend.value for backend in AttentionBackend)}
"""Words of layer rules, and the names that lpattn keeps for itself."""
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


@dataclass(frozen=True)
class Source:
    """Where a backend came from.

    Attributes:
        kind: ``"built-in"``, ``"plugin"`` or ``"registered"`` (in process).
        distribution, version: of the plugin's package; empty for in-process registrations.
        entry_point: name of the entry point or module.
        load_seconds: time that importing and registering it took.
    """

    kind: str
    distribution: str = ""
    version: str = ""
    entry_point: str = ""
    load_seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}" if self.kind == "plugin" else self.kind


@dataclass(frozen=True)
class Failure:
    """A plugin that could not be imported or registered, or part of it.

    Attributes:
        source: where it came from.
        message: one line.
        traceback: the whole traceback; empty where no exception was raised.
    """

    source: Source
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Load:
    """One attempt to load a plugin or a built-in module.

    Attributes:
        source: where from; its ``load_seconds`` is what the attempt took, also where it failed.
        protocol_versions: those that its backends were written for, also of backends that were refused.
    """

    source: Source
    protocol_versions: tuple[int, ...] = ()


class _NameConflictError(RegistrationError):
    """Several plugins claim one name."""


class Registry:
    """The backends of one process. Thread-safe; loads itself at the first question."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._loaded = False
        self._loading = False
        self._backends: dict[str, Backend] = {}
        self._sources: dict[str, Source] = {}
        self._conflicts: dict[str, list[Source]] = {}
        self._failures: list[Failure] = []
        self._loads: list[Load] = []
        self._probes: dict[tuple[str, torch.device], tuple[Reason, ...]] = {}
        self.generation = 0
        """Raised at every change, so that remembered decisions can be dropped."""

    # Questions

    def get(self, name: str) -> Backend | None:
        """The backend of that name; None if nothing with it is registered."""
        return self._load()._backends.get(name)

    def backends(self) -> dict[str, Backend]:
        """All registered backends, built-in ones first, in the order in which they were found."""
        return dict(self._load()._backends)

    def names(self) -> list[str]:
        """Every known name: registered, reserved by :class:`AttentionBackend`, or in conflict."""
        self._load()
        return list(dict.fromkeys([*self._backends, *(b.value for b in AttentionBackend), *self._conflicts]))

    def source(self, name: str) -> Source | None:
        """Where the backend came from; None if nothing with that name is registered."""
        return self._load()._sources.get(name)

    def failures(self) -> list[Failure]:
        """What could not be loaded or registered; a name in conflict is a failure of every plugin that claims it."""
        self._load()
        conflicts = [
            Failure(source, f"{RegistrationError.__name__}: {self._claimed(name)}")
            for name, sources in self._conflicts.items()
            for source in dict.fromkeys(sources)
        ]
        return [*self._failures, *conflicts]

    def loads(self) -> list[Load]:
        """Every attempt to load something, in order."""
        return list(self._load()._loads)

    def conflicts(self) -> dict[str, list[Source]]:
        """Names that several plugins claim, and which therefore none of them has."""
        return {name: list(sources) for name, sources in self._load()._conflicts.items()}

    def resolve(self, name: str | AttentionBackend) -> str:
        """The canonical form of a backend name, whatever its case.

        Raises:
            UnknownBackendError: no backend has this name; lists the valid ones and near matches.
            InvalidArgumentError: not a string.
        """
        if not isinstance(name, str):
            raise InvalidArgumentError(
                f"backend must be an AttentionBackend, a string or None; got {name!r} ({type(name).__name__})"
            )
        plain = name.value if isinstance(name, Enum) else name
        canonical = plain.strip().lower()
        known = self.names()
        if canonical in known:
            return canonical
        if package := _PLUGIN_PACKAGES.get(canonical):
            raise UnknownBackendError(
                f"unknown backend {plain!r}: it comes with the plugin {package}, which is not loaded\n"
                f"pip install {package}; `lpattn info` shows plugins that are kept out or failed to load"
            )
        near = difflib.get_close_matches(canonical, known, n=2)
        hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
        raise UnknownBackendError(
            f"unknown backend {plain!r}; {hint}known backends: {', '.join(known)}\n"
            "`lpattn info` shows where each comes from, and plugins that failed to load"
        )

    def absence(self, name: str) -> tuple[Reason, ...]:
        """Why a known name has no backend behind it; empty if it has one."""
        self._load()
        if name in self._backends:
            return ()
        if sources := self._conflicts.get(name):
            remedy = f"uninstall all but one, or name them in {DISABLE_VARIABLE}"
            return (Reason("conflict", f"it is claimed by {_claimants(sources)}", remedy),)
        for failure in self._failures:
            if failure.source.kind == "built-in" and failure.source.entry_point.endswith(name.rpartition("_")[2]):
                return (Reason("load_failed", f"its module failed to load: {failure.message}", "see `lpattn info`"),)
        package = _PLUGIN_PACKAGES.get(name)
        remedy = f"pip install {package}" if package else "install or register it again; see `lpattn info`"
        return (Reason("not_registered", "no backend of this name is registered", remedy),)

    def probe(self, name: str, device: torch.device) -> tuple[Reason, ...]:
        """Why the backend cannot run on the device; empty if it can. Evaluated once per device."""
        if absent := self.absence(name):
            return absent
        if device.index is None and device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
        key = (name, device)
        if (known := self._probes.get(key)) is None:
            try:
                known = checked_reasons(self._backends[name].probe(device))
            except Exception as error:
                known = (Reason("probe_failed", f"its probe raised {type(error).__name__}: {error}"),)
            self._probes[key] = known
        return known

    # Registration

    def register(self, backend: Backend, source: Source) -> None:
        """Add one backend.

        Raises:
            RegistrationError: it breaks the protocol, or its name is taken.
        """
        validate_backend(backend, source)
        with self._lock:
            self._load()
            self._add(backend, source)

    def unregister(self, name: str) -> None:
        """Remove a backend that was registered in process.

        Raises:
            UnknownBackendError: there is none of that name.
            RegistrationError: it is built in or came from a plugin.
        """
        with self._lock:
            canonical = self.resolve(name)
            source = self._sources.get(canonical)
            if source is None or source.kind != "registered":
                known = f"it is {source}" if source else self.absence(canonical)[0].message
                raise RegistrationError(
                    f"{canonical} was not registered in this process ({known}), so it cannot be unregistered; "
                    f"{DISABLE_VARIABLE} keeps plugins out"
                )
            del self._backends[canonical], self._sources[canonical]
            self._changed()

    def _add(self, backend: Backend, source: Source) -> None:
        name = backend.name
        other = self._sources.get(name)
        if other is None and name not in self._conflicts:
            self._backends[name] = backend
            self._sources[name] = source
            self._changed()
            return
        rivals = (other is not None and other.kind == "plugin") or name in self._conflicts
        if rivals and source.kind == "plugin":
            # Two plugins claim one name: which of them loads first is chance, so neither may win.
            if other is not None:
                del self._backends[name], self._sources[name]
            self._conflicts.setdefault(name, [other] if other else []).append(source)
            self._changed()
            raise _NameConflictError(self._claimed(name))
        takers = other or _claimants(self._conflicts[name])
        raise RegistrationError(f"backend name {name!r} is already taken by {takers}; choose another name")

    def _claimed(self, name: str) -> str:
        return f"backend name {name!r} is claimed by {_claimants(self._conflicts[name])}"

    def _changed(self) -> None:
        self._probes.clear()
        self.generation += 1

    # Loading

    def _load(self) -> Registry:
        if self._loaded:
            return self
        with self._lock:
            # A plugin that asks the registry while it is being loaded sees what is there so far.
            if not self._loaded and not self._loading:
                self._loading = True
                try:
                    self._load_all()
                    self._loaded = True
                finally:
                    self._loading = False
        return self

    def _load_all(self) -> None:
        # An earlier load may have been interrupted from the keyboard: start from nothing.
        for known in (self._backends, self._sources, self._conflicts, self._failures, self._loads):
            known.clear()
        manager = pluggy.PluginManager("lpattn")
        manager.add_hookspecs(Hooks)
        for module in BUILTIN_MODULES:
            load = functools.partial(importlib.import_module, module)
            self._load_plugin(manager, Source("built-in", entry_point=module), load)
        for entry_point, source in self._entry_points():
            self._load_plugin(manager, source, entry_point.load)

    def _entry_points(self) -> Iterator[tuple[importlib.metadata.EntryPoint, Source]]:
        disabled = _disabled_plugins()
        seen = set()
        for entry_point in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
            dist = entry_point.dist
            source = Source("plugin", dist.name if dist else "?", dist.version if dist else "?", entry_point.name)
            seen |= {source.entry_point, source.distribution}
            if disabled is not None and not disabled & {source.entry_point, source.distribution}:
                yield entry_point, source
        if disabled and (unknown := disabled - seen):
            self._failures.append(
                Failure(
                    Source("plugin", entry_point=", ".join(sorted(unknown))),
                    f"{DISABLE_VARIABLE} names {_join(sorted(unknown))}, but no such plugin is installed",
                )
            )

    def _load_plugin(self, manager: pluggy.PluginManager, source: Source, load: Any) -> None:
        start = time.perf_counter()
        name = f"{source.distribution}:{source.entry_point}"
        try:
            plugin = load()
            manager.register(plugin, name=name)
            manager.check_pending()
            implementations = [i for i in manager.hook.lpattn_backends.get_hookimpls() if i.plugin_name == name]
            if not implementations:
                raise RegistrationError(f"{source.entry_point} implements no lpattn_backends hook")
            backends: list[Any] = []
            for implementation in implementations:
                backends.extend(cast("list[Any]", implementation.function()))
        except (Exception, SystemExit) as error:  # a module may call sys.exit() when it does not like the machine
            if manager.has_plugin(name):
                manager.unregister(name=name)
            source = dataclasses.replace(source, load_seconds=time.perf_counter() - start)
            self._loads.append(Load(source))
            self._fail(source, error)
            return
        source = dataclasses.replace(source, load_seconds=time.perf_counter() - start)
        self._loads.append(Load(source, _protocol_versions(backends)))
        for backend in backends:
            try:
                validate_backend(backend, source)
                self._add(backend, source)
            except _NameConflictError:
                continue  # not this plugin's alone: failures() has it for all that claim the name
            except Exception as error:
                self._fail(source, error)

    def _fail(self, source: Source, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))
        self._failures.append(Failure(source, f"{type(error).__name__}: {error}", text))


def _protocol_versions(backends: list[Any]) -> tuple[int, ...]:
    """What the objects say, which may be no backends at all."""
    found = set()
    for backend in backends:
        try:
            found.add(int(backend.protocol_version))
        except Exception:  # validate_backend() says what is wrong with it
            continue
    return tuple(sorted(found))


def validate_backend(backend: Any, source: Source) -> None:
    """Check that an object follows the protocol.

    Raises:
        RegistrationError: names what is wrong and what is needed.
    """
    if not isinstance(backend, Backend):
        hint = "; pass an instance, not the class" if isinstance(backend, type) else ""
        raise RegistrationError(f"a backend must be an instance of lpattn.Backend; got {backend!r}{hint}")
    name = getattr(backend, "name", None)
    problem = backend_name_problem(name)
    if problem and not (source.kind == "built-in" and name in _RESERVED_NAMES):
        raise RegistrationError(f"{type(backend).__name__}: {problem}")
    if backend.protocol_version != PROTOCOL_VERSION:
        raise RegistrationError(
            f"{name} was written for protocol version {backend.protocol_version!r}; this lpattn speaks version "
            f"{PROTOCOL_VERSION}: install a version of it that fits"
        )
    if not isinstance(getattr(backend, "capabilities", None), Capabilities):
        raise RegistrationError(f"{name}.capabilities must be an lpattn.Capabilities")


def backend_name_problem(name: object) -> str:
    """Why a plugin's backend cannot have this name; empty if it can."""
    if not isinstance(name, str) or not _NAME.match(name):
        return f"a backend's name must be a lower-case identifier such as 'my_fp8'; got {name!r}"
    return f"backend name {name!r} is reserved by lpattn; choose another name" if name in _RESERVED_NAMES else ""


def checked_reasons(reasons: object) -> tuple[Reason, ...]:
    """What a plugin's probe(), supports() or detours() returned, as a tuple.

    Raises:
        TypeError: it is not a list of reasons.
    """
    if not isinstance(reasons, (list, tuple)) or not all(isinstance(reason, Reason) for reason in reasons):
        raise TypeError(f"it must return a list of lpattn.Reason, not {reasons!r}")
    return tuple(reasons)


def local_devices() -> list[torch.device]:
    """The devices of this machine that can run attention: the CPU and every CUDA device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [*(torch.device("cuda", index) for index in range(count)), torch.device("cpu")]


def _disabled_plugins() -> set[str] | None:
    """Names in LPATTN_DISABLE_PLUGINS; None if it keeps all plugins out."""
    value = os.environ.get(DISABLE_VARIABLE, "").strip()
    if value.lower() in {"1", "true", "all"}:
        return None
    return {name.strip() for name in value.split(",") if name.strip()} - {"0", "false"}


def _claimants(sources: list[Source]) -> str:
    """Who provides one name; a plugin may do so more than once."""
    counts = collections.Counter(map(str, sources))
    return _join(who if times == 1 else f"{who} ({times} times)" for who, times in counts.items())


def _join(items: Any) -> str:
    return " and ".join(str(i) for i in items)


registry = Registry()
"""The registry of this process."""
