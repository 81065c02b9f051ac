"""Rotations and near-rotations at random: fused or not, the numbers are those of the graph as it was.

Graphs are made without Dynamo, which would take a second each. Numbers are compared, never texts.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from lpattn import ops
from lpattn.compile.graph import fuse_rope
from lpattn.settings import Settings
from lpattn.types import Provenance

REFERENCE = Settings("bf16_reference", provenance=Provenance.MODEL).text
FUSED = (ops.rope_sdpa, ops.rope_sdpa_lse)


def rotated(x, cos, sin, style, lanes):
    """x [.., D] with its first lanes rotated; cos and sin [.., lanes], each pair of lanes with entries of its own."""
    head, rest = x[..., :lanes], x[..., lanes:]
    half = lanes // 2
    if style == "half_split":
        out = head * cos + torch.cat((-head[..., half:], head[..., :half]), -1) * sin
    elif style == "halves_apart":
        a, b = head[..., :half], head[..., half:]
        out = torch.cat((a * cos[..., :half] - b * sin[..., :half], b * cos[..., half:] + a * sin[..., half:]), -1)
    elif style == "interleaved":
        out = head * cos + torch.stack((-head[..., 1::2], head[..., 0::2]), -1).flatten(-2) * sin
    elif style == "written":
        out = head.clone()
        a, b = head[..., 0::2], head[..., 1::2]
        out[..., 0::2] = a * cos[..., 0::2] - b * sin[..., 0::2]
        out[..., 1::2] = a * sin[..., 1::2] + b * cos[..., 1::2]
    else:
        turned = torch.view_as_complex(head.reshape(*head.shape[:-1], half, 2).contiguous())
        out = torch.view_as_real(turned * torch.complex(cos[..., 0::2], sin[..., 0::2])).flatten(-2)
    return out if rest.shape[-1] == 0 else torch.cat((out, rest), -1)


STYLES = {"half_split": False, "halves_apart": False, "interleaved": True, "written": True, "complex": True}


def swap_lanes(x, a, b):
    order = list(range(x.shape[-1]))
    order[a], order[b] = order[b], order[a]
    return torch.cat([x[..., lane : lane + 1] for lane in order], -1)


def scale_lane(x, lane, factor):
    return torch.cat((x[..., :lane], x[..., lane : lane + 1] * factor, x[..., lane + 1 :]), -1)


def replace_row(x, row, other):
    return torch.cat((x[:, :, :row], x[:, :, other : other + 1], x[:, :, row + 1 :]), 2)


def negate_head(x, head):
    return torch.cat((x[:, :head], -x[:, head : head + 1], x[:, head + 1 :]), 1)


def offset_lane(x, lane, offset):
    out = x.clone()
    out[..., lane] = out[..., lane] + offset
    return out


def leak(x, source, a, b):
    """A little of another lane, before rotation."""
    out = x.clone()
    out[..., a] = out[..., a] + 0.5 * source[..., b]
    return out


@st.composite
def programs(draw):
    dim = draw(st.sampled_from([4, 6, 8, 12]))
    lanes = draw(st.integers(1, dim // 2)) * 2
    style = draw(st.sampled_from(sorted(STYLES)))
    length = draw(st.sampled_from([3, 4, 7]))
    groups = draw(st.sampled_from([1, 2]))
    near = draw(
        st.sampled_from(
            ["nothing", "swap", "scale", "row", "head", "offset", "leak", "other_style", "cut", "swap_before"]
        )
    )
    which = draw(st.sampled_from(["q", "k", "both"]))
    lane, other = draw(st.integers(0, dim - 1)), draw(st.integers(0, dim - 1))
    row, second = draw(st.integers(0, length - 1)), draw(st.integers(0, length - 1))
    layout = draw(st.sampled_from(["heads first", "heads last"]))
    own = draw(st.booleans())
    independent = draw(st.booleans())
    return {name: value for name, value in locals().items() if name != "draw"}


def build(p):
    """The program as a function of q, k, v and tables."""

    def change(x, source, tables):
        near, lanes = p["near"], p["lanes"]
        if near == "swap_before":
            return rotated(swap_lanes(source, p["lane"], p["other"]), *tables, p["style"], lanes)
        if near == "other_style":
            style = "interleaved" if not STYLES[p["style"]] else "half_split"
            return rotated(source, *tables, style, lanes)
        if near == "cut" and lanes > 2:
            fewer = [t[..., : lanes - 2] for t in tables]
            return rotated(source, *fewer, p["style"], lanes - 2)
        changes = {
            "swap": lambda: swap_lanes(x, p["lane"], p["other"]),
            "scale": lambda: scale_lane(x, p["lane"], 0.5),
            "row": lambda: replace_row(x, p["row"], p["second"]),
            "head": lambda: negate_head(x, 0),
            "offset": lambda: offset_lane(x, p["lane"], 0.7),
            "leak": lambda: leak(x, source, p["lane"], p["other"]),
        }
        return changes.get(near, lambda: x)()

    def run(q, k, v, cos, sin, cos_k, sin_k):
        tables_k = (cos_k, sin_k) if p["own"] else (cos, sin)
        if p["layout"] == "heads last":
            q, k = q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(1, 2).contiguous().transpose(1, 2)
        turned = [rotated(x, *t, p["style"], p["lanes"]) for x, t in ((q, (cos, sin)), (k, tables_k))]
        if p["which"] in ("q", "both"):
            turned[0] = change(turned[0], q, (cos, sin))
        if p["which"] in ("k", "both"):
            turned[1] = change(turned[1], k, tables_k)
        k = turned[1]
        if p["groups"] > 1:
            k, v = (x[:, :, None].expand(-1, -1, p["groups"], -1, -1).reshape(2, -1, *x.shape[2:]) for x in (k, v))
        return ops.sdpa(turned[0], k, v, None, 0.0, False, None, None, REFERENCE)

    return run


def check(p):
    torch.manual_seed(0)
    dim, length, lanes = p["dim"], p["length"], p["lanes"]
    q, k, v = (2 * torch.randn(2, h, length, dim) for h in (2 * p["groups"], 2, 2))
    size = (1, 1, length, lanes // 2)

    def table():
        one = torch.randn(size)
        other = torch.randn(size) if p["independent"] and p["style"] != "complex" else one
        return torch.stack((one, other), -1).flatten(-2) if STYLES[p["style"]] else torch.cat((one, other), -1)

    inputs = (q, k, v, table(), table(), table(), table())
    run = build(p)
    want = run(*inputs)
    traced = make_fx(
        torch.func.functionalize(run, remove="mutations"),
        tracing_mode="fake",
        decomposition_table=select_decomp_table(),
    )(*inputs)
    torch.testing.assert_close(traced(*inputs), want, rtol=1e-5, atol=1e-5)
    fuse_rope(traced.graph)
    traced.graph.lint()
    traced.recompile()
    torch.testing.assert_close(traced(*inputs), want, rtol=2e-5, atol=2e-5)
    return sum(node.target in FUSED for node in traced.graph.nodes)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs())
def test_the_numbers_stay(p):
    fused = check(p)
    if p["near"] == "nothing":
        assert fused == 1


EXAMPLE = {
    "dim": 8,
    "lanes": 6,
    "style": "half_split",
    "length": 4,
    "groups": 2,
    "near": "nothing",
    "which": "both",
    "lane": 1,
    "other": 2,
    "row": 1,
    "second": 2,
    "layout": "heads first",
    "own": True,
    "independent": True,
}


@pytest.mark.parametrize("near", ["swap", "scale", "row", "head", "offset", "leak", "cut", "swap_before"])
def test_every_change_shows_in_the_numbers(near):
    """What makes a rotation a near-rotation changes the output, so that fusing it as one would fail the test above."""
    torch.manual_seed(0)
    inputs = [2 * torch.randn(2, h, 4, 8) for h in (4, 2, 2)] + [torch.randn(1, 1, 4, 6) for _ in range(4)]
    outputs = [build(EXAMPLE | {"near": which, "which": "q"})(*inputs) for which in ("nothing", near)]
    assert not torch.allclose(*outputs, rtol=1e-2, atol=1e-2)
