"""Applied models under torch.compile: same numbers, right counts, no stale code, no graph per length or layer."""

from __future__ import annotations

import re
import threading

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import lpattn
from lpattn.compile.passes_only import passes_only
from lpattn.eager import compiled as compiled_code

LAYERS = ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def low_calls(model, backend="marked"):
    return {name: layer.low.get(backend, 0) for name, layer in lpattn.attention_report(model).items()}


@pytest.mark.parametrize("how", ["eager", "aot_eager", "inductor"])
def test_fullgraph_equals_eager_and_is_counted(model, x, marked, how):
    lpattn.apply_low_precision_attention(model, "marked")
    expected = model(x)
    compiled = torch.compile(model, backend=how, fullgraph=True)
    for run in (2, 3):
        torch.testing.assert_close(compiled(x), expected)
        assert low_calls(model) == dict.fromkeys(LAYERS, run)


def test_apply_and_remove_after_compiling(model, x, marked, other):
    plain = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain)
    assert lpattn.apply_low_precision_attention(compiled, "marked") is compiled
    assert not torch.allclose(compiled(x), plain)
    assert low_calls(compiled) == dict.fromkeys(LAYERS, 1)
    lpattn.apply_low_precision_attention(compiled, "other")
    compiled(x)
    assert low_calls(compiled, "other") == dict.fromkeys(LAYERS, 1)
    lpattn.remove_low_precision_attention(compiled)
    torch.testing.assert_close(compiled(x), plain)
    assert len(marked.calls) == len(other.calls) == 3


def test_module_compiled_in_place(model, x, marked):
    model.compile(backend="aot_eager", fullgraph=True)
    plain = model(x)
    lpattn.apply_low_precision_attention(model, "marked")
    assert not torch.allclose(model(x), plain)
    lpattn.remove_low_precision_attention(model)
    torch.testing.assert_close(model(x), plain)


def test_one_graph_for_ten_lengths(model, marked):
    lpattn.apply_low_precision_attention(model, "marked")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in range(20, 30):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", ["applied", "called"])
def test_dynamic_sizes_are_compiled_once(how):
    class Attention(torch.nn.Module):
        def forward(self, x):
            if how == "called":
                return lpattn.low_precision_sdpa(x, x, x, backend="bf16_reference")
            return F.scaled_dot_product_attention(x, x, x)

    model, compiled = Attention(), []

    def count(graph, inputs):
        compiled.append(graph)
        return passes_only(graph, inputs)

    if how == "applied":
        lpattn.apply_low_precision_attention(model, "bf16_reference")
    under = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in range(20, 30):
            under(torch.randn(2, 3, length, 16))
    assert len(compiled) == 1


def test_one_graph_for_all_blocks(classes, x, marked):
    """Regional compilation: twelve blocks share one graph, and each counts for itself."""
    model = classes.Model(depth=12).eval()
    lpattn.apply_low_precision_attention(model, "marked")
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    model(x)
    assert counter.frame_count == 1
    assert low_calls(model) == {f"blocks.{i}.attn": 1 for i in range(12)}


def test_blocks_compiled_before_applying(classes, x, marked):
    model = classes.Model().eval()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="aot_eager", fullgraph=True)
    model(x)
    lpattn.apply_low_precision_attention(model, "marked", layers={"blocks.1": "exact"})
    model(x)
    report = lpattn.attention_report(model)
    assert list(report) == LAYERS
    assert report["blocks.1.attn"].exact == {"layer_rule": 1}


def test_the_context_manager_around_compiled_code(model, x, marked):
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    plain = compiled(x)
    for _ in range(2):
        with lpattn.low_precision_attention("marked"):
            assert not torch.allclose(compiled(x), plain)
        torch.testing.assert_close(compiled(x), plain)
    assert len(marked.calls) == 6


def test_functions_inside_of_compiled_code(marked):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def attend(q):
        out, lse = lpattn.low_precision_sdpa(q, q, q, backend="bf16_reference", return_lse=True)
        return out + lpattn.low_precision_sdpa(q, q, q, backend="Marked"), lse

    q = torch.randn(1, 2, 5, 8)
    out, lse = attend(q)
    torch.testing.assert_close(out, 3 * F.scaled_dot_product_attention(q, q, q))
    torch.testing.assert_close(lse, (q @ q.mT / 8**0.5).logsumexp(-1))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"backend": "nope"}, lpattn.UnknownBackendError),
        ({"backend": 3}, lpattn.InvalidArgumentError),
        ({"hadamard": "k_only"}, lpattn.InvalidArgumentError),
        ({"on_unsupported": "ignore"}, lpattn.InvalidArgumentError),
    ],
)
def test_a_wrong_argument_inside_of_compiled_code_is_named(options, error):
    q = torch.randn(1, 2, 8, 16)

    def attention(q):
        return lpattn.low_precision_sdpa(q, q, q, **options)

    with pytest.raises(error) as eager:
        attention(q)
    with pytest.raises(error, match=re.escape(str(eager.value))):
        torch.compile(attention, backend="eager")(q)
    torch._dynamo.reset()
    # What is raised while a whole graph is wanted is Dynamo's, and quotes it.
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{error.__name__}.*{next(iter(options.values()))}"):
        torch.compile(attention, backend="eager", fullgraph=True)(q)


