"""low_precision_rope_sdpa: rotate q and k by the plain formula, then attend."""

import pytest
import torch

import lpattn
from lpattn import LpattnWarning, Rope, UnsupportedCallError

BACKENDS = pytest.mark.parametrize("backend", ["bf16_reference", "plain", "fused"])
"""The reference, a backend without a rotation, and one with."""


@pytest.fixture
def backends(add_backend):
    made = {"plain": add_backend("plain", rank=0.5), "fused": add_backend("fused", rank=0.5, fused_rope=True)}
    made["bf16_reference"] = None
    return made


@pytest.fixture
def agree(backends, plain, rotation, in_bshd):
    """Run a call on a backend and compare with the formula in float64."""

    def check(backend, q, k, v, cos, sin, *, interleaved=False, cos_k=None, sin_k=None, **options):
        tensors = [t for t in (q, k, v, cos, sin, cos_k, sin_k) if t is not None]
        copies = [t.clone() for t in tensors]
        tables = {"interleaved": interleaved, "cos_k": cos_k, "sin_k": sin_k}
        out = lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, **tables, **options, backend=backend)
        rotated_q = rotation(q, cos, sin, interleaved)
        rotated_k = rotation(k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved)
        options = {name: value for name, value in options.items() if name != "enable_gqa"}
        expected, _ = plain(rotated_q.transpose(1, 2), rotated_k.transpose(1, 2), v.transpose(1, 2), **options)
        torch.testing.assert_close(out, expected.to(q.dtype), atol=2e-5, rtol=2e-5)
        assert in_bshd(out)
        assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))
        if backend != "bf16_reference":
            (call,) = backends[backend].calls
            assert call.rope == (Rope(interleaved, cos.shape[-1]) if backend == "fused" else None)
        return out

    torch.manual_seed(0)
    return check


def bshd(batch=2, q_len=6, kv_len=None, heads=4, kv_heads=None, dim=8, dim_v=None):
    kv_len, kv_heads = q_len if kv_len is None else kv_len, kv_heads or heads
    shapes = [(batch, q_len, heads, dim), (batch, kv_len, kv_heads, dim), (batch, kv_len, kv_heads, dim_v or dim)]
    return [torch.randn(shape) for shape in shapes]


def tables(*shape):
    """cos and sin without any of the properties that a real one has: halves differ, cos^2 + sin^2 is not 1."""
    return torch.randn(shape), torch.randn(shape)


@BACKENDS
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 4, 6, 8])
def test_pairs_and_partial_rotation(agree, backend, interleaved, rotary_dim):
    agree(backend, *bshd(), *tables(1, 6, 1, rotary_dim), interleaved=interleaved)


@BACKENDS
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 6, 1, 8), (2, 6, 1, 8), (1, 6, 4, 8), (2, 6, 4, 8), (6, 1, 8), (6, 4, 8), (1, 1, 1, 8), (1, 1, 8)]
)
def test_tables_of_every_broadcast(agree, backend, interleaved, shape):
    agree(backend, *bshd(), *tables(*shape), interleaved=interleaved)


@BACKENDS
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, :, :, :1].expand_as(t),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], -1)[..., ::2],
        lambda t: t[:1].expand_as(t),
        lambda t: t.double(),
    ],
)
def test_tables_of_any_strides_and_dtype(agree, backend, view):
    cos, sin = tables(2, 6, 4, 8)
    agree(backend, *bshd(), view(cos), view(sin))


@BACKENDS
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kv_len", [6, 9])
def test_keys_with_positions_of_their_own(agree, backend, interleaved, kv_len):
    cos_k, sin_k = tables(2, kv_len, 1, 6)
    q, k, v = bshd(kv_len=kv_len)
    agree(backend, q, k, v, *tables(2, 6, 1, 6), cos_k=cos_k, sin_k=sin_k, interleaved=interleaved)


