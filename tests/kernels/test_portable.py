"""The kernel's meaning: lengths, causality, windows, masks, heads, head_dims, precisions; held to plain PyTorch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lpattn.types import HadamardMode

F16, F32 = torch.float16, torch.float32


@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("q_len", [1, 17])
def test_lengths(kernel, q_len, kv_len) -> None:
    kernel.check(*kernel.make(q_len=q_len, kv_len=kv_len))


BANDS = {
    "causal": {"after": 0},
    "causal, from the end": {"after": 0, "from_end": True},
    "window": {"before": 20, "after": 0},
    "window, from the end": {"before": 70, "after": 5, "from_end": True},
    "both sides": {"before": 3, "after": 90},
    "only in front": {"before": 40},
}


@pytest.mark.parametrize(("q_len", "kv_len"), [(150, 150), (40, 170), (170, 40)])
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
def test_bands(kernel, band, q_len, kv_len) -> None:
    kernel.check(*kernel.make(heads=1, q_len=q_len, kv_len=kv_len), band=kernel.Band(**band))


def test_window_against_pytorch(kernel, sqnr) -> None:
    q, k, v = kernel.make(q_len=150, kv_len=150)
    out, lse, _ = kernel.check(q, k, v, band=kernel.Band(before=40, after=0))
    distance = torch.arange(150)[:, None] - torch.arange(150)
    mask = ((distance >= 0) & (distance <= 40)).to(kernel.device)
    assert sqnr(out, F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)) > 30
    logits = (q @ k.mT / math.sqrt(32)).masked_fill(~mask, -torch.inf)
    assert (lse - logits.logsumexp(-1)).abs().max() < 0.15


MASKS = {
    "padding": lambda q, k: torch.arange(k) < 100,
    "per query": lambda q, k: torch.rand(q, k) < 0.5,
    "causal": lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(),
    "window": lambda q, k: torch.ones(q, k, dtype=torch.bool).tril().triu(-30),
    "blocks": lambda q, k: torch.arange(q)[:, None] // 64 == torch.arange(k) // 64,
    "prefix": lambda q, k: (torch.arange(q)[:, None] >= torch.arange(k)) | (torch.arange(k) < 70),
    "rows without keys": lambda q, k: (torch.rand(q, k) < 0.5) & (torch.arange(q)[:, None] % 3 > 0),
    "nothing": lambda q, k: torch.zeros(q, k, dtype=torch.bool),
    "everything": lambda q, k: torch.ones(q, k, dtype=torch.bool),
    "one key": lambda q, k: torch.arange(k) == 140,
    "one column": lambda q, k: torch.rand(q, 1) < 0.5,
}


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(kernel, mask, kind) -> None:
    torch.manual_seed(0)
    seen = mask(40, 200)
    if kind == "additive":
        seen = torch.where(seen, torch.randn(seen.shape) * (torch.rand(seen.shape) < 0.5), -torch.inf)
    kernel.check(*kernel.make(heads=1, q_len=40, kv_len=200), mask=seen)


@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 20), (1, 130))), ids=str)
def test_masks_broadcast_along_every_dimension(kernel, shape) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    kernel.check(*kernel.make(batch=2, heads=4, kv_heads=2, q_len=20, kv_len=130), mask=mask)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "fortran"])
def test_masks_of_any_strides(kernel, layout) -> None:
    torch.manual_seed(0)
    if layout == "transposed":
        mask = (torch.rand(2, 130, 2, 32) < 0.6).permute(0, 2, 3, 1)
    elif layout == "sliced":
        mask = (torch.rand(2, 2, 40, 300) < 0.6)[:, :, 3:35, 7:137]
    elif layout == "expanded":
        mask = (torch.rand(2, 1, 1, 130) < 0.6).expand(2, 2, 32, 130)
    else:
        mask = (torch.rand(130, 32, 2, 2) < 0.6).permute(3, 2, 1, 0)
    kernel.check(*kernel.make(batch=2, q_len=32, kv_len=130), mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_lowest_bias_of_a_dtype_is_a_value(kernel, dtype, sqnr) -> None:
    lowest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).min
    mask = torch.zeros(20, 150, dtype=dtype)
    mask[:, 100:] = lowest
    mask[3] = lowest
    q, k, v = kernel.make(q_len=20, kv_len=150)
    out, *_ = kernel.check(q, k, v, mask=mask)
    assert out.isfinite().all()
    # Where all keys have it, they count alike, whatever the logits are: these are lost in the sum.
    if dtype != torch.float16:
        assert sqnr(out[:, :, 3], v.mean(2).expand(1, 2, -1)) > 30


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("band", [{}, {"after": 0}], ids=["full", "causal"])
def test_heads(kernel, heads, kv_heads, band) -> None:
    kernel.check(*kernel.make(batch=2, heads=heads, kv_heads=kv_heads, q_len=20, kv_len=70), band=kernel.Band(**band))


@pytest.mark.parametrize(
    ("dim", "dim_v"), [(16, 16), (40, 40), (72, 72), (80, 80), (88, 96), (112, 64), (128, 192), (192, 128), (256, 256)]
)
def test_head_dims(kernel, dim, dim_v) -> None:
    kernel.check(*kernel.make(q_len=20, kv_len=140, dim=dim, dim_v=dim_v))


@pytest.mark.parametrize("mode", [HadamardMode.QKV, HadamardMode.V_ONLY])
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (40, 24), (128, 128)])
def test_hadamard_is_undone(kernel, mode, dim, dim_v, sqnr) -> None:
    q, k, v = kernel.make(q_len=20, kv_len=140, dim=dim, dim_v=dim_v)
    out, *_ = kernel.check(q, k, v, hadamard=mode)
    assert sqnr(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True)) > 30


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
@pytest.mark.parametrize("band", [{}, {"before": 50, "after": 0}], ids=["full", "window"])
def test_int8(kernel, dtype, band, sqnr) -> None:
    q, k, v = kernel.make(heads=4, kv_heads=2, q_len=70, kv_len=150, dim=48, dim_v=80, dtype=dtype)
    precision = kernel.fused.Precision.INT8_F16
    out, *_ = kernel.check(q, k, v, band=kernel.Band(**band), precision=precision)
    if not band:
        assert sqnr(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True)) > 40


def test_int8_with_a_mask_and_hadamard(kernel) -> None:
    mask = torch.rand(1, 4, 20, 150, generator=torch.Generator().manual_seed(0)) < 0.6
    q, k, v = kernel.make(heads=4, kv_heads=2, q_len=20, kv_len=150)
    kernel.check(q, k, v, mask=mask, precision=kernel.fused.Precision.INT8_F16, hadamard=HadamardMode.QKV)


def test_packed_keys(kernel) -> None:
    q, k, v = kernel.make(batch=3, q_len=20, kv_len=200)
    used = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) < 0.7
    used[1] = False
    for x in (k, v):
        x.transpose(1, 2)[~used] = math.nan
    kernel.check(q, k, v, used=used)


@pytest.mark.parametrize("from_end", [False, True])
def test_fewer_queries_and_keys_in_some_sequences(kernel, from_end) -> None:
    q, k, v = kernel.make(batch=3, q_len=40, kv_len=200)
    used = torch.arange(200) < torch.tensor([200, 20, 129])[:, None]
    kernel.check(q, k, v, used=used, q_counts=[40, 33, 0], band=kernel.Band(before=60, after=2, from_end=from_end))


def test_what_float16_cannot_hold_becomes_its_largest_number(kernel) -> None:
    q, k, v = kernel.make(q_len=20, kv_len=70, dtype=F16)
    v = torch.where(v > 0, 65504.0, -63000.0).half()
    out, *_ = kernel.check(q * 30, k, v)
    assert out.max() == 65504


def test_two_runs_are_equal_whatever_was_in_memory(kernel, poison) -> None:
    q, k, v = kernel.make(batch=2, heads=4, kv_heads=2, q_len=40, kv_len=200)
    mask = torch.rand(2, 1, 40, 200, generator=torch.Generator().manual_seed(0)) < 0.6
    first = kernel.check(q, k, v, mask=mask)
    poison[0] = 0x7E
    second = kernel.check(q, k, v, mask=mask)
    assert torch.equal(first[0].contiguous().view(torch.int32), second[0].contiguous().view(torch.int32))
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("queries", "keys"), [(16, 128), (32, 64), (64, 32)])
def test_every_shape_of_tile_gives_the_same(kernel, queries, keys, sqnr) -> None:
    q, k, v = kernel.make(q_len=70, kv_len=200)
    shape = kernel.TileShape(queries, keys, 4, 1, sum_by_product=keys == 64, k_reordered=keys == 128)
    for band in ({}, {"after": 0}, {"before": 50, "after": 0}):
        kernel.check(q, k, v, shape=shape, band=kernel.Band(**band))
    kernel.check(q, k, v, shape=shape, mask=torch.ones(70, 200, dtype=torch.bool).tril(20).triu(-30))


def test_a_mask_goes_with_nothing_that_also_hides_keys(kernel) -> None:
    q, k, v = kernel.make()
    with pytest.raises(ValueError, match="a mask already says what a query sees"):
        kernel.check(q, k, v, mask=torch.ones(150, dtype=torch.bool), band=kernel.Band(after=0))


def test_rows_of_a_mask_may_be_further_apart_than_32_bits_say(kernel) -> None:
    if not kernel.interpreted:
        pytest.skip("the memory between the rows is only there where nobody touches it")
    q, k, v = kernel.make(q_len=3, kv_len=64)
    mask = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    # An offset that wraps leads in front of a row, into the memory all the same.
    step = 2**31
    memory = torch.from_numpy(np.zeros(4 * step + 64, dtype=bool))
    apart = memory[2 * step :].as_strided((3, 64), (step, 1))
    apart.copy_(mask)
    assert torch.equal(kernel.check(q, k, v, mask=apart)[0], kernel.check(q, k, v, mask=mask)[0])


@pytest.mark.parametrize("masked", [False, True])
def test_no_length_is_compiled_for(kernel, masked, monkeypatch) -> None:
    """What is compiled in, and what Triton specializes a kernel for, is the same for all lengths."""
    from lpattn.quantize.fused.launcher import Launch

    recorded, on = [], Launch.on

    def record(launch, stream, pointers, tensors):
        jitted, made = launch._kernel, tensors()
        if not kernel.interpreted:
            constants = sum(p.is_constexpr for p in jitted.params)
            names = jitted.arg_names[len(made) : len(jitted.arg_names) - constants]
            assert set(names) <= {p.name for p in jitted.params if p.do_not_specialize}
        recorded.append(launch._key)

    shape = kernel.shape(32)
    for q_len, kv_len in ((17, 20), (130, 77), (33, 2048)):
        q, k, v = kernel.make(q_len=q_len, kv_len=kv_len)
        quantized = kernel.fused.quantize_per_block(q, k, v)
        mask = None
        monkeypatch.setattr(Launch, "on", record)
        if masked:
            whole = torch.ones(1, 1, q_len, -(-kv_len // 16) * 16, dtype=torch.bool, device=kernel.device)
            mask = kernel.mask_tiles.list_mask_tiles(whole[..., :kv_len], kv_len, shape.queries, shape.keys)
        kernel.attention.attend(quantized, shape, torch.float32, mask=mask)
        monkeypatch.setattr(Launch, "on", on)
    each = len(recorded) // 3
    assert each == (3 if masked else 1)
    assert recorded[:each] == recorded[each : 2 * each] == recorded[2 * each :]
