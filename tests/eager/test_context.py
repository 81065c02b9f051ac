"""The context manager: scope, nesting, precedence, and the warning when nothing was intercepted."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpattn


@pytest.fixture
def q():
    return torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(3))


def test_calls_inside_are_redirected_and_outside_are_not(q, marked):
    exact = F.scaled_dot_product_attention(q, q, q)
    with lpattn.low_precision_attention("marked"):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), 2 * exact)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), exact)


def test_nested_contexts(q, marked, other):
    exact = F.scaled_dot_product_attention(q, q, q)
    with lpattn.low_precision_attention("marked"):
        with lpattn.low_precision_attention("other"):
            torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), -exact)
        torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), 2 * exact)


def test_the_same_object_can_be_entered_again(q, marked):
    context = lpattn.low_precision_attention("marked")
    with context, context:
        F.scaled_dot_product_attention(q, q, q)
    with context:
        F.scaled_dot_product_attention(q, q, q)
    F.scaled_dot_product_attention(q, q, q)
    assert len(marked.calls) == 2


def test_an_exception_leaves_it(q, marked):
    with pytest.raises(RuntimeError, match="inside"), lpattn.low_precision_attention("marked"):
        raise RuntimeError("inside")
    F.scaled_dot_product_attention(q, q, q)
    assert not marked.calls


def test_other_threads_are_not_concerned(q, marked):
    with lpattn.low_precision_attention("marked"):
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=(q, q, q))
        thread.start()
        thread.join()
    assert not marked.calls


def test_it_is_stronger_than_the_model_and_weaker_than_the_call(model, x, q, marked, other):
    lpattn.apply_low_precision_attention(model, "marked")
    with lpattn.low_precision_attention("other"):
        model(x)
        assert len(other.calls) == 3
        assert not marked.calls
        lpattn.low_precision_sdpa(q, q, q, backend="marked")
    assert len(marked.calls) == 1
    report = lpattn.attention_report(model)
    assert {layer.provenance for layer in report.values()} == {"context manager"}


def test_multihead_attention_inside(marked):
    mha, x = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 5, 32)
    exact = mha(x, x, x, need_weights=False)[0] - mha.out_proj.bias
    with lpattn.low_precision_attention("marked"):
        torch.testing.assert_close(mha(x, x, x, need_weights=False)[0] - mha.out_proj.bias, 2 * exact)


def test_arguments_are_checked_at_once():
    with pytest.raises(lpattn.UnknownBackendError):
        lpattn.low_precision_attention("nonsense")
    with pytest.raises(lpattn.InvalidArgumentError, match="hadamard"):
        lpattn.low_precision_attention("bf16_reference", "qkv")


class NoAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).softmax(-1)


def test_a_model_in_which_nothing_was_intercepted_says_so_once(recwarn):
    model = NoAttention()
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    with pytest.warns(lpattn.LpattnWarning, match="attn_implementation='sdpa'"):
        model(torch.randn(2, 8))
    recwarn.clear()
    model(torch.randn(2, 8))
    assert not recwarn


def test_a_model_with_attention_does_not(model, x, recwarn):
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    model(x)
    assert not recwarn


def test_contexts_may_end_in_any_order(q, marked, other):
    exact = F.scaled_dot_product_attention(q, q, q)
    first, second = lpattn.low_precision_attention("marked"), lpattn.low_precision_attention("other")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), -exact)
    second.__exit__(None, None, None)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), exact)
    assert torch.equal(lpattn.low_precision_sdpa(q, q, q, backend="bf16_reference"), exact)
    assert lpattn.explain(q, q, q).choice.provenance is lpattn.Provenance.AUTOMATIC


def test_an_extra_exit_is_an_error():
    with pytest.raises(lpattn.LpattnError, match="was not entered on this thread"):
        lpattn.low_precision_attention("bf16_reference").__exit__(None, None, None)


def test_a_context_without_a_backend_leaves_it_to_the_outer_one(q, marked):
    with lpattn.low_precision_attention("marked"), lpattn.low_precision_attention(hadamard="qkv"):
        F.scaled_dot_product_attention(q, q, q)
    (call,) = marked.calls
    assert call.hadamard is lpattn.HadamardMode.QKV


def test_as_a_decorator(q, marked):
    @lpattn.low_precision_attention("marked")
    def attend():
        return F.scaled_dot_product_attention(q, q, q)

    attend()
    attend()
    F.scaled_dot_product_attention(q, q, q)
    assert len(marked.calls) == 2


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_inside_of_compiled_code(q, marked, how):
    torch._dynamo.reset()

    @torch.compile(backend=how, fullgraph=True)
    def attend(q):
        with lpattn.low_precision_attention("marked"):
            return F.scaled_dot_product_attention(q, q, q)

    torch.testing.assert_close(attend(q), 2 * F.scaled_dot_product_attention(q, q, q))


def test_the_warning_points_at_the_users_line(model, x):
    lpattn.apply_low_precision_attention(model)
    with pytest.warns(lpattn.LpattnWarning) as caught:
        model(x)
    assert caught[0].filename.endswith("conftest.py")  # where the model calls SDPA


def test_a_tensor_for_a_number_is_read_at_every_call(q, marked):
    scale, dropout_p = torch.tensor(0.1), torch.tensor(0.0)
    with lpattn.low_precision_attention("marked", on_unsupported="fallback"):
        F.scaled_dot_product_attention(q, q, q, scale=scale, dropout_p=dropout_p)
        scale.fill_(5.0)
        sharper = F.scaled_dot_product_attention(q, q, q, scale=scale, dropout_p=dropout_p)
        dropout_p.fill_(1.0)
        with pytest.warns(lpattn.LpattnWarning, match="dropout"):
            dropped = F.scaled_dot_product_attention(q, q, q, scale=scale, dropout_p=dropout_p)
    torch.testing.assert_close(sharper, 2 * F.scaled_dot_product_attention(q, q, q, scale=5.0))
    assert not dropped.any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_compiled_encoder_layer_is_redirected(marked, padded, norm_first):
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first).eval()
    x, padding = torch.randn(2, 10, 32), torch.arange(10) >= torch.tensor([10, 6])[:, None]
    options = {"src_key_padding_mask": padding} if padded else {}
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        exact = compiled(x, **options)
        with lpattn.low_precision_attention("marked"):
            low, eager = compiled(x, **options), layer(x, **options)
        torch.testing.assert_close(low, eager)
        assert not torch.allclose(low, exact)
        torch.testing.assert_close(compiled(x, **options), exact)
