"""The settings of one call: its own arguments over those that are in force on the thread."""

from __future__ import annotations

import dataclasses
import functools

import torch

from lpattn.active import current_settings
from lpattn.registry import registry
from lpattn.settings import Settings, from_text, is_exact, make_settings
from lpattn.tracing import constant_while_tracing
from lpattn.types import AttentionBackend, HadamardMode, Provenance

_AUTOMATIC = Settings()


def settings_of_call(
    backend: str | AttentionBackend | None, hadamard: str | HadamardMode | None, on_unsupported: str | None
) -> Settings:
    """What holds for a call with these arguments, each of which is None where the call does not say.

    Raises:
        UnknownBackendError: no backend has the name.
        InvalidArgumentError: a value is not valid, or the backend does not offer the Hadamard mode.
    """
    surrounding = current_settings() or _AUTOMATIC
    if backend is None and hadamard is None and on_unsupported is None:
        return surrounding
    for argument in (backend, hadamard, on_unsupported):
        if argument is not None and not isinstance(argument, str):
            make_settings(backend, hadamard, on_unsupported, Provenance.ARGUMENT)  # raises, and names the value
    if torch.compiler.is_compiling():
        return _merged_while_tracing(backend, hadamard, on_unsupported, surrounding.text)
    return _merged(backend, hadamard, on_unsupported, surrounding.text, registry.generation)


@functools.lru_cache(maxsize=256)
def _merged(
    backend: str | AttentionBackend | None,
    hadamard: str | HadamardMode | None,
    on_unsupported: str | None,
    surrounding_text: str,
    generation: int,
) -> Settings:
    """A call's own arguments over the surrounding settings. The generation keeps stale names out of the cache."""
    surrounding = from_text(surrounding_text)
    named = backend is not None
    if hadamard is None:
        hadamard = HadamardMode.NONE if backend is not None and is_exact(backend) else surrounding.hadamard
    settings = make_settings(
        backend if named else surrounding.backend,
        hadamard,
        on_unsupported if on_unsupported is not None else (None if named else surrounding.on_unsupported),
        Provenance.ARGUMENT,
    )
    provenance = Provenance.ARGUMENT if named else surrounding.provenance
    return dataclasses.replace(settings, provenance=provenance, scope=surrounding.scope)


@constant_while_tracing
def _merged_while_tracing(
    backend: str | AttentionBackend | None,
    hadamard: str | HadamardMode | None,
    on_unsupported: str | None,
    surrounding_text: str,
) -> Settings:
    return _merged(backend, hadamard, on_unsupported, surrounding_text, registry.generation)
