"""The functions inside of torch.compile: what is refused in eager mode must not become a silent fallback in a graph."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

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


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("rope", [False, True])
def test_make_fx_records_the_operator(add_backend, mode, rope):
    """What it records runs at another length, and on what the backend says then."""
    fake = add_backend(fused_rope=True)

    def attend(q, k, v, cos, sin):
        if rope:
            return lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, backend="fake")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return lpattn.low_precision_sdpa(q, k, v, backend="fake")

    def inputs(length):
        return [*(torch.randn(2, length, 4, 8) for _ in range(3)), *torch.randn(2, length, 1, 8)]

    traced = make_fx(attend, tracing_mode=mode)(*inputs(6))
    ours = [node for node in traced.graph.nodes if str(node.target).startswith("lpattn.")]
    assert [str(node.target) for node in ours] == [f"lpattn.{'rope_' if rope else ''}sdpa.default"]
    fake.calls.clear()
    other = inputs(9 if mode == "symbolic" else 6)
    torch.testing.assert_close(traced(*other), attend(*other))
    assert len(fake.calls) == 2


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


def sdpa_of(x):
    q = x.transpose(1, 2)
    return lpattn.low_precision_sdpa(q, q, q, backend="bf16_reference")


def rope_sdpa_of(x):
    # A table without a batch size, of the one length that there is.
    table = torch.ones(7, 1, 16)
    return lpattn.low_precision_rope_sdpa(x, x, x, table, table, backend="bf16_reference")


@pytest.mark.parametrize("attend", [sdpa_of, rope_sdpa_of])
def test_no_graph_is_made_per_batch_size(attend):
    counter = CompileCounter()
    torch._dynamo.reset()
    run = torch.compile(attend, backend=counter, dynamic=True, fullgraph=True)
    for batch in range(2, 7):
        x = torch.randn(batch, 7, 4, 16)
        torch.testing.assert_close(run(x), attend(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("attend", [sdpa_of, rope_sdpa_of])
def test_an_export_keeps_the_batch_size_dynamic(attend, strict):
    class Model(torch.nn.Module):
        def forward(self, x):
            return attend(x)

    x = torch.randn(3, 7, 4, 16)
    exported = torch.export.export(Model(), (x,), dynamic_shapes=({0: Dim("b")},), strict=strict).module()
    for batch in (2, 7):
        x = torch.randn(batch, 7, 4, 16)
        torch.testing.assert_close(exported(x), attend(x))


def test_a_mask_fits_sizes_that_are_fixed_elsewhere():
    """Of q [3, 3, ...] under dynamic=True, one symbol stands for both sizes until the code fixes one of them."""

    def run(q, mask):
        assert q.shape[0] in {3}
        return lpattn.low_precision_sdpa(q, q, q, mask, backend="bf16_reference")

    q, mask = torch.randn(3, 3, 2, 16), torch.randn(3, 1, 1, 1)
    torch._dynamo.reset()
    found = torch.compile(run, backend="eager", dynamic=True, fullgraph=True)(q, mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, mask))


def test_wrong_sizes_are_refused_by_name_where_they_are_dynamic():
    q, mask = torch.randn(3, 3, 2, 16), torch.randn(4, 1, 1, 1)
    torch._dynamo.reset()
    run = torch.compile(lpattn.low_precision_sdpa, backend="eager", dynamic=True, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Observed exception[\s\S]*InvalidArgumentError"):
        run(q, q, q, mask)


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
