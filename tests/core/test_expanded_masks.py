"""Masks with a stride of 0 are narrowed: what a backend is told and given, what is remembered, and what is computed."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lpattn
from lpattn import MaskKind, UnsupportedCallError
from lpattn.calls import narrowed_mask
from lpattn.plan import make_plan
from lpattn.settings import Settings

BACKENDS = pytest.mark.parametrize("backend", ["bf16_reference", "fake"])
FULL = (2, 4, 6, 9)
SHAPES = [s for n in range(5) for s in itertools.product(*[(1, f) for f in FULL[4 - n :]])]
"""Every shape of 0 to 4 dimensions that broadcasts to FULL."""


def make_mask(shape, kind="bool"):
    return torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape)


@pytest.fixture
def padding(add_backend):
    """A backend that takes key-padding masks only."""
    return add_backend("padding", masks=frozenset({MaskKind.NONE}), key_padding=True)


# What is narrowed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_expanded_dimensions_become_one_again(shape, kind):
    mask = make_mask(shape, kind)
    expanded = mask.expand(FULL[4 - len(shape) :])
    narrowed = narrowed_mask(expanded)
    assert narrowed.shape == (1,) * (4 - len(shape)) + shape
    assert narrowed.data_ptr() == mask.data_ptr()
    assert torch.equal(narrowed.expand(FULL), expanded.expand(FULL))


def test_a_view_into_a_larger_mask_stays_where_it_is():
    mask = make_mask((4, 1, 1, 20))
    view = mask[1::2, :, :, 5:14]
    assert torch.equal(narrowed_mask(view.expand(2, 4, 6, 9)), view)


def test_equal_values_prove_nothing():
    dense = make_mask((2, 1, 1, 9)).expand(2, 1, 6, 9).contiguous()
    assert narrowed_mask(dense) is dense


@pytest.mark.parametrize(
    ("shape", "expanded", "narrowed"),
    [
        ((2, 1, 1, 0), (2, 4, 6, 0), (2, 1, 1, 0)),
        ((1, 1, 1, 9), (0, 4, 6, 9), (0, 1, 1, 9)),
        ((2, 1, 1, 9), (2, 4, 0, 9), (2, 1, 0, 9)),
        ((), (0,), (1, 1, 1, 0)),
    ],
)
def test_empty_dimensions_stay_empty(shape, expanded, narrowed):
    assert narrowed_mask(make_mask(shape).expand(expanded)).shape == narrowed


# What is computed


@BACKENDS
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1])  # SDPA takes no smaller ones
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_backends_are_told_and_given_the_narrowed_mask(agree, qkv, backend, shape, kind):
    mask = make_mask(shape, kind).expand(FULL[4 - len(shape) :])
    agree(backend, *qkv(kv_len=9), mask)
    if backend == "fake":
        assert agree.fake.calls[0].mask_shape == agree.fake.seen[0].mask.shape == (1,) * (4 - len(shape)) + shape


@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (2, 4, 1, 9), (1, 1, 6, 9), (2, 1, 1, 1)])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_attention_stays_sdpas_own(qkv, shape, kind, dtype):
    mask = make_mask(shape, kind)
    mask = (mask if kind == "bool" else mask.to(dtype)).expand(FULL)
    q, k, v = qkv(kv_len=9, dtype=dtype)
    out = lpattn.low_precision_sdpa(q, k, v, mask, backend="bf16_reference")
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize("shape", [(2, 1, 6, 9), (2, 4, 6, 9), (1, 6, 9), (6, 9)])
def test_key_padding_runs_on_a_backend_that_takes_nothing_else(padding, qkv, shape):
    q, k, v = qkv(kv_len=9)
    keep = make_mask((2, 1, 1, 9) if len(shape) == 4 else (1, 9))
    keep[0] = False
    mask = keep.expand(shape)
    out = lpattn.low_precision_sdpa(q, k, v, mask, backend="padding")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask))
    (call,), (seen,) = padding.calls, padding.seen
    assert call.key_padding
    assert torch.equal(seen.mask, keep[(None,) * (4 - keep.dim())])


def test_key_padding_runs_with_a_fused_rotation(add_backend):
    fake = add_backend(fused_rope=True, masks=frozenset({MaskKind.NONE}), key_padding=True)
    q, k, v = (torch.randn(2, 6, 4, 8) for _ in range(3))
    cos, sin = torch.randn(2, 1, 6, 1, 8)
    mask = make_mask((2, 1, 1, 6)).expand(2, 1, 6, 6)
    out = lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, mask, backend="fake")
    expected = lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, mask.contiguous(), backend="bf16_reference")
    torch.testing.assert_close(out, expected)
    assert fake.calls[0].mask_shape == fake.seen[0].mask.shape == (2, 1, 1, 6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_key_padding_runs_in_a_graph(padding, qkv, dynamic):
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def run(q, k, v, keep):
        mask = keep[:, None, None, :].expand(-1, 1, q.shape[2], -1)
        return lpattn.low_precision_sdpa(q, k, v, mask, backend="padding")

    for length in (6, 7):
        q, k, v = qkv(q_len=length)
        keep = make_mask((2, length))
        expected = F.scaled_dot_product_attention(q, k, v, keep[:, None, None, :])
        torch.testing.assert_close(run(q, k, v, keep), expected)
    torch._dynamo.reset()
    assert [c.mask_shape for c in padding.calls] == [(2, 1, 1, 6), (2, 1, 1, 7)]


def test_autocast_casts_the_narrowed_mask(agree, qkv):
    mask = make_mask((2, 1, 1, 6), "float").expand(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        lpattn.low_precision_sdpa(*qkv(), mask, backend="fake")
        explained = lpattn.explain(*qkv(), mask, backend="fake").call
    (call,), (seen,) = agree.fake.calls, agree.fake.seen
    assert call.mask_shape == explained.mask_shape == seen.mask.shape == (2, 1, 1, 6)
    assert seen.mask.dtype == torch.bfloat16


# What is decided and remembered


def test_explain_knows_key_padding(padding, qkv):
    mask = make_mask((2, 1, 1, 6)).expand(2, 1, 6, 6)
    assert lpattn.explain(*qkv(), mask, backend="padding").choice.backend == "padding"
    (reason,) = lpattn.explain(*qkv(), mask.contiguous(), backend="padding").reasons["padding"]
    assert "bool attn_mask [2, 1, 6, 6]: takes key-padding masks only" in reason.message


@pytest.mark.parametrize("order", [(True, False, True), (False, True, False)])
def test_strides_of_the_mask_are_part_of_what_is_remembered(padding, qkv, order):
    q, k, v = qkv()
    expanded = make_mask((2, 1, 1, 6)).expand(2, 1, 6, 6)
    for is_expanded in order:
        if is_expanded:
            lpattn.low_precision_sdpa(q, k, v, expanded, backend="padding")
        else:
            with pytest.raises(UnsupportedCallError, match="takes key-padding masks only"):
                lpattn.low_precision_sdpa(q, k, v, expanded.contiguous(), backend="padding")
    assert [c.key_padding for c in padding.calls] == [True] * sum(order)


def test_a_mask_that_must_not_be_this_large_is_not_made_to_fit(padding, qkv):
    mask = make_mask((1, 1, 1, 6)).expand(7, 1, 6, 6)
    with pytest.raises(lpattn.InvalidArgumentError, match="must broadcast"):
        lpattn.low_precision_sdpa(*qkv(), mask)
    plan = make_plan(*qkv(), mask, 0.0, False, None, Settings(), False, False)
    assert plan.call is None
    assert plan.choice.exact_reason.code == "shapes"


# Gradients


def test_the_gradient_of_an_expanded_mask_is_sdpas(qkv):
    q, k, v = qkv()
    mask = torch.randn(2, 1, 1, 6).expand(2, 4, 6, 6)
    gradients = []
    for attend in (F.scaled_dot_product_attention, lpattn.low_precision_sdpa):
        leaf = mask.detach().requires_grad_()
        options = {"backend": "bf16_reference"} if attend is lpattn.low_precision_sdpa else {}
        attend(q, k, v, leaf, **options).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_requiring_grad_of_the_mask_is_part_of_what_is_remembered(add_backend, qkv):
    fake = add_backend("trains", backward=True)
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.randn(2, 1, 1, 6).expand(2, 4, 6, 6)
    for requires_grad in (False, True, False):
        lpattn.low_precision_sdpa(q, k, v, mask.detach().requires_grad_(requires_grad), backend="trains")
    shapes = [(2, 1, 1, 6), (2, 4, 6, 6), (2, 1, 1, 6)]
    assert [c.mask_shape for c in fake.calls] == [s.mask.shape for s in fake.seen] == shapes