def test_a_wrong_argument_of_a_context_inside_of_compiled_code_is_named():
    q = torch.randn(1, 2, 8, 16)

    def attention(q):
        with lpattn.low_precision_attention("nope"):
            return F.scaled_dot_product_attention(q, q, q)

    with pytest.raises(lpattn.UnknownBackendError, match="unknown backend 'nope'"):
        torch.compile(attention, backend="eager")(q)


def test_rope_function_inside_of_compiled_code():
    q, k, v = (torch.randn(2, 5, h, 8) for h in (4, 2, 2))
    angle = torch.randn(1, 5, 1, 8)

    def attend(q, k, v):
        return lpattn.low_precision_rope_sdpa(q, k, v, angle.cos(), angle.sin(), backend="bf16_reference")

    torch.testing.assert_close(torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v), attend(q, k, v))


def test_training_is_traced_exactly_with_gradients(model, x, marked):
    lpattn.apply_low_precision_attention(model, "marked", on_unsupported="fallback")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.enable_grad():
        compiled(x).sum().backward()
        got = model.blocks[0].attn.qkv.weight.grad.clone()
        model.zero_grad()
        lpattn.remove_low_precision_attention(model)
        model(x).sum().backward()
    torch.testing.assert_close(got, model.blocks[0].attn.qkv.weight.grad)
    assert not marked.calls


def test_autocast_in_the_graph(model, x, marked):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    lpattn.apply_low_precision_attention(model, "marked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(x)
    assert {call.dtype for call in marked.calls} == {torch.bfloat16}


def test_graph_breaks_are_survived(classes, x, marked):
    class Breaking(classes.Model):
        def forward(self, x):
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.head(self.blocks[2](self.blocks[1](x)))

    model = Breaking().eval()
    lpattn.apply_low_precision_attention(model, "marked")
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), expected)
    assert low_calls(model) == dict.fromkeys(LAYERS, 2)


class Breaks(torch.nn.Module):
    """A graph ends in it before it attends."""

    def forward(self, q):
        q = q + 0.5
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, q, q)


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Breaks(), Breaks()

    def forward(self, q):
        return self.b(self.a(q))


