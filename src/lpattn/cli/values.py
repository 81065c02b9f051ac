"""From the text of an option to its value, or to a message that names both."""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError

import torch

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}

_ARCHITECTURES = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121)
"""The compute capabilities that CUDA has or had, from Maxwell on."""


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"must be an integer of at least 1; got {text!r}")
    return number


def finite(text: str) -> float:
    """A finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ArgumentTypeError(f"must be a finite number; got {text!r}")
    return number


def shape(text: str) -> tuple[int, int, int, int]:
    """Four sizes, separated by commas."""
    parts = text.split(",")
    if len(parts) != 4:
        raise ArgumentTypeError(f"must be four sizes B,H,S,D, such as 1,16,4096,128; got {len(parts)} in {text!r}")
    try:
        batch, heads, length, dim = (positive(part) for part in parts)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"must be four integers of at least 1, such as 1,16,4096,128; got {text!r}") from None
    return batch, heads, length, dim


def dtype(text: str) -> torch.dtype:
    """A floating-point dtype of PyTorch."""
    name = text.strip().lower().removeprefix("torch.")
    if name not in _DTYPES:
        raise ArgumentTypeError(f"must be one of {', '.join(_DTYPES)}; got {text!r}")
    return _DTYPES[name]


def device(text: str) -> torch.device:
    """A device, whether or not this machine has it."""
    try:
        return torch.device(text)
    except RuntimeError:
        raise ArgumentTypeError(f"must be a device such as cuda:0 or cpu; got {text!r}") from None


def architecture(text: str) -> tuple[int, int]:
    """A CUDA compute capability: sm_90, sm_120a or 9.0."""
    match = re.fullmatch(r"(?:sm_?)?(\d{2,3})[af]?|(\d{1,2}\.\d)", text.strip().lower())
    number = 0 if match is None else int(match[1] or match[2].replace(".", ""))
    if number not in _ARCHITECTURES:
        known = ", ".join(f"sm_{known}" for known in _ARCHITECTURES)
        raise ArgumentTypeError(f"must be one of {known}; got {text!r}")
    return divmod(number, 10)
