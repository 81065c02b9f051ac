"""Launches kernels without asking Triton each time which compiled one it is: that takes longer than they do."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)

_INT32_END = 2**31

_compiled: dict[Hashable, Any] = {}


def kinds_of(tensors: Sequence[torch.Tensor | None]) -> tuple[object, ...]:
    """What Triton compiles a kernel for, of the tensors that a caller brings: dtypes, alignment, and which are None."""
    return tuple([t if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors])


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Any, ...],
    numbers: tuple[float, ...],
    constants: tuple[Hashable, ...],
    kinds: Hashable,
    num_warps: int,
    launch_pdl: bool = False,
    maxnreg: int | None = None,
) -> None:
    """Launch a kernel, whose arguments are tensors, numbers and constants in this order, on its first tensor's device.

    Args:
        kernel: a ``triton.jit`` function that specializes on no number.
        programs: size of the grid.
        tensors: None is compiled in. Descriptors of tensors may be among them, but not first.
        numbers: what varies from call to call.
        constants: what is compiled in.
        kinds: :func:`kinds_of` all tensors that may differ in that between calls with equal constants.
        num_warps: per program.
        launch_pdl: it may start before the kernel in front of it ends.
        maxnreg: registers per thread at most.
    """
    if programs == 0:
        return
    if INTERPRETED:
        kernel[(programs,)](*tensors, *numbers, *constants, num_warps=num_warps)
        return
    device = tensors[0].device.index
    with contextlib.nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device):
        key = (kernel, device, constants, kinds, num_warps)
        compiled = _compiled.get(key)
        if compiled is None or max(numbers) >= _INT32_END:  # then each number may have either width
            options = {"num_warps": num_warps, "launch_pdl": launch_pdl, "maxnreg": maxnreg}
            compiled = kernel[(programs,)](*tensors, *numbers, *constants, **options)
            if max(numbers) < _INT32_END:
                _compiled[key] = compiled
        else:
            compiled[(programs, 1, 1)](*tensors, *numbers, *constants)
