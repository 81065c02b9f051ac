"""The one hook through which backends are found; built-in backends come in by it as well."""

from __future__ import annotations

import pluggy

from lpattn.backend import Backend

ENTRY_POINT_GROUP = "lpattn"
"""Entry point group of plugins. An entry point names a module (or an object) that has the hook implementation."""

hookspec = pluggy.HookspecMarker("lpattn")
hookimpl = pluggy.HookimplMarker("lpattn")


class Hooks:
    """What a plugin may implement."""

    @hookspec
    def lpattn_backends(self) -> list[Backend]:  # type: ignore[empty-body]
        """Return the backends of this plugin. Called once, at first use; must not touch a device."""
