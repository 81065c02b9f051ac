"""The pass over the output: V's constant added, its transform undone, cast to the caller's dtype."""

from __future__ import annotations

import pytest
import torch

from lpattn.quantize import hadamard_transform
from lpattn.types import HadamardMode

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
PAIRS = [(BF16, BF16), (BF16, F16), (BF16, F32), (F16, F16), (F32, F16), (F32, BF16)]


def restored(fused, out: torch.Tensor, quantized, dtype: torch.dtype) -> torch.Tensor:
    """The same in plain PyTorch."""
    dim, group = out.shape[-1], out.shape[2] // quantized.constants[1].shape[1]
    want = out.float() + quantized.constants[1][..., :dim].repeat_interleave(group, 1)[:, None]
    if quantized.hadamard is not HadamardMode.NONE:
        want = hadamard_transform(want.to(out.dtype).float())
    if dtype == F16:
        want = want.clamp(-65504, 65504)
    if fused.interpreted and dtype == BF16:
        want = (want.view(torch.int32) & -(2**16)).view(F32)  # the interpreter does not round, it cuts off
    return want.to(dtype)


def attention_output(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)


@pytest.fixture(scope="module")
def grouped(fused):
    """Two batch entries of two groups of two heads, the V of one group far beyond float16's range."""
    q, k, v = fused.make(batch=2, heads=4, kv_heads=2, q_len=1, kv_len=3, dim=16)
    quantized = fused.quantize_per_head(q, k, v * torch.tensor([1.0, 1e6]).view(2, 1, 1).to(v) + 1)
    assert quantized.constants[1].any(-1).all()
    return quantized


@pytest.mark.parametrize(("dtype", "to"), PAIRS)
def test_the_constant_of_the_group_is_added(fused, grouped, dtype, to) -> None:
    quantized = grouped
    out = attention_output(2, 5, 4, 16, dtype=dtype, device=fused.device)
    want = restored(fused, out, quantized, to)
    assert to != F16 or (want.abs() == 65504).any()
    found = fused.restore_output(out, quantized, to)
    assert (found.dtype, found.shape) == (to, out.shape)
    assert found.is_contiguous()
    assert (found.data_ptr() == out.data_ptr()) is (dtype == to)
    assert torch.equal(found, want)


@pytest.mark.parametrize(("q_len", "dim"), [(1, 40), (63, 64), (65, 80), (130, 16), (66, 128)])
def test_every_length_and_head_dim(fused, q_len, dim) -> None:
    q, k, v = fused.make(heads=2, q_len=1, kv_len=9, dim=dim)
    quantized = fused.quantize_per_head(q, k, v + 3)
    out = attention_output(1, q_len, 2, dim, dtype=BF16, device=fused.device)
    want = restored(fused, out, quantized, F32)
    assert torch.equal(fused.restore_output(out, quantized, F32), want)


def test_where_there_is_nothing_to_add_nothing_is_written(fused) -> None:
    v = torch.randn(1, 2, 40, 32, device=fused.device)
    v -= v.mean(2, keepdim=True)
    v[0, 1] += 3
    quantized = fused.quantize_per_head(v[:, :, :1], v, v)
    assert quantized.constants[1].any(-1).tolist() == [[False, True]]
    # Adding 0 to it makes it 0.
    out = torch.full((1, 70, 2, 32), -0.0, dtype=BF16, device=fused.device)
    found = fused.restore_output(out, quantized, BF16)
    assert found.signbit()[:, :, 0].all()
    assert (found[:, :, 1] > 2).all()
    assert torch.equal(fused.restore_output(out, quantized, F32)[:, :, 0], torch.zeros(1, 70, 32, device=fused.device))


@pytest.mark.parametrize(("dtype", "to"), [(F16, F16), (F32, F32), (F32, BF16), (F16, F32), (BF16, BF16)])
def test_the_transform_is_undone(fused, dtype, to) -> None:
    if dtype not in fused.hadamard_dtypes:
        pytest.skip("Triton's interpreter multiplies matrices of bfloat16 wrongly: a GPU runs this")
    q, k, v = fused.make(heads=2, kv_heads=2, q_len=1, kv_len=40, dtype=F16)
    v = v / v.abs().amax((2, 3), keepdim=True) + 0.5
    quantized = fused.quantize_per_head(q, k, v, hadamard=HadamardMode.V_ONLY)
    # Attention of one key each.
    out = quantized.value.float() * quantized.v_descale[:, None, :, None]
    out = out.to(dtype).contiguous()
    want = restored(fused, out, quantized, to).float()
    found = fused.restore_output(out, quantized, to).float()
    # 64 terms in another order: 8 is the square root of their number.
    assert (found - want).abs().max() <= 8 * torch.finfo(to).eps * want.abs().max()
    error = found - v.transpose(1, 2).float()
    assert error.square().mean().sqrt() < 0.04 * v.float().std()


def test_inf_and_nan_stay(fused) -> None:
    q, k, v = fused.make(q_len=1, kv_len=9, dim=16)
    quantized = fused.quantize_per_head(q, k, v + 3)
    out = attention_output(1, 4, 1, 16, dtype=F32, device=fused.device)
    out[0, 1, 0, 3], out[0, 2, 0, 4] = torch.nan, torch.inf
    want = restored(fused, out, quantized, F32)
    assert torch.equal(fused.restore_output(out, quantized, F32).nan_to_num(7.0), want.nan_to_num(7.0))
