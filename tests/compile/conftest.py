"""What the tests of RoPE fusion share: a spy on the reference backend, and inductor up to its graph passes."""

from __future__ import annotations

import math

import pytest
import torch

import lpattn
from lpattn.backends import reference
from lpattn.compile.passes_only import passes_only


class Spy:
    """What the reference backend was handed.

    Attributes:
        fused: calls of ``rope_attention``. ``plain``: calls of ``attention`` that did not come from there.
        shapes: of q and k before rotation, of the fused calls.
        norms: of the fused calls, None where there was none.
        turned: True makes the backend rotate the other way, so that a test sees whether its numbers would notice.
        skewed: True makes the backend take other weights for the norm.
    """

    def __init__(self):
        self.clear()

    def clear(self):
        self.fused, self.plain, self.shapes, self.tables, self.norms = [], 0, [], [], []
        self.turned = self.skewed = False


@pytest.fixture
def spy(monkeypatch):
    spy, inside = Spy(), []
    rope_attention = reference.ReferenceBackend.rope_attention
    attention = reference.ReferenceBackend.attention

    def spied_rope(self, query, key, value, cos, sin, call, *args, **kwargs):
        spy.fused.append(call)
        spy.shapes.append((tuple(query.shape), tuple(key.shape)))
        spy.tables.append((cos, sin, kwargs.get("cos_k")))
        norm = kwargs.get("norm")
        spy.norms.append(norm)
        if spy.turned:
            sin = -sin
        if spy.skewed and norm is not None:
            other = torch.linspace(3, 0, query.shape[-1])
            if norm.rstd_q is None:
                eps_q, eps_k = (1e-6 if eps is None else eps for eps in (norm.eps_q, norm.eps_k))
                kwargs["norm"] = lpattn.Norm(eps_q, eps_k, other, other)
            else:
                weights = (other.expand(x.shape[2:]) for x in (query, key))
                kwargs["norm"] = lpattn.Norm(None, None, *weights, norm.rstd_q, norm.rstd_k)
        inside.append(True)
        try:
            return rope_attention(self, query, key, value, cos, sin, call, *args, **kwargs)
        finally:
            inside.pop()

    def spied(self, *args, **kwargs):
        spy.plain += not inside
        return attention(self, *args, **kwargs)

    monkeypatch.setattr(reference.ReferenceBackend, "rope_attention", spied_rope)
    monkeypatch.setattr(reference.ReferenceBackend, "attention", spied)
    return spy


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def compiled():
    """``compiled(f)``: f as one graph, with inductor's passes, without code generation; ``.graphs`` are those."""

    def compile(function, **options):
        graphs = []

        def backend(graph, example_inputs):
            graphs.append(graph)
            return passes_only(graph, example_inputs)

        result = torch.compile(function, backend=backend, fullgraph=True, **options)
        result.graphs = graphs
        return result

    return compile


@pytest.fixture
def as_compiled(compiled):
    """``as_compiled(model, inputs, eager)``: the output of an untouched model, and whether it is the eager one.

    The inductor of torch 2.11 drops casts to a coarser dtype and back.
    """

    def run(model, inputs, eager):
        output = compiled(model)(*inputs)
        same = torch.allclose(output, eager, rtol=2e-5, atol=2e-5, equal_nan=True)
        return (eager if same else output), same

    return run


@pytest.fixture
def reasons():
    """``reasons(model)``: what the report says of RoPE, by layer; with ``of="norm"``, of the norm in front of it."""
    return lambda model, of="rope": {name: layer[of] for name, layer in lpattn.attention_report(model).items()}


@pytest.fixture
def sharpen():
    """``sharpen(model)``: redraws what makes q and k, so that attention is peaked and a wrong rotation shows."""
    names = ("q_proj", "k_proj", "qkv", "query_key_value", "Wqkv", "to_q", "to_k", "add_q", "add_k", "wq", "wk")

    def redraw(model, gain=1.6):
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and any(part in name for part in names):
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * gain / math.sqrt(parameter.shape[1]))
            elif parameter.dim() == 1 and any(part in name for part in ("norm_q", "norm_k", "q_norm", "k_norm")):
                parameter.mul_(gain)
        return model.eval()

    return redraw
