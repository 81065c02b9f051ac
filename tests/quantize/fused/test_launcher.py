"""The short way to a compiled kernel: what it hands over, and when it is not taken."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton, which compiles the kernels, is not installed")

DEVICE = torch.device("cuda:1")


class Compiled:
    """Stands for Triton's object of a compiled kernel."""

    function = 4711
    packed_metadata = (4, 1, 0)

    def __init__(self) -> None:
        self.run_with: list[tuple[Any, ...]] = []
        self.called_with: list[tuple[Any, ...]] = []

    def run(self, *args: Any) -> None:
        self.run_with.append(args)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.called_with.append((grid, *args))


class Kernel:
    """Stands for a function decorated with triton.jit."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Compiled, tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_run(*args: Any, **options: Any) -> Compiled:
            self.compiled.append((Compiled(), grid, options))
            return self.compiled[-1][0]

        return compile_and_run


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Any:
    from lpattn.quantize.fused import launcher

    class Driver:
        @staticmethod
        def get_current_stream(device: int) -> int:
            return 100 + device

    class Active:
        active = Driver()

    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE.index)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(triton.runtime, "driver", Active)
    return launcher


class Run:
    """A launch, called with tensors."""

    def __init__(self, launcher: Any, device: torch.device, **given: Any) -> None:
        launch = launcher.Launch(device=device, **given)
        self.on, self._short_way, self._device = launch.on, launcher.short_way, device

    def __call__(self, tensors: tuple[Any, ...]) -> None:
        pointers = [t.data_ptr() if isinstance(t, torch.Tensor) else t for t in tensors]
        self.on(self._short_way(self._device), pointers, lambda: tensors)


def launch_of(launcher: Any, kernel: Kernel, **changes: Any) -> Run:
    given = {
        "kernel": kernel,
        "programs": 7,
        "numbers": (3, 0.5),
        "constants": (64, True),
        "kinds": "kinds",
        "num_warps": 2,
        "launch_pdl": True,
        "device": DEVICE,
    }
    return Run(launcher, **given | changes)


def test_after_the_first_time_pointers_travel_as_numbers(launcher) -> None:
    kernel, one, other = Kernel(), torch.zeros(3), torch.ones(2)
    descriptor = object()
    run = launch_of(launcher, kernel)
    run((one, None, descriptor))
    ((compiled, grid, options),) = kernel.compiled
    assert (grid, options) == ((7,), {"num_warps": 2, "launch_pdl": True, "maxnreg": None, "enable_fp_fusion": True})
    assert compiled.run_with == []
    run((other, None, descriptor))
    assert len(kernel.compiled) == 1
    head = (7, 1, 1, 101, 4711, (4, 1, 0), None, None, None)
    assert compiled.run_with == [(*head, other.data_ptr(), None, descriptor, 3, 0.5, 64, True)]


def test_another_launch_of_the_same_kind_is_compiled_already(launcher) -> None:
    kernel, tensor = Kernel(), torch.zeros(3)
    launch_of(launcher, kernel)((tensor,))
    launch_of(launcher, kernel, programs=9, numbers=(5, 0.25))((tensor,))
    ((compiled, _, _),) = kernel.compiled
    assert compiled.run_with[0][0] == 9
    assert compiled.run_with[0][-4:] == (5, 0.25, 64, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"constants": (64, False)},
        {"kinds": "others"},
        {"num_warps": 4},
        {"launch_pdl": False},
        {"maxnreg": 168},
        {"device": torch.device("cuda:0")},
        {"numbers": (2**31, 0.5)},
    ],
    ids=str,
)
def test_whatever_is_compiled_in_makes_it_another_kernel(launcher, changes, monkeypatch) -> None:
    kernel, tensor = Kernel(), torch.zeros(3)
    launch_of(launcher, kernel)((tensor,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: changes.get("device", DEVICE).index)
    launch_of(launcher, kernel, **changes)((tensor,))
    assert len(kernel.compiled) == 2
    launch_of(launcher, other := Kernel(), **changes)((tensor,))
    assert len(other.compiled) == 1


def test_numbers_of_64_bits_are_of_one_kind(launcher) -> None:
    kernel, tensor = Kernel(), torch.zeros(3)
    for number in (2**31, 2**40):
        launch_of(launcher, kernel, numbers=(number, 0.5))((tensor,))
    launch_of(launcher, kernel, numbers=(2**31 - 1, 0.5))((tensor,))
    assert len(kernel.compiled) == 2


def test_hooks_get_the_tensors_by_the_long_way(launcher, monkeypatch) -> None:
    kernel, tensor = Kernel(), torch.zeros(3)
    run = launch_of(launcher, kernel)
    run((tensor,))
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        run((tensor,))
    finally:
        hook.remove(print)
    ((compiled, _, _),) = kernel.compiled
    assert compiled.run_with == []
    ((grid, *args),) = compiled.called_with
    assert grid == (7, 1, 1)
    assert args[0] is tensor
    assert args[1:] == [3, 0.5, 64, True]
    run((tensor,))
    assert len(compiled.run_with) == 1


def test_on_another_device_than_the_current_one_it_switches(launcher, monkeypatch) -> None:
    kernel, tensor, entered = Kernel(), torch.zeros(3), []
    run = launch_of(launcher, kernel)
    run((tensor,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: entered.append(index) or contextlib.nullcontext())
    run((tensor,))
    assert entered == [DEVICE.index]
    assert len(kernel.compiled[0][0].called_with) == 1


def test_launches_that_follow_each_other_share_what_was_found_out(launcher, monkeypatch) -> None:
    kernel, tensor, made = Kernel(), torch.zeros(3), []
    run = launch_of(launcher, kernel)
    stream = launcher.short_way(DEVICE)
    assert stream == 101
    for _ in range(2):
        run.on(stream, (tensor.data_ptr(),), lambda: made.append("tensors") or (tensor,))
    assert made == ["tensors"]  # for Triton, the first time
    ((compiled, _, _),) = kernel.compiled
    assert compiled.run_with == [(7, 1, 1, 101, 4711, (4, 1, 0), None, None, None, tensor.data_ptr(), 3, 0.5, 64, True)]
    run.on(None, (tensor.data_ptr(),), lambda: made.append("again") or (tensor,))
    assert made == ["tensors", "again"]
    assert len(compiled.called_with) == 1


def test_there_is_no_short_way_where_others_must_know(launcher, monkeypatch) -> None:
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        assert launcher.short_way(DEVICE) is None
    finally:
        hook.remove(print)
    assert launcher.short_way(torch.device("cuda:0")) is None
    assert launcher.short_way(DEVICE) == 101
    monkeypatch.setattr(launcher, "INTERPRETED", True)
    assert launcher.short_way(DEVICE) is None


def test_no_program_no_launch(launcher) -> None:
    kernel = Kernel()
    launch_of(launcher, kernel, programs=0)((torch.zeros(3),))
    assert kernel.compiled == []


def test_triton_calls_its_launcher_as_the_short_way_does() -> None:
    """By name and order, in the version that is installed."""
    import inspect

    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler.compiler import CompiledKernel

    source = " ".join(inspect.getsource(CompiledKernel.__getitem__).split())
    call = (
        "self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, launch_metadata, "
        "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *args)"
    )
    assert call in source
    assert list(inspect.signature(CudaLauncher.__call__).parameters)[1:6] == [
        "gridX",
        "gridY",
        "gridZ",
        "stream",
        "function",
    ]
