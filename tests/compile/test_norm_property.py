"""Norms and near-norms at random: fused or not, the numbers are those of the graph as it was.

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
EPS_Q = 14
"""Position of the first argument of a norm, and of those for norms over all heads."""
RSTD_Q = 18


def mean_square(x, p):
    """Over the lanes, or what is nearly that."""
    near, squares = p["near"], x * x if p["squares"] == "product" else x.pow(2)
    if near == "tokens":
        return squares.mean(-2, keepdim=True)
    if near == "heads":
        return squares.mean(1, keepdim=True)
    if near == "some_lanes":
        return squares[..., : max(p["lane"], 1)].mean(-1, keepdim=True)
    if near == "sum":
        return squares.sum(-1, keepdim=True)
    if near == "variance":
        return x.var(-1, keepdim=True, unbiased=False)
    if near == "next_row":
        squares = torch.cat((squares[:, :, 1:], squares[:, :, :1]), 2)
    if near == "next_head":
        squares = torch.cat((squares[:, 1:], squares[:, :1]), 1)
    if p["squares"] == "flat":
        return squares.reshape(-1, x.shape[-1]).mean(-1).view(*x.shape[:-1], 1)
    return squares.mean(-1, keepdim=True)


def normalized(x, weight, eps, p):
    """x [B, H, S, D] by the program p; over all heads, they are one head of as many lanes."""
    if p["over"] == "heads":
        heads = x.shape[1]
        x = normalized(x.transpose(1, 2).flatten(2).unsqueeze(1), weight, eps, p | {"over": "head"})
        return x.squeeze(1).unflatten(2, (heads, -1)).transpose(1, 2)
    near = p["near"]
    total = mean_square(x, p) + (weight[0] if near == "eps_tensor" else eps)
    if near == "no_root":
        out = x * total.reciprocal()
    elif p["root"] == "rsqrt":
        out = x * total.rsqrt()
    elif p["root"] == "power":
        out = total.pow(-0.5) * x
    else:
        out = x / total.sqrt()
    if near == "swapped":
        half = x.shape[-1] // 2
        out = torch.cat((out[..., half:], out[..., :half]), -1)
    if near == "one_lane":
        lane = min(p["lane"], x.shape[-1] - 1)
        out = torch.cat((out[..., :lane], out[..., lane : lane + 1] * 0.5, out[..., lane + 1 :]), -1)
    if near == "one_row":
        out = torch.cat((out[:, :, :1], x[:, :, 1:2], out[:, :, 2:]), 2)
    if near == "bias":
        out = out + 0.3 * weight
    if near == "weight_of_rows":
        out = out * torch.linspace(0.5, 2.0, x.shape[2])[:, None]
    if near == "twice_weighted":
        out = out * (1.0 + weight)
    if p["weight"] == "plain":
        out = out * weight
    elif p["weight"] == "plus_one":
        out = (1.0 + weight) * out
    return out


NEAR = [
    *("tokens", "heads", "some_lanes", "sum", "variance", "next_row", "next_head", "eps_tensor", "no_root", "swapped"),
    *("one_lane", "one_row", "bias", "weight_of_rows", "twice_weighted"),
]


@st.composite
def programs(draw):
    near = draw(st.sampled_from(["nothing", "nothing", *NEAR]))
    over = draw(st.sampled_from(["head", "heads"]))
    which = draw(st.sampled_from(["q", "k", "both"]))
    squares = draw(st.sampled_from(["product", "power", "flat"]))
    root = draw(st.sampled_from(["rsqrt", "power", "division"]))
    weight = draw(st.sampled_from(["none", "plain", "plus_one"]))
    layout = draw(st.sampled_from(["heads first", "heads last"]))
    dim = draw(st.sampled_from([4, 6, 8]))
    length = draw(st.sampled_from([3, 4, 8]))
    groups = draw(st.sampled_from([1, 2]))
    lane = draw(st.integers(0, dim - 1))
    eps = draw(st.sampled_from([0.0, 1e-6, 0.5]))
    return {name: value for name, value in locals().items() if name != "draw"}


def build(p):
    """The program as a function of q, k, v, cos, sin and weights."""

    def one(x, weight, eps, name):
        program = p if p["which"] in (name, "both") else p | {"near": "nothing"}
        if p["layout"] == "heads last":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return normalized(x, weight, eps, program)

    def run(q, k, v, cos, sin, of_q, of_k):
        turned = []
        for x in (one(q, of_q, p["eps"], "q"), one(k, of_k, 2 * p["eps"], "k")):
            half = x.shape[-1] // 2
            turned.append(x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin)
        return ops.sdpa(*turned, v, None, 0.0, False, None, None, REFERENCE)

    return run


def make(p):
    torch.manual_seed(0)
    dim, length = p["dim"], p["length"]
    size = torch.logspace(-0.5, 0.5, length)[:, None]
    q, k, v = (2 * torch.randn(2, h, length, dim) * size for h in (2 * p["groups"], 2, 2))
    one = torch.randn(2, 1, 1, length, dim // 2)
    weights = [0.5 + torch.rand(dim if p["over"] == "head" else x.shape[1] * dim) for x in (q, k)]
    return q, k, v, *torch.cat((one, one), -1).unbind(0), *weights


def check(p):
    inputs = make(p)
    run = build(p)
    want = run(*inputs)
    traced = make_fx(
        torch.func.functionalize(run, remove="mutations"),
        tracing_mode="fake",
        decomposition_table=select_decomp_table(),
    )(*inputs)
    fuse_rope(traced.graph)
    traced.graph.lint()
    traced.recompile()
    torch.testing.assert_close(traced(*inputs), want, rtol=3e-5, atol=3e-5)
    calls = [n for n in traced.graph.nodes if n.target in (ops.rope_sdpa, ops.rope_sdpa_lse)]
    return [(*n.args[EPS_Q : EPS_Q + 2], *n.args[RSTD_Q : RSTD_Q + 2]) for n in calls]


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs())
def test_the_numbers_stay(p):
    ((eps_q, eps_k, *rstd),) = check(p)
    if p["near"] == "nothing" and p["over"] == "head":
        assert (eps_q, eps_k) == (p["eps"], 2 * p["eps"])
    elif p["near"] == "nothing":
        assert eps_q is eps_k is None
        assert None not in rstd


EXAMPLE = {
    "near": "nothing",
    "over": "head",
    "which": "q",
    "squares": "power",
    "root": "rsqrt",
    "weight": "plain",
    "layout": "heads first",
    "dim": 8,
    "length": 4,
    "groups": 2,
    "lane": 3,
    "eps": 1e-6,
}


@pytest.mark.parametrize(
    ("over", "near"),
    [(over, near) for over in ("head", "heads") for near in NEAR if (over, near) != ("heads", "next_head")],
)
def test_every_change_shows_in_the_numbers(over, near):
    """What makes a norm a near-norm changes the output, so that fusing it as one would fail the test above."""
    example = EXAMPLE | {"over": over}
    outputs = [build(example | {"near": which})(*make(example)) for which in ("nothing", near)]
    assert not torch.allclose(*outputs, rtol=1e-2, atol=1e-2)
