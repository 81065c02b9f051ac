"""Attention over operands that are quantized per block: from a ``PerBlock`` to the output, in one launch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from lpattn.kernels.mask_tiles import MaskTiles, list_strides, mask_strides
from lpattn.kernels.portable import ADDITIVE_MASK, BOOL_MASK, BOTH, NO_BAND, NO_MASK, UPPER, attend_tiles
from lpattn.kernels.shapes import TileShape
from lpattn.quantize.fused import BLOCK, PerBlock
from lpattn.quantize.fused.inputs import addresses_of
from lpattn.quantize.fused.launcher import INTERPRETED, Launch, short_way
from lpattn.quantize.fused.memory import Layout
from lpattn.quantize.fused.reading import lanes_of
from lpattn.types import HadamardMode


@dataclass(frozen=True)
class Band:
    """Query i sees the keys i - before to i + after only.

    Attributes:
        before, after: how many; None: all of them. ``Band(after=0)`` is causal.
        from_end: positions are counted from the last query and the last key (bottom-right aligned), not from the first.
    """

    before: int | None = None
    after: int | None = None
    from_end: bool = False


_NO_BAND = Band()
_FAR = 2**30
"""More keys than there are."""


def attend(
    quantized: PerBlock,
    shape: TileShape,
    dtype: torch.dtype,
    *,
    band: Band = _NO_BAND,
    mask: MaskTiles | None = None,
    q_counts: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in the precision that the operands are quantized to.

    Args:
        quantized: q times softmax_scale * log2(e), k and v; with ``lse_shift`` where the log-sum-exp is wanted.
        shape: of the tiles; ``mask`` was listed for the same.
        dtype: of the output: float16, bfloat16 or float32.
        band: which keys a query sees. Not together with a mask.
        mask: as :func:`lpattn.kernels.mask_tiles.list_mask_tiles` found it; not with packed keys.
        q_counts: int32 [B], how many queries of each batch entry are there; rows past them are not written.
        return_lse: also return the log-sum-exp.

    Returns:
        (output, lse): [B, q_len, H, D_v] in ``dtype``, contiguous, zeros in rows that see no key, and where that is
        float16 at most its largest number; None, or float32 [B, H, q_len], natural logarithm, -inf in such rows.

    Raises:
        ValueError: a mask together with a band, packed keys or another shape's tiles.

    Precision:
        Products of eight-bit values are exact. Logits, softmax and sums are float32; P times 2^8 is rounded to e4m3
        (float16 where v is), and the row sum adds what was rounded: four values of e4m3 in float16, the rest in
        float32, or all in float32 where the shape has the tensor cores do so. Every tile of keys has an accumulator of
        its own in the tensor cores (on Hopper narrower than float32), which is added to one in float32. The inverse
        Hadamard transform takes rows in float16, scaled to a largest value of 1. Two runs give the same bits.

    Source:
        Online softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867). Accumulation in two levels and scales per block:
        SageAttention2 (arXiv:2411.10958). P times 2^8: FlashAttention-3 (arXiv:2407.08608, section 3.3).
    """
    if mask is not None and (band != _NO_BAND or quantized.key_counts is not None):
        raise ValueError("a mask already says what a query sees: pass it without a band, and with keys in their places")
    if mask is not None and (mask.queries, mask.keys) != (shape.queries, shape.keys):
        raise ValueError(f"the mask was listed in tiles of {mask.queries} x {mask.keys}, not {shape[:2]}")
    layout, key_counts = quantized.layout, quantized.key_counts
    device = layout.device
    batch, heads, q_len, _ = layout.query.shape
    out = torch.empty((batch, q_len, heads, layout.dim_v), dtype=dtype, device=device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device) if return_lse else None
    of_mask = (None, None, None) if mask is None else (mask.mask, mask.lists, mask.counts)
    what = None
    if mask is not None:
        what = (mask.mask.dtype, mask.mask.shape, mask.mask.stride(), mask.mask.data_ptr() % 16 == 0)
    run = _plan(layout, shape, dtype, band, what, q_counts is None, key_counts is None, return_lse)
    start = quantized.address
    shift = layout.lse_shift if return_lse else None
    # By the addresses of what it takes, and by the tensors themselves, in the same order.
    run.on(
        short_way(device),
        (
            start + layout.query.start,
            start + layout.key.start,
            start + layout.value.start,
            start + layout.q_scale.start,
            start + layout.k_scale.start,
            start + layout.v_scale.start,
            start + layout.v_constant.start,
            None if shift is None else start + shift.start,
            *addresses_of((q_counts, key_counts, *of_mask, out, lse)),
        ),
        lambda: (
            quantized.query,
            quantized.key,
            quantized.value,
            quantized.q_scale,
            quantized.k_scale,
            quantized.v_scale,
            quantized.v_constant,
            None if shift is None else quantized.lse_shift,
            q_counts,
            key_counts,
            *of_mask,
            out,
            lse,
        ),
    )
    return out, lse


@functools.lru_cache(maxsize=1024)
def _plan(
    layout: Layout,
    shape: TileShape,
    dtype: torch.dtype,
    band: Band,
    mask: tuple[torch.dtype, tuple[int, ...], tuple[int, ...], bool] | None,
    all_queries: bool,
    all_keys: bool,
    return_lse: bool,
) -> Launch:
    """The launch for what is laid out like that. ``mask``: its dtype, shape, strides, and whether it is aligned."""
    batch, heads, q_len, dim = layout.query.shape
    kv_heads, rows_v = layout.key.shape[1], layout.value.shape[3]
    kind = NO_BAND if band.before is None and band.after is None else UPPER if band.before is None else BOTH
    before = _FAR if band.before is None else band.before
    after = _FAR if band.after is None else band.after
    numbers: tuple[int, ...] = (0,) * 8
    mask_kind, unit, dense = NO_MASK, 1, True
    if mask is not None:
        mask_dtype, sizes, steps, _ = mask
        strides, unit, dense = mask_strides(sizes, steps)
        mask_kind = BOOL_MASK if mask_dtype == torch.bool else ADDITIVE_MASK
        of_lists, room = list_strides(sizes, layout.kv_len, shape.queries, shape.keys)
        numbers = (*strides, *of_lists, room)
    q_tiles = -(-q_len // shape.queries)
    return Launch(
        attend_tiles,
        batch * heads * q_tiles,
        (heads, kv_heads, q_len, layout.kv_len, q_tiles, before, after, *numbers),
        (
            dim,
            rows_v,
            layout.dim_v,
            lanes_of(dim),
            layout.v_constant.shape[2],
            BLOCK,
            shape.queries,
            shape.keys,
            shape.stages,
            kind.value,
            band.from_end,
            mask_kind.value,
            unit,
            dense,
            layout.hadamard is not HadamardMode.NONE,
            shape.sum_by_product,
            shape.k_reordered,
            INTERPRETED,
        ),
        (
            layout.query.dtype,
            dtype,
            return_lse,
            layout.lse_shift is None,
            all_queries,
            all_keys,
            None if mask is None else (mask_dtype, mask[3]),
        ),
        shape.warps,
        False,
        layout.device,
    )
