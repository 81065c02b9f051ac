"""The conformance suite on the GPU: the built-in backends by the public door, and bugs that only a GPU shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

import lpattn
from lpattn import Capabilities, CausalKind
from lpattn.testing import Status, run_check
from lpattn.testing.builtin import FA3Tests, FastTritonTests, Int8TritonTests, ReferenceTests, TritonTests
from lpattn.testing.subject import Subject

pytestmark = pytest.mark.gpu


class TestReferenceOnTheGPU(ReferenceTests):
    device = "cuda"


class TestFA3(FA3Tests):
    pass


class TestTriton(TritonTests):
    pass


class TestFastTriton(FastTritonTests):
    pass


class TestInt8Triton(Int8TritonTests):
    pass


class Plain(lpattn.Backend):
    """Attention in float16 on the GPU, with a hook around it."""

    automatic = False
    capabilities = Capabilities(dtypes=frozenset({torch.float32}), device_types=frozenset({"cuda"}))

    def probe(self, device):
        return [] if device.type == "cuda" else [lpattn.Reason("device", f"{device}: runs on cuda")]

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        with self.around(query):
            out = torch.nn.functional.scaled_dot_product_attention(
                query.half(),
                key.half(),
                value.half(),
                is_causal=call.causal is CausalKind.TOP_LEFT,
                scale=call.softmax_scale,
                enable_gqa=call.num_heads != call.num_kv_heads,
            )
        return out.to(call.dtype)

    def around(self, query):
        return contextlib.nullcontext()


class Correct(Plain):
    name = "gpu_correct"


class OnTheDefaultStream(Plain):
    name = "gpu_default_stream"

    def around(self, query):
        return torch.cuda.stream(torch.cuda.default_stream(query.device))


class LooksAtValues(Plain):
    name = "gpu_looks_at_values"

    def around(self, query):
        return contextlib.nullcontext(float(query.abs().max()))


class KeepsTheFirstScale(Plain):
    name = "gpu_keeps_the_first_scale"
    kept: float | None = None

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        if not torch.cuda.is_current_stream_capturing():
            self.kept = float(value.abs().max())
        kept = self.kept or 1.0
        value = (value / kept).clamp(-1, 1) * kept
        return super().attention(query, key, value, call, attn_mask, dropout_p)


@pytest.fixture
def subject() -> Iterator[object]:
    names = []

    def make(backend: lpattn.Backend) -> Subject:
        lpattn.register_backend(backend)
        names.append(backend.name)
        return Subject(backend.name)

    yield make
    for name in names:
        lpattn.unregister_backend(name)


@pytest.mark.parametrize(
    ("backend", "check", "says"),
    [
        (OnTheDefaultStream, "other_streams", "on another stream"),
        (LooksAtValues, "cuda_graphs", "capturing a CUDA graph raised"),
        (KeepsTheFirstScale, "cuda_graphs", "the replayed graph gives another result"),
    ],
)
def test_the_bug_is_found(subject, backend, check, says) -> None:
    outcome = run_check(subject(backend()), check)
    assert outcome.status is Status.FAILED, outcome.detail
    assert says in outcome.detail


@pytest.mark.parametrize("check", ["other_streams", "cuda_graphs"])
def test_a_correct_backend_passes(subject, check) -> None:
    outcome = run_check(subject(Correct()), check)
    assert outcome.status is Status.PASSED, outcome.detail
