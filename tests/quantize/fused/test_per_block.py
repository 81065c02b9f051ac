"""The quantization that lpattn's own kernels read, value by value beside plain PyTorch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from lpattn.quantize import Granularity, quantize_e4m3, round_e4m3
from lpattn.types import HadamardMode, Norm

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BLOCK = 128


def natural_order(value: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, blocks, D_v, 128] as it is stored to [B, Hkv, blocks * 128, D_v], float32, keys in order."""
    order = [16 * g + 8 * b + 2 * c + e for g in range(8) for c in range(4) for b in range(2) for e in range(2)]
    unpermuted = torch.empty_like(value.float())
    unpermuted[..., order] = value.float()
    return unpermuted.transpose(3, 4).flatten(2, 3)


def parts_of(layout: Any) -> dict[str, Any]:
    """Where each tensor lies."""
    found = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    return {name: part for name, part in found.items() if hasattr(part, "start")}


def padded(x: torch.Tensor, tokens: int, lanes: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, lanes - x.shape[3], 0, tokens - x.shape[2]))


def check(
    fused: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, used: torch.Tensor | None = None, **options: Any
) -> Any:
    """Run ``quantize_per_block`` and hold all that it returns to plain PyTorch, given the constants.

    ``used`` [B, Hkv or 1, kv_len] goes with ``pack``: whether the used keys are to come first.
    """
    from lpattn.quantize.fused import Precision, quantize_per_block

    packs = options.pop("pack", False)
    precision = options.get("precision", Precision.E4M3)
    hadamard, rope, norm = options.get("hadamard", HadamardMode.NONE), options.get("rope"), options.get("norm")
    if used is not None:
        options |= {"keys": fused.keys(used[:, 0])} if packs else {"used": used.to(fused.device)}
    found = quantize_per_block(q, k, v, with_lse_shift=True, **options)
    wanted = fused.operands(q, k, v, hadamard, rope, norm)
    wanted[0] = wanted[0] * options.get("factor", 1.0)
    batch, kv_heads, kv_len = k.shape[:3]
    blocks = -(-kv_len // BLOCK)
    seen = torch.ones(batch, 1, kv_len, dtype=torch.bool) if used is None else used.cpu()
    if packs:
        for x in wanted[1:]:
            for b in range(batch):
                count = int(seen[b].sum())
                x[b, :, :count] = x[b][:, seen[b, 0]]
        seen = torch.arange(kv_len) < seen.sum(-1, keepdim=True)
        assert found.key_counts.tolist() == seen.sum(-1).flatten().tolist()
    else:
        assert found.key_counts is None
    assert (found.kv_len, found.dim_v, found.hadamard) == (kv_len, v.shape[3], hadamard)
    constants = [torch.zeros(batch, kv_heads, wanted[0].shape[3])]
    for x, constant in zip(wanted[1:], (found.k_constant, found.v_constant), strict=True):
        assert not constant[..., x.shape[3] :].any()
        constants.append(constant.cpu()[..., : x.shape[3]])
        if kv_len <= 256:  # all tokens are sampled
            counts = seen.any(1, keepdim=True)[..., None]
            mean = torch.where(counts & x.isfinite(), x, 0.0).double().sum(2) / counts.sum(2).clamp_min(1)
            assert torch.allclose(constants[-1].double(), mean, rtol=1e-5, atol=2e-6 * fused.largest_finite(x) + 1e-44)

    kinds = (Granularity.PER_TOKEN, Granularity.PER_BLOCK, Granularity.PER_BLOCK)
    scales = (found.q_scale, found.k_scale, found.v_scale)
    data = [found.query.float(), found.key.float(), found.value.float()]
    if precision is Precision.E4M3:
        data[2] = natural_order(found.value)
    for which, (x, constant, kind, scale, got) in enumerate(zip(wanted, constants, kinds, scales, data, strict=True)):
        got, scale = got.cpu(), scale.cpu()
        smoothed = x - constant[:, :, None] if which else x
        smoothed = torch.where(seen[..., None], smoothed, 0.0) if which else smoothed
        limit, part = (448.0, 2**0.5) if which == 2 else (options.get("qk_max", 448.0), 1.0)
        oracle = quantize_e4m3(smoothed / part, kind, qmax=limit, power_of_two=True)
        exact = norm is None and hadamard is HadamardMode.NONE and (rope is None or fused.interpreted)
        tokens = x.shape[2] if which == 0 else blocks * BLOCK
        spread = scale[..., None] if which == 0 else scale.repeat_interleave(BLOCK, 2)[..., None]
        smoothed = padded(smoothed, tokens, got.shape[3])
        if precision is Precision.INT8_F16 and which < 2:
            peak = torch.where(smoothed.isfinite(), smoothed.abs(), 0.0).amax(3)
            peak = peak if which == 0 else peak.unflatten(2, (blocks, BLOCK)).amax(3)
            whole = ~scale.isnan()
            assert torch.allclose(scale[whole], (peak / 127).clamp_min(2.0**-56)[whole], rtol=1e-5)
            good = (~spread.isnan()).expand_as(smoothed)
            assert ((smoothed / spread - got).abs() <= 0.501)[good].all()
            continue
        floor = 2.0**-56 if which < 2 else 0.0
        expected = oracle.scale.clamp_min(floor)
        if which == 2:
            # 2^-60 of what the largest value of the head could get.
            bound = torch.where(seen[..., None] & x.isfinite(), x.abs(), 0.0).amax((2, 3), keepdim=True)[..., 0]
            bound = torch.where(bound > 0, bound / 448, 1.0) * 2.0**-60
            expected = torch.maximum(expected, torch.exp2(bound.clamp_min(2.0**-126).log2().ceil())) * 2**0.5
        # Where the largest value is next to a power of two, sums in another order may say either.
        ratio = (scale / expected * 2**20).round() / 2**20
        assert (ratio == 1).all() if exact and which == 0 else ((ratio == 1) | (ratio == 2) | (ratio == 0.5)).all()
        want = smoothed / spread
        if precision is Precision.E4M3:
            want = round_e4m3(want).float()
            step = 0.13 * want.abs() + 2.0**-9
        else:
            step = 1e-3 * want.abs() + 1e-4
        off = torch.where(want.isnan(), 0.0, (got - want).abs())
        assert (off <= step).all(), f"{(off > step).sum()} elements of {'qkv'[which]} are wrong"
        assert (off > 0).sum() <= off.numel() // (500 if precision is Precision.E4M3 else 1)
    shift = (wanted[0].unflatten(1, (kv_heads, -1)) * constants[1][:, :, None, None]).sum(-1).flatten(1, 2)
    atol = 1e-4 * fused.largest_finite(shift) + 1e-40
    assert torch.allclose(found.lse_shift.cpu(), shift, rtol=1e-4, atol=atol, equal_nan=True)
    return found


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (130, 127), (5, 300)])
def test_every_length_and_dtype(fused, dtype, q_len, kv_len) -> None:
    check(fused, *fused.make(heads=2, q_len=q_len, kv_len=kv_len, dtype=dtype), factor=0.3, qk_max=14.0)