@BACKENDS
@pytest.mark.parametrize("options", [{}, {"enable_gqa": True}])
def test_grouped_heads_causal_scale_and_dim_v(agree, backend, options):
    agree(backend, *bshd(kv_heads=2, dim_v=5), *tables(1, 6, 1, 8), is_causal=True, scale=0.3, **options)


@BACKENDS
def test_rectangular_causal_is_top_left_aligned(agree, backend):
    cos_k, sin_k = tables(1, 9, 1, 8)
    agree(backend, *bshd(kv_len=9), *tables(1, 6, 1, 8), cos_k=cos_k, sin_k=sin_k, is_causal=True)


@BACKENDS
@pytest.mark.parametrize("mask", [torch.rand(6, 6) > 0.4, torch.randn(2, 1, 1, 6), torch.randn(4, 6, 6)])
def test_masks(agree, backend, mask):
    agree(backend, *bshd(), *tables(1, 6, 1, 8), attn_mask=mask)


@BACKENDS
def test_inputs_of_any_strides(agree, backend):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in bshd())
    agree(backend, q, k.mT.contiguous().mT, v.flip(3), *tables(1, 6, 1, 8))


def test_what_a_fused_backend_is_given(backends):
    q, k, v = bshd(kv_len=9, kv_heads=2)
    (cos, sin), (cos_k, sin_k) = tables(1, 6, 1, 4), tables(1, 9, 1, 4)
    lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, cos_k=cos_k, sin_k=sin_k, interleaved=True, backend="fused")
    fused = backends["fused"]
    assert [t is u for t, u in zip(fused.tables[0], (cos, sin, cos_k, sin_k), strict=True)] == [True] * 4
    (call,) = fused.calls
    assert call.rope == Rope(interleaved=True, rotary_dim=4)
    assert (call.batch, call.num_heads, call.num_kv_heads, call.q_len, call.kv_len) == (2, 4, 2, 6, 9)


def test_the_rotation_is_part_of_what_is_remembered(backends):
    q, k, v = bshd()
    for interleaved, rotary_dim in ((False, 8), (True, 8), (True, 4)):
        lpattn.low_precision_rope_sdpa(q, k, v, *tables(1, 6, 1, rotary_dim), interleaved=interleaved, backend="fused")
    lpattn.low_precision_sdpa(*(x.transpose(1, 2) for x in (q, k, v)), backend="fused")
    assert [c.rope for c in backends["fused"].calls] == [Rope(False, 8), Rope(True, 8), Rope(True, 4), None]


@BACKENDS
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_log_sum_exp(backends, plain, rotation, backend, interleaved):
    q, k, v = bshd(kv_heads=1)
    cos, sin = tables(1, 6, 1, 4)
    out, lse = lpattn.low_precision_rope_sdpa(
        q, k, v, cos, sin, interleaved=interleaved, is_causal=True, backend=backend, return_lse=True
    )
    rotated = (rotation(x, cos, sin, interleaved).transpose(1, 2) for x in (q, k))
    expected, expected_lse = plain(*rotated, v.transpose(1, 2), is_causal=True)
    torch.testing.assert_close(out, expected.float())
    torch.testing.assert_close(lse, expected_lse.float())


@BACKENDS
def test_half_precision_is_rounded_once(backends, plain, rotation, backend):
    torch.manual_seed(0)
    q, k, v = (x.bfloat16() for x in bshd(q_len=32))
    cos, sin = tables(1, 32, 1, 8)
    out = lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, backend=backend)
    assert out.dtype == torch.bfloat16
    rounded = [rotation(x, cos, sin, False).bfloat16().transpose(1, 2) for x in (q, k)]
    expected, _ = plain(*rounded, v.transpose(1, 2))
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


@BACKENDS
def test_autocast(backends, plain, rotation, backend):
    torch.manual_seed(0)
    q, k, v = bshd()
    cos, sin = tables(1, 6, 1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, backend=backend)
    assert out.dtype == torch.bfloat16
    expected, _ = plain(*(rotation(x, cos, sin, False).transpose(1, 2) for x in (q, k)), v.transpose(1, 2))
    torch.testing.assert_close(out.double(), expected, atol=5e-2, rtol=5e-2)
    if backend != "bf16_reference":
        assert backends[backend].calls[0].dtype == torch.bfloat16
        assert not backends[backend].seen[0].autocast


