"""Under autocast, and with inputs that require grad."""

import pytest
import torch
import torch.nn.functional as F

import lpattn
from lpattn import LpattnWarning, UnsupportedCallError

REFERENCE = {"backend": "bf16_reference"}
BACKENDS = pytest.mark.parametrize("backend", ["bf16_reference", "fake"])

# Autocast


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_autocast_is_sdpas(agree, qkv, backend, dtype, mask):
    masks = {None: None, "bool": torch.rand(6, 6) > 0.3, "float": torch.randn(6, 6)}
    q, k, v = qkv()
    with torch.autocast("cpu", dtype):
        expected = F.scaled_dot_product_attention(q, k, v, masks[mask])
        out = lpattn.low_precision_sdpa(q, k, v, masks[mask], backend=backend)
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, atol=agree.tolerance[dtype], rtol=agree.tolerance[dtype])
    if backend == "bf16_reference":
        assert torch.equal(out, expected)
    else:
        (call,), (seen,) = agree.fake.calls, agree.fake.seen
        assert call.dtype == seen.q.dtype == seen.k.dtype == seen.v.dtype == dtype
        assert not seen.autocast
        assert mask != "float" or seen.mask.dtype == dtype


def test_autocast_leaves_float64_alone(agree, qkv):
    with torch.autocast("cpu", torch.bfloat16):
        out = agree("bf16_reference", *qkv(dtype=torch.float64))
    assert out.dtype == torch.float64


def test_autocast_unites_dtypes(qkv):
    q, k, v = qkv()
    k, v = k.bfloat16(), v.half()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v)
        assert torch.equal(lpattn.low_precision_sdpa(q, k, v, **REFERENCE), expected)


def test_autocast_is_part_of_what_is_remembered(agree, qkv):
    q, k, v = qkv()
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = lpattn.low_precision_sdpa(q, k, v, backend="fake")
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
    assert [c.dtype for c in agree.fake.calls] == [torch.float32, torch.bfloat16, torch.float32]


# Gradients


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_inputs_that_require_grad_run_exactly_and_have_gradients(agree, qkv, which, autocast):
    def gradients(attend):
        tensors = list(qkv())
        torch.manual_seed(1)
        weight = torch.randn(2, 4, 6, 8)
        for index in which:
            tensors[index].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attend(*tensors)
        (out * weight).sum().backward()
        return [out.detach(), *(tensors[index].grad for index in which)]

    torch.manual_seed(0)
    expected = gradients(F.scaled_dot_product_attention)
    torch.manual_seed(0)
    with pytest.warns(LpattnWarning, match="fake: inputs require grad: has no backward pass") as caught:
        got = gradients(lpattn.low_precision_sdpa)
    assert len(caught) == 1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not agree.fake.calls


@pytest.mark.parametrize("which", range(3))
def test_a_named_backend_refuses_inputs_that_require_grad(agree, qkv, which):
    tensors = list(qkv())
    tensors[which].requires_grad_()
    with pytest.raises(UnsupportedCallError, match=r"fake +inputs require grad.*torch\.inference_mode"):
        lpattn.low_precision_sdpa(*tensors, backend="fake")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            lpattn.low_precision_sdpa(*tensors, backend="fake")
    assert len(agree.fake.calls) == 2


def test_a_backend_with_a_backward_pass_runs(add_backend, qkv):
    fake = add_backend("trains", rank=3.0, backward=True)
    q, k, v = qkv()
    leaf, other = q.clone().requires_grad_(), q.clone().requires_grad_()
    lpattn.low_precision_sdpa(leaf, k, v).square().sum().backward()
    F.scaled_dot_product_attention(other, k, v).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    assert fake.calls[0].requires_grad


def test_requiring_grad_is_part_of_what_is_remembered(agree, qkv):
    q, k, v = qkv()
    lpattn.low_precision_sdpa(q, k, v)
    with pytest.warns(LpattnWarning, match="require grad"):
        assert lpattn.low_precision_sdpa(q.clone().requires_grad_(), k, v).requires_grad
    lpattn.low_precision_sdpa(q, k, v)
    assert len(agree.fake.calls) == 2


def test_the_reference_has_gradients_and_is_quiet(qkv):
    q, k, v = qkv()
    out = lpattn.low_precision_sdpa(q.requires_grad_(), k, v, **REFERENCE)
    out.sum().backward()
    assert q.grad is not None


def test_a_mask_that_requires_grad_is_not_detached(agree, qkv):
    bias = torch.randn(6, 6, requires_grad=True)
    with pytest.warns(LpattnWarning, match="require grad"):
        out = lpattn.low_precision_sdpa(*qkv(), bias)
    assert out.requires_grad
    with pytest.raises(UnsupportedCallError, match="require grad"):
        lpattn.low_precision_sdpa(*qkv(), bias, backend="fake")
    assert not agree.fake.calls
