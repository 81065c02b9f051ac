"""How result files call what they measured. Imports nothing, so that pages and plots are made anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXACT = "exact:"
"""Starts the names of exact kernels; the other names are those of low-precision backends, or :data:`AUTO`."""

AUTO = "auto"
"""lpattn's automatic choice, which may be exact attention."""

_HADAMARD = "+hadamard_"


def name_of(backend: str, mode: str) -> str:
    """A backend with a Hadamard mode: ``fp8_fa3``, ``fp8_fa3+hadamard_qkv``."""
    return backend if mode == "none" else f"{backend}{_HADAMARD}{mode}"


def mask_of(shape: Mapping[str, Any]) -> str:
    """Of a :class:`cases.Shape` in a file, what rows of speedups.json call its mask; "none" if it hides whole keys."""
    return "dense" if shape.get("holes") else "additive" if shape.get("bias") else "none"


def kind_of(shape: Mapping[str, Any]) -> str:
    """What pages and plots call such a call: "full", "causal", "dense mask" or "additive mask"."""
    mask = mask_of(shape)
    return f"{mask} mask" if mask != "none" else "causal" if shape["causal"] else "full"


def parts_of(name: str) -> tuple[str, str]:
    """(backend, Hadamard mode) of such a name."""
    backend, _, mode = name.partition(_HADAMARD)
    return backend, mode or "none"
