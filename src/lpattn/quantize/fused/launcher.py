"""Launches compiled kernels without asking Triton each time which one it is: that takes longer than small kernels do."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)

_INT32_END = 2**31

_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[torch.Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: tuple[Hashable, ...],
    num_warps: int,
) -> None:
    """Launch a kernel on the device of its first tensor, whose arguments are tensors, numbers, and constants in order.

    Args:
        kernel: a ``triton.jit`` function that specializes on no number.
        programs: size of the grid.
        tensors: None is compiled in.
        numbers: what varies from call to call.
        constants: what is compiled in.
        num_warps: per program.
    """
    if programs == 0:
        return
    if INTERPRETED:
        kernel[(programs,)](*tensors, *numbers, *constants, num_warps=num_warps)
        return
    device = tensors[0].device  # type: ignore[union-attr]
    with contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
        # All that Triton compiles another kernel for.
        key = (
            kernel,
            device.index,
            tuple([None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors]),
            max(numbers) < _INT32_END,
            constants,
            num_warps,
        )
        compiled = _compiled.get(key)
        if compiled is None or max(numbers) >= _INT32_END:  # then each number may have either width
            _compiled[key] = kernel[(programs,)](*tensors, *numbers, *constants, num_warps=num_warps)
        else:
            compiled[(programs, 1, 1)](*tensors, *numbers, *constants)
