"""What the compiler makes of the portable kernel on every architecture: its loop does not spill, and memory suffices.

`python tests/kernels/offline.py` with the configurations of ``EVERY`` shows registers and the instructions of the loop.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton, in which the kernel is written, is not installed")

# KiB of a multiprocessor's shared memory that one program can have, by compute capability.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SOME = [
    "80:128-int8",
    "86:64-int8-bool",
    "89:128-bool",
    "90:128-causal-lse",
    "90:128-bool",
    "90:128-additive",
    "89:128-single",
    "90:128-int8-single-lse",
    "120:80-single-lse",
    "100:128",
    "120:128",
]
EVERY = [
    f"{capability}:{dim}{kind}{options}"
    for capability, dim, options in itertools.product(
        SHARED, (64, 80, 128, 256), ("", "-causal", "-window", "-bool", "-additive-lse", "-single-lse", "-qkv-lse")
    )
    for kind in (["-int8"] if capability < 89 else ["", "-int8"] if capability == 90 else [""])
]


def compiled(folder: Path, configurations: list[str]) -> list[dict[str, Any]]:
    """What the script says of the attention kernel of each, in a process in which nothing is interpreted or cached."""
    script = Path(__file__).with_name("offline.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", str(script), *configurations]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = [kernel for kernel in found if kernel["kernel"] == "attend_tiles"]
    assert [kernel["configuration"] for kernel in found] == configurations
    return found


def check(kernel: dict[str, Any]) -> None:
    capability, _, asked = kernel["configuration"].partition(":")
    assert kernel["shared"] <= SHARED[int(capability)] * 1024, kernel
    assert kernel["hot_loop"]["all"] > 0, kernel
    assert not kernel["moved"], kernel
    if int(asked.split("-")[0]) <= 128:
        assert kernel["spills_in_loops"] == 0, kernel
        # P stays in registers. Byte by byte, a tile would take as many loads as there are exponentials.
        assert kernel["hot_loop"].get("STS", 0) <= 8, kernel
        assert kernel["hot_loop"].get("LDG", 0) <= 8, kernel


@pytest.mark.slow
def test_the_loop_does_not_spill_and_p_stays_in_registers(tmp_path, record_property) -> None:
    for kernel in compiled(tmp_path, SOME):
        record_property(kernel["configuration"], json.dumps(kernel))
        check(kernel)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("capability", SHARED)
def test_every_configuration(tmp_path, capability) -> None:
    """Needs no GPU, but minutes: it runs where the other long tests do."""
    for kernel in compiled(tmp_path, [name for name in EVERY if name.startswith(f"{capability}:")]):
        check(kernel)
