"""benchmarks/targets.py: what was measured meets its line of the table, and what was not is not called met."""

from __future__ import annotations

import itertools
import json

import attention
import cases
import common
import pytest
import targets
import torch
from common import host_timer

SMALL = cases.Shape(1, 2, 2, 70, 32, False)


def good() -> dict:
    """Parts in the form in which the other benchmarks return them, each at its limit."""
    variants = {
        "per_head": {"milliseconds": {"graph": 0.06}, "fraction_of_copy": {"graph": 0.6}},
        "per_head+hadamard_qkv": {"over_plain": {"graph": 1.15}},
        "per_head+hadamard_v_only": {"over_plain": {"graph": 1.2}},
    }
    short = {"automatic": {"graph_over_sdpa": 0.98, "over_sdpa": 0.98}}
    parts = {
        "flux": {
            "speedup": {"fp8_fa3": 1.2, "fp8_fa3+hadamard_qkv": 1.1},
            "best_exact": "exact:a",
            "milliseconds": {"exact:a": 2.0},
            "kernel_alone": {"milliseconds": 1.6},
        },
        "long": {"speedup": {"fp8_fa3": 1.33}},
        "host": {"microseconds": {"low_precision_sdpa, fp8_fa3": 80.0, "plain SDPA": 30.0}},
    }
    for layout in ("bhsd", "bshd"):
        parts |= {f"quantization {layout}": {"variants": variants}, f"short {layout}": short}
    for data, off, on in (("randn", 25.0, 25.0), ("outliers", 18.5, 27.0), ("bias", 45.0, 45.0)):
        parts[f"accuracy {data}"] = {"sqnr_db": {"fp8_fa3": off, "fp8_fa3+hadamard_qkv": on}}
    return parts


def verdicts(parts: dict) -> dict[str, str]:
    return {line.what: line.verdict for line in targets.lines(parts)}


def test_at_its_limit_each_target_is_met() -> None:
    found = verdicts(good())
    assert sorted(set(found.values())) == ["", "met", "not measured"]
    assert [what for what, verdict in found.items() if verdict == "not measured"] == [
        "whole op, FLUX, graph",
        "whole op, FLUX, Hadamard qkv, graph",
        "whole op, 2 x 4608, key padding, events",
        "kernel alone, 16k, head_dim 128, events",
    ]


def leaves(tree: dict, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(tree, dict):
        return [path]
    return [leaf for name, sub in tree.items() for leaf in leaves(sub, (*path, name))]


@pytest.mark.parametrize("step", [0.99, 1.01])
def test_beyond_its_limit_each_target_is_missed(step) -> None:
    missed = set()
    for path in leaves(good()):
        parts = json.loads(json.dumps(good()))
        at = targets.dig(parts, *path[:-1])
        if isinstance(at[path[-1]], float):
            at[path[-1]] *= step
            missed |= {what for what, verdict in verdicts(parts).items() if verdict == "MISSED"}
    every = {line.what: line for line in targets.lines(good())}
    assert missed == {w for w, x in every.items() if x.limited and (x.wanted[0] == "<") is (step > 1)}


def test_what_was_not_measured_is_not_met() -> None:
    assert set(verdicts({}).values()) == {"not measured"}
    assert "not measured" in targets.report(targets.lines({}))


def test_the_other_benchmarks_return_what_the_lines_read(monkeypatch, tmp_path, capsys) -> None:
    def measured(**changes):
        return lambda: attention.measure(SMALL, host_timer(1), 3, 0.0, extras=True, device="cpu", **changes)

    def broken():
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("variants.fa3_function", lambda: None)
    monkeypatch.setattr(attention, "captured", lambda runs: runs[0])
    parts = {"short bhsd": measured(graph_timer=host_timer(1), layout="bshd"), "flux": broken}
    monkeypatch.setattr(targets, "items", lambda budget, rounds: parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(common, "provenance", lambda: {"commit": common.commit()})
    monkeypatch.setenv("LPATTN_COMMIT", "abc123")
    monkeypatch.setattr("sys.argv", ["targets.py", "--out", str(tmp_path / "out.json")])
    monkeypatch.setattr(common, "wait", lambda: None)
    monkeypatch.setattr(attention, "gpu_state", dict)
    assert targets.main() == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["provenance"]["commit"] == "abc123"
    assert written["failed"] == {"flux": "RuntimeError: no such kernel"}
    values = {x["what"]: x["found"] for x in written["targets"]}
    for how in ("graph", "events"):
        assert values[f"automatic choice, 512 tokens, bhsd, against plain SDPA, {how}"] > 0
    assert values["whole op, FLUX, events"] is None
    assert "no such kernel" in capsys.readouterr().out


# Orders


@pytest.mark.parametrize("n", range(1, 9))
def test_each_follows_each_other_equally_often(n) -> None:
    names = [str(i) for i in range(n)]
    orders = common.balanced_orders(names)
    assert all(sorted(order) == names for order in orders)
    pairs = [pair for order in orders for pair in itertools.pairwise(order)]
    counts = {pairs.count(pair) for pair in itertools.permutations(names, 2)}
    assert len(counts) <= 1
    assert 0 not in counts


def test_a_ratio_is_taken_within_rounds() -> None:
    # The clock halves from round to round; one variant takes 1.5 times as long in each.
    one = [1.0, 2.0, 4.0, 8.0]
    assert common.ratio([1.5 * x for x in one], one) == 1.5
    assert common.ratio([1.5 * x for x in reversed(one)], one) != 1.5
