"""Which backends there are, and what they say about this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lpattn.backend import Backend
from lpattn.errors import InvalidArgumentError
from lpattn.registry import Source, local_devices, registry
from lpattn.types import Reason


@dataclass(frozen=True)
class BackendInfo:
    """What a backend's probe says about one device.

    Attributes:
        name: the backend.
        available: whether the device can run it.
        reasons: why not; empty where it can.
        version: of what runs underneath; empty where unknown.
        source: ``"built-in"``, ``"registered"``, or distribution and version of the plugin.
        automatic: whether the automatic choice considers it.
        device: the device that was probed.
    """

    name: str
    available: bool
    reasons: tuple[Reason, ...]
    version: str
    source: str
    automatic: bool
    device: torch.device


def available_backends(device: torch.device | str | int | None = None) -> list[BackendInfo]:
    """Every known backend and whether it can run on a device.

    Args:
        device: the device; None is the first CUDA device, or the CPU where there is none.

    Returns:
        One entry per backend, those that cannot run included, with their reasons.

    Raises:
        InvalidArgumentError: the machine has no such device.
    """
    try:
        where = local_devices()[0] if device is None else torch.device(device)
    except RuntimeError as error:
        raise InvalidArgumentError(f"device {device!r} is not a device: {error}") from None
    here = local_devices()
    if where.type == "cuda" and where.index is None and torch.cuda.is_available():
        where = torch.device("cuda", torch.cuda.current_device())
    if where.type in ("cuda", "cpu") and where not in here:
        raise InvalidArgumentError(f"this machine has no {where}; it has {', '.join(map(str, here))}")
    infos = []
    for name in registry.names():
        backend = registry.get(name)
        reasons = registry.probe(name, where)
        infos.append(
            BackendInfo(
                name=name,
                available=not reasons,
                reasons=reasons,
                version=backend.version if backend is not None else "",
                source=str(registry.source(name) or "not loaded"),
                automatic=backend is not None and backend.automatic,
                device=where,
            )
        )
    return infos


def register_backend(backend: Backend) -> None:
    """Register a backend in this process, as a plugin would: for notebooks and tests.

    Args:
        backend: an instance of :class:`lpattn.Backend`.

    Raises:
        RegistrationError: it breaks the protocol, or its name is taken.
    """
    registry.register(backend, Source("registered"))


def unregister_backend(name: str) -> None:
    """Undo :func:`register_backend`.

    Raises:
        UnknownBackendError: no backend has the name.
        RegistrationError: it is built in or came from a plugin.
    """
    registry.unregister(name)
