"""The compiled blocks, small and on the CPU: what is called fused is fused, and what is called opaque is not."""

from __future__ import annotations

import itertools
from pathlib import Path

import blocks
import compiled
import pytest
import torch

import lpattn
from lpattn.backends.reference import ReferenceBackend
from lpattn.compile.passes_only import passes_only


class Rotating(ReferenceBackend):
    """Takes the place of a low-precision backend with a fused rotation."""

    name = "rotating_test"
    exact = False
    automatic = False

    def __init__(self):
        self.fused = self.normed = 0

    def rope_attention(self, *args, **kwargs):
        self.fused += 1
        self.normed += kwargs.get("norm") is not None
        return super().rope_attention(*args, **kwargs)


@pytest.fixture
def rotating():
    backend = Rotating()
    lpattn.register_backend(backend)
    torch._dynamo.reset()
    yield backend
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "part"), [("llama", "between"), ("flux", "block"), ("wan", "between")])
def test_measure(name, part, rotating):
    import time

    def timer(run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    result = compiled.measure(
        name,
        part,
        24,
        timer,
        3,
        1.0,
        backend=rotating.name,
        sizes=blocks.SMALL[name],
        device="cpu",
        dtype=torch.float32,
        how=passes_only,
    )
    kinds = ["opaque", "fused", *(["rope only"] if name == "flux" else [])]
    assert set(result["milliseconds"]) == {"exact:sdpa", *(f"rotating_test {kind}" for kind in kinds)}
    # When it was compiled, compared, and timed.
    assert rotating.fused == (1 + 1 + 3) * (len(kinds) - 1)
    assert rotating.normed == (1 + 1 + 3) * (name != "llama")
    assert rotating.capabilities.norm
    assert result["fused_over_opaque"] > 0
    assert name in compiled.report([result])


def test_processes_are_merged():
    def result(opaque, fused, exact):
        return {
            "model": "llama",
            "best_exact": "exact:a",
            "milliseconds": {"x opaque": opaque, "x fused": fused, "exact:a": exact, "exact:b": 3.0},
            "spread": {"x opaque": opaque / 100, "x fused": 0.0, "exact:a": 0.0, "exact:b": 0.0},
            "sqnr_db": {"x opaque": 20.0 + opaque, "x fused": 20.0, "exact:a": 50.0, "exact:b": 50.0},
            "fused_over_opaque": opaque / fused,
            "opaque_over_exact": exact / opaque,
            "fused_over_exact": exact / fused,
            "rounds": int(10 * opaque),
        }

    found = compiled.merged([result(2.0, 1.0, 4.0), result(1.0, 1.0, 4.0), result(3.0, 1.0, 2.0)])
    assert found["milliseconds"] == {"x opaque": 2.0, "x fused": 1.0, "exact:a": 4.0, "exact:b": 3.0}
    assert found["best_exact"] == "exact:b"
    assert found["fused_over_opaque"] == 2.0
    assert [each["fused_over_opaque"] for each in found["processes"]] == [2.0, 1.0, 3.0]
    assert (found["spread"]["x opaque"], found["sqnr_db"]["x opaque"], found["rounds"]) == (0.03, 21.0, 10)


def test_a_backend_that_does_not_fuse_is_no_result(rotating, monkeypatch):
    monkeypatch.setattr(Rotating, "capabilities", lpattn.Capabilities(dtypes=frozenset({torch.float32})))
    build = lambda: blocks.BETWEEN["flux"](blocks.SMALL["flux"])  # noqa: E731
    inputs = (*(torch.randn(1, 6, 64) for _ in range(3)), *blocks.tables(6, 16, True, "cpu"))
    with torch.no_grad(), pytest.raises(RuntimeError, match="has no fused rotation"):
        compiled.low(build, inputs, rotating.name, passes_only)


MEASURES = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from turns import Turns
model, part, length, backend, told = json.loads(sys.argv[2])
folder, count, patience, seconds, rounds = json.loads(told)
turns = Turns(Path(folder), count, patience)
try:
    if backend == "broken":
        raise ValueError("it is broken")
    time.sleep(0.3 if backend == "slow" else 0.0)
    with turns.mine():
        ready = len(list(Path(folder).glob("ready-*")))
        start = time.monotonic()
        time.sleep(0.1)
        print(json.dumps({{"ready": ready, "start": start, "end": time.monotonic(), "backend": backend}}))
finally:
    turns.ready()
"""


@pytest.mark.parametrize("jobs", [8, 2])
def test_items_are_measured_in_turn_when_none_compiles(jobs, monkeypatch, tmp_path):
    script = tmp_path / "measures.py"
    script.write_text(MEASURES.format(benchmarks=str(Path(compiled.__file__).parent)))
    monkeypatch.setattr(compiled, "__file__", str(script))
    waiting = compiled.items(["llama"], ["block"], [8], ["quick", "slow", "broken", "other"])
    found = {item.backend: result for item, result in compiled.measure_all(waiting, 1.0, 1, 30.0, jobs)}
    assert found.pop("broken") == "ValueError: it is broken"
    assert {result["backend"] for result in found.values()} == {"quick", "slow", "other"}
    assert {result["ready"] for result in found.values()} == {min(jobs, 4)}
    times = sorted((result["start"], result["end"]) for result in found.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))


def test_an_item_that_hangs_costs_no_other_its_result(monkeypatch, tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text("import time, sys; 'stuck' in sys.argv[2] and time.sleep(60); print('{}')")
    monkeypatch.setattr(compiled, "__file__", str(script))
    waiting = compiled.items(["llama"], ["block"], [8], ["stuck", "quick"])
    assert [result for _, result in compiled.measure_all(waiting, 1.0, 1, 1.0, 2)] == ["no time left", {}]
