"""What Triton makes of the passes for each architecture, compiled on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lpattn.errors import InvalidArgumentError

pytest.importorskip("triton", reason="triton, in which the passes are written, is not installed")

SHARED = 227 * 1024
"""Bytes that a program can have on sm_90."""

PASSES = {"list_used", "sample_heads", "quantize_heads", "restore"}


def compiled(configurations: Sequence[str]) -> list[dict[str, object]]:
    """What the script says of each kernel, in a process in which nothing is interpreted.

    Triton's cache is the user's: what was compiled once is not compiled again until its source changes.
    """
    script = Path(__file__).with_name("offline.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(script), *configurations]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["configuration"] for kernel in found} == set(configurations)
    return found


FEW_SPILLS = 32
"""Bytes that a thread of a rotated quantization may spill, whose registers are limited, on one Triton or another."""


@pytest.mark.slow
def test_on_hopper_little_spills_and_loads_are_wide() -> None:
    kinds = ["64-half", "128-keys", "128-qkv", "128-interleaved-v_only", "256", "128-interleaved-norm"]
    for kernel in compiled([f"90:{kind}" for kind in kinds]):
        limited = kernel["kernel"] == "quantize_heads" and {"half", "interleaved"} & set(
            kernel["configuration"].split("-")
        )
        assert kernel["stack"] <= (FEW_SPILLS if limited else 0), kernel
        assert kernel["shared"] <= SHARED, kernel
        if kernel["kernel"] != "list_used":
            assert kernel["wide"] >= kernel["per_tile"] > 0, kernel
            # The weights of q's norm or of k's, once in a program.
            assert kernel["narrow"] <= (2 if "norm" in kernel["configuration"] else 0), kernel


def test_no_cast_takes_one_register_twice() -> None:
    # Lanes past the head_dim are zeros that the compiler knows to be equal.
    quantize = compiled(["90:40-blocks"])[1]
    assert quantize["kernel"] == "quantize_blocks"
    assert quantize["twins"] == 0


@pytest.mark.slow
def test_every_architecture_with_e4m3() -> None:
    found = compiled(["89:64-half-keys", "100:128-qkv", "120:96-partial-norm"])
    assert {kernel["kernel"] for kernel in found} == PASSES
    assert not [kernel for kernel in found if "refused" in kernel]


@pytest.mark.slow
def test_norms_over_all_heads() -> None:
    configurations = [f"90:{kind}-blocks" for kind in ("128-half-span", "128-half-bare-span", "96-partial-span-keys")]
    assert not [kernel for kernel in compiled(configurations) if "refused" in kernel]


@pytest.mark.slow
def test_ampere_lacks_the_cast_and_nothing_else() -> None:
    found = {kernel["kernel"]: kernel for kernel in compiled(["80:64-keys"])}
    assert set(found) == PASSES
    assert "fp8e4nv not supported" in found.pop("quantize_heads")["refused"]
    assert not [kernel for kernel in found.values() if "refused" in kernel]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)])
def test_a_gpu_without_the_cast_is_refused_by_name(monkeypatch, capability) -> None:
    from lpattn.quantize.fused.device import check_device

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    name = f"sm_{capability[0]}{capability[1]}"
    with pytest.raises(InvalidArgumentError, match=rf"cuda:1 \({name}\): quantization to e4m3 needs sm_89 or newer"):
        check_device(torch.device("cuda:1"))


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_a_gpu_with_the_cast_is_not(monkeypatch, capability) -> None:
    from lpattn.quantize.fused.device import check_device

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check_device(torch.device("cuda:0"))
    check_device(torch.device("cpu"))
