"""What a device has and can do."""

from __future__ import annotations

import functools

import torch

from lpattn.errors import InvalidArgumentError

E4M3_FROM = (8, 9)
"""Compute capability from which on Triton casts to e4m3."""


def check_device(device: torch.device) -> None:
    """Refuse a GPU for which Triton has no cast to e4m3.

    Raises:
        InvalidArgumentError: its compute capability is below 8.9.
    """
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < E4M3_FROM:
        raise InvalidArgumentError(
            f"q, k, v are on {device} (sm_{capability[0]}{capability[1]}): quantization to e4m3 needs "
            f"sm_{E4M3_FROM[0]}{E4M3_FROM[1]} or newer, for whose e4m3 Triton has a cast"
        )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; 8 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def overlaps_on(device: torch.device) -> bool:
    """Whether a kernel can start before the one in front of it ends: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
