"""Puts the pass where inductor looks for one while a graph with lpattn's operators is compiled, and takes it away.

Between compilations nothing of lpattn is in anybody's configuration. Tracing lpattn's operator installs the pass, in
the thread that compiles, on top of what the user has set by then. Dynamo's callback at the end of a compilation removes
it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.callback
import torch._inductor.config as inductor_config
from torch import fx
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass

from lpattn.compile.graph import fuse_rope
from lpattn.registry import local_devices, registry
from lpattn.settings import BACKEND_VARIABLE

_TAKES_SEVERAL = hasattr(custom_graph_pass, "get_custom_graph_passes")
"""Whether inductor's slot takes a list; that of torch 2.11 takes one object."""


class RopePass(CustomGraphPass):
    """The pass, with what its result depends on as its identity in inductor's caches."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        fuse_rope(graph)

    def uuid(self) -> str:
        """A hash of lpattn's sources, of the backends of this machine, and of what the environment asks for."""
        backends = [
            (
                name,
                backend.version,
                backend.capabilities.rope,
                backend.capabilities.rope_from,
                backend.capabilities.norm,
                backend.capabilities.norm_over_heads,
                backend.automatic,
                backend.exact,
                [not registry.probe(name, device) for device in local_devices()],
            )
            for name, backend in sorted(registry.backends().items())
        ]
        asked = os.environ.get(BACKEND_VARIABLE, "")
        return hashlib.sha256(repr((_sources(), torch.__version__, backends, asked)).encode()).hexdigest()


class Wrapped(CustomGraphPass):
    """The user's pass, then lpattn's, where inductor takes one object only.

    Attributes:
        users: what was set before.
    """

    def __init__(self, users: Any) -> None:
        self.users = users

    def __call__(self, graph: fx.Graph) -> None:
        """Run both."""
        self.users(graph)
        rope_pass(graph)

    def uuid(self) -> Any:
        """Both identities; None, which switches caches off, where the user's pass has none."""
        users = self.users.uuid() if isinstance(self.users, CustomGraphPass) else None
        return (users, rope_pass.uuid()) if users else None


rope_pass = RopePass()


class _Together(list[Any]):
    """The user's passes and lpattn's, where inductor takes several.

    Attributes:
        users: what was set before, a pass or a list of them.
    """

    def __init__(self, users: Any) -> None:
        super().__init__([*(users if isinstance(users, (list, tuple)) else [users]), rope_pass])
        self.users = users


def install() -> None:
    """Have inductor run the pass until the present compilation ends. Does nothing where it already does."""
    present = inductor_config.post_grad_custom_pre_pass
    if not _holds_ours(present):
        inductor_config.post_grad_custom_pre_pass = _with_ours(present)
    handler = torch._dynamo.callback.callback_handler
    if _compilation_ended not in handler.end_callbacks:
        handler.register_end_callback(_compilation_ended)


def uninstall() -> None:
    """Put back what the user had set, unless somebody has replaced or wrapped what :func:`install` put there."""
    present = inductor_config.post_grad_custom_pre_pass
    if _holds_ours(present):
        inductor_config.post_grad_custom_pre_pass = _without_ours(present)


def _compilation_ended(_: Any) -> None:
    uninstall()
    handler = torch._dynamo.callback.callback_handler
    # Not by removing it from the list, which is being walked through.
    handler.end_callbacks = [callback for callback in handler.end_callbacks if callback is not _compilation_ended]


def _holds_ours(present: Any) -> bool:
    if isinstance(present, (list, tuple)):
        return rope_pass in present
    return present is rope_pass or isinstance(present, Wrapped)


def _with_ours(present: Any) -> Any:
    if present is None:
        return rope_pass
    return _Together(present) if _TAKES_SEVERAL else Wrapped(present)


def _without_ours(present: Any) -> Any:
    if present is rope_pass:
        return None
    if isinstance(present, Wrapped):
        return present.users
    if isinstance(present, _Together) and present == _Together(present.users):
        return present.users
    # Somebody has made another list of it.
    left = [other for other in present if other is not rope_pass]
    return tuple(left) if isinstance(present, tuple) else left


@functools.cache
def _sources() -> str:
    """A hash of all that lpattn ships: the pass, the meaning of its operators, the measured speeds."""
    root = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.glob("*.json")]):
        found.update(str(path.relative_to(root)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()
