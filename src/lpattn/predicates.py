"""What several parts ask of an argument before they refuse it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of tensors that lpattn computes with outside of its kernels."""
FLOATING_NAMES = "float16, bfloat16, float32 or float64"


def is_number(value: object) -> bool:
    """Whether it is a real number, or stands for one in a graph. A bool is none."""
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def is_whole_number(value: object) -> bool:
    """Whether it is an integer, or stands for one in a graph. A bool is none."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether a shape of as many dimensions broadcasts to the full one."""
    # Not by ``in``: for Dynamo a symbol is not in (1, 3) even where it stands for 3.
    return all(size == 1 or size == limit for size, limit in zip(shape, full, strict=True))
