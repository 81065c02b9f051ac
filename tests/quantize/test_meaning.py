"""What a call means: the emulation is compared with F.scaled_dot_product_attention of the installed torch.

Only gross errors matter here: noise may be three times the predicted mean square, which is the ratio of the largest
rounding error, ulp / 2, squared to its variance, ulp^2 / 12. A wrong mask is off by much more.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lpattn.errors import InvalidArgumentError
from lpattn.quantize import FA3_PER_HEAD, PER_BLOCK, PER_BLOCK_F16, RECIPES, emulated_attention
from lpattn.types import HadamardMode

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
LENGTHS = [1, 2, 7, 63, 64, 65, 127, 128, 129, 130]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def qkv(batch=2, heads=4, kv_heads=2, q_len=20, kv_len=24, dim=32, dim_v=None, dtype=torch.float32):
    shapes = [(heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim_v or dim)]
    return [torch.randn(batch, *shape, dtype=dtype) for shape in shapes]


def sdpa(q, k, v, attn_mask=None, is_causal=False, softmax_scale=None):
    if is_causal and attn_mask is not None:  # SDPA takes one of the two
        tril = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        boolean = attn_mask.dtype is torch.bool
        attn_mask = attn_mask & tril if boolean else attn_mask.masked_fill(~tril, -math.inf)
        is_causal = False
    if attn_mask is not None:
        attn_mask = torch.atleast_2d(attn_mask)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask, is_causal=is_causal, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@pytest.fixture
def check(exact, predicted):
    def run(q, k, v, recipe=PER_BLOCK, **kwargs):
        out, lse = emulated_attention(q, k, v, recipe=recipe, return_lse=True, **kwargs)
        want = sdpa(q, k, v, **kwargs)
        assert out.shape == want.shape
        assert out.dtype == q.dtype
        noise = predicted(q, k, v, recipe, **kwargs)
        resolution = want.double().square().sum() * torch.finfo(q.dtype).eps ** 2 * 4
        error = (out.double() - want.double()).square().sum()
        assert error <= 3 * noise.total + resolution, (error, noise.total)
        reference = exact(q, k, v, **kwargs).lse
        assert lse.dtype == torch.float32
        assert torch.equal(lse == -math.inf, reference == -math.inf)
        assert ((out == 0).all(-1) | (reference > -math.inf)).all()
        rows = reference > -math.inf
        assert ((lse.double() - reference).abs() <= noise.lse_budget + 1e-5 + reference.abs() * 2e-7)[rows].all()
        return out, lse

    return run


@recipes
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths_around_tile_edges(check, recipe, is_causal):
    for i, q_len in enumerate(LENGTHS):
        kv_len = LENGTHS[(3 * i + 2) % len(LENGTHS)]
        check(*qkv(1, 2, 1, q_len, kv_len), recipe, is_causal=is_causal)
        check(*qkv(1, 1, 1, q_len, q_len), recipe, is_causal=is_causal)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 8), (8, 1), (8, 2), (6, 3)])
@pytest.mark.parametrize(("dim", "dim_v"), [(16, 16), (40, 24), (72, 72), (80, 128), (192, 128), (256, 256)])
def test_heads_and_head_dims(check, heads, kv_heads, dim, dim_v):
    for mode in HadamardMode:
        check(*qkv(1, heads, kv_heads, 9, 33, dim, dim_v), replace(PER_BLOCK, hadamard=mode))
    check(*qkv(1, heads, kv_heads, 9, 33, dim, dim_v), FA3_PER_HEAD)


def masks(batch, heads, q_len, kv_len):
    padding = torch.arange(kv_len) >= torch.tensor([[5], [kv_len // 2]])[:batch]  # left padding
    full = torch.rand(batch, heads, q_len, kv_len) < 0.5
    holes = full.clone()
    holes[:, 1, 3:6] = False
    bias = torch.randn(batch, heads, q_len, kv_len)
    return {
        "padding": padding[:, None, None],
        "padding per query": padding[:, None, None].expand(-1, 1, q_len, -1),
        "full": full,
        "per head": full[:1],
        "2-D": full[0, 0],
        "1-D": padding[0],
        "one key column": full[:, :, :, :1],
        "rows without keys": holes,
        "nothing": torch.zeros(1, 1, 1, 1, dtype=torch.bool),
        "everything": torch.ones(1, 1, q_len, kv_len, dtype=torch.bool),
        "bias": bias,
        "bias per head": bias[:1, :, :1],
        "bias with -inf": bias.masked_fill(~holes, -math.inf),
        "min": torch.zeros(q_len, kv_len).masked_fill(~full[0, 0], torch.finfo(torch.float32).min),
        "all min": torch.full((1, 1, q_len, kv_len), torch.finfo(torch.float32).min),
        "transposed": full.mT.contiguous().mT,
    }


@pytest.mark.parametrize("name", masks(2, 4, 7, 9))
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(20, 150), (150, 70)])
def test_masks(check, name, is_causal, q_len, kv_len):
    check(*qkv(2, 4, 2, q_len, kv_len, 16), attn_mask=masks(2, 4, q_len, kv_len)[name], is_causal=is_causal)


@recipes
@pytest.mark.parametrize("name", ["rows without keys", "bias with -inf", "nothing", "padding"])
def test_masks_with_every_recipe_and_rotation(check, recipe, name):
    for mode in HadamardMode:
        mask = masks(2, 4, 20, 24)[name]
        check(*qkv(), replace(recipe, hadamard=mode), attn_mask=mask)


def test_rows_whose_keys_are_all_at_finfo_min_attend_uniformly():
    q, k, v = qkv(kv_heads=4)
    mask = torch.full((20, 24), torch.finfo(torch.float32).min)
    out, lse = emulated_attention(q, k, v, recipe=PER_BLOCK, attn_mask=mask, return_lse=True)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=2**-4, atol=0.05)
    assert lse.isfinite().all()


@recipes
@pytest.mark.parametrize("scale", [0.0, 0.02, 1.0, -0.3])
def test_scale(check, recipe, scale):
    check(*qkv(), recipe, softmax_scale=scale)


def test_scale_zero_is_uniform_even_for_huge_logits():
    q, k, v = qkv(kv_heads=4)
    for mode in HadamardMode:
        recipe = replace(PER_BLOCK, hadamard=mode)
        out, lse = emulated_attention(q * 1e30, k * 1e30, v, recipe=recipe, softmax_scale=0.0, return_lse=True)
        torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=2**-4, atol=0.05)
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(24)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(check, dtype):
    check(*qkv(dtype=dtype))
    check(*qkv(dtype=dtype), FA3_PER_HEAD, is_causal=True)
    check(*qkv(dtype=dtype), attn_mask=torch.randn(20, 24).to(dtype))


def test_a_float64_mask_keeps_its_range():
    q, k, v = qkv()
    mask = torch.full((20, 24), torch.finfo(torch.float64).min, dtype=torch.float64)
    assert (emulated_attention(q, k, v, recipe=PER_BLOCK, attn_mask=mask) != 0).any(-1).all()


@pytest.mark.parametrize("empty", [{"batch": 0}, {"heads": 0, "kv_heads": 0}, {"q_len": 0}, {"kv_len": 0}])
@recipes
def test_empty_inputs(empty, recipe):
    q, k, v = qkv(**empty)
    out, lse = emulated_attention(q, k, v, recipe=recipe, return_lse=True)
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert (out == 0).all()
    assert lse.shape == q.shape[:3]
    assert (lse == -math.inf).all()


def test_strides_do_not_matter_and_inputs_stay():
    q, k, v = qkv(2, 4, 4, 130, 130)
    want = emulated_attention(q, k, v, recipe=PER_BLOCK, is_causal=True)
    for change in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):
        strided = [change(x) for x in (q, k, v)]
        copies = [x.clone() for x in strided]
        assert torch.equal(emulated_attention(*strided, recipe=PER_BLOCK, is_causal=True), want)
        assert all(torch.equal(a, b) for a, b in zip(strided, copies, strict=True))


def test_autocast_and_reduced_matmul_precision_change_nothing():
    q, k, v = qkv(q_len=140, kv_len=140)
    want = emulated_attention(q, k, v, recipe=PER_BLOCK)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(emulated_attention(q, k, v, recipe=PER_BLOCK), want)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(emulated_attention(q, k, v, recipe=PER_BLOCK), want, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_float32_matmul_precision(before)


JUNK = [math.nan, math.inf, -math.inf, 1e30]


@recipes
@pytest.mark.parametrize("mode", HadamardMode)
@pytest.mark.parametrize("junk", JUNK)
def test_masked_tokens_may_hold_anything(recipe, mode, junk):
    recipe = replace(recipe, hadamard=mode)
    q, k, v = qkv(2, 4, 2, 20, 150)
    padding = masks(2, 4, 20, 150)["padding"]
    ours, theirs = ([x.masked_fill(~padding.mT[:, :, :, :1], fill) for x in (k, v)] for fill in (junk, 0.0))
    for mask in (padding, torch.zeros(padding.shape).masked_fill(~padding, -math.inf)):
        want = emulated_attention(q, *theirs, recipe=recipe, attn_mask=mask, return_lse=True)
        got = emulated_attention(q, *ours, recipe=recipe, attn_mask=mask, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert got[0].isfinite().all()
    # Keys that causality hides from every query, and queries that see nothing, are masked in the same sense.
    spoiled = [x.index_fill(2, torch.arange(20, 150), junk) for x in (k, v)]
    want = emulated_attention(q, k[:, :, :20], v[:, :, :20], recipe=recipe, is_causal=True)
    got = emulated_attention(q, *spoiled, recipe=recipe, is_causal=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    rows = (torch.arange(20) != 3)[:, None]
    want = emulated_attention(q, k, v, recipe=recipe, attn_mask=rows, return_lse=True)
    junk_row = q.index_fill(2, torch.tensor([3]), junk)
    got = emulated_attention(junk_row, k, v, recipe=recipe, attn_mask=rows, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@recipes
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["none", "causal", "mask"])
def test_what_is_not_finite_reaches_only_the_rows_that_see_it(exact, predicted, recipe, which, bad, kind):
    q, k, v = qkv(2, 4, 2, 140, 140, 16)
    mask = torch.rand(1, 4, 140, 140) < 0.3 if kind == "mask" else None
    kwargs = {"attn_mask": mask, "is_causal": kind == "causal"}
    spoiled = {"query": q.clone(), "key": k.clone(), "value": v.clone()}
    spoiled[which][1, 1, 5, 3] = bad
    for mode in HadamardMode:
        out, lse = emulated_attention(**spoiled, recipe=replace(recipe, hadamard=mode), return_lse=True, **kwargs)
        reached = torch.zeros(2, 4, 140, dtype=torch.bool)
        if which == "query":
            reached[1, 1, 5] = True
        else:
            reached[1, 2:] = exact(q, k, v, **kwargs).visible[1, 2:, :, 5]
        assert torch.equal(out.isnan().any(-1), reached)
        assert out.isfinite()[~reached].all()
        if which == "value":
            assert lse.isfinite().all()
        else:
            assert torch.equal(lse.isnan(), reached)
        if which == "value" and mode is HadamardMode.NONE:
            assert out[..., :3].isfinite().all()
            assert out[..., 4:].isfinite().all()
        theirs = sdpa(**{f"{n[0]}": x for n, x in spoiled.items()}, **kwargs)
        if not math.isinf(bad):
            assert not (out.isnan().any(-1) & theirs.isfinite().all(-1)).any()
        # The other rows are as accurate as if the value were not there.
        clean = {"query": q.clone(), "key": k.clone(), "value": v.clone()}
        clean[which][1, 1, 5, 3] = 0.0
        error = out - exact(clean["query"], clean["key"], clean["value"], **kwargs).out
        noise = predicted(*clean.values(), recipe, **kwargs)
        assert error[~reached].square().sum() <= 3 * noise.total


def test_nan_and_inf_biases_spoil_their_row():
    q, k, v = qkv(kv_heads=4)
    for bad in (math.nan, math.inf):
        bias = torch.zeros(20, 24)
        bias[3, 4] = bad
        out = emulated_attention(q, k, v, recipe=PER_BLOCK, attn_mask=bias)
        want = sdpa(q, k, v, attn_mask=bias)
        assert torch.equal(out.isnan(), want.isnan())


def test_wrong_inputs_are_refused_with_what_is_needed():
    q, k, v = qkv()

    def refuse(match, *args, **kwargs):
        with pytest.raises(InvalidArgumentError, match=match):
            emulated_attention(*args, recipe=PER_BLOCK, **kwargs)

    refuse(r"query must be \[B, H, S, D\]; got 3 dimensions", q[0], k, v)
    refuse("query must be one of float16.*got torch.int32", q.int(), k, v)
    refuse("key must have the dtype and device of query, torch.float32", q, k.half(), v)
    refuse(r"query's number of heads, 4, must be a multiple of key's; got 3", q, *qkv(kv_heads=3)[1:])
    refuse(r"key must share query's batch and head_dim", q, k[..., :8], v)
    refuse(r"value must share key's \[B, Hkv, kv_len\]", q, k, v[:, :, 1:])
    refuse(r"attn_mask must be broadcastable.*\[2, 4, 20, 24\]; got \[24, 20\]", q, k, v, attn_mask=torch.ones(24, 20))
    refuse(r"attn_mask must be bool.*got torch.int64.*mask.bool\(\)", q, k, v, attn_mask=torch.ones(24).long())
    refuse("requires grad", q.requires_grad_(), k, v)
    with torch.no_grad():
        emulated_attention(q, k, v, recipe=PER_BLOCK)


def test_one_tile_or_many_agree():
    q, k, v = qkv(1, 2, 1, 64, 256, 64)
    one = emulated_attention(q, k, v, recipe=replace(PER_BLOCK_F16, block=256, tile=256))
    many = emulated_attention(q, k, v, recipe=replace(PER_BLOCK_F16, block=256, tile=32))
    # Only P's rounding differs, by the running maximum it is relative to.
    assert (one - many).square().sum() <= 2 * 2**-8 / 3 * one.square().sum()
