"""Constants, descales and data of what is neither rotated, transformed nor masked."""

from __future__ import annotations

import math

import pytest
import torch

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("q_len", "kv_len", "dtype"),
    [(1, 129, BF16), (7, 64, F16), (63, 65, F32), (64, 63, BF16), (65, 7, BF16), (127, 1, F16), (129, 127, F32)],
)
def test_every_length_up_to_a_tile_and_beyond(fused, q_len, kv_len, dtype) -> None:
    fused.check(*fused.make(q_len=q_len, kv_len=kv_len, dtype=dtype), with_lse_shift=q_len % 2 == 1)


@pytest.mark.parametrize(("q_len", "kv_len", "dtype"), [(300, 490, BF16), (700, 300, F32)])
def test_where_only_a_sample_of_q_and_k_is_looked_at(fused, q_len, kv_len, dtype) -> None:
    q, k, v = fused.make(q_len=q_len, kv_len=kv_len, dtype=dtype, dim=24)
    found = fused.check(q, k, v, with_lse_shift=True)
    mean = k[0, 0, list(fused.sampled(kv_len))].double().mean(0)
    assert (found.constants[0][0, 0, :24] - mean).abs().max() <= 1e-6 * k.abs().max()


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(8, F32), (40, BF16), (64, F16), (72, F32), (80, F16), (96, BF16), (128, BF16), (192, F16), (256, F32)],
)
def test_every_head_dim(fused, dim, dtype) -> None:
    fused.check(*fused.make(q_len=17, kv_len=33, dim=dim, dtype=dtype), with_lse_shift=True)


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(2, 4, 2), (1, 3, 1)])
def test_a_descale_and_a_constant_for_each_group_of_heads(fused, batch, heads, kv_heads) -> None:
    q, k, v = fused.make(batch=batch, heads=heads, kv_heads=kv_heads, q_len=20, kv_len=9)
    found = fused.check(q, k, v, with_lse_shift=True)
    if kv_heads > 1:
        assert found.k_descale.unique().numel() > 1


@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.7])
def test_q_times_a_factor(fused, factor) -> None:
    found = fused.check(*fused.make(q_len=300), factor=factor, with_lse_shift=True)
    assert bool(found.query.float().any()) is (factor != 0)


def test_nothing_but_zeros(fused) -> None:
    found = fused.check(*(torch.zeros_like(x) for x in fused.make(q_len=9, kv_len=300)), with_lse_shift=True)
    assert found.q_descale == found.k_descale == 2.0**-56
    assert found.v_descale == 2.0**-126
    assert not any(x.float().any() for x in (found.query, found.key, found.value, *found.constants))


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-15, 1e15, 1e30, 1e36])
def test_tiny_and_huge_magnitudes(fused, size) -> None:
    q, k, v = (x.clamp(-4, 4) * size for x in fused.make(q_len=5, kv_len=7, dtype=F32))
    found = fused.check(q, k, v)
    if size > 1:
        assert found.query.float().abs().max() >= 224


@pytest.mark.parametrize("length", [20, 300])
def test_inf_and_nan_spoil_only_themselves(fused, length) -> None:
    q, k, v = (torch.randn(1, 1, length, 32, dtype=BF16, device=fused.device) for _ in range(3))
    for tensor, x in enumerate((q, k, v)):
        for i, bad in enumerate((math.inf, -math.inf, math.nan)):
            # In the first tile, in the last one, and so often that every sample has some.
            for place, tokens in enumerate((3 + tensor, length - 1 - i, slice(i, None, 4))):
                x[0, 0, tokens, 9 * i + 3 * place + tensor] = bad
    fused.check(q, k, v)


def test_two_runs_are_equal_whatever_was_in_memory(fused, poison) -> None:
    q, k, v = fused.make(heads=2, q_len=33, kv_len=300, dim=24)
    first = fused.check(q, k, v, with_lse_shift=True)
    poison[0] = 0x45
    second = fused.check(q, k, v, with_lse_shift=True)
    for name in ("query", "key", "value", "q_descale", "k_descale", "v_descale", "lse_shift"):
        one, other = (getattr(found, name).contiguous().view(torch.uint8) for found in (first, second))
        assert torch.equal(one, other), name
    for one, other in zip(first.constants, second.constants, strict=True):
        assert torch.equal(one, other)


# V's constant


def test_v_keeps_a_mean_that_is_not_significant(fused) -> None:
    v = torch.randn(1, 4, 90, 32, device=fused.device)
    v[0, 1] += 0.5
    v[0, 2, :, 17] += 1.0
    v[0, 3] = v[0, 3, :1]
    found = fused.check(v[:, :, :1], v, v)
    assert found.constants[1].any(-1).tolist() == [[False, True, True, True]]
    assert found.constants[0].any(-1).all()


def test_so_many_keys_that_v_has_its_exact_mean(fused) -> None:
    q, k, v = (torch.randn(1, 1, length, 16, dtype=F16, device=fused.device) for length in (1, 8300, 8300))
    # A part has several tiles; of the used ones alone, it would have one.
    found = fused.check(q, k, v + 1, used=torch.arange(8300)[None] < 8000)
    assert found.constants[1].any()


def test_fewer_keys_are_sampled(fused) -> None:
    q, k, v = (torch.randn(1, 1, length, 16, dtype=F16, device=fused.device) for length in (1, 8191, 8191))
    found = fused.check(q, k, v + 1)
    constant = found.constants[1].cpu()[0, 0, :16]
    mean = (v + 1).float().cpu().mean((0, 1, 2))
    # 384 of them: within 5 of their mean's standard deviations, but not the mean.
    assert (constant - mean).abs().max() < 5 * 384**-0.5
    assert (constant - mean).abs().max() > 0.1 * 384**-0.5
