"""The functions inside of torch.compile: what is refused in eager mode must not become a silent fallback in a graph."""

import pytest
import torch
import torch.nn.functional as F

import lpattn
from lpattn import UnsupportedCallError


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_named_backend_runs_in_the_graph(add_backend, qkv, return_lse):
    fake = add_backend()
    q, k, v = qkv(kv_len=9, dim_v=5, kv_heads=2)

    @compiled
    def run(q, k, v):
        result = lpattn.low_precision_sdpa(q, k, v, is_causal=True, backend="FAKE", return_lse=return_lse)
        return (result[0] * 2, result[1]) if return_lse else result * 2

    result = run(q, k, v)
    out = result[0] if return_lse else result
    expected = 2 * F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    assert [c.return_lse for c in fake.calls] == [return_lse]


def test_rope_runs_in_the_graph(add_backend, rotation, plain):
    fake = add_backend(fused_rope=True)
    q, k, v = (torch.randn(2, 6, 4, 8) for _ in range(3))
    cos, sin = torch.randn(2, 1, 6, 1, 4)
    run = compiled(lambda *args: lpattn.low_precision_rope_sdpa(*args, interleaved=True, backend="fake"))
    expected, _ = plain(*(rotation(x, cos, sin, True).transpose(1, 2) for x in (q, k)), v.transpose(1, 2))
    torch.testing.assert_close(run(q, k, v, cos, sin), expected.float())
    assert fake.calls[0].rope == lpattn.Rope(True, 4)


def test_no_graph_is_made_per_length(add_backend, qkv):
    fake = add_backend()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    run = torch.compile(
        lambda q, k, v: lpattn.low_precision_sdpa(q, k, v, backend="fake"), backend=count, dynamic=True, fullgraph=True
    )
    for length in (5, 6, 7, 33, 100):
        run(*qkv(q_len=length))
    assert len(graphs) == 1
    assert [c.q_len for c in fake.calls] == [5, 6, 7, 33, 100]


def test_unsupported_calls_raise_when_the_graph_runs(add_backend, qkv):
    add_backend(head_dims=frozenset({64}))
    run = compiled(lambda q, k, v: lpattn.low_precision_sdpa(q, k, v, backend="fake"))
    with pytest.raises(UnsupportedCallError, match="head_dim 8: has kernels for 64"):
        run(*qkv())


REFUSED = {
    "requires_grad": lambda q, k, v: lpattn.low_precision_sdpa(q, k, v, backend="fake"),
    "dropout": lambda q, k, v: lpattn.low_precision_sdpa(q, k, v, dropout_p=0.5, backend="fake"),
    "three_dimensions": lambda q, k, v: lpattn.low_precision_sdpa(q[0], k[0], v[0], backend="fake"),
}


@pytest.mark.parametrize("wrap", [lambda function: function, compiled], ids=["eager", "graph"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_named_backend_never_falls_back_silently(add_backend, qkv, case, wrap):
    add_backend(dropout=False)
    q, k, v = qkv()
    q.requires_grad_(case == "requires_grad")
    with pytest.raises(Exception, match=r"cannot run this attention call|No backend can run this attention call"):
        wrap(REFUSED[case])(q, k, v)


def test_rope_on_inputs_that_require_grad_runs_exactly_in_a_graph():
    q, k, v = (torch.randn(2, 6, 4, 8) for _ in range(3))
    cos, sin = torch.randn(2, 1, 6, 1, 4)
    run = compiled(lambda q: lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, backend="bf16_reference"))
    gradients = []
    for function in (run, lambda q: lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, backend="bf16_reference")):
        leaf = q.clone().requires_grad_()
        function(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
