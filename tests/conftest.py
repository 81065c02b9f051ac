"""What every test shares: skips with reasons, and a registry that each test leaves as it found it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lpattn
from lpattn import execute
from lpattn.registry import registry

# Without a GPU, Triton's kernels run in its interpreter. It looks when it is imported, which some test does first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; make test-gpu runs it")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch):
    """No setting, registration or given warning leaks from one test into the next."""
    monkeypatch.delenv("LPATTN_BACKEND", raising=False)
    monkeypatch.delenv("LPATTN_DISABLE_PLUGINS", raising=False)
    before = set(registry.backends())
    execute._warned.clear()
    yield
    for name in set(registry.backends()) - before:
        lpattn.unregister_backend(name)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whatever is allocated holds this byte, repeated: NaN in every dtype, until a test chooses another one."""
    byte = [0xFF]

    def poisoned(empty: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        if made.numel():
            made.view(-1).view(torch.uint8).fill_(byte[0])
        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, functools.partial(poisoned, getattr(torch, name)))
    return byte


@pytest.fixture
def sqnr():
    """Signal-to-quantization-noise ratio in dB: 10*log10(sum(ref^2) / sum((ref - out)^2))."""

    def measure(out: torch.Tensor, ref: torch.Tensor) -> float:
        ref, out = ref.double(), out.double()
        noise = (ref - out).pow(2).sum()
        return float("inf") if noise == 0 else float(10 * torch.log10(ref.pow(2).sum() / noise))

    return measure
