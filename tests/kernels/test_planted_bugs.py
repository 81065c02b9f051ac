"""Bugs that are planted into the kernel, each of which the comparison with the emulation must find.

The interpreter runs what Python reads, so a bug is a changed line of the module's source. Where one is no longer found,
the inputs or the tolerances have become too weak.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lpattn.types import HadamardMode


@dataclasses.dataclass(frozen=True)
class Bug:
    """A line as it is, as it must not be, and what finds it out."""

    right: str
    wrong: str
    case: Callable[[Any], dict[str, Any]]


def plain(kernel: Any) -> dict[str, Any]:
    """Two heads that differ, several blocks of keys with scales of their own, tails."""
    q, k, v = kernel.make(heads=4, kv_heads=2, q_len=20, kv_len=300)
    v[:, :, 128:256] *= 40
    return {"q": q, "k": k, "v": v}


def tails(kernel: Any) -> dict[str, Any]:
    """One peak, and many weights so small that together they count: half of them lie below 2^-10 of it."""
    q, k, v = kernel.make(heads=1, q_len=16, kv_len=2000)
    q[:] = 0.0
    q[..., 0] = 1.0
    k[:] = 0.0
    k[0, 0, 0, 0] = 7.5 * 32**0.5
    v[0, 0, 0] = -5.0
    return {"q": q, "k": k, "v": v}


def causal(kernel: Any) -> dict[str, Any]:
    return plain(kernel) | {"band": kernel.Band(after=7)}


def window(kernel: Any) -> dict[str, Any]:
    q, k, v = kernel.make(heads=1, q_len=150, kv_len=150)
    return {"q": q, "k": k, "v": v, "band": kernel.Band(before=9, after=0)}


def no_keys(kernel: Any) -> dict[str, Any]:
    return plain(kernel) | {"band": kernel.Band(after=-3)}


def masked(kernel: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return plain(kernel) | {"mask": torch.rand(1, 4, 20, 300, generator=generator) < 0.5}


def own_tiles(kernel: Any) -> dict[str, Any]:
    """Every head sees another block of keys."""
    return plain(kernel) | {"mask": (torch.arange(300) // 64 == torch.arange(4)[:, None])[None, :, None]}


def biased(kernel: Any) -> dict[str, Any]:
    return plain(kernel) | {"mask": torch.randn(20, 300, generator=torch.Generator().manual_seed(0))}


def packed(kernel: Any) -> dict[str, Any]:
    return plain(kernel) | {"used": torch.arange(300)[None] < 90}


def rotated(kernel: Any) -> dict[str, Any]:
    return plain(kernel) | {"hadamard": HadamardMode.V_ONLY}


def on_the_cores(kernel: Any) -> dict[str, Any]:
    return plain(kernel) | {"shape": kernel.shape(32)._replace(sum_by_product=False)}


def tails_on_the_cores(kernel: Any) -> dict[str, Any]:
    return tails(kernel) | {"shape": kernel.shape(32)._replace(sum_by_product=False)}


def k_reordered(kernel: Any) -> dict[str, Any]:
    return plain(kernel) | {"shape": kernel.shape(32)._replace(k_reordered=True)}


BUGS = {
    "P without its factor": Bug("_P_BITS = tl.constexpr(8.0)", "_P_BITS = tl.constexpr(0.0)", tails),
    "sum of P before the cast": Bug("+ tl.dot(weights, ones)", "+ tl.sum(p, 1)[:, None]", tails),
    "sum that is not rescaled": Bug("row_sum = row_sum * alpha[:, None]", "row_sum = row_sum", plain),
    "output that is not rescaled": Bug(
        "acc * (alpha * (unit / next_unit))", "acc * (0.0 * alpha + (unit / next_unit))", plain
    ),
    "units of V mixed up": Bug("(alpha * (unit / next_unit))", "alpha", plain),
    "V's scale of another block": Bug("of_v = tl.load(v_scale + block)", "of_v = tl.load(v_scale)", plain),
    "K's scale of another block": Bug("tl.load(k_scale + block)", "tl.load(k_scale)", plain),
    "q's scale of another head": Bug("q_scale + head.to(tl.int64) * q_len", "q_scale", plain),
    "keys of V out of order": Bug("(0, 1, 3, 2, 4)", "(0, 1, 2, 3, 4)", plain),
    "keys of V out of order, as K is loaded": Bug(
        "slots // 2 % 2 * 8 + slots // 4 % 4 * 2", "slots // 2 % 8 * 2", k_reordered
    ),
    "sum on the cores before the cast": Bug("+ _sum_of_rows(rounded", "+ _sum_of_rows(p", tails_on_the_cores),
    "half a sum on the cores": Bug("(BM, _SUMMED, BN // _SUMMED)), 1)", "(BM, 2, BN // 2)), 1) * 0.5", on_the_cores),
    "another KV head": Bug("h // (heads // kv_heads)", "h % kv_heads", plain),
    "V's constant left out": Bug("[:, None] + constant[None, :]", "[:, None]", plain),
    "log-sum-exp without the shift": Bug("found += tl.load(lse_shift", "tl.load(lse_shift", plain),
    "a key past the end": Bug("seen = (column < keys)", "seen = (column < keys + 1)", packed),
    "the last key left out": Bug("seen = (column < keys)", "seen = (column < keys - 1)", plain),
    "number of keys ignored": Bug("keys = tl.load(key_counts + b)", "tl.load(key_counts + b)", packed),
    "causal by one too few": Bug("<= rows[:, None] + after", "< rows[:, None] + after", causal),
    "a tile taken for seen in full": Bug("(tile * BM + after + 1, 0) // BN)", "(tile * BM + BN, 0) // BN)", causal),
    "window by one too few": Bug(">= rows[:, None] - before", "> rows[:, None] - before", window),
    "a tile of the window left out": Bug("(tile * BM - before, 0) // BN", "(tile * BM - before, 0) // BN + 1", window),
    "rows without keys": Bug('tl.where(highest == float("-inf"), 0.0, highest)', "highest", no_keys),
    "zeros in rows without keys": Bug("tl.where(nothing[:, None], 0.0, acc)", "acc", no_keys),
    "mask of another head": Bug("h.to(tl.int64) * mask_h", "0 * mask_h", masked),
    "list of another head": Bug("h * list_h", "0 * list_h", own_tiles),
    "bias left out": Bug("s += bias", "bias", biased),
    "bias in units of exp2": Bug("factor *= _LN2", "factor *= 1.0", biased),
    "transform not undone": Bug("if HADAMARD:", "if False:", rotated),
    "transform without its norm": Bug("largest * LANES_V**-0.5", "largest * LANES_V**-0.25", rotated),
}


def planted(bug: Bug, path: Path) -> Any:
    """The kernel of a copy of its module with the bug in it."""
    from lpattn.kernels import portable

    source = Path(portable.__file__).read_text(encoding="utf-8")
    assert bug.right in source
    path.write_text(source.replace(bug.right, bug.wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module.attend_tiles


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_found(kernel, bug, tmp_path, monkeypatch) -> None:
    if not kernel.interpreted:
        pytest.skip("bugs are planted into what the interpreter runs")
    case = bug.case(kernel)
    monkeypatch.setattr(kernel.attention, "attend_tiles", planted(bug, tmp_path / "planted.py"))
    # Plans hold the kernel, and these not for longer than the test.
    monkeypatch.setattr(kernel.attention, "_plan", kernel.attention._plan.__wrapped__)
    with pytest.raises(AssertionError):
        kernel.check(**case)


@pytest.mark.parametrize("case", sorted({bug.case for bug in BUGS.values()}, key=lambda case: case.__name__))
def test_without_a_bug_nothing_is_found(kernel, case) -> None:
    if case is k_reordered and not kernel.interpreted and torch.cuda.get_device_capability()[0] not in (10, 11):
        pytest.skip("keys are reordered where products take no P from registers: elsewhere Triton 3.6 gets it wrong")
    kernel.check(**case(kernel))
