"""The log-sum-exp: natural logarithm, float32, -inf for rows that attend to nothing."""

import pytest
import torch

import lpattn
from lpattn import UnsupportedCallError

REFERENCE = {"backend": "bf16_reference"}
BACKENDS = pytest.mark.parametrize("backend", ["bf16_reference", "fake"])


@BACKENDS
@pytest.mark.parametrize(("causal", "mask"), [(False, None), (True, None), (False, "bool"), (False, "float")])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("scale", [None, 0.0, 0.7])
def test_the_log_sum_exp(add_backend, plain, in_bshd, qkv, backend, causal, mask, kv_heads, scale):
    add_backend()
    q, k, v = qkv(q_len=7, kv_len=5, dim_v=3, kv_heads=kv_heads)
    masks = {None: None, "bool": torch.rand(2, 1, 7, 5) > 0.4, "float": torch.randn(7, 5)}
    if mask == "bool":
        masks[mask][:, :, 2] = False
    out, lse = lpattn.low_precision_sdpa(
        q, k, v, masks[mask], is_causal=causal, scale=scale, backend=backend, return_lse=True
    )
    expected, expected_lse = plain(q, k, v, masks[mask], is_causal=causal, scale=scale)
    assert (lse.dtype, lse.shape) == (torch.float32, (2, 4, 7))
    torch.testing.assert_close(lse, expected_lse.float())
    torch.testing.assert_close(out, expected.float())
    assert in_bshd(out)
    if mask == "bool":
        assert (lse[:, :, 2] == -torch.inf).all()


def test_the_log_sum_exp_over_many_rows(plain, qkv):
    q, k, v = qkv(batch=1, heads=2, q_len=2500, kv_len=2300, dim=4)
    mask = torch.rand(1, 1, 2500, 2300) > 0.5
    for options in ({"is_causal": True}, {"attn_mask": mask}):
        _, lse = lpattn.low_precision_sdpa(q, k, v, **options, **REFERENCE, return_lse=True)
        torch.testing.assert_close(lse, plain(q, k, v, **options)[1].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_log_sum_exp_is_float32(plain, qkv, dtype):
    q, k, v = qkv(dtype=dtype, q_len=33)
    _, lse = lpattn.low_precision_sdpa(q, k, v, **REFERENCE, return_lse=True)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, plain(q, k, v)[1].float(), atol=1e-5, rtol=1e-5)


def test_a_backend_without_log_sum_exp_is_refused(add_backend, qkv):
    add_backend(lse=False)
    with pytest.raises(UnsupportedCallError, match="return_lse: does not return the log-sum-exp"):
        lpattn.low_precision_sdpa(*qkv(), backend="fake", return_lse=True)
