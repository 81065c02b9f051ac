"""What the compiler makes of the Hopper kernel, on any machine: products overlap, and the main loop does not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton, in which the kernel is written, is not installed")

# A multiprocessor's shared memory that one program can have.
SHARED = 227 * 1024

CONFIGURATIONS = [
    "64:step",
    "64:step-causal-lse-keys",
    "128:linear",
    "128:step",
    "128:step-causal",
    "80:step-lse-keys-half",
    "32:step-hadamard",
    "128:step-hadamard-causal",
]


def compiled(folder: Path, configurations: list[str]) -> list[dict[str, Any]]:
    """What the script says of each configuration, in a process in which nothing is interpreted or cached."""
    script = Path(__file__).with_name("offline.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", str(script), *configurations]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [kernel["configuration"] for kernel in found] == configurations
    return found


@pytest.mark.slow
def test_products_overlap_and_nothing_spills_in_the_main_loop(tmp_path, record_property) -> None:
    for kernel in compiled(tmp_path, CONFIGURATIONS):
        record_property(str(kernel["configuration"]), json.dumps(kernel))
        assert kernel["serialized"] == [], kernel
        assert set(kernel["spills"]) == {0}, kernel
        # P without MUFU; what is left are the factors between tiles, two rows to a thread.
        assert set(kernel["exponentials"]) <= {1, 2}, kernel
        assert kernel["shared"] <= SHARED, kernel


@pytest.mark.slow
def test_with_masks_and_at_head_dim_256_little_spills(tmp_path) -> None:
    """At head_dim 256 accumulators take half of the registers, and the consumers of triton 3.6 are short of a few.

    Tiles of 64 keys are not, and are slower.
    """
    configurations = ["64:step-mask", "128:step-mask", "128:step-mask-hadamard"]
    configurations += ["256:step", "256:step-mask", "256:step-hadamard", "256:step-causal-lse"]
    for kernel in compiled(tmp_path, configurations):
        assert kernel["serialized"] == [], kernel
        most = 1 if str(kernel["configuration"]).startswith(("64", "128")) else 41
        assert max(kernel["spills"]) <= most, kernel
        assert kernel["shared"] <= SHARED, kernel
