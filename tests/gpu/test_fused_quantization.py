"""q, k and v in e4m3 as the passes make them on the GPU, against the same formula in plain PyTorch, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lpattn.quantize import E4M3_MAX, hadamard_transform, round_e4m3
from lpattn.types import HadamardMode

pytestmark = pytest.mark.gpu

HEADROOM = 16
QK_FLOOR, V_FLOOR = 2.0**-56, 2.0**-126
SAMPLED = 256
"""So many tokens are looked at, at least."""
EXACT_FROM = 8192
"""With so many keys, all of v are."""

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def quantize(q, k, v, hadamard="none", keys=None, factor=1.0):
    from lpattn.quantize.fused import quantize_per_head

    # With lse_shift throughout, so that nothing is compiled once more without.
    return quantize_per_head(q, k, v, hadamard=HadamardMode(hadamard), keys=keys, factor=factor, with_lse_shift=True)


def codes(x: torch.Tensor) -> torch.Tensor:
    """e4m3 values as integers in their order; both zeros are 0."""
    bits = x.view(torch.uint8).int()
    magnitude = bits & 0x7F
    return torch.where(bits > 0x7F, -magnitude, magnitude)


def check_data(data, x, constant, scale, transformed: bool) -> None:
    """``data`` [B, S, H, D] is ``x`` [B, H, S, D], transformed, less its constant, divided by its scale, rounded."""
    x = x.float()
    x = hadamard_transform(x) if transformed else x
    expected = round_e4m3((x - constant) / scale)
    data = data.transpose(1, 2)
    spoiled = expected.float().isnan()
    assert torch.equal(data.float().isnan(), spoiled)
    apart = (codes(data.contiguous()) - codes(expected)).abs().masked_fill(spoiled, 0)
    if not transformed:
        assert not apart.any(), f"{int((apart > 0).sum())} of {apart.numel()} values differ"
    else:
        # The sums of a transform depend on their order, and may end on the other side of a boundary.
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 1e-3


def check_scale(scale, x, constant, floor: float, headroom: int) -> None:
    """A power of two with which nothing is clipped, and no larger than headroom over the bound explains."""
    x = x.float()
    assert (torch.frexp(scale)[0] == 0.5).all()
    largest = (x - constant).nan_to_num(0.0, 0.0, 0.0).abs().amax((2, 3))
    bound = x.nan_to_num(0.0, 0.0, 0.0).abs().amax((2, 3)) + constant.abs().amax((2, 3))
    assert (largest <= E4M3_MAX * scale).all()
    # Twice, since it was rounded up; a little more for the order of sums.
    assert (scale <= (2.001 * headroom * bound / E4M3_MAX).clamp_min(floor)).all()


def check_constant(constant, x, least: int | None = None) -> None:
    """Per channel [B, H, 1, D] the mean, or that of a sample that is no smaller than ``least``."""
    x = x.float()
    length = x.shape[2]
    mean, std = x.mean(2, keepdim=True), x.std(2, keepdim=True, correction=0)
    error = (constant - mean).abs()
    if least is None or length <= least:
        assert (error <= 1e-5 * x.abs().amax(2, keepdim=True)).all()
    else:
        assert (error <= 7 * std * least**-0.5 + 1e-5).all()


def check(q, k, v, hadamard="none", factor=1.0, found=None) -> object:
    """Quantize, and compare all that comes back with what it should be."""
    found = quantize(q, k, v, hadamard, factor=factor) if found is None else found
    groups, dim = q.shape[1] // k.shape[1], q.shape[3]
    qk, of_v = hadamard == "qkv", hadamard != "none"
    k_constant, v_constant = (c[:, :, None, :dim] for c in found.constants)
    spread = lambda scale: scale.repeat_interleave(groups, 1)[..., None, None]  # noqa: E731
    check_data(found.query, q.float() * factor, 0.0, spread(found.q_descale), qk)
    check_data(found.key, k, k_constant, found.k_descale[..., None, None], qk)
    check_data(found.value, v, v_constant, found.v_descale[..., None, None], of_v)
    q_, k_, v_ = (hadamard_transform(x.float()) if t else x.float() for x, t in ((q, qk), (k, qk), (v, of_v)))
    by_group = (q_ * factor).unflatten(1, (-1, groups)).flatten(2, 3)
    check_scale(found.q_descale, by_group, torch.zeros(1, 1, 1, 1, device=q.device), QK_FLOOR, HEADROOM)
    check_scale(found.k_descale, k_, k_constant, QK_FLOOR, HEADROOM)
    whole = v.shape[2] <= SAMPLED or v.shape[2] >= EXACT_FROM
    check_scale(found.v_descale, v_, v_constant, V_FLOOR, 1 if whole else HEADROOM)
    shift = (q_.double() * factor * k_constant.double().repeat_interleave(groups, 1)).sum(-1)
    assert torch.allclose(
        found.lse_shift.double(), shift, rtol=1e-4, atol=1e-3 * float(shift.nan_to_num().abs().max()), equal_nan=True
    )
    return found


@pytest.mark.parametrize(
    ("dtype", "dim", "hadamard"),
    [
        (BF16, 64, "none"),
        (BF16, 96, "none"),
        (BF16, 128, "none"),
        (BF16, 192, "none"),
        (BF16, 256, "none"),
        (F16, 96, "none"),
        (F16, 128, "none"),
        (F32, 96, "none"),
        (F32, 128, "none"),
        (BF16, 64, "qkv"),
        (BF16, 128, "qkv"),
        (BF16, 256, "qkv"),
        (F32, 128, "qkv"),
        (F16, 64, "v_only"),
        (BF16, 128, "v_only"),
        (F32, 256, "v_only"),
    ],
)
def test_it_is_the_formula(tools, dtype, dim, hadamard) -> None:
    q, k, v = tools.make(2, 4, 2, 1100, 900, dim, dtype)
    for bias in (0.0, 3.0):
        k = k + bias * torch.randn(2, 2, 1, dim, device=k.device, dtype=dtype)
        v = v + bias * torch.randn(2, 2, 1, dim, device=v.device, dtype=dtype)
        tools.poison_all()
        found = check(q, k, v, hadamard)
        transforms = (hadamard == "qkv", hadamard != "none")
        k_constant, v_constant = (c[:, :, None, :dim] for c in found.constants)
        check_constant(k_constant, hadamard_transform(k.float()) if transforms[0] else k, SAMPLED)
        if bias:
            check_constant(v_constant, hadamard_transform(v.float()) if transforms[1] else v, SAMPLED)
        else:
            assert not v_constant.any()  # not significant


def test_factors(tools) -> None:
    q, k, v = tools.make(1, 2, 2, 300, 300, 128)
    plain = check(q, k, v)
    turned = check(q, k, v, factor=-1.0)
    assert torch.equal(turned.query.float(), -plain.query.float())
    zero = check(q, k, v, factor=0.0)
    assert not zero.query.float().any()


def test_lengths(tools) -> None:
    for length in (*range(1, 131), 255, 256, 257, 511, 512, 513, 4608):
        q, k, v = tools.make(1, 2, 1, length, 131 - length if length < 131 else length, 64)
        tools.poison(q)
        try:
            check(q, k, v)
        except AssertionError as error:
            raise AssertionError(f"{length} queries") from error


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 3), (4, 1), (3, 3)])
def test_grouped_heads(tools, heads, kv_heads) -> None:
    q, k, v = tools.make(2, heads, kv_heads, 100, 333, 128)
    q = q * torch.logspace(-2, 2, heads, device=q.device).to(q.dtype)[:, None, None]
    k = k * torch.logspace(3, -3, kv_heads, device=k.device).to(k.dtype)[:, None, None]
    check(q, k, v)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e-18, 1e18, 1e34])
def test_magnitudes(tools, size) -> None:
    q, k, v = (x * size for x in tools.make(1, 2, 1, 300, 300, 128))
    found = quantize(q, k, v)
    check_data(found.query, q, 0.0, found.q_descale.repeat_interleave(2, 1)[..., None, None], False)
    for scale in (found.q_descale, found.k_descale, found.v_descale):
        assert (scale.isfinite() & (scale > 0)).all()
    assert found.key.float().isfinite().all()
    assert found.value.float().isfinite().all()


def outlier_at(x: torch.Tensor, head: int, token: int) -> torch.Tensor:
    x = x.clone()
    x[0, head, token, 5] = -3e4
    return x


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_an_outlier_beyond_the_sample_is_not_clipped(tools, dtype) -> None:
    """Most tokens are in no sample: the group is quantized again, with a scale that fits."""
    q, k, v = tools.make(1, 4, 2, 4608, 4608, 128, dtype)
    again = {"q": 0, "k": 0, "v": 0}
    for token in (1, 77, 1001, 2303, 4600, 4607):
        tools.poison_all()
        spoiled = {"q": outlier_at(q, 3, token), "k": outlier_at(k, 1, token), "v": outlier_at(v, 1, token)}
        found = check(*spoiled.values())
        calm = quantize(q, k, v)
        for name, scale, before in (
            ("q", found.q_descale, calm.q_descale),
            ("k", found.k_descale, calm.k_descale),
            ("v", found.v_descale, calm.v_descale),
        ):
            assert torch.equal(scale[0, 0], before[0, 0])  # another group's
            # Without headroom, the outlier becomes more than half of what e4m3 has.
            again[name] += bool(3e4 / scale[0, 1] > E4M3_MAX / 2.1)
    assert min(again.values()) >= 3, f"quantized again, of 6 times: {again}"


def test_runs_are_bitwise_equal_whatever_memory_holds(tools) -> None:
    q, k, v = tools.make(2, 6, 2, 3000, 3000, 128)
    q, k, v = outlier_at(q, 4, 2999), outlier_at(k, 1, 1501), outlier_at(v, 0, 2047)

    def run() -> list[torch.Tensor]:
        found = quantize(q, k, v)
        data = [x.view(torch.uint8) for x in (found.query, found.key, found.value)]
        scales = (found.q_descale, found.k_descale, found.v_descale)
        return [x.clone() for x in (*data, *scales, *found.constants, found.lse_shift)]

    first = run()
    for _ in range(20):
        tools.poison_all()
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("dim", [64, 96])
def test_strided_views(tools, dim) -> None:
    q, k, v = tools.make(2, 4, 2, 333, 257, dim)

    def wide(x: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, dim = x.shape
        room = torch.full((batch, tokens + 5, heads, 2 * dim + 1), torch.nan, device=x.device, dtype=x.dtype)
        view = room[:, 3:-2, :, 1 : dim + 1].transpose(1, 2)
        view.copy_(x)
        return view

    def every_other(x: torch.Tensor) -> torch.Tensor:
        room = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, device=x.device, dtype=x.dtype)
        room[..., ::2] = x
        return room[..., ::2]

    def one_buffer(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    for layout in (one_buffer, wide, every_other):
        check(*map(layout, (q, k, v)))
    # A tensor that is broadcast over heads, and one over tokens.
    check(q[:, :1].expand_as(q), k[:, :, :1].expand_as(k), v[:1].expand_as(v))


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_only_itself(tools, which, bad) -> None:
    clean = dict(zip("qkv", tools.make(1, 4, 2, 300, 300, 128), strict=True))
    for token in (0, 123):
        clean[which][0, 1, token, 7] = 0.0
        calm = quantize(*clean.values())
        spoiled = {name: x.clone() for name, x in clean.items()}
        spoiled[which][0, 1, token, 7] = bad
        found = check(*spoiled.values())
        for name in ("q_descale", "k_descale", "v_descale"):
            assert torch.equal(getattr(found, name), getattr(calm, name))


def test_used_keys_come_first(tools) -> None:
    from lpattn.quantize.fused import used_keys

    length = 1500
    q, k, v = tools.make(3, 4, 2, 200, length, 128)
    k, v = k + 2, v + 2
    used = torch.rand(3, length, device="cuda") < torch.tensor([[1.0], [0.4], [0.0]], device="cuda")
    tools.poison_all()
    keys = used_keys(used[:, None, None], 3, length)
    assert torch.equal(keys.counts, used.sum(1, dtype=torch.int32))
    for b, count in enumerate(keys.counts.tolist()):
        assert torch.equal(keys.indices[b, :count], used[b].nonzero()[:, 0].int())
    junk = (x.masked_fill(~used[:, None, :, None], torch.nan) for x in (k, v))
    found = quantize(q, *junk, keys=keys)
    everything = quantize(q, k, v)
    assert torch.equal(found.key[0].view(torch.uint8), everything.key[0].view(torch.uint8))
    assert torch.equal(found.value[0].view(torch.uint8), everything.value[0].view(torch.uint8))
    for x, data, scale, constant, least in (
        (k, found.key, found.k_descale, found.constants[0], SAMPLED),
        (v, found.value, found.v_descale, found.constants[1], SAMPLED),
    ):
        for b, count in enumerate(keys.counts.tolist()):
            one = slice(b, b + 1)
            mine = x[one][:, :, used[b]]
            check_data(data[one, :count], mine, constant[one, :, None], scale[one, :, None, None], False)
            if count:
                check_constant(constant[one, :, None], mine, least)
            assert not data[b, count:].view(torch.uint8).any()


def test_past_2_to_the_31_elements(tools) -> None:
    heads, length, dim = 130, 131072, 128
    assert heads * length * dim > 2**31
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    x = torch.randn(1, heads, length, dim, device="cuda", dtype=BF16)
    x[0, heads - 1, length - 3] = 1e4
    found = quantize(x, x, x)
    for head in (0, 63, 127, 128, heads - 1):
        one = slice(head, head + 1)
        for data, scale, constant in (
            (found.query, found.q_descale, None),
            (found.key, found.k_descale, found.constants[0]),
            (found.value, found.v_descale, found.constants[1]),
        ):
            shift = 0.0 if constant is None else constant[:, one, None]
            check_data(data[:, :, one], x[:, one], shift, scale[:, one, None, None], False)