@pytest.mark.parametrize(("dim", "dim_v"), [(16, 16), (40, 40), (80, 80), (256, 256), (64, 128), (96, 16), (24, 80)])
def test_head_dims(fused, dim, dim_v) -> None:
    q, k, _ = fused.make(heads=4, kv_heads=2, q_len=9, kv_len=140, dim=dim)
    v = fused.make(kv_heads=2, kv_len=140, dim=dim_v, seed=1)[2]
    found = check(fused, q, k, v)
    # Rows of 16 bytes, the lanes past D zeros.
    assert found.query.shape[3] == found.key.shape[3] == -(-dim // 16) * 16
    assert found.value.shape == (1, 2, 2, dim_v, 128)


@pytest.mark.parametrize("mode", [HadamardMode.QKV, HadamardMode.V_ONLY])
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (40, 40), (64, 32)])
def test_hadamard(fused, mode, dim, dim_v) -> None:
    q, k, _ = fused.make(q_len=9, kv_len=140, dim=dim, dtype=F32)
    v = fused.make(kv_len=140, dim=dim_v, dtype=F32, seed=1)[2]
    found = check(fused, q, k, v, hadamard=mode)
    lanes = 1 << (dim - 1).bit_length()
    assert found.query.shape[3] == (lanes if mode is HadamardMode.QKV else -(-dim // 16) * 16)
    assert found.value.shape[3] == 1 << (dim_v - 1).bit_length()


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("dim", "dim_v"), [(32, 32), (32, 64)])
def test_only_used_keys_count(fused, pack, dim, dim_v) -> None:
    q, k, _ = fused.make(heads=4, kv_heads=2, batch=3, q_len=4, kv_len=200, dim=dim)
    v = fused.make(kv_heads=2, batch=3, kv_len=200, dim=dim_v, seed=1)[2]
    used = torch.rand(3, 1, 200, generator=torch.Generator().manual_seed(0)) < 0.6
    used[1] = False
    for x in (k, v):
        x.transpose(1, 2)[~used[:, 0]] = math.nan
        x.transpose(1, 2)[~used[:, 0], :, ::2] = 3e4
    check(fused, q, k, v, used, pack=pack)


def test_a_key_may_be_used_by_some_heads_only(fused) -> None:
    q, k, v = fused.make(heads=2, kv_heads=2, q_len=4, kv_len=200, dim=32)
    used = torch.rand(1, 2, 200, generator=torch.Generator().manual_seed(0)) < 0.6
    for x in (k, v):
        x[~used] = 3e4
        x[:, :, used.any(1)[0]] = x[:, :, used.any(1)[0]].clamp(-9, 9)
    check(fused, q, k, v, used)


@pytest.mark.parametrize("own_angles", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "most"), [(1, 6, 6, 4), (2, 5, 5, 3), (2, 6, 2, 2), (1, 3, 3, 8)]
)
def test_programs_that_take_several_heads(fused, batch, heads, kv_heads, most, own_angles, take_heads) -> None:
    """Heads differ; the last program has fewer of them where the number is no divisor."""
    take_heads(most)
    q, k, v = fused.make(batch=batch, heads=heads, kv_heads=kv_heads, q_len=140, kv_len=300, dim=32)
    tables = fused.tables(batch, 140, heads if own_angles else 1, 32, 300, kv_heads if own_angles else 1)
    check(fused, q, k, v, rope=fused.rotation(q, k, tables), factor=-0.5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(fused, interleaved) -> None:
    q, k, _ = fused.make(heads=2, q_len=140, kv_len=140, dim=64)
    v = fused.make(kv_len=140, dim=32, seed=1)[2]
    tables = [torch.randn(1, 140, 1, 64, device=fused.device) for _ in range(4)]
    check(fused, q, k, v, rope=fused.rotation(q, k, tables, interleaved), factor=-0.5)


@pytest.mark.parametrize("pack", [None, False, True])
@pytest.mark.parametrize("mode", [HadamardMode.NONE, HadamardMode.QKV])
@pytest.mark.parametrize(("dim", "rotary", "interleaved"), [(64, 64, False), (64, 64, True), (96, 40, False)])
def test_normalized_over_all_heads_then_rotated(fused, dim, rotary, interleaved, mode, pack) -> None:
    """Several batch entries and heads, of which a program takes more than one."""
    q, k, _ = fused.make(batch=2, heads=6, kv_heads=3, q_len=140, kv_len=240, dim=dim, dtype=F32)
    v = fused.make(batch=2, kv_heads=3, kv_len=240, dim=32, dtype=F32, seed=1)[2]
    norm = fused.norm_over_heads(q, k, F32, F32)
    tables = [torch.randn(1, n, 1, rotary, device=fused.device) for n in (140, 140, 240, 240)]
    rope = fused.rotation(q, k, tables, interleaved)
    used = None
    if pack is not None:
        used = torch.rand(2, 1, 240, generator=torch.Generator().manual_seed(0)) < 0.6
        assert norm.rstd_k is not None
        norm.rstd_k[~used[:, 0].to(fused.device)] = math.nan
    check(
        fused,
        q,
        k,
        v,
        used,
        rope=rope,
        norm=norm,
        hadamard=mode,
        factor=-0.5,
        **({} if pack is None else {"pack": pack}),
    )


@pytest.mark.parametrize("dtypes", [(), (BF16, F32)], ids=["unweighted", "two_types"])
def test_normalized_over_all_heads_alone(fused, dtypes) -> None:
    """Without a rotation, and with numbers and weights that are strided and of other types than q."""
    q, k, v = fused.make(batch=2, heads=4, kv_heads=2, q_len=9, kv_len=140, dim=72, dtype=F16)
    given = fused.norm_over_heads(q, k, *dtypes)
    strided = [None if t is None else torch.stack((t, t + 1), -1)[..., 0] for t in given.tensors]
    norm = Norm(None, None, *strided[:2], strided[2].double(), strided[3])
    check(fused, q, k, v, norm=norm, factor=-0.5)


@pytest.mark.parametrize("precision", ["e4m3", "int8_f16"])
@pytest.mark.parametrize(
    ("dim", "rotary", "interleaved", "weighted", "dtype"),
    [
        (64, 64, False, "both", BF16),
        (40, 24, False, "k", F32),
        (80, 80, True, "none", BF16),
        (128, 64, True, "both", F16),
    ],
)
def test_normalized_then_rotated(fused, dim, rotary, interleaved, weighted, dtype, precision) -> None:
    from lpattn.quantize.fused import Precision

    q, k, _ = fused.make(heads=4, kv_heads=2, q_len=140, kv_len=300, dim=dim, dtype=dtype)
    v = fused.make(kv_heads=2, kv_len=300, dim=32, dtype=dtype, seed=1)[2]
    weights = (torch.randn(2, dim, device=fused.device) + 1).unbind(0)
    norm = Norm(1e-6, 0.3, *(w if weighted in ("both", n) else None for w, n in zip(weights, "qk", strict=True)))
    tables = [torch.randn(1, n, 1, rotary, device=fused.device) for n in (140, 140, 300, 300)]
    rope = fused.rotation(q, k, tables, interleaved)
    check(fused, q, k, v, rope=rope, norm=norm, factor=-0.5, precision=Precision(precision))


@pytest.mark.parametrize(("dim", "mode"), [(64, HadamardMode.NONE), (24, HadamardMode.NONE), (32, HadamardMode.QKV)])
def test_int8_with_v_in_float16(fused, dim, mode) -> None:
    from lpattn.quantize.fused import Precision

    q, k, v = fused.make(heads=2, q_len=140, kv_len=140, dim=dim, dtype=F32)
    k[0, 0, 130, 3] = math.inf
    q[0, 1, 7, 0] = math.nan
    found = check(fused, q, k, v * 1e6, precision=Precision.INT8_F16, hadamard=mode)
    assert found.q_scale.isnan().nonzero().tolist() == [[0, 1, 7]]
    assert found.k_scale.isnan().tolist() == [[[False, True]]]
    assert found.value.isfinite().all()


@pytest.mark.parametrize("huge", [1e30, 3e33])
def test_scales_of_v_lie_within_a_range_that_a_kernel_can_rely_on(fused, huge) -> None:
    q, k, v = fused.make(q_len=1, kv_len=256, dtype=F32)
    v -= v.mean(2, keepdim=True)
    v[:, :, 128:] *= huge
    v[:, :, 128:] -= v[:, :, 128:].mean(2, keepdim=True)
    scale = check(fused, q, k, v).v_scale[0, 0]
    assert scale[1] / scale[0] <= 2.0**61


def test_two_runs_are_equal_whatever_was_in_memory(fused, poison) -> None:
    from lpattn.quantize.fused import quantize_per_block

    q, k, _ = fused.make(heads=2, q_len=33, kv_len=300, dim=24)
    v = fused.make(kv_len=300, dim=40, seed=1)[2]
    first = quantize_per_block(q, k, v, with_lse_shift=True)
    poison[0] = 0x45
    second = quantize_per_block(q, k, v, with_lse_shift=True)
    for name, part in parts_of(first.layout).items():
        one, other = getattr(first, name), getattr(second, name)
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), part


@pytest.mark.parametrize(
    "options",
    [{}, {"with_lse_shift": True}, {"precision": "int8_f16"}, {"hadamard": HadamardMode.QKV}],
    ids=str,
)
def test_nothing_lies_on_anything_else(fused, options) -> None:
    from lpattn.quantize.fused import Precision, quantize_per_block

    q, k, _ = fused.make(heads=2, q_len=33, kv_len=300, dim=24)
    v = fused.make(kv_len=300, dim=40, seed=1)[2]
    precision = Precision(options.get("precision", "e4m3"))
    found = quantize_per_block(q, k, v, **options | {"precision": precision})
    parts = sorted(parts_of(found.layout).values(), key=lambda part: part.start)
    ends = [part.start + part.dtype.itemsize * math.prod(part.shape) for part in parts]
    assert all(end <= part.start for end, part in zip(ends, parts[1:], strict=False))
    assert ends[-1] <= found.memory.numel()
    assert all(getattr(found, name).is_contiguous() for name in parts_of(found.layout))
