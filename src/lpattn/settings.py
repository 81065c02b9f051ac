"""What a user asked for at one level (call, context manager, layer rule, model, environment), checked.

Levels by precedence: see :class:`lpattn.types.Provenance`. A level that names a backend decides alone; one that names
none leaves the decision to the next weaker one, and the automatic choice is the weakest.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import os
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeVar

from lpattn.errors import BackendUnavailableError, InvalidArgumentError
from lpattn.registry import local_devices, registry
from lpattn.tracing import constant_while_tracing
from lpattn.types import AttentionBackend, HadamardMode, Provenance, Reason

BACKEND_VARIABLE = "LPATTN_BACKEND"

# The dict behind os.environ: asking os.environ for a variable that is not set takes 0.8 us, a third of a dispatch.
_ENVIRONMENT = os.environ._data  # type: ignore[attr-defined]
_BACKEND_KEY = os.environ.encodekey(BACKEND_VARIABLE)

_scopes = itertools.count(1)

_EnumT = TypeVar("_EnumT", bound=Enum)


class OnUnsupported(str, Enum):
    """What happens to a call that the wanted backend cannot run: exact attention, or an error."""

    FALLBACK = "fallback"
    RAISE = "raise"

    __str__ = str.__str__


@dataclass(frozen=True, eq=False)
class Settings:
    """A checked request. Equal by :attr:`text`.

    Attributes:
        backend: canonical name; None leaves the choice to lpattn.
        hadamard: mode that is applied wherever a low-precision backend runs.
        on_unsupported: None means strict for a named backend and fallback for the automatic choice.
        provenance: the level that these settings come from.
        scope: number of the application or context manager that they belong to; 0 outside. Warnings are given once per
            scope and reason.
        text: all of it as one string: what compiled graphs carry, and what dictionaries hash.
    """

    backend: str | None = None
    hadamard: HadamardMode = HadamardMode.NONE
    on_unsupported: OnUnsupported | None = None
    provenance: Provenance = Provenance.AUTOMATIC
    scope: int = 0
    text: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        policy = self.on_unsupported.value if self.on_unsupported is not None else ""
        parts = (self.backend or "", self.hadamard.value, policy, self.provenance.value, str(self.scope))
        object.__setattr__(self, "text", "|".join(parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def strict(self) -> bool:
        """Whether a call that cannot run as wanted is an error."""
        if self.on_unsupported is None:
            return self.backend is not None
        return self.on_unsupported is OnUnsupported.RAISE


def new_scope() -> int:
    """A number for :attr:`Settings.scope` that no other application or context manager has."""
    return next(_scopes)


@functools.lru_cache(maxsize=1024)
def from_text(text: str) -> Settings:
    """The settings whose :attr:`Settings.text` this is."""
    backend, hadamard, on_unsupported, provenance, scope = text.split("|")
    return Settings(
        backend or None,
        HadamardMode(hadamard),
        OnUnsupported(on_unsupported) if on_unsupported else None,
        Provenance(provenance),
        int(scope),
    )


def make_settings(
    backend: str | AttentionBackend | None,
    hadamard: str | HadamardMode | None,
    on_unsupported: str | None,
    provenance: Provenance,
) -> Settings:
    """Check one level's arguments.

    Args:
        backend: name in any case, or None.
        hadamard: mode or its name; None is ``HadamardMode.NONE``.
        on_unsupported: ``"fallback"``, ``"raise"`` or None.
        provenance: the level; it becomes AUTOMATIC where no backend is named.

    Raises:
        UnknownBackendError: no backend has this name.
        InvalidArgumentError: a value is not valid, or the backend does not offer the Hadamard mode.
    """
    mode = HadamardMode.NONE if hadamard is None else _parse(HadamardMode, hadamard, "hadamard")
    policy = None if on_unsupported is None else _parse(OnUnsupported, on_unsupported, "on_unsupported")
    if backend is None:
        return Settings(None, mode, policy, Provenance.AUTOMATIC)
    name = registry.resolve(backend)
    found = registry.get(name)
    if found is not None and mode not in found.capabilities.hadamard:
        offered = ", ".join(sorted(found.capabilities.hadamard))
        others = [
            n for n, b in registry.backends().items() if mode in b.capabilities.hadamard and not b.exact and n != name
        ]
        raise InvalidArgumentError(
            f"backend {name!r} cannot apply hadamard={mode.value!r}; it offers: {offered}\n"
            f"Use hadamard='none', or a backend that offers it: {', '.join(others) or 'none is installed'}"
        )
    return Settings(name, mode, policy, provenance)


@constant_while_tracing
def overlay(upper_text: str, lower_text: str) -> Settings:
    """The settings of a level that names no backend, over those of the next weaker level.

    The weaker level's backend stands; a Hadamard mode or an on_unsupported of the stronger level goes over its own.

    Raises:
        InvalidArgumentError: the backend does not offer the Hadamard mode.
    """
    return _overlay(upper_text, lower_text, registry.generation)


@functools.lru_cache(maxsize=64)
def _overlay(upper_text: str, lower_text: str, generation: int) -> Settings:
    upper, lower = from_text(upper_text), from_text(lower_text)
    hadamard = lower.hadamard if upper.hadamard is HadamardMode.NONE else upper.hadamard
    on_unsupported = lower.on_unsupported if upper.on_unsupported is None else upper.on_unsupported
    checked = make_settings(lower.backend, hadamard, on_unsupported, lower.provenance)
    return replace(checked, provenance=lower.provenance, scope=lower.scope)


def is_exact(backend: str | AttentionBackend) -> bool:
    """Whether a name stands for exact attention, which no Hadamard mode of a surrounding level concerns.

    Raises:
        UnknownBackendError: no backend has this name.
    """
    found = registry.get(registry.resolve(backend))
    return found is not None and found.exact


def with_environment(settings: Settings) -> Settings:
    """The settings, with ``LPATTN_BACKEND`` taken into account where no level named a backend.

    Raises:
        UnknownBackendError: the variable holds a name that no backend has.
    """
    # A layer rule "auto" asks for the automatic choice by name, and is stronger than the environment.
    if settings.backend is not None or settings.provenance is not Provenance.AUTOMATIC:
        return settings
    if _ENVIRONMENT.get(_BACKEND_KEY) is None:
        return settings
    value = os.environ[BACKEND_VARIABLE]
    return _from_environment(value, settings, registry.generation) if value else settings


@functools.lru_cache(maxsize=64)
def _from_environment(value: str, settings: Settings, generation: int) -> Settings:
    try:
        named = make_settings(value, settings.hadamard, settings.on_unsupported, Provenance.ENVIRONMENT)
    except (InvalidArgumentError, ValueError) as error:
        raise type(error)(f"environment variable {BACKEND_VARIABLE}={value!r}: {error}") from None
    return replace(named, provenance=Provenance.ENVIRONMENT)


def reasons_against_machine(backend: str) -> dict[str, tuple[Reason, ...]]:
    """Per device of this machine, why the backend cannot run there; empty if some device can run it."""
    probed = {str(device): registry.probe(backend, device) for device in local_devices()}
    return {} if any(not reasons for reasons in probed.values()) else probed


def check_machine(settings: Settings) -> str | None:
    """Refuse a named backend that no device of this machine can run.

    Returns:
        None if it can run, or if none is named; else, where the settings allow fallback, the text of a warning.

    Raises:
        BackendUnavailableError: strict settings; with the probe's reasons for each device.
    """
    if settings.backend is None or not (reasons := reasons_against_machine(settings.backend)):
        return None
    listing = "\n".join(
        f"  {device:8s} {reason}" for device, device_reasons in reasons.items() for reason in device_reasons
    )
    text = f"backend {settings.backend!r} cannot run on any device of this machine:\n{listing}"
    if settings.strict:
        raise BackendUnavailableError(
            f'{text}\nUse backend=None to let lpattn choose, or on_unsupported="fallback" to run such calls exactly.'
        )
    return f'{text}\nIts calls run exactly, because on_unsupported="fallback".'


def _parse(kind: type[_EnumT], value: object, argument: str) -> _EnumT:
    if isinstance(value, str):
        canonical = str(value.value if isinstance(value, Enum) else value).strip().lower()
        for member in kind:
            if member.value == canonical:
                return member
        near = difflib.get_close_matches(canonical, [m.value for m in kind], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    else:
        hint = ""
    valid = ", ".join(repr(m.value) for m in kind)
    raise InvalidArgumentError(f"{argument} must be one of {valid}; got {value!r}{hint}")