def test_the_report_says_who_rotated(backends):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, cos, sin, backend):
            return lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, backend=backend)

    model = torch.nn.Sequential()
    model.attn = Attention()
    lpattn.apply_low_precision_attention(model)
    for backend, rope in (("fused", "fused"), ("plain", "plain has no fused rotation")):
        model.attn(*bshd(), *tables(1, 6, 1, 8), backend)
        report = lpattn.attention_report(model)["attn"]
        assert (report.low[backend], report.rope) == (1, rope)


def test_a_call_that_cannot_run_falls_back_or_raises(add_backend, plain, rotation):
    fake = add_backend(fused_rope=True, head_dims=frozenset({64}))
    q, k, v = bshd()
    cos, sin = tables(1, 6, 1, 4)
    with pytest.raises(UnsupportedCallError, match=r"head_dim 8") as caught:
        lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, backend="fake")
    assert "rope half-split on 4 lanes" in str(caught.value)
    with pytest.warns(LpattnWarning, match="head_dim 8"):
        out = lpattn.low_precision_rope_sdpa(q, k, v, cos, sin)
    expected, _ = plain(*(rotation(x, cos, sin, False).transpose(1, 2) for x in (q, k)), v.transpose(1, 2))
    torch.testing.assert_close(out, expected.float())
    assert not fake.calls


@pytest.mark.parametrize("which", ["q", "k", "v", "cos", "sin"])
def test_what_requires_grad_is_not_detached(add_backend, which):
    fake = add_backend(fused_rope=True)
    names = ("q", "k", "v", "cos", "sin")
    tensors = dict(zip(names, (*bshd(), *tables(1, 6, 1, 8)), strict=True))
    tensors[which].requires_grad_()
    with pytest.warns(LpattnWarning, match="require grad"):
        out = lpattn.low_precision_rope_sdpa(*tensors.values())
    out.sum().backward()
    assert tensors[which].grad.abs().max() > 0
    with pytest.raises(UnsupportedCallError, match="require grad"):
        lpattn.low_precision_rope_sdpa(*tensors.values(), backend="fake")
    assert not fake.calls


EMPTY = [(0, 5, 2), (5, 0, 2), (5, 5, 0)]


def attend_to_nothing(q_len, kv_len, batch, kv_heads, **options):
    q, k, v = bshd(batch=batch, q_len=q_len, kv_len=kv_len, kv_heads=kv_heads, dim_v=3)
    (cos, sin), (cos_k, sin_k) = tables(1, q_len, 1, 8), tables(1, kv_len, 1, 8)
    return lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, cos_k=cos_k, sin_k=sin_k, **options)


@pytest.mark.parametrize(("q_len", "kv_len", "batch"), EMPTY)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_empty_inputs(add_backend, q_len, kv_len, batch, kv_heads):
    fake = add_backend(fused_rope=True)
    out = attend_to_nothing(q_len, kv_len, batch, kv_heads)
    torch.testing.assert_close(out, torch.zeros(batch, 4, q_len, 3))
    assert not fake.calls


def test_no_keys_give_zeros_in_the_usual_memory(in_bshd):
    assert in_bshd(attend_to_nothing(5, 0, 2, 4, backend="bf16_reference"))


@pytest.mark.parametrize(("q_len", "kv_len", "batch"), EMPTY)
def test_empty_inputs_have_a_log_sum_exp(q_len, kv_len, batch):
    result = attend_to_nothing(q_len, kv_len, batch, 4, backend="bf16_reference", return_lse=True)
    assert isinstance(result, tuple)
    out, lse = result
    torch.testing.assert_close(out, torch.zeros(batch, 4, q_len, 3))
    torch.testing.assert_close(lse, torch.full((batch, 4, q_len), -torch.inf))
