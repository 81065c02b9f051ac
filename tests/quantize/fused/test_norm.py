"""RMS norm of q and k on the way to e4m3, in front of the rotation."""

from __future__ import annotations

import pytest
import torch

from lpattn.types import HadamardMode, Norm

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def weights(fused, dim: int, *dtypes: torch.dtype) -> list[torch.Tensor]:
    """Weights that differ from lane to lane, and from each other."""
    generator = torch.Generator().manual_seed(dim)
    return [(1 + torch.randn(dim, generator=generator)).to(dtype).to(fused.device) for dtype in dtypes]


def rope_of(fused, q, k, rotary: int, interleaved: bool):
    """Tables of their own for q and k, whose halves differ and which are no rotation."""
    generator = torch.Generator().manual_seed(rotary)
    tables = [torch.randn(x.shape[2], 1, rotary, generator=generator).to(fused.device) for x in (q, q, k, k)]
    return fused.rotation(q, k, tables, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("dim", "rotary", "dtype"), [(64, 64, BF16), (64, 48, F16), (80, 80, F32), (40, 16, F16), (128, 128, F32)]
)
def test_in_front_of_every_kind_of_rotation(fused, dim, rotary, dtype, interleaved) -> None:
    q, k, v = fused.make(q_len=21, kv_len=37, dim=dim, dtype=dtype)
    norm = Norm(1e-6, 1e-5, *weights(fused, dim, dtype, dtype))
    fused.check(q, k, v, rope=rope_of(fused, q, k, rotary, interleaved), norm=norm, with_lse_shift=True)


@pytest.mark.parametrize("dim", [32, 72])
def test_without_a_rotation(fused, dim) -> None:
    q, k, v = fused.make(heads=2, kv_heads=2, dim=dim)
    fused.check(q, k, v, norm=Norm(1e-6, 1e-6, *weights(fused, dim, BF16, BF16)), with_lse_shift=True)


@pytest.mark.parametrize(("eps_q", "eps_k"), [(1e-6, None), (None, 2.0), (0.0, 0.0), (5.0, 0.1)])
@pytest.mark.parametrize("weighted", ["qk", "q", "k", ""])
def test_each_tensor_has_a_norm_of_its_own(fused, eps_q, eps_k, weighted) -> None:
    q, k, v = fused.make(heads=2, q_len=7, kv_len=9, dim=48)
    given = zip(weights(fused, 48, BF16, F32), "qk", (eps_q, eps_k), strict=True)
    norm = Norm(eps_q, eps_k, *(w if name in weighted and eps is not None else None for w, name, eps in given))
    fused.check(q, k, v, rope=rope_of(fused, q, k, 32, False), norm=norm, factor=-1.0)


def test_sizes_of_heads_vanish_and_tokens_stay_apart(fused) -> None:
    """Each token is divided by its own root mean square, whatever lies beside it in the tile."""
    q, k, v = fused.make(heads=4, kv_heads=2, q_len=70, kv_len=300, dim=64)
    q *= torch.logspace(-3, 3, 70, device=q.device)[:, None].to(q.dtype)
    k *= torch.logspace(3, -3, 300, device=k.device)[:, None].to(k.dtype)
    found = fused.check(q, k, v, rope=rope_of(fused, q, k, 64, True), norm=Norm(0.0, 0.0), with_lse_shift=True)
    squares = (found.query.float() * found.q_descale.repeat_interleave(2, 1)[:, None, :, None]).square().mean(-1)
    assert squares.isfinite().all()


@pytest.mark.parametrize("layout", ["sliced", "unaligned", "lanes_first", "one_token"])
def test_inputs_and_weights_in_any_layout(fused, layout) -> None:
    q, k, v = (fused.laid_out(x, layout) for x in fused.make(heads=2, q_len=5, kv_len=5, dim=40))
    of_q, of_k = (torch.stack((w, w.flip(0)), 1)[:, 0] for w in weights(fused, 40, BF16, BF16))
    fused.check(q, k, v, rope=rope_of(fused, q, k, 24, False), norm=Norm(1e-6, 1e-6, of_q, of_k))


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_padding_and_zeros(fused, eps) -> None:
    """Tokens that are not used are zeros whatever eps is; zeros that are used stay zeros where eps is not."""
    q, k, v = fused.make(batch=2, q_len=5, kv_len=150, dim=32)
    used = torch.rand(2, 150, generator=torch.Generator().manual_seed(0)) < 0.6
    k.transpose(1, 2)[~used] = torch.nan
    if eps:
        q[:, :, 2], k[:, :, 3] = 0.0, 0.0
    fused.check(q, k, v, rope=rope_of(fused, q, k, 32, False), norm=Norm(eps, eps), used=used, with_lse_shift=True)


def test_inf_and_nan_spoil_their_token(fused) -> None:
    q, k, v = fused.make(q_len=9, kv_len=9, dim=32, dtype=F16)
    q[0, 0, 2, 1], k[0, 0, 3, 30] = torch.inf, torch.nan
    norm = Norm(1e-6, 1e-6, *weights(fused, 32, F16, F16))
    found = fused.check(q, k, v, norm=norm)
    assert found.key.float().isnan()[0, :, 0].any(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("interleaved", [False, True])
def test_normalized_rotated_and_transformed(fused, interleaved) -> None:
    # In float32, which is not rounded between rotation and transform.
    q, k, v = fused.make(q_len=9, kv_len=300, dtype=F32)
    norm = Norm(1e-6, 1e-6, *weights(fused, 64, F32, F32))
    options = {"rope": rope_of(fused, q, k, 64, interleaved), "hadamard": HadamardMode.QKV}
    fused.check(q, k, v, norm=norm, **options, with_lse_shift=True)


def test_a_norm_over_all_heads_is_refused(fused) -> None:
    q, k, v = fused.make()
    with pytest.raises(ValueError, match="the norm spans heads"):
        fused.check(q, k, v, norm=fused.norm_over_heads(q, k))
