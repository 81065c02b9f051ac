"""The compiled blocks, small and on the CPU: what is called fused is fused, and what is called opaque is not."""

from __future__ import annotations

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
        self.fused = 0

    def rope_attention(self, *args, **kwargs):
        self.fused += 1
        return super().rope_attention(*args, **kwargs)


@pytest.fixture
def rotating():
    backend = Rotating()
    lpattn.register_backend(backend)
    torch._dynamo.reset()
    yield backend
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "part"), [("llama", "between"), ("flux", "block")])
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
    assert set(result["milliseconds"]) == {"exact:sdpa", "rotating_test opaque", "rotating_test fused"}
    assert rotating.fused == 1 + 1 + 3  # when it was compiled, compared, and timed
    assert result["fused_over_opaque"] > 0
    assert name in compiled.report([result])


def test_a_backend_that_does_not_fuse_is_no_result(rotating, monkeypatch):
    monkeypatch.setattr(Rotating, "capabilities", lpattn.Capabilities(dtypes=frozenset({torch.float32})))
    build = lambda: blocks.BETWEEN["flux"](blocks.SMALL["flux"])  # noqa: E731
    inputs = (*(torch.randn(1, 6, 64) for _ in range(3)), *blocks.tables(6, 16, True, "cpu"))
    with torch.no_grad(), pytest.raises(RuntimeError, match="has no fused rotation"):
        compiled.low(build, inputs, rotating.name, passes_only)
