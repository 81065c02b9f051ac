"""The check of CUDA graphs, with a stand-in for the graph: a replay computes with what the capture left behind."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import lpattn
from lpattn import Capabilities, CausalKind
from lpattn.testing import Status, run_check
from lpattn.testing.checks import machinery
from lpattn.testing.subject import Subject


class Scaled(lpattn.Backend):
    """Attention that takes a number of every tensor with it; a subclass keeps the number of the capture."""

    name = "scaled"
    automatic = False
    capabilities = Capabilities(dtypes=frozenset({torch.float16}), device_types=frozenset({"cpu"}))
    keeps_it = False
    replays = False

    def __init__(self):
        self.kept = {}

    def probe(self, device):
        return [] if device.type == "cpu" else [lpattn.Reason("device", f"{device}: runs on the CPU")]

    def amax(self, name, x):
        if not (self.replays and self.keeps_it):
            self.kept[name] = float(x.float().abs().max())
        return self.kept[name]

    def round(self, name, x, amax):
        return x

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        named = {"q": query.float(), "k": key.float(), "v": value.float()}
        q, k, v = (self.round(name, x, self.amax(name, x)) for name, x in named.items())
        causal = call.causal is CausalKind.TOP_LEFT
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=call.softmax_scale, enable_gqa=True)
        return out.to(call.dtype)


class Clips(Scaled):
    keeps_it = True

    def round(self, name, x, amax):
        return x.clamp(-amax, amax)


class Flushes(Scaled):
    """Large values are no trouble to it: it does not clip."""

    keeps_it = True

    def round(self, name, x, amax):
        return torch.where(x.abs() >= amax / 1000, x, 0.0) if name == "v" else x


class Graph:
    def __init__(self, backend, subject, static, out):
        self.backend, self.subject, self.static, self.out = backend, subject, static, out

    def replay(self):
        self.backend.replays = True
        self.out.copy_(self.subject.run(self.static))
        self.backend.replays = False


@pytest.mark.parametrize(
    ("backend", "label"),
    [
        (Scaled, None),
        (Clips, "k and v 64 times as large, q as small"),
        (Flushes, "k and v 64 times as small, q as large"),
    ],
)
def test_numbers_of_the_capture_are_found(monkeypatch, backend, label) -> None:
    made = backend()
    lpattn.register_backend(made)

    def captured(subject, problem, device):
        names = ("query", "key", "value")
        static = problem.changed(**{name: getattr(problem, name).clone() for name in names})
        out = subject.run(static)
        return (Graph(made, subject, static, out), static), out

    monkeypatch.setattr(machinery, "_captured", captured)
    monkeypatch.setattr(Subject, "gpu", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    outcome = run_check(Subject(made.name), "cuda_graphs")
    if label is None:
        assert outcome.status is Status.PASSED, outcome.detail
    else:
        assert outcome.status is Status.FAILED
        assert outcome.detail.startswith(label)
        assert "the replayed graph gives another result" in outcome.detail
