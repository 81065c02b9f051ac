"""fp8_fa3 with key-padding masks: against exact attention over the keys that are used, whatever the others hold."""

from __future__ import annotations

import pytest
import torch

import lpattn

pytestmark = pytest.mark.gpu

LENGTH = 513


def padding(name: str) -> torch.Tensor:
    """[B, kv_len]"""
    at = torch.arange(LENGTH, device="cuda")
    per_entry = {
        "right": (at < 513, at < 300, at < 128, at < 129),
        "left": (at >= 1, at >= 200, at >= 449, at >= 448),
        "gaps": (torch.rand(LENGTH, device="cuda") < 0.5, at % 3 == 0, at % 128 != 127, (at < 5) | (at > 508)),
        "none and one": (at < 0, at == 0, at == 512, at == 300),
    }
    return torch.stack(per_entry[name])


def spoiled(x: torch.Tensor, used: torch.Tensor, value: float) -> torch.Tensor:
    return x.masked_fill(~used[:, None, :, None], value)


def check(tools, q, k, v, used, out, lse) -> None:
    rows = torch.arange(q.shape[2], device="cuda")
    expected, expected_lse = tools.exact_rows(q, k, v, rows, False, q.shape[3] ** -0.5, used)
    for b in range(len(used)):
        if not used[b].any():
            assert not out[b].any()
            assert (lse[b] == -torch.inf).all()
            continue
        # A single key is its own mean: nothing of it is left to quantize.
        floor = 40.0 if used[b].sum() == 1 else 23.0
        assert tools.sqnr(expected[b], out[b]) >= floor, f"entry {b}"
        assert (lse[b] - expected_lse[b]).abs().max() < 0.15, f"entry {b}"


@pytest.mark.parametrize("name", ["right", "left", "gaps", "none and one"])
@pytest.mark.parametrize(
    ("dim", "q_len", "hadamard", "dtype"),
    [
        (128, 513, "none", torch.bfloat16),
        (128, 77, "none", torch.bfloat16),
        (64, 200, "qkv", torch.bfloat16),
        (96, 130, "none", torch.float16),
    ],
)
def test_only_the_used_keys_count(fa3, tools, name, dim, q_len, hadamard, dtype) -> None:
    used = padding(name)
    q, k, v = tools.make(4, 4, 2, q_len, LENGTH, dim, dtype)
    # Constants that differ from entry to entry: one that was taken over other tokens shows in output and lse.
    k, v = (x + 2 * torch.randn(4, 2, 1, dim, device="cuda", dtype=dtype) for x in (k, v))
    results = []
    for value in (torch.nan, torch.inf, 0.0):
        tools.poison_all()
        keys, values = spoiled(k, used, value), spoiled(v, used, value)
        results.append(
            lpattn.low_precision_sdpa(
                q, keys, values, used[:, None, None], enable_gqa=True, backend=fa3, hadamard=hadamard, return_lse=True
            )
        )
    check(tools, q, spoiled(k, used, 0.0), spoiled(v, used, 0.0), used, *results[-1])
    for result in results[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[-1], strict=True))


def test_masks_of_all_shapes_that_say_the_same(fa3, tools) -> None:
    q, k, v = tools.make(2, 4, 2, 100, LENGTH, 128)
    used = padding("gaps")[:2]
    wide = torch.ones(2, 1, 1, 2 * LENGTH + 1, dtype=torch.bool, device="cuda")
    wide[..., 1::2] = used[:, None, None]
    strided = wide[..., 1::2]
    masks = [
        used[:, None, None],
        used[:, None, None].expand(2, 1, 100, LENGTH),
        used[:, None, None].expand(2, 4, 100, LENGTH),
        strided.expand(2, 4, 100, LENGTH),
    ]
    want, *others = (
        lpattn.low_precision_sdpa(q, k, v, mask, enable_gqa=True, backend=fa3, return_lse=True) for mask in masks
    )
    for got in others:
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    one = used[:1, None, None]
    for mask in (one, one.expand(2, 1, 100, LENGTH), used[0], used[0].expand(100, LENGTH)):
        out, lse = lpattn.low_precision_sdpa(q, k, v, mask, enable_gqa=True, backend=fa3, return_lse=True)
        check(tools, q, k, v, used[:1].expand(2, LENGTH), out, lse)


@pytest.mark.parametrize("flag", [True, False])
def test_a_mask_for_all_keys_at_once(fa3, tools, flag) -> None:
    q, k, v = tools.make(2, 4, 2, 100, LENGTH, 128)
    mask = torch.full((2, 1, 1, 1), flag, device="cuda")
    out, lse = lpattn.low_precision_sdpa(q, k, v, mask, enable_gqa=True, backend=fa3, return_lse=True)
    check(tools, q, k, v, mask[:, 0, 0].expand(2, LENGTH), out, lse)


def test_long_sequences(fa3, tools) -> None:
    length = 20_000
    q, k, v = tools.make(2, 2, 1, 64, length, 128)
    used = torch.rand(2, length, device="cuda") < torch.tensor([[0.9], [0.05]], device="cuda")
    k, v = (spoiled(x + 1, used, torch.nan) for x in (k, v))
    out, lse = lpattn.low_precision_sdpa(q, k, v, used[:, None, None], enable_gqa=True, backend=fa3, return_lse=True)
    rows = torch.arange(64, device="cuda")
    keys = k.nan_to_num()
    expected, expected_lse = tools.exact_rows(q, keys, v.nan_to_num(), rows, False, 128**-0.5, used)
    for b in range(2):
        assert tools.sqnr(expected[b], out[b]) >= 40.0  # V's mean is 1, and is not quantized
    assert (lse - expected_lse).abs().max() < 0.05


def test_two_runs_are_bitwise_equal(fa3, tools) -> None:
    q, k, v = tools.make(4, 4, 2, 300, LENGTH, 128)
    mask = padding("gaps")[:, None, None]
    results = []
    for _ in range(6):
        tools.poison_all()
        results.append(lpattn.low_precision_sdpa(q, k, v, mask, enable_gqa=True, backend=fa3, return_lse=True))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
