"""Exact attention in float64, and how much noise the casts to e4m3 ought to add to it."""

import math
from dataclasses import dataclass

import pytest
import torch

from lpattn.quantize import Granularity, Recipe, RowSum


@dataclass
class Exact:
    """Plain-formula attention in float64, with what else the tests want to know about it."""

    out: torch.Tensor  # [B, H, q_len, D_v]
    lse: torch.Tensor  # [B, H, q_len]
    weights: torch.Tensor  # [B, H, q_len, kv_len]
    visible: torch.Tensor  # bool, as weights


def _exact(q, k, v, attn_mask=None, is_causal=False, softmax_scale=None) -> Exact:
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    logits = (q * scale) @ k.mT
    visible = torch.ones(logits.shape, dtype=torch.bool)
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            visible = visible & attn_mask
        else:
            visible = visible & (attn_mask != -math.inf)
            # Added in float32, as SDPA adds it: next to finfo.min every finite logit vanishes.
            logits = (logits.float() + attn_mask).double() if attn_mask.abs().max() > 1e30 else logits + attn_mask
    if is_causal:
        visible = visible.tril()
    logits = logits.masked_fill(~visible, -math.inf)
    weights = torch.where(visible.any(-1, keepdim=True), logits.softmax(-1), 0.0)
    out = (weights[..., None, :] @ torch.where(visible.any(-2).any(1, keepdim=True)[..., None], v, 0.0)[:, :, None])[
        ..., 0, :
    ]
    return Exact(out, logits.logsumexp(-1), weights, visible)


def _ulp_variance(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Variance of the rounding error of x / scale to e4m3, times scale^2: 3 mantissa bits, smallest exponent -6."""
    scaled = x / scale
    exponent = torch.frexp(scaled.abs())[1] - 1
    variance = (torch.ldexp(torch.ones_like(x), exponent.clamp_min(-6) - 3) * scale) ** 2 / 12
    # The largest of each group maps to a value that e4m3 has.
    is_exact = (scaled.to(torch.float8_e4m3fn).to(x.dtype) - scaled).abs() <= 1e-6 * scaled.abs()
    return variance.masked_fill(is_exact, 0.0)


def _scales(x: torch.Tensor, granularity: Granularity, qmax: float, heads: int, power_of_two: bool) -> torch.Tensor:
    if granularity is Granularity.PER_HEAD:
        groups = x.unflatten(1, (heads, -1)).abs().amax((2, 3, 4), keepdim=True)
        amax = groups.expand(-1, -1, x.shape[1] // heads, -1, -1).flatten(1, 2)
    elif granularity is Granularity.PER_TOKEN:
        amax = x.abs().amax(-1, keepdim=True)
    elif granularity is Granularity.PER_CHANNEL:
        amax = x.abs().amax(2, keepdim=True)
    else:
        blocks = [b.abs().amax((2, 3), keepdim=True).expand(-1, -1, b.shape[2], -1) for b in x.split(128, dim=2)]
        amax = torch.cat(blocks, 2)
    scale = (amax / qmax).clamp_min(1e-300)
    return 2.0 ** scale.log2().ceil() if power_of_two else scale


@dataclass
class Noise:
    """First-order prediction of what the casts do."""

    out: torch.Tensor  # [B, H, q_len, D_v], mean square of the output's error
    lse: torch.Tensor  # [B, H, q_len], standard deviation of lse's error that the casts of q and k cause
    row_sum: torch.Tensor  # [B, H, q_len], the largest error that the cast of P can cause in lse, if it can

    @property
    def total(self) -> float:
        return self.out.sum().item()

    @property
    def lse_budget(self) -> torch.Tensor:
        """6 standard deviations. P's errors are not independent: equal logits are all rounded to the same side."""
        return 6 * self.lse + self.row_sum


def _predicted(q, k, v, recipe: Recipe, **kwargs) -> Noise:
    """Propagate the rounding errors of q, k, v and P through attention, taken as independent (no rotation).

    A logit moves by sum(dq*k + q*dk), so a weight p moves by p times that; moving weight to a key moves the output by
    v minus the output, because the weights are normalised by the sum of the rounded ones.
    """
    exact = _exact(q, k, v, **kwargs)
    heads = k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if kwargs.get("softmax_scale") is None else kwargs["softmax_scale"]
    used = exact.visible.any(2).unflatten(1, (heads, -1)).any(2)[..., None]
    count = used.sum(2, keepdim=True).clamp_min(1)
    k, v = torch.where(used, k, 0.0), torch.where(used, v, 0.0)
    k = torch.where(used, k - k.sum(2, keepdim=True) / count, 0.0) if recipe.smooth_k else k
    mean = v.sum(2, keepdim=True) / count if recipe.smooth_v else torch.zeros_like(v[:, :, :1])
    v = torch.where(used, v - mean, 0.0)

    def variance(x, granularity, qmax):
        return _ulp_variance(x, _scales(x, granularity, qmax, heads, recipe.power_of_two))

    var_q = variance(q, recipe.q_granularity, recipe.qk_max)
    var_k = variance(k, recipe.k_granularity, recipe.qk_max)
    var_v = variance(v, recipe.v_granularity, recipe.v_max)
    group = q.shape[1] // heads
    k, v, var_k, var_v, mean = (x.repeat_interleave(group, 1) for x in (k, v, var_k, var_v, mean))
    p, top = exact.weights, exact.weights.amax(-1, keepdim=True).clamp_min(1e-300)
    var_p = torch.where(p > 0, _ulp_variance(p / top * recipe.p_scale, 1.0) * (top / recipe.p_scale) ** 2, 0.0)
    var_logit = scale**2 * (var_q @ (k**2).mT + q**2 @ var_k.mT)
    weight = p**2 * var_logit + var_p
    # The denominator of unrounded weights does not follow P's rounding: what that adds to the sum is out's own size.
    out = exact.out - mean
    moved = weight @ v**2 - 2 * out * (weight @ v) + out**2 * weight.sum(-1, keepdim=True)
    if recipe.row_sum is RowSum.UNROUNDED:
        moved = (p**2 * var_logit) @ v**2 - 2 * out * ((p**2 * var_logit) @ v)
        moved = moved + out**2 * (p**2 * var_logit).sum(-1, keepdim=True) + var_p @ v**2
    # q's error is the same for all keys of a row, so it reaches lse through the weighted mean of k.
    var_lse = scale**2 * ((var_q * (p @ k) ** 2).sum(-1) + (p**2 * (q**2 @ var_k.mT)).sum(-1))
    rounded = recipe.row_sum is RowSum.ROUNDED
    row_sum = (3 * var_p).sqrt().sum(-1) if rounded else torch.zeros_like(var_lse)  # half an ulp each
    return Noise(moved + p**2 @ var_v, var_lse.sqrt(), row_sum)


@pytest.fixture(scope="session")
def exact():
    return _exact


@pytest.fixture(scope="session")
def predicted():
    return _predicted
