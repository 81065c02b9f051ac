"""fp8_fa3 with rotation: one fused call against rotating first, and against exact attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lpattn
from lpattn.rope import rotate

pytestmark = pytest.mark.gpu

LENGTH = 300

# Shape of cos and sin, and whether pairs are interleaved.
TABLES = {
    "half-split": ((LENGTH, 1, 128), False),
    "interleaved": ((LENGTH, 1, 128), True),
    "half-split on 32 lanes": ((LENGTH, 1, 32), False),
    "interleaved on 32 lanes": ((LENGTH, 1, 32), True),
    "per sequence": ((2, LENGTH, 1, 128), False),
}


def tables(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin as real ones are, but that their halves differ."""
    angle = 6 * torch.rand(shape, device="cuda")
    return angle.cos(), angle.sin()


def inputs(tools, dtype, length=LENGTH, dim=128):
    """q, k, v [B, S, H, D]"""
    q, k, v = tools.make(2, 4, 2, length, length, dim, dtype)
    return tuple(x.transpose(1, 2).contiguous() for x in (q, k, v))


def check(fa3, tools, qkv, cos, sin, cos_k, sin_k, interleaved, used=None, **options) -> None:
    q, k, v = qkv
    mask = None if used is None else used[:, None, None]
    options = {"attn_mask": mask, "enable_gqa": True, "backend": fa3, "return_lse": True} | options
    keys = {} if cos_k is None else {"cos_k": cos_k, "sin_k": sin_k}
    out, lse = lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, interleaved=interleaved, **keys, **options)
    cos_k, sin_k = (cos, sin) if cos_k is None else (cos_k, sin_k)
    causal = options.get("is_causal", False)
    rows = torch.arange(q.shape[1], device="cuda")
    exactly = (rotate(q.double(), cos, sin, interleaved), rotate(k.double(), cos_k, sin_k, interleaved), v)
    expected, expected_lse = tools.exact_rows(
        *(x.transpose(1, 2) for x in exactly), rows, causal, q.shape[3] ** -0.5, used
    )
    assert tools.sqnr(expected, out) >= 23.5
    assert (lse - expected_lse).abs().max() < 0.15
    first = [x.transpose(1, 2) for x in (rotate(q, cos, sin, interleaved), rotate(k, cos_k, sin_k, interleaved), v)]
    apart, apart_lse = lpattn.low_precision_sdpa(*first, **options)
    # Rotated q and k that are rounded to bfloat16 in between go to another neighbour in e4m3 in one of 64 cases (the
    # mean error of the one, over the spacing of the other), and are then a whole step apart. A step squared is 12 times
    # the mean squared error of rounding: the two differ by 12 / 64 of that, 7 dB below it.
    floor = 45.0 if q.dtype == torch.float32 else 26.0
    assert tools.sqnr(apart, out) >= floor
    assert (lse - apart_lse).abs().max() < (0.02 if q.dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("name", TABLES)
def test_rotation(fa3, tools, name) -> None:
    shape, interleaved = TABLES[name]
    check(fa3, tools, inputs(tools, torch.float32), *tables(*shape), None, None, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rotation_in_bfloat16(fa3, tools, interleaved, causal) -> None:
    cos, sin = tables(LENGTH, 1, 128)
    check(fa3, tools, inputs(tools, torch.bfloat16), cos, sin, None, None, interleaved, is_causal=causal)


def test_rotation_and_transform(fa3, tools) -> None:
    check(fa3, tools, inputs(tools, torch.bfloat16), *tables(LENGTH, 1, 128), None, None, False, hadamard="qkv")


def test_rotation_at_a_head_dim_that_is_no_power_of_two(fa3, tools) -> None:
    check(fa3, tools, inputs(tools, torch.float32, dim=96), *tables(LENGTH, 1, 96), None, None, False)


def test_keys_at_other_positions(fa3, tools) -> None:
    q, _, _ = inputs(tools, torch.float32, length=77)
    _, k, v = inputs(tools, torch.float32)
    of_q, of_k = tables(2, 77, 1, 128), tables(LENGTH, 1, 128)
    check(fa3, tools, (q, k, v), *of_q, *of_k, False)


@pytest.mark.parametrize("name", ["half-split", "half-split on 32 lanes"])
def test_rotation_with_key_padding(fa3, tools, name) -> None:
    shape, interleaved = TABLES[name]
    q, k, v = inputs(tools, torch.float32)
    used = torch.rand(2, LENGTH, device="cuda") < 0.5
    k, v = (x.masked_fill(~used[:, :, None, None], torch.nan) for x in (k, v))
    check(fa3, tools, (q, k, v), *tables(*shape), None, None, interleaved, used)


def test_tables_of_any_strides(fa3, tools) -> None:
    qkv = inputs(tools, torch.float32)
    cos, sin = tables(LENGTH, 1, 128)
    options = {"enable_gqa": True, "backend": fa3}
    want = lpattn.low_precision_rope_sdpa(*qkv, cos, sin, **options)
    turned = [x.squeeze(1).t().contiguous().t()[:, None] for x in (cos, sin)]
    wide = [torch.stack((x, x), -1)[..., 0] for x in (cos, sin)]
    for layout in (turned, wide, (cos, turned[1]), [x.expand(2, LENGTH, 4, 128)[:, :, :1] for x in (cos, sin)]):
        # Other loads are other code, in which the compiler may fuse other products with sums.
        assert tools.sqnr(want, lpattn.low_precision_rope_sdpa(*qkv, *layout, **options)) > 40


class Rotated(nn.Module):
    def forward(self, q, k, v, cos, sin):
        return lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, is_causal=True, enable_gqa=True)


@torch.inference_mode()
def test_the_report_says_that_it_was_fused(fa3, tools) -> None:
    model = lpattn.apply_low_precision_attention(Rotated().eval(), fa3)
    model(*inputs(tools, torch.bfloat16), *tables(LENGTH, 1, 128))
    report = lpattn.attention_report(model)[""]
    assert report.rope == "fused"
    assert report.low == {fa3: 1}
