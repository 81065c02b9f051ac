"""What is no plain, non-empty [B, H, S, D] tensor: empty inputs, other ranks, subclasses, nested tensors."""

import pytest
import torch
import torch.nn.functional as F

import lpattn
from lpattn import LpattnWarning, UnsupportedCallError

REFERENCE = {"backend": "bf16_reference"}


EMPTY = [{"q_len": 0, "kv_len": 5}, {"q_len": 5, "kv_len": 0}, {"q_len": 0}, {"batch": 0}, {"q_len": 0, "dim_v": 3}]


@pytest.mark.parametrize("shapes", EMPTY)
@pytest.mark.parametrize("settings", [{}, REFERENCE, {"backend": "fake"}])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_empty_inputs_are_quiet_and_follow_sdpa(add_backend, qkv, shapes, settings, kv_heads):
    fake = add_backend()
    q, k, v = qkv(**shapes, kv_heads=kv_heads)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    out = lpattn.low_precision_sdpa(q, k, v, **settings)
    torch.testing.assert_close(out, expected)
    assert not fake.calls


@pytest.mark.parametrize("attn_mask", [None, torch.ones(5, 0, dtype=torch.bool)])
def test_no_keys_give_zeros_in_the_usual_memory(qkv, attn_mask, in_bshd):
    out = lpattn.low_precision_sdpa(*qkv(q_len=5, kv_len=0), attn_mask, **REFERENCE)
    assert out.shape == (2, 4, 5, 8)
    assert out.abs().max() == 0.0
    assert in_bshd(out)


@pytest.mark.parametrize("shapes", EMPTY)
def test_empty_inputs_have_a_log_sum_exp(qkv, shapes, in_bshd):
    q, k, v = qkv(**shapes)
    out, lse = lpattn.low_precision_sdpa(q, k, v, **REFERENCE, return_lse=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    assert in_bshd(out)
    torch.testing.assert_close(lse, torch.full(q.shape[:3], -torch.inf))


@pytest.mark.parametrize("shape", [(6, 8), (2, 6, 8), (2, 3, 4, 6, 8)])
def test_other_ranks_run_on_sdpa_with_a_warning(add_backend, shape):
    fake = add_backend()
    q, k, v = (torch.randn(shape) for _ in range(3))
    with pytest.warns(LpattnWarning, match=r"of (2, 2, 2|3, 3, 3|5, 5, 5) dimensions: lpattn takes \[B, H, S, D\]"):
        out = lpattn.low_precision_sdpa(q, k, v, is_causal=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    with pytest.raises(UnsupportedCallError, match="dimensions"):
        lpattn.low_precision_sdpa(q, k, v, backend="fake")
    assert not fake.calls


def test_other_ranks_are_quiet_where_exact_attention_is_asked_for(qkv):
    q, k, v = (x[0] for x in qkv())
    torch.testing.assert_close(lpattn.low_precision_sdpa(q, k, v, **REFERENCE), F.scaled_dot_product_attention(q, k, v))


class Tagged(torch.Tensor):
    """A tensor subclass that does nothing special."""


def test_tensor_subclasses_run_on_sdpa_with_a_warning(add_backend, qkv):
    fake = add_backend()
    q, k, v = (x.as_subclass(Tagged) for x in qkv())
    with pytest.warns(LpattnWarning, match="Tagged: lpattn takes plain tensors"):
        out = lpattn.low_precision_sdpa(q, k, v)
    assert type(out) is Tagged
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(UnsupportedCallError, match="Tagged"):
        lpattn.low_precision_sdpa(q, k, v, backend="fake")
    assert not fake.calls


@pytest.mark.parametrize(
    "layout",
    [
        torch.jagged,
        torch.strided,
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_run_on_sdpa_with_a_warning(add_backend, layout):
    fake = add_backend()
    parts = [torch.randn(3, 4, 8), torch.randn(5, 4, 8)]
    nested = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
    if layout is torch.strided:
        nested = nested.contiguous()
    with pytest.warns(LpattnWarning, match="nested tensors: lpattn takes plain tensors"):
        out = lpattn.low_precision_sdpa(nested, nested, nested)
    for got, part in zip(out.unbind(), parts, strict=True):
        x = part.transpose(0, 1)[None]
        torch.testing.assert_close(got, F.scaled_dot_product_attention(x, x, x)[0])
    with pytest.raises(UnsupportedCallError, match="nested"):
        lpattn.low_precision_sdpa(nested, nested, nested, backend="fake")
    assert not fake.calls


@pytest.mark.parametrize("heads", [(1, 4, 4), (1, 1, 4), (4, 4, 1), (1, 4, 1)])
def test_heads_that_broadcast_run_on_sdpa_with_a_warning(add_backend, heads):
    fake = add_backend()
    q, k, v = (torch.randn(2, number, 6, 8) for number in heads)
    with pytest.warns(LpattnWarning, match="heads"):
        out = lpattn.low_precision_sdpa(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(UnsupportedCallError, match="heads"):
        lpattn.low_precision_sdpa(q, k, v, backend="fake")
    assert not fake.calls


def test_fewer_kv_heads_are_understood_where_the_batch_broadcasts():
    q, k, v = torch.randn(2, 8, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    expected = F.scaled_dot_product_attention(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), enable_gqa=True)
    torch.testing.assert_close(lpattn.low_precision_sdpa(q, k, v, **REFERENCE), expected)
