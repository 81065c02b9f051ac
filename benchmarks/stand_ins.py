"""fp8_fa3 and fp8_triton on a machine without a GPU, with nothing behind their launches: the host time of lpattn.

Triton's launchers, the descriptors that they make, and FlashAttention-3's operator are left out with what they launch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import lpattn
from lpattn.backends.fa3 import FA3Backend
from lpattn.backends.triton import TritonBackend

FA3 = "host_fp8_fa3"
TRITON = "host_fp8_triton"
HOPPER = (9, 0)
MULTIPROCESSORS = 132


class HostOfFA3(FA3Backend):
    """fp8_fa3 on tensors of the CPU; its operator returns the same result every time."""

    name = FA3
    capabilities = dataclasses.replace(FA3Backend.capabilities, device_types=frozenset({"cpu"}))

    def __init__(self) -> None:
        self._results: dict[torch.Size, tuple[torch.Tensor, ...]] = {}

    def probe(self, device: torch.device) -> list[lpattn.Reason]:
        return []

    def rank(self, call: lpattn.AttentionCall) -> float:
        return 0.0

    def _operator(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        found = self._results.get(query.shape)
        if found is None:
            batch, q_len, heads, _ = query.shape
            lse = torch.zeros(batch, heads, q_len)
            found = self._results[query.shape] = (torch.zeros(query.shape, dtype=torch.bfloat16), lse, lse, lse)
        return found


class HostOfTriton(TritonBackend):
    """fp8_triton on tensors of the CPU, by its Hopper kernel."""

    name = TRITON
    capabilities = dataclasses.replace(TritonBackend.capabilities, device_types=frozenset({"cpu"}))

    def probe(self, device: torch.device) -> list[lpattn.Reason]:
        return []

    def rank(self, call: lpattn.AttentionCall) -> float:
        return 0.0


class _NoKernels(dict[Any, Any]):
    """In place of the compiled kernels: launches of all of them do nothing."""

    def get(self, key: Any, default: Any = None) -> Any:
        return (_nothing, 0, None, None)


def _nothing(*args: object) -> int:
    return 0


def _no_index() -> None:
    return None


def _hopper(*device: object) -> tuple[int, int]:
    return HOPPER


def _multiprocessors(device: torch.device) -> int:
    return MULTIPROCESSORS


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Both are registered inside, and the CPU passes for a Hopper GPU."""
    import triton

    from lpattn.kernels.hopper import launch
    from lpattn.quantize.fused import launcher

    if launcher.INTERPRETED:
        raise RuntimeError("Triton's interpreter runs kernels on this machine: unset TRITON_INTERPRET")
    # Plain functions: mocks would take as long as what is measured. Tensors of the CPU have a device without an index.
    driver = types.SimpleNamespace(active=types.SimpleNamespace(get_current_stream=_nothing))
    patches = (
        mock.patch("lpattn.calls.device_capability", new=_hopper),
        mock.patch.object(launch, "multiprocessors", new=_multiprocessors),
        mock.patch.object(launcher, "_compiled", new=_NoKernels()),
        mock.patch.object(torch.cuda, "current_device", new=_no_index),
        mock.patch.object(triton.runtime, "driver", new=driver),
    )
    backends = (HostOfFA3(), HostOfTriton())
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        for backend in backends:
            lpattn.register_backend(backend)
            stack.callback(lpattn.unregister_backend, backend.name)
        yield
