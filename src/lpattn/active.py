"""What is in force on this thread: the context manager's settings, the layer whose forward runs, the redirection."""

from __future__ import annotations

import functools
import threading
from typing import Any, Protocol

import torch

from lpattn.ledger import Ledger
from lpattn.settings import Settings, overlay

REDIRECTION_KEY = "TESTING_ONLY_GenericMode"
"""Dispatch key of the redirection: above autocast, autograd and vmap, so that calls are seen as the user wrote them.
PyTorch itself leaves it empty. Kernels for it are registered in :mod:`lpattn.eager.interception`."""

_key = torch._C._dispatch_key_parse(REDIRECTION_KEY)
# Partial objects and not functions, so that Dynamo finds no frame to compile where it has broken a graph around them.
included = functools.partial(torch._C._IncludeDispatchKeyGuard, _key)
"""Makes a context manager: SDPA calls of this thread are redirected inside."""
excluded = functools.partial(torch._C._ExcludeDispatchKeyGuard, torch._C.DispatchKeySet(_key))
"""Makes a context manager: SDPA calls of this thread are not redirected inside."""


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


NOTHING = _Nothing()
"""A context manager that does nothing, and takes less time for it than contextlib's."""


def outside_redirection() -> Any:
    """A context manager in which SDPA calls of this thread are not redirected, whether or not they are outside."""
    return excluded() if is_redirecting() else NOTHING


def is_redirecting() -> bool:
    """Whether SDPA calls of this thread are redirected by the dispatch key."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_key)


class Layer(Protocol):
    """The innermost applied module that runs. What the eager path keeps per module has these."""

    settings: Settings | None
    ledger: Ledger
    tag: torch.Tensor

    def child(self, name: str) -> Layer | None:
        """The layer of a submodule; None if it has none."""


class Scope(Protocol):
    """An entered context manager."""

    settings: Settings


class Active(threading.local):
    """Per thread.

    Attributes:
        layer: innermost applied module; None outside of applied models.
        contexts: entered context managers, innermost last.
        context_settings: what they come to; None outside of them.
        mode: the function mode that serves them.
        tracing: whether a surrounding applied module already redirects the calls of the code being traced.
        attended: whether a traced module has come to an attention call.
    """

    # Set per thread by __init__ and not as class attributes: Dynamo guards on the presence of instance attributes.
    def __init__(self) -> None:
        self.layer: Layer | None = None
        self.contexts: tuple[Scope, ...] = ()
        self.context_settings: Settings | None = None
        self.mode: Any = None
        self.tracing = False
        self.attended = False


active = Active()


def current_settings() -> Settings | None:
    """The settings in force on this thread; None if there are none.

    The context manager's come before the layer's; where it names no backend, the layer's stands.
    """
    own = None if active.layer is None else active.layer.settings
    settings = active.context_settings
    if settings is None:
        return own
    return settings if own is None or settings.backend is not None else overlay(settings.text, own.text)


def contexts_changed() -> None:
    """Work out what the entered context managers come to."""
    settings: Settings | None = None
    for context in active.contexts:
        own = context.settings
        inherits = settings is not None and own.backend is None
        settings = overlay(own.text, settings.text) if settings is not None and inherits else own
    active.context_settings = settings
