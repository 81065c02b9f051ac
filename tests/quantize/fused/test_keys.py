"""Key padding: the list of the used keys, and k and v packed by it."""

from __future__ import annotations

import pytest
import torch

from lpattn.types import HadamardMode

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def mask(*rows: object, length: int) -> torch.Tensor:
    """bool [B, length], True at what the rows name."""
    made = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, which in zip(made, rows, strict=True):
        row[which] = True
    return made


@pytest.mark.parametrize("length", [1, 64, 1023, 1024, 1025, 2100])
def test_the_list_of_the_used_keys(fused, length) -> None:
    used = torch.rand(3, length, generator=torch.Generator().manual_seed(length)) < 0.4
    used[1], used[2] = False, True
    keys = fused.used_keys(used[:, None, None].to(fused.device), 3, length)
    assert (keys.indices.dtype, keys.counts.dtype) == (torch.int32, torch.int32)
    assert keys.indices.shape == (3, length)
    assert keys.counts.tolist() == used.sum(1).tolist()
    for row, indices, count in zip(used, keys.indices, keys.counts, strict=True):
        assert torch.equal(indices[:count].cpu(), row.nonzero().flatten().int())


@pytest.mark.parametrize("name", ["one_row", "every_other_key", "keys_first", "one_key", "expanded"])
def test_the_list_of_a_mask_in_any_layout(fused, name) -> None:
    bits = torch.rand(4, 1, 1, 80, generator=torch.Generator().manual_seed(0)) < 0.5
    made = {
        "one_row": bits[:1],
        "every_other_key": bits[..., ::2],
        "keys_first": bits.flatten(1).T.contiguous().T[:, None, None],
        "one_key": bits[..., :1],
        "expanded": bits[:1].expand(4, -1, -1, -1),
    }[name].to(fused.device)
    length = 40 if name == "every_other_key" else 80
    keys = fused.used_keys(made, 4, length)
    for row, indices, count in zip(made.expand(4, 1, 1, length), keys.indices, keys.counts, strict=True):
        assert torch.equal(indices[:count], row.flatten().nonzero().flatten().int())


@pytest.mark.parametrize("bad", [torch.nan, 6e4])
def test_other_tokens_enter_nothing_and_zeros_follow(fused, bad) -> None:
    used = mask([], [69], slice(None), [*range(3, 9), 17, *range(40, 69, 2)], slice(0, 64), length=70)
    q, k, v = fused.make(batch=5, q_len=2, kv_len=70, dim=32, dtype=F16)
    for x in (k, v):
        x.transpose(1, 2)[~used] = bad
    found = fused.check(q, k, v, used=used, with_lse_shift=True)
    assert (found.k_descale[0], found.v_descale[0]) == (2.0**-56, 2.0**-126)
    for data in (found.key, found.value):
        for b, count in enumerate(used.sum(1)):
            assert not data[b, count:].float().any()


@pytest.mark.parametrize("layout", ["sliced", "unaligned", "lanes_first"])
def test_packed_from_any_layout(fused, layout) -> None:
    q, k, v = fused.make(batch=2, q_len=2, kv_len=12, dim=40)
    used = mask([1, 4, 5, 11], [0, 2, 3], length=12)
    fused.check(q, fused.laid_out(k, layout), fused.laid_out(v, layout), used=used, with_lse_shift=True)


@pytest.mark.parametrize(("interleaved", "rotary"), [(False, 32), (True, 32), (False, 24)])
def test_packed_keys_are_rotated_by_where_they_were(fused, interleaved, rotary) -> None:
    q, k, v = fused.make(batch=2, q_len=5, kv_len=20, dim=32, dtype=F16)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 1, rotary)] * 2 + [(2, 20, 1, rotary)] * 2
    tables = [torch.randn(shape, generator=generator).to(fused.device) for shape in shapes]
    used = mask([2, 3, 7, 8, 15, 19], slice(4, None), length=20)
    fused.check(q, k, v, used=used, rope=fused.rotation(q, k, tables, interleaved), with_lse_shift=True)


def test_packed_and_transformed(fused) -> None:
    q, k, v = fused.make(batch=2, q_len=5, kv_len=20, dim=32, dtype=F16)
    used = mask([2, 3, 7, 8, 15, 19], [], length=20)
    k[0, 0, 1] = v[0, 0, 0] = torch.inf
    fused.check(q, k, v, used=used, hadamard=HadamardMode.QKV, with_lse_shift=True)


def test_what_follows_the_list_is_not_read(fused) -> None:
    used = torch.arange(30)[None] % 7 == 2
    q, k, v = fused.make(q_len=1, kv_len=30, dim=16)
    keys = fused.used_keys(used[:, None, None].to(fused.device), 1, 30)
    by_hand = fused.check(q, k, v, used=used)
    listed = fused.quantize_per_head(q, k, v, keys=keys)
    for name in ("key", "value", "k_descale", "v_descale"):
        assert torch.equal(getattr(listed, name).float(), getattr(by_hand, name).float())
