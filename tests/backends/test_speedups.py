"""The measured speeds: what benchmarks/calibrate.py writes is what the policy reads."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lpattn import policy
from lpattn.types import AttentionCall, CausalKind, HadamardMode, MaskKind

REPOSITORY = Path(__file__).parents[2]


def result(length: int, ratio: float, causal: bool = False, kv_heads: int = 8) -> dict:
    shape = {"batch": 1, "num_heads": 8, "num_kv_heads": kv_heads, "length": length, "head_dim": 128, "causal": causal}
    return {"shape": shape, "speedup": {"fp8_fa3": ratio}}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes results through calibrate.py into a file, which becomes the one that the policy reads."""

    def write(results: list[dict], capability: list[int], existing: str | None = None) -> dict:
        target, source = tmp_path / "speedups.json", tmp_path / "results.json"
        if existing is not None:
            target.write_text(existing)
        source.write_text(json.dumps({"results": results, "provenance": {"capability": capability, "device": "X"}}))
        command = [sys.executable, str(REPOSITORY / "benchmarks" / "calibrate.py"), "--from", source, "--write", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
        policy._tables.cache_clear()
        return json.loads(target.read_text())

    yield write
    monkeypatch.undo()
    policy._tables.cache_clear()


def call(length: int, **changes) -> AttentionCall:
    options = {"num_kv_heads": 8, "capability": (9, 0), "causal": CausalKind.NONE} | changes
    return AttentionCall(
        1,
        8,
        q_len=length,
        kv_len=length,
        head_dim=128,
        head_dim_v=128,
        dtype=torch.bfloat16,
        device_type="cuda",
        **options,
    )


def test_what_is_calibrated_is_what_is_read(tables) -> None:
    tables([result(16384, 1.2), result(1024, 0.5), result(4096, 0.8), result(4096, 1.1, causal=True)], [9, 0])
    assert policy.measured_speedup("fp8_fa3", call(4096)) == 0.8
    assert policy.measured_speedup("fp8_fa3", call(8192)) == pytest.approx(1.0)
    assert policy.measured_speedup("fp8_fa3", call(512)) == 0.5
    assert policy.measured_speedup("fp8_fa3", call(10**6)) == 1.2
    assert policy.measured_speedup("fp8_fa3", call(4096, causal=CausalKind.TOP_LEFT)) == 1.1
    assert policy.measured_speedup("fp8_fa3", call(4096, num_kv_heads=2)) == 0.0
    assert policy.measured_speedup("fp8_fa3", call(4096, capability=(8, 9))) == 0.0
    assert policy.measured_speedup("another", call(4096)) == 0.0


def test_hadamard_modes_have_rows_of_their_own(tables) -> None:
    both = result(4096, 1.3)
    both["speedup"] |= {"fp8_fa3+hadamard_qkv": 1.1, "auto": 1.3}
    written = tables([both], [9, 0])
    assert [(row["backend"], row["hadamard"]) for row in written["tables"]] == [("fp8_fa3", "none"), ("fp8_fa3", "qkv")]
    assert policy.measured_speedup("fp8_fa3", call(4096)) == 1.3
    assert policy.measured_speedup("fp8_fa3", call(4096, hadamard=HadamardMode.QKV)) == 1.1
    assert policy.measured_speedup("fp8_fa3", call(4096, hadamard=HadamardMode.V_ONLY)) == 0.0


def test_masks_have_rows_of_their_own(tables) -> None:
    masked, biased = result(4096, 1.7), result(4096, 1.4)
    masked["shape"]["holes"] = biased["shape"]["bias"] = True
    tables([result(4096, 1.2), masked, biased], [9, 0])
    assert policy.measured_speedup("fp8_fa3", call(4096)) == 1.2
    dense, padding = (1, 1, 4096, 4096), (1, 1, 1, 4096)
    assert policy.measured_speedup("fp8_fa3", call(4096, mask=MaskKind.BOOL, mask_shape=dense)) == 1.7
    assert policy.measured_speedup("fp8_fa3", call(4096, mask=MaskKind.BOOL, mask_shape=padding)) == 1.2
    assert policy.measured_speedup("fp8_fa3", call(4096, mask=MaskKind.ADDITIVE, mask_shape=dense)) == 1.4
    assert policy.measured_speedup("fp8_fa3", call(4096, mask=MaskKind.ADDITIVE, mask_shape=padding)) == 1.4


def test_another_architecture_keeps_its_rows(tables) -> None:
    old = {"measured": {"sm_89": {"device": "Y"}}, "tables": []}
    row = {"backend": "fp8_fa3", "head_dim": 128, "causal": False, "gqa": False, "hadamard": "none"}
    old["tables"] = [row | {"capability": c, "speedup_by_length": [[64, 9.0]]} for c in ([8, 9], [9, 0])]
    written = tables([result(4096, 0.8)], [9, 0], json.dumps(old))
    assert set(written["measured"]) == {"sm_89", "sm_90"}
    assert policy.measured_speedup("fp8_fa3", call(64, capability=(8, 9))) == 9.0
    assert policy.measured_speedup("fp8_fa3", call(64)) == 0.8


def test_the_file_that_ships_names_its_device_and_is_sane() -> None:
    data = json.loads(importlib.resources.files("lpattn").joinpath("speedups.json").read_text())
    for row in data["tables"]:
        assert "sm_{}{}".format(*row["capability"]) in data["measured"]
        assert all(0 < ratio < 10 for _, ratio in row["speedup_by_length"])
