"""low_precision_sdpa means what F.scaled_dot_product_attention means, whoever runs it."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import lpattn
from lpattn import CausalKind, MaskKind

REFERENCE = {"backend": "bf16_reference"}
BACKENDS = pytest.mark.parametrize("backend", ["bf16_reference", "fake"])
"""The fake computes the plain formula from the AttentionCall: what it gets wrong, the call says wrong."""


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_dtypes(agree, qkv, backend, dtype, causal):
    agree(backend, *qkv(dtype=dtype), is_causal=causal)


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 7), (7, 1), (5, 9), (9, 5), (64, 65)])
def test_lengths(agree, qkv, backend, q_len, kv_len, causal):
    agree(backend, *qkv(q_len=q_len, kv_len=kv_len), is_causal=causal)
    if backend == "fake":
        (call,) = agree.fake.calls
        assert (call.q_len, call.kv_len) == (q_len, kv_len)
        assert call.causal is (CausalKind.TOP_LEFT if causal else CausalKind.NONE)


@BACKENDS
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("options", [{}, {"enable_gqa": True}])
def test_grouped_heads_with_and_without_enable_gqa(agree, qkv, backend, heads, kv_heads, options):
    agree(backend, *qkv(heads=heads, kv_heads=kv_heads), **options)


@BACKENDS
@pytest.mark.parametrize(("dim", "dim_v"), [(8, 4), (4, 12), (1, 1), (7, 7), (80, 80)])
def test_head_dims(agree, qkv, backend, dim, dim_v):
    agree(backend, *qkv(dim=dim, dim_v=dim_v))


@BACKENDS
@pytest.mark.parametrize("scale", [None, 0.0, 0.5, -0.5, 1, 10.0])
def test_scales(agree, qkv, backend, scale):
    q, k, v = qkv(kv_len=9)
    out = agree(backend, q, k, v, scale=scale)
    if scale == 0.0:
        torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))


@BACKENDS
@pytest.mark.parametrize(
    "shape", [s for n in (2, 3, 4) for s in itertools.product(*[(1, f) for f in (2, 4, 6, 9)[-n:]])]
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_broadcast(agree, qkv, backend, shape, kind):
    mask = torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape)
    agree(backend, *qkv(kv_len=9), mask)
    if backend == "fake":
        assert agree.fake.calls[0].mask is (MaskKind.BOOL if kind == "bool" else MaskKind.ADDITIVE)
        assert agree.fake.calls[0].mask_shape == tuple(agree.fake.seen[0].mask.shape) == (1,) * (4 - len(shape)) + shape


@BACKENDS
def test_additive_masks_with_infinities(agree, qkv, backend):
    mask = torch.randn(6, 9).masked_fill(torch.rand(6, 9) < 0.3, -torch.inf)
    agree(backend, *qkv(kv_len=9), mask)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_additive_masks_of_the_dtype_of_q(agree, qkv, backend, dtype):
    agree(backend, *qkv(dtype=dtype), torch.randn(6, 6, dtype=dtype))


def test_float32_masks_of_float64_inputs(qkv):
    q, k, v = qkv(kv_len=9, dtype=torch.float64)
    mask = torch.randn(2, 1, 6, 9)
    out = lpattn.low_precision_sdpa(q, k, v, mask, backend="bf16_reference")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.3])
def test_causal_calls_with_a_scale_that_is_not_positive(qkv, plain, dtype, scale):
    q, k, v = qkv(dtype=dtype)
    out, lse = lpattn.low_precision_sdpa(
        q, k, v, is_causal=True, scale=scale, backend="bf16_reference", return_lse=True
    )
    expected, expected_lse = plain(q, k, v, is_causal=True, scale=scale)
    torch.testing.assert_close(out.double(), expected, atol=4 * torch.finfo(dtype).eps, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float())


@BACKENDS
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_attend_to_nothing(agree, qkv, backend, kind):
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, :, 2] = False
    mask[1] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    out = agree(backend, *qkv(), mask)
    assert out[1].abs().max() == 0.0


@BACKENDS
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x], -1)[..., ::2],
        lambda x: torch.cat([x, x], 2)[:, :, ::2],
        lambda x: x.flip(3),
        lambda x: x[:, :, :1].expand_as(x),
        lambda x: torch.nn.Parameter(x, requires_grad=False),
    ],
)
def test_memory_layouts(agree, qkv, backend, view):
    q, k, v = (view(x) for x in qkv())
    mask = torch.randn(6, 12)[:, ::2]
    agree(backend, q, k, v, mask)
    agree(backend, q, k, v, is_causal=True)
    if backend == "fake":
        assert agree.fake.calls[0].contiguous_last_dim == (q.stride(3) == 1)


@pytest.mark.parametrize("which", range(3))
def test_each_tensor_counts_for_the_layout(agree, qkv, which):
    tensors = list(qkv())
    tensors[which] = tensors[which].mT.contiguous().mT
    agree("fake", *tensors)
    assert not agree.fake.calls[0].contiguous_last_dim


@pytest.mark.parametrize("which", range(3))
def test_the_layout_is_part_of_what_is_remembered(agree, qkv, which):
    tensors = list(qkv())
    agree("fake", *tensors)
    tensors[which] = tensors[which].mT.contiguous().mT
    agree("fake", *tensors)
    assert [c.contiguous_last_dim for c in agree.fake.calls] == [True, False]


def test_the_memory_of_the_output_does_not_depend_on_the_backend(add_backend, qkv, in_bshd):
    fake = add_backend()
    q, k, v = qkv()
    for layout in (
        lambda x: x,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ):
        plain_attention = type(fake).attention
        fake.attention = lambda *args: layout(plain_attention(fake, *args))  # noqa: B023
        assert in_bshd(lpattn.low_precision_sdpa(q, k, v, backend="fake"))


# Dropout


def test_dropout_of_everything(qkv):
    assert lpattn.low_precision_sdpa(*qkv(), dropout_p=1.0, **REFERENCE).abs().max() == 0.0


def test_dropout_of_one_half(qkv):
    q, k, _ = qkv(batch=16, heads=8, q_len=32)
    v = torch.eye(32).expand(16, 8, 32, 32)
    exact = F.scaled_dot_product_attention(q, k, v)
    out = lpattn.low_precision_sdpa(q, k, v, dropout_p=0.5, **REFERENCE)
    kept = out != 0
    # 131072 coins: six standard deviations are 0.0083.
    assert abs(kept.double().mean() - 0.5) < 0.0083
    torch.testing.assert_close(out[kept], 2 * exact[kept])


def test_dropout_reaches_the_backend(add_backend, qkv):
    fake = add_backend()
    lpattn.low_precision_sdpa(*qkv(), dropout_p=0.25, backend="fake")
    assert fake.calls[0].dropout
    assert fake.seen[0].dropout == 0.25
    lpattn.low_precision_sdpa(*qkv(), backend="fake")
    assert not fake.calls[1].dropout


# The call as a whole


def test_positions_of_the_arguments_are_sdpas(qkv):
    q, k, v = qkv()
    args = (q, k, v, None, 0.0, True, 0.3, False)
    expected = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.3, enable_gqa=False)
    torch.testing.assert_close(lpattn.low_precision_sdpa(*args, **REFERENCE), expected)


def test_the_default_scale_is_exact(add_backend, qkv):
    fake = add_backend()
    lpattn.low_precision_sdpa(*qkv(dim=7), backend="fake")
    assert fake.calls[0].softmax_scale == 1 / math.sqrt(7)


def test_what_the_backend_is_told(add_backend, qkv):
    fake = add_backend()
    q, k, v = qkv(batch=3, heads=6, q_len=5, kv_len=7, dim=8, dim_v=4, kv_heads=2, dtype=torch.bfloat16)
    mask = torch.ones(5, 7, dtype=torch.bool)
    options = {"dropout_p": 0.1, "scale": 0.5, "return_lse": True}
    lpattn.low_precision_sdpa(q, k, v, mask, **options, backend="fake", hadamard="qkv")
    (call,) = fake.calls
    assert call == lpattn.AttentionCall(
        *(3, 6, 2, 5, 7, 8, 4, torch.bfloat16, "cpu"),
        softmax_scale=0.5,
        mask=MaskKind.BOOL,
        mask_shape=(1, 1, 5, 7),
        dropout=True,
        hadamard=lpattn.HadamardMode.QKV,
        return_lse=True,
    )
