"""Causal masks that say where they are aligned, as ``torch.nn.attention.bias`` makes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import lpattn


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return [torch.randn(1, 2, length, 16) for length in (5, 9, 9)]


@pytest.mark.parametrize("make", [causal_lower_right, causal_upper_left])
def test_it_is_aligned_where_it_says(qkv, make, sqnr) -> None:
    bias = make(5, 9)
    found = lpattn.low_precision_sdpa(*qkv, attn_mask=bias, backend="bf16_reference")
    assert sqnr(found, F.scaled_dot_product_attention(*qkv, attn_mask=bias)) > 60


def test_backends_see_a_mask_or_is_causal(qkv) -> None:
    lower, upper = (lpattn.explain(*qkv, attn_mask=make(5, 9)).call for make in (causal_lower_right, causal_upper_left))
    assert (lower.mask, lower.causal) == (lpattn.MaskKind.BOOL, lpattn.CausalKind.NONE)
    assert (upper.mask, upper.causal) == (lpattn.MaskKind.NONE, lpattn.CausalKind.TOP_LEFT)
    square = lpattn.explain(qkv[0], qkv[0], qkv[0], causal_lower_right(5, 5)).call
    assert (square.mask, square.causal) == (lpattn.MaskKind.NONE, lpattn.CausalKind.TOP_LEFT)


def test_rotated_queries_and_keys(qkv, sqnr) -> None:
    q, k, v = (x.transpose(1, 2) for x in qkv)
    cos, sin = torch.ones(9, 1, 16), torch.zeros(9, 1, 16)
    found = lpattn.low_precision_rope_sdpa(
        q, k, v, cos[:5], sin[:5], causal_lower_right(5, 9), cos_k=cos, sin_k=sin, backend="bf16_reference"
    )
    assert sqnr(found, F.scaled_dot_product_attention(*qkv, attn_mask=causal_lower_right(5, 9))) > 60


def test_it_goes_without_is_causal(qkv) -> None:
    with pytest.raises(lpattn.InvalidArgumentError, match="is_causal goes without a CausalBias"):
        lpattn.low_precision_sdpa(*qkv, attn_mask=causal_lower_right(5, 9), is_causal=True)
