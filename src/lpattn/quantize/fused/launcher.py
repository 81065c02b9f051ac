"""Launches kernels by a shorter way than Triton's own, which takes the host longer than the kernels take the GPU.

Triton looks at each argument to find the compiled kernel that fits it, asks the driver about each pointer, and calls
its hooks, which are there even if they are empty. Here the caller says what a kernel is compiled for, pointers travel
as numbers, and a launch goes by way of the hooks only where somebody listens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)

_INT32_END = 2**31

_Handles = tuple[Callable[..., None], int, object, Any]
"""Of a compiled kernel: its launcher, function and metadata, and Triton's object."""

_compiled: dict[Hashable, _Handles] = {}


def short_way(device: torch.device) -> int | None:
    """The device's current stream; None where launches must go by way of Triton's own launcher.

    So they must where nothing is compiled, on another device than the current one, and where somebody listens.
    """
    index = device.index
    if INTERPRETED or index != torch.cuda.current_device() or _listening():
        return None
    stream: int = triton.runtime.driver.active.get_current_stream(index)
    return stream


def kinds_of(tensors: Sequence[torch.Tensor | None]) -> tuple[object, ...]:
    """What Triton compiles a kernel for, of the tensors that a caller brings: dtypes, alignment, and which are None."""
    return tuple([t if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors])


class Launch:
    """A launch of which only the tensors are left to say; made once and kept, it costs the host least.

    The kernel's arguments are tensors, numbers and constants, in this order.

    Args:
        kernel: a ``triton.jit`` function that specializes on no number.
        programs: size of the grid.
        numbers: what varies from call to call.
        constants: what is compiled in.
        kinds: what else it is compiled for: dtypes and alignment (see :func:`kinds_of`) of all tensors that may differ
            in these between launches with equal constants, and which of them are None.
        num_warps: per program.
        launch_pdl: it may start before the kernel in front of it ends.
        device: of the tensors.
        maxnreg: registers per thread at most.
    """

    __slots__ = ("_device", "_handles", "_kernel", "_key", "_options", "_programs", "_rest")

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[float, ...],
        constants: tuple[Hashable, ...],
        kinds: Hashable,
        num_warps: int,
        launch_pdl: bool,
        device: torch.device,
        maxnreg: int | None = None,
    ) -> None:
        self._kernel = kernel
        self._programs = programs
        self._rest = (*numbers, *constants)
        self._device = device
        # Triton 3.9 warns where nobody says whether products and sums may be fused; the kernels count on it.
        fused = {"enable_fp_fusion": True}
        self._options = {"num_warps": num_warps, "launch_pdl": launch_pdl, "maxnreg": maxnreg, **fused}
        # A number that does not fit into 32 bits is an argument of another type.
        wide = tuple([n >= _INT32_END for n in numbers]) if max(numbers) >= _INT32_END else ()
        # Not the kernel itself: to hash it, Triton takes a lock.
        self._key = (id(kernel), device.index, constants, kinds, num_warps, launch_pdl, maxnreg, wide)
        self._handles = _compiled.get(self._key)

    def on(self, stream: int | None, pointers: Sequence[Any], tensors: Callable[[], tuple[Any, ...]]) -> None:
        """Launch it.

        Args:
            stream: what :func:`short_way` says of the device; several launches that follow each other may share it.
            pointers: addresses of the tensors; None and descriptors as they are.
            tensors: makes the tensors, for Triton to look at: the first time, and where it must launch.
        """
        handles = self._handles
        if stream is None or handles is None:
            self._launch_slowly(tensors())
            return
        run, function, metadata, _ = handles
        run(self._programs, 1, 1, stream, function, metadata, None, None, None, *pointers, *self._rest)

    def _launch_slowly(self, tensors: tuple[Any, ...]) -> None:
        if self._programs == 0:
            return
        if INTERPRETED:
            self._kernel[(self._programs,)](*tensors, *self._rest, num_warps=self._options["num_warps"])
            return
        with torch.cuda.device(self._device.index):
            if self._handles is None:
                made = self._kernel[(self._programs,)](*tensors, *self._rest, **self._options)
                self._handles = _compiled[self._key] = (made.run, made.function, made.packed_metadata, made)
            else:
                self._handles[-1][(self._programs, 1, 1)](*tensors, *self._rest)


def _listening() -> bool:
    """Whether somebody, such as a profiler, wants to know of launches."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # A chain of hooks in the versions that have chains, else a hook or None.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
