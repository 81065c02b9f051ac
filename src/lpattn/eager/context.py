"""The context manager, for code whose model object is out of reach."""

from __future__ import annotations

from contextlib import ContextDecorator
from dataclasses import replace

from lpattn.active import active, contexts_changed
from lpattn.eager.interception import RedirectMode
from lpattn.errors import LpattnError, warn
from lpattn.settings import Settings, check_machine, make_settings, new_scope, with_environment
from lpattn.tracing import constant_while_tracing
from lpattn.types import AttentionBackend, HadamardMode, Provenance


class low_precision_attention(ContextDecorator):
    """Context manager and decorator: attention calls of this thread run in low precision inside.

    Stronger than what was applied to models, weaker than the arguments of a call. Contexts nest, and the inner one
    wins; one that names no backend leaves it to the next outer one, then to the model. It belongs to the thread, not
    to the task: do not hold it across ``await`` or ``yield``.

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
        self.settings = _checked(backend, hadamard, on_unsupported)

    def __enter__(self) -> None:
        if not active.contexts:
            # One mode serves nested contexts: each costs every operator a call.
            active.mode = RedirectMode()
            active.mode.__enter__()
        active.contexts = (*active.contexts, self)
        contexts_changed()

    def __exit__(self, *exc: object) -> None:
        # Contexts that generators hold may end in any order: each takes its own entry away, the latest one.
        index = len(active.contexts) - 1
        while index >= 0 and active.contexts[index] is not self:
            index -= 1
        if index < 0:
            raise LpattnError("this low_precision_attention context is left, but was not entered on this thread")
        active.contexts = (*active.contexts[:index], *active.contexts[index + 1 :])
        contexts_changed()
        if not active.contexts:
            active.mode.__exit__(None, None, None)
            active.mode = None


@constant_while_tracing
def _checked(
    backend: str | AttentionBackend | None, hadamard: str | HadamardMode, on_unsupported: str | None
) -> Settings:
    settings = make_settings(backend, hadamard, on_unsupported, Provenance.CONTEXT)
    if (text := check_machine(with_environment(settings))) is not None:
        warn(text)
    return replace(settings, scope=new_scope())
