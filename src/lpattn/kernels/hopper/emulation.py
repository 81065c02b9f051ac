"""What the Hopper kernel computes, in plain PyTorch: tile by tile, with every rounding but that inside of a product.

It is the oracle of the kernel's tests. Where the tensor cores add products, it adds in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lpattn.quantize.hadamard import hadamard_transform
from lpattn.types import HadamardMode

if TYPE_CHECKING:
    from lpattn.quantize.fused import PerBlock

LINEAR, STEP, EX2 = range(3)
TOP = {LINEAR: 31.0 - 3 / 64, STEP: 31.25 - 2 / 64, EX2: 8.0}
"""What float16 value a logit that equals the reference has."""

_KEYS = 128


def emulate(
    quantized: PerBlock, *, kind: int, causal: bool = False, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of quantized tensors.

    Args:
        quantized: q, k and v; see :class:`lpattn.quantize.fused.PerBlock`.
        kind: how P is made: LINEAR, STEP or EX2.
        causal: query i sees keys 0..i.
        mask: bool, broadcastable to [B, H, q_len, kv_len]: True attends. The kernel goes through key tiles in another
            order then, which moves a reference, and with it the rounding of P, now and then.

    Returns:
        The output in float64 [B, H, q_len, D], and the natural log-sum-exp, [B, H, q_len], -inf where no key is seen.
    """
    q = quantized.query.float()
    batch, heads, q_len, dim = q.shape
    group = heads // quantized.key.shape[1]
    blocks = quantized.k_scale.shape[2]
    k = quantized.key.float().repeat_interleave(group, 1)
    v = unpermuted(quantized.value).repeat_interleave(group, 1)
    k_scale, v_scale = (x.double().repeat_interleave(group, 1) for x in (quantized.k_scale, quantized.v_scale))
    rows = torch.arange(q_len, device=q.device)
    seen = torch.full((batch, 1, q_len), quantized.kv_len, device=q.device)
    if quantized.key_counts is not None:
        seen = torch.minimum(seen, quantized.key_counts[:, None, None])
    if causal:
        seen = torch.minimum(seen, rows + 1)

    top = TOP[kind]
    offset = torch.full((batch, heads, q_len), torch.inf, dtype=torch.float64, device=q.device)
    total = torch.zeros_like(offset)
    acc = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=torch.float64, device=q.device)
    for block in reversed(range(blocks)):
        keys = slice(block * _KEYS, (block + 1) * _KEYS)
        s = torch.zeros(batch, heads, q_len, _KEYS, dtype=torch.float64, device=q.device)
        for lane in range(0, dim, 32):
            step = slice(lane, min(lane + 32, dim))
            s = (s + (q[..., step] @ k[:, :, keys, step].mT).double()).half().double()
        columns = torch.arange(block * _KEYS, (block + 1) * _KEYS, device=q.device)
        s = s.masked_fill(columns >= seen[..., None], -torch.inf)
        if mask is not None:
            shown = mask.expand(batch, heads, q_len, quantized.kv_len)[..., keys]
            there = shown.shape[-1]
            s[..., :there] = s[..., :there].masked_fill(~shown, -torch.inf)
        largest = torch.where(s.isnan(), -torch.inf, s).amax(-1)
        c = quantized.q_scale.double() * k_scale[:, :, block, None]
        c = torch.where((largest * c).abs() > 8000.0, 1.0, c.clamp(2.0**-24, 32768.0))
        raised = (top - largest * c).clamp(max=8192.0)
        after = torch.minimum(offset, _half(raised - (raised.abs() - 1024.0).clamp(min=0.0) * 2.0**-10))
        change = torch.where(offset == torch.inf, 0.0, torch.exp2(after - offset))
        t = (s * _half(c)[..., None] + after[..., None]).half().double()
        p = _half(torch.exp2(t)).float().to(torch.float8_e4m3fn).double() if kind == EX2 else _values(_codes(t, kind))
        total = total * change + p.sum(-1)
        acc = acc * change[..., None] + (p @ v[:, :, keys].double()) * v_scale[:, :, block, None, None]
        offset = after
    out = acc / total[..., None]
    constant = quantized.v_constant[:, :, None, : v.shape[-1]].repeat_interleave(group, 1)
    empty = total == 0.0
    out = torch.where(empty[..., None], 0.0, out + constant)
    if quantized.hadamard is not HadamardMode.NONE:
        out = hadamard_transform(out)[..., : quantized.dim_v]
    lse = (top - offset - 8.0 + torch.log2(total)) * math.log(2.0)
    if quantized.lse_shift is not None:
        # In the unit of q times its factor, a power of two as the logits are.
        lse = lse + quantized.lse_shift * math.log(2.0)
    return out, torch.where(empty, -torch.inf, lse)


def _codes(t: torch.Tensor, kind: int) -> torch.Tensor:
    """Codes of e4m3 numbers, and NaN, of float16 values t that lie in [16, 32) where P is not tiny."""
    inside = torch.where(t.isnan() | (t < 16.0), 16.0, t)
    if kind == LINEAR:
        codes = ((inside - 16.0) * 8.0).round()
    else:
        middle = (inside * 64.0).long() & 32
        codes = ((inside - middle / 32 * 3 / 64) * 8.0 - 130.0).round().clamp(min=0.0)
    codes = torch.where(t < 16.0, 0.0, codes)
    return torch.where(t.isnan(), t, codes)


def _values(codes: torch.Tensor) -> torch.Tensor:
    return torch.where(
        codes < 8.0, codes * 2.0**-9, torch.exp2(torch.floor(codes / 8.0) - 7.0) * (1.0 + codes.remainder(8.0) / 8.0)
    )


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.half().double()


def unpermuted(value: torch.Tensor) -> torch.Tensor:
    """V in e4m3 as it is stored, [B, Hkv, blocks, D, 128], as float32 [B, Hkv, blocks * 128, D]."""
    slots = torch.arange(_KEYS, device=value.device)
    keys = slots // 16 * 16 + slots // 2 % 2 * 8 + slots // 4 % 4 * 2 + slots % 2
    batch, kv_heads, blocks, dim, _ = value.shape
    natural = torch.empty(batch, kv_heads, blocks, _KEYS, dim, device=value.device)
    natural[..., keys, :] = value.float().mT
    return natural.reshape(batch, kv_heads, blocks * _KEYS, dim)