@pytest.mark.parametrize("how", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("regional", [False, True])
def test_attention_behind_a_graph_break(marked, how, regional):
    model = lpattn.apply_low_precision_attention(Twice(), "marked")
    q = torch.randn(1, 2, 5, 8)
    expected = model(q)
    for part in (model.a, model.b) if regional else (model,):
        part.compile(backend=how)
    for run in (2, 3):
        torch.testing.assert_close(model(q), expected)
        assert low_calls(model) == {"a": run, "b": run}
    lpattn.remove_low_precision_attention(model)
    assert not torch.allclose(model(q), expected)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class Attribute(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.run = torch.compile(F.scaled_dot_product_attention, backend=how)

    def forward(self, q, k, v):
        return self.run(q, k, v)


class Method(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.run = torch.compile(self.attend, backend=how)

    def attend(self, q, k, v):
        return attend(q, k, v)

    def forward(self, q, k, v):
        return self.run(q, k, v)


class Forward(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.forward = torch.compile(self.forward, backend=how)

    def forward(self, q, k, v):
        return attend(q, k, v)


def decorated(how):
    class Decorated(torch.nn.Module):
        @torch.compile(backend=how)
        def forward(self, q, k, v):
            return attend(q, k, v)

    return Decorated()


attend_apart = torch.compile(attend, backend="aot_eager")


class Named(torch.nn.Module):
    def __init__(self, how=None):
        super().__init__()

    def forward(self, q, k, v):
        return attend_apart(q, k, v)


class Around(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, q, k, v):
        return self.part(q, k, v)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("how", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [Attribute, Method, Forward, decorated, Named])
def test_code_that_is_compiled_by_itself_is_redirected(marked, make, how, around, warm):
    model = Around(make(how)) if around else make(how)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    expected = attend(q, k, v)
    if warm:
        torch.testing.assert_close(model(q, k, v), expected)
    lpattn.apply_low_precision_attention(model, "marked")
    for _ in range(2):
        torch.testing.assert_close(model(q, k, v), 2 * expected)
    assert low_calls(model) == {"part" if around else "": 2}
    lpattn.remove_low_precision_attention(model)
    torch.testing.assert_close(model(q, k, v), expected)


def test_models_share_code_that_is_compiled_by_itself(marked):
    low, reference, exact = Named(), Named(), Named()
    lpattn.apply_low_precision_attention(low, "marked")
    lpattn.apply_low_precision_attention(reference, "bf16_reference")
    q = torch.randn(1, 2, 5, 8)
    expected = attend(q, q, q)
    for _ in range(2):
        for model, factor in ((low, 2), (exact, 1), (reference, 1)):
            torch.testing.assert_close(model(q, q, q), factor * expected)
    assert low_calls(low) == {"": 2}
    assert sum(lpattn.attention_report(reference)[""].exact.values()) == 2


class Unseen(torch.nn.Module):
    """Compiled code where nobody looks for it."""

    def __init__(self):
        super().__init__()
        self.box = [torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="aot_eager")]

    def forward(self, q):
        return self.box[0](q)


def test_compiled_code_that_nobody_saw_is_redirected_from_the_next_run_on(marked, monkeypatch):
    monkeypatch.setattr(compiled_code, "unseen_code", threading.Event())
    q = torch.randn(1, 2, 5, 8)
    expected = F.scaled_dot_product_attention(q, q, q)
    model = lpattn.apply_low_precision_attention(Unseen(), "marked", on_unsupported="fallback")
    with pytest.warns(lpattn.LpattnWarning, match="compiled by itself"):
        torch.testing.assert_close(model(q), expected)
    torch.testing.assert_close(model(q), 2 * expected)
    report = lpattn.attention_report(model)[""]
    assert (report.low, report.exact) == ({"marked": 1}, {"compiled_by_itself": 1})
    another = lpattn.apply_low_precision_attention(Unseen(), "marked")
    torch.testing.assert_close(another(q), 2 * expected)


def test_strict_settings_refuse_compiled_code_that_nobody_saw_once(marked, monkeypatch):
    monkeypatch.setattr(compiled_code, "unseen_code", threading.Event())
    q = torch.randn(1, 2, 5, 8)
    strict = lpattn.apply_low_precision_attention(Unseen(), "marked")
    with pytest.raises(Exception, match="compiled by itself"):  # Dynamo's own, around ours
        strict(q)
    torch.testing.assert_close(strict(q), 2 * F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_untouched_model_says_so_while_it_is_traced(x, dynamic):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    with pytest.warns(lpattn.LpattnWarning, match="none of its attention was intercepted"):
        torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)(x)


def test_every_class_has_a_recompile_limit_of_its_own(classes, x, marked):
    """Dynamo limits recompilations by code object: with one forward for all classes, the ninth class would fail."""
    blocks = []
    for index in range(torch._dynamo.config.recompile_limit + 2):
        namespace = {}
        exec(f"def forward(self, x):\n    return x + self.attn(self.norm(x)) * {index}\n", namespace)
        blocks.append(type(f"Block{index}", (classes.Block,), {"forward": namespace["forward"]})())
    model = torch.nn.Sequential(*blocks).eval()
    expected = model(x)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    for block in blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(x), expected)


class Biased(torch.nn.Module):
    def forward(self, q, k, bias):
        return F.scaled_dot_product_attention(q, k, k, bias)


def biased_in_context(q, k, bias):
    with lpattn.low_precision_attention("marked"):
        return F.scaled_dot_product_attention(q, k, k, bias)


@pytest.mark.parametrize("how", [None, "eager", "inductor"])
@pytest.mark.parametrize("make", [causal_lower_right, causal_upper_left])
def test_a_causal_bias_is_aligned_where_it_says(marked, how, make):
    q, k, bias = torch.randn(1, 4, 5, 16), torch.randn(1, 4, 8, 16), make(5, 8)
    expected = F.scaled_dot_product_attention(q, k, k, bias) * 2.0
    applied = lpattn.apply_low_precision_attention(Biased(), "marked")
    for run in (applied, biased_in_context):
        found = (run if how is None else torch.compile(run, backend=how, fullgraph=True))(q, k, bias)
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, expected)
    assert low_calls(applied) == {"": 1}
    assert len(marked.calls) == 2


def test_a_causal_bias_that_stays_sdpa(marked):
    q, bias = torch.randn(1, 4, 8, 16), causal_upper_left(8, 8)
    model = lpattn.apply_low_precision_attention(Biased(), "marked", on_unsupported="fallback")
    with torch.enable_grad():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(q.requires_grad_(), q, bias)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, bias))
    assert found.requires_grad
    assert not marked.calls
