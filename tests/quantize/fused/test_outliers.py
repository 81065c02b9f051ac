"""A token that no sample shows: within the headroom nothing happens, beyond it the group is quantized once more."""

from __future__ import annotations

import pytest
import torch

from lpattn.types import HadamardMode

NAMES = ("query", "key", "value")
LENGTH = 300


def unsampled(fused, last: bool) -> int:
    """A token in the first or the last tile that is in no sample."""
    tokens = sorted(set(range(LENGTH)) - set(fused.sampled(LENGTH)))
    token = tokens[-1 if last else 0]
    assert token >= LENGTH - 30 if last else token < 30
    return token


def with_outlier(fused, name: str, last: bool, size: float) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """q, k and v of two groups; and which of them has an outlier, in which head of the latter group."""
    queries = name == "query"
    q_len, kv_len = (LENGTH, 5) if queries else (5, LENGTH)
    inputs = fused.make(heads=4 if queries and last else 2, kv_heads=2, dim=16, q_len=q_len, kv_len=kv_len)
    x = inputs[NAMES.index(name)]
    x /= x.abs().amax((2, 3), keepdim=True)
    head = x.shape[1] - 1
    x[0, head, unsampled(fused, last), 6] = -size
    return inputs, x, head


def tight(fused, found, x: torch.Tensor, name: str) -> float:
    """The scale that the latter group's values need."""
    x = x.cpu().float().unflatten(1, (2, -1))[0, 1]
    if name != "query":
        x = x - found.constants[NAMES.index(name) - 1].cpu()[0, 1, : x.shape[-1]]
    return fused.power_of_two_above(float(x.abs().max()) / 448)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_beyond_the_headroom_the_group_is_quantized_once_more(fused, name, last) -> None:
    inputs, x, head = with_outlier(fused, name, last, 1000.0)
    found = fused.check(*inputs, with_lse_shift=True)
    descales = getattr(found, f"{name[0]}_descale")[0].tolist()
    assert descales[1] == tight(fused, found, x, name)
    # The other group keeps its headroom.
    assert descales[0] < descales[1] / 8
    assert getattr(found, name)[0, :, head].float().abs().max() > 200


@pytest.mark.parametrize("name", NAMES)
def test_within_the_headroom_it_is_not(fused, name) -> None:
    inputs, x, _ = with_outlier(fused, name, True, 7.0)
    found = fused.check(*inputs)
    descale = float(getattr(found, f"{name[0]}_descale")[0, 1])
    assert descale > tight(fused, found, x, name)
    assert descale == 16 * fused.power_of_two_above(descale / 16)


def test_a_long_v_needs_no_headroom(fused) -> None:
    q, k, v = fused.make(q_len=1, kv_len=8192, dim=16)
    v[0, 0, 8190, 5] = 2e4
    found = fused.check(q, k, v)
    assert found.value.float().abs().max() > 200


def test_a_group_with_outliers_in_several_heads_and_tiles(fused) -> None:
    q, k, v = fused.make(heads=3, q_len=300, kv_len=3, dim=24, dtype=torch.float32)
    q /= q.abs().amax((2, 3), keepdim=True)
    others = [t for t in range(300) if t not in fused.sampled(300)]
    for head, (token, size) in enumerate(((others[0], 100.0), (others[20], 3000.0), (others[-1], 500.0))):
        q[0, head, token, 11 * head] = size
    found = fused.check(q, k, v)
    assert found.q_descale == fused.power_of_two_above(3000.0 / 448)


@pytest.mark.parametrize("hadamard", [HadamardMode.NONE, HadamardMode.QKV])
def test_after_rotation_and_transform(fused, hadamard) -> None:
    q, k, v = fused.make(heads=2, q_len=300, kv_len=300, dim=32, dtype=torch.float16)
    token = unsampled(fused, True)
    tables = [torch.randn(300, 1, 32, device=fused.device) for _ in range(2)]
    q[0, 1, token], k[0, 0, token] = 3000.0, 5000.0
    rope = fused.rotation(q, k, tables)
    plain = fused.check(q, k, v, hadamard=hadamard, rope=rope, with_lse_shift=True, factor=-1.0)
    rotated = fused.operands(q, k, v, hadamard, rope)
    smoothed = rotated[0], rotated[1] - plain.constants[0].cpu()[:, :, None]
    for x, descale in zip(smoothed, (plain.q_descale, plain.k_descale), strict=True):
        assert float(descale) == fused.power_of_two_above(float(x.abs().max()) / 448)


@pytest.mark.parametrize("own_angles", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "most"), [(3, 3, 2), (6, 2, 2), (6, 2, 4), (8, 4, 5), (4, 1, 3), (7, 1, 4)]
)
def test_programs_that_take_several_rotated_heads(fused, heads, kv_heads, most, own_angles, take_heads) -> None:
    """Groups lie in one program or in several of them; some are quantized once more, and the others are not."""
    take_heads(most)
    q, k, v = fused.make(batch=2, heads=heads, kv_heads=kv_heads, q_len=LENGTH, kv_len=LENGTH, dim=32)
    tables = fused.tables(2, LENGTH, heads if own_angles else 1, 32, LENGTH, kv_heads if own_angles else 1)
    rope = fused.rotation(q, k, tables)
    before = fused.check(q, k, v, rope=rope, with_lse_shift=True, factor=0.5)
    token = unsampled(fused, True)
    q[0, 0, token], q[1, heads - 1, token] = 3e4, 3e4
    k[0, kv_heads - 1, unsampled(fused, False)] = 3e4
    found = fused.check(q, k, v, rope=rope, with_lse_shift=True, factor=0.5)
    for which, groups in (("q", [(0, 0), (1, kv_heads - 1)]), ("k", [(0, kv_heads - 1)])):
        changed = getattr(found, f"{which}_descale") != getattr(before, f"{which}_descale")
        assert sorted(map(tuple, changed.nonzero().tolist())) == groups


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [100.0, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_beside_a_sample_of_zeros(fused, name, size, turned) -> None:
    """Times one over the smallest scale, float32 would overflow."""
    inputs = [torch.zeros_like(x) for x in fused.make(q_len=LENGTH, kv_len=LENGTH, dim=32)]
    q, k, _ = inputs
    inputs[NAMES.index(name)][0, 0, unsampled(fused, True), 6] = size
    found = fused.check(
        *inputs, rope=fused.rotation(q, k, fused.tables(1, LENGTH, 1, 32, LENGTH, 1)) if turned else None
    )
    assert getattr(found, name).float().abs().max() > 200


@pytest.mark.parametrize("turned", [False, True])
def test_where_some_keys_are_used(fused, turned) -> None:
    used = torch.zeros(2, 400, dtype=torch.bool)
    used[0, 50:350] = True
    used[1, ::2] = True
    q, k, v = fused.make(batch=2, q_len=3, kv_len=400, dim=16)
    k /= k.abs().amax((2, 3), keepdim=True)
    k.transpose(1, 2)[~used] = torch.nan
    k[0, 0, 50 + unsampled(fused, True), 3] = 900.0
    rope = fused.rotation(q, k, fused.tables(1, 3, 1, 16, 400, 1)) if turned else None
    found = fused.check(q, k, v, used=used, rope=rope)
    rotated = fused.operands(q, k, v, HadamardMode.NONE, rope)[1]
    largest = (rotated[0, 0, 50:350] - found.constants[0][0, 0, :16].cpu()).abs().max()
    assert float(found.k_descale[0]) == fused.power_of_two_above(float(largest) / 448)
    assert turned or found.k_descale[1] <= 2 * 2 / 448
