"""The context manager, for code whose model object is out of reach."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from lpattn.active import active
from lpattn.eager.interception import RedirectMode
from lpattn.eager.layers import Application
from lpattn.errors import LpattnWarning
from lpattn.settings import check_machine, make_settings, with_environment
from lpattn.types import AttentionBackend, HadamardMode, Provenance


class low_precision_attention:
    """Context manager: attention calls of this thread run in low precision inside.

    Stronger than what was applied to models, weaker than the arguments of a call. Re-entrant; contexts nest, and the
    inner one wins. It belongs to the thread, not to the task: do not hold it across ``await`` or ``yield``.

    Args:
        backend, hadamard, on_unsupported: as in :func:`lpattn.apply_low_precision_attention`. There are no layer rules:
            without a model, layers have no names.

    Raises:
        As :func:`lpattn.apply_low_precision_attention`.
    """

    def __init__(
        self,
        backend: str | AttentionBackend | None = None,
        hadamard: str | HadamardMode = HadamardMode.NONE,
        *,
        on_unsupported: str | None = None,
    ) -> None:
        settings = make_settings(backend, hadamard, on_unsupported, Provenance.CONTEXT)
        if (text := check_machine(with_environment(settings))) is not None:
            warnings.warn(text, LpattnWarning, stacklevel=2)
        self.settings = replace(settings, scope=Application(None).scope)
        self._entered: list[tuple[Any, RedirectMode | None]] = []

    def __enter__(self) -> None:
        # One mode serves nested contexts: each costs every operator a call.
        mode = RedirectMode() if active.context is None else None
        if mode is not None:
            mode.__enter__()
        self._entered.append((active.context, mode))
        active.context = self

    def __exit__(self, *exc: object) -> None:
        active.context, mode = self._entered.pop()
        if mode is not None:
            mode.__exit__(None, None, None)
