"""Rotation and Hadamard transform on the way to e4m3."""

from __future__ import annotations

import pytest
import torch

from lpattn.types import HadamardMode

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def tables(fused, *shape: int, count: int = 2, dtype=F32) -> list[torch.Tensor]:
    """cos and sin whose halves differ and which are no rotation."""
    generator = torch.Generator().manual_seed(len(shape))
    return [torch.randn(*shape, generator=generator).to(dtype).to(fused.device) for _ in range(count)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("dim", "rotary", "dtype"), [(64, 64, BF16), (64, 48, F16), (80, 80, F32), (40, 16, F16), (128, 2, BF16)]
)
def test_whole_and_partial_rotation(fused, dim, rotary, dtype, interleaved) -> None:
    q, k, v = fused.make(q_len=21, kv_len=21, dim=dim, dtype=dtype)
    rope = fused.rotation(q, k, tables(fused, 21, 1, rotary), interleaved)
    fused.check(q, k, v, rope=rope, with_lse_shift=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_of_their_own_for_every_batch_entry_and_head(fused, interleaved) -> None:
    q, k, v = fused.make(batch=2, heads=2, kv_heads=2, q_len=5, kv_len=7, dim=32)
    rope = fused.rotation(q, k, [*tables(fused, 2, 5, 2, 32), *tables(fused, 2, 7, 2, 32)], interleaved)
    fused.check(q, k, v, rope=rope, factor=-1.0)


@pytest.mark.parametrize(
    ("name", "interleaved"),
    [
        *(("per_entry", False), ("every_other_lane", True), ("transposed", False)),
        *(("one_angle", True), ("unequal_strides", False), ("half_precision", False)),
    ],
)
def test_tables_in_any_layout(fused, name, interleaved) -> None:
    q, k, v = fused.make(batch=2 if name == "per_entry" else 1, q_len=9, kv_len=9, dim=32, dtype=F16)
    cos, sin = {
        "per_entry": lambda: tables(fused, 2, 9, 1, 32),
        "every_other_lane": lambda: [x[..., ::2] for x in tables(fused, 9, 1, 64)],
        "transposed": lambda: [x.mT[:, None] for x in tables(fused, 32, 9)],
        "one_angle": lambda: [x.expand(9, 1, 32) for x in tables(fused, 9, 1, 1)],
        "unequal_strides": lambda: [tables(fused, 9, 1, 32)[0], tables(fused, 32, 9)[0].mT[:, None]],
        "half_precision": lambda: tables(fused, 9, 1, 32, dtype=F16),
    }[name]()
    fused.check(q, k, v, rope=fused.rotation(q, k, (cos, sin), interleaved))


def test_keys_at_other_positions_than_queries(fused) -> None:
    q, k, v = fused.make(q_len=3, kv_len=70)
    rope = fused.rotation(q, k, [*tables(fused, 3, 1, 64), *tables(fused, 70, 1, 64)])
    fused.check(q, k, v, rope=rope, with_lse_shift=True)


@pytest.mark.parametrize("layout", ["sliced", "unaligned", "lanes_first"])
def test_rotated_inputs_in_any_layout(fused, layout) -> None:
    q, k, v = (fused.laid_out(x, layout) for x in fused.make(heads=2, q_len=5, kv_len=5, dim=40))
    fused.check(q, k, v, rope=fused.rotation(q, k, tables(fused, 5, 1, 24)))


@pytest.mark.parametrize("mode", [HadamardMode.V_ONLY, HadamardMode.QKV])
@pytest.mark.parametrize(("dim", "dtype"), [(32, F32), (64, F16), (128, F32), (256, F16), (64, BF16)])
def test_hadamard_transform(fused, mode, dim, dtype) -> None:
    if dtype not in fused.hadamard_dtypes:
        pytest.skip("Triton's interpreter multiplies matrices of bfloat16 wrongly: a GPU runs this")
    q, k, v = fused.make(q_len=19, kv_len=23, dim=dim, dtype=dtype)
    # Outlier channels, which the transform is for.
    q[..., 3], k[..., 5], v[..., dim - 1] = 30.0, 40.0, 50.0
    fused.check(q, k, v, hadamard=mode, with_lse_shift=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_then_transformed(fused, interleaved) -> None:
    q, k, v = fused.make(q_len=9, kv_len=9, dtype=F16)
    rope = fused.rotation(q, k, tables(fused, 9, 1, 64), interleaved)
    fused.check(q, k, v, rope=rope, hadamard=HadamardMode.QKV, with_lse_shift=True)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("interleaved", [False, True])
def test_lanes_that_do_not_turn_are_left_alone(fused, interleaved, bad) -> None:
    q, k, v = fused.make(dim=64)
    q[0, 0, 3, 41], k[0, 0, 5, 62] = bad, bad
    found = fused.check(q, k, v, rope=fused.rotation(q, k, fused.tables(1, 65, 1, 40, 65, 1), interleaved))
    for data in (found.query, found.key):
        assert data.float().isnan().sum() == 1


def test_inf_spoils_what_it_is_mixed_with(fused) -> None:
    q, k, v = (torch.randn(1, 1, 9, 32, dtype=F16, device=fused.device) for _ in range(3))
    q[0, 0, 2, 1], k[0, 0, 3, 30], v[0, 0, 4, 9] = torch.inf, torch.nan, -torch.inf
    fused.check(q, k, v, rope=fused.rotation(q, k, tables(fused, 9, 1, 32)))
    fused.check(q, k, v, hadamard=HadamardMode.QKV)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("length", [129, 200, 256])
def test_both_parts_of_a_rotated_sample_count(fused, length, last) -> None:
    """All tokens are looked at, in two parts: constants and scales are known exactly."""
    q, k, v = fused.make(heads=2, kv_heads=2, q_len=length, kv_len=length, dim=32)
    q[:, :, -1 if last else 0] *= 50.0
    k[:, :, -1 if last else 0] *= 50.0
    fused.check(q, k, v, rope=fused.rotation(q, k, fused.tables(1, length, 1, 32, length, 1)), with_lse_shift=True)
