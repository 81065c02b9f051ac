"""Before and after torch.compile, again, on parts of a model and on its blocks: RoPE is fused in all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpattn
from lpattn.compile.passes_only import passes_only


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        q, k = (t * cos + torch.cat((-t[..., 8:], t[..., :8]), -1) * sin for t in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(depth))

    def forward(self, x, cos, sin):
        for block in self.blocks:
            x = x + block(x, cos, sin)
        return x


@pytest.fixture
def model():
    return Model().eval()


@pytest.fixture
def inputs():
    angle = torch.randn(1, 1, 12, 8).repeat(1, 1, 1, 2)
    return torch.randn(2, 12, 32), angle.cos(), angle.sin()


FUSED = {"blocks.0": "fused", "blocks.1": "fused"}


def test_apply_then_compile_and_the_other_way_round(model, inputs, compiled, spy, reasons):
    want = model(*inputs)
    under = compiled(model)
    torch.testing.assert_close(under(*inputs), want)
    assert not spy.fused
    lpattn.apply_low_precision_attention(under, "bf16_reference")
    torch.testing.assert_close(under(*inputs), want)
    assert (len(spy.fused), reasons(model)) == (2, FUSED)
    # Again with other settings, and without: code that was compiled before does not run.
    lpattn.apply_low_precision_attention(under, "bf16_reference", layers={"blocks.1": "exact"})
    torch.testing.assert_close(under(*inputs), want)
    assert len(spy.fused) == 3
    lpattn.remove_low_precision_attention(under)
    spy.clear()
    torch.testing.assert_close(under(*inputs), want)
    assert (spy.fused, spy.plain) == ([], 0)


def test_the_context_manager(model, inputs, compiled, spy):
    want, under = model(*inputs), compiled(model)
    with lpattn.low_precision_attention("bf16_reference"):
        torch.testing.assert_close(under(*inputs), want)
    assert len(spy.fused) == 2
    under(*inputs)
    assert len(spy.fused) == 2


def test_blocks_one_at_a_time_share_a_graph(inputs, spy, reasons):
    model, graphs = Model(depth=6).eval(), []
    want = model(*inputs)
    lpattn.apply_low_precision_attention(model, "bf16_reference")

    def backend(graph, example_inputs):
        graphs.append(graph)
        return passes_only(graph, example_inputs)

    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(model(*inputs), want)
    assert len(graphs) == 1
    assert reasons(model) == {f"blocks.{i}": "fused" for i in range(6)}
    assert len(spy.fused) == 6


def test_counts_go_on(model, inputs, compiled, spy):
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    under = compiled(model)
    for calls in (1, 2, 3):
        under(*inputs)
        report = lpattn.attention_report(model)
        assert [layer.exact for layer in report.values()] == [{"requested": calls}] * 2


def test_autocast(model, inputs, compiled, spy, reasons):
    """Inputs were cast when the graph was traced: the operator rotates what it gets."""
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(*inputs)
        spy.clear()
        got = compiled(model)(*inputs)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert [call.dtype for call in spy.fused] == [torch.bfloat16] * 2
    assert reasons(model) == FUSED


def test_autocast_around_a_rotation_that_was_asked_for(inputs, compiled):
    _, cos, sin = (x.transpose(1, 2) for x in (inputs[0][None], *inputs[1:]))
    q, k, v = torch.randn(3, 2, 12, 2, 16)

    def attend(q, k, v):
        return lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, backend="bf16_reference")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = attend(q, k, v), compiled(attend)(q, k, v)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_a_copy_is_compiled_apart(model, inputs, compiled, spy, reasons):
    import copy

    lpattn.apply_low_precision_attention(model, "bf16_reference")
    clone = copy.deepcopy(model)
    compiled(clone)(*inputs)
    assert reasons(clone) == FUSED
    assert reasons(model) == {}
