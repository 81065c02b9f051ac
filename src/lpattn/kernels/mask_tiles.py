"""Which key tiles of a mask a kernel must look at: a pass over the mask whose result stays on the device.

Any structure that a mask may have (padding, a window, blocks, a prefix) is thus found, and none is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lpattn.quantize.fused.launcher import kinds_of, launch

_WARPS = 8
_ALIGNED = 16
"""Strides in units of so many elements let the compiler see that loads are aligned."""


@dataclass(frozen=True)
class MaskTiles:
    """A mask, and for every tile of queries the key tiles that it leaves something of.

    For a mask of shape [Bm, Hm, Qm, Km], each size 1 where it broadcasts, and Q tiles of queries (one where Qm is 1):

    Attributes:
        mask: bool (True attends) or floating point, [Bm, Hm, Qm, Km].
        lists: int32 [Bm, Hm, Q, 2, tiles]: the key tiles that are seen in full (the mask says nothing of them), then
            those of which something is seen; in increasing order, then anything.
        counts: int32 [Bm, Hm, Q, 2]: how many.
        used: bool [Bm, Hm, kv_len]: keys that some query sees.
        queries, keys: sizes of a tile.
    """

    mask: torch.Tensor
    lists: torch.Tensor
    counts: torch.Tensor
    used: torch.Tensor
    queries: int
    keys: int

    def used_by(self, kv_heads: int, heads: int) -> torch.Tensor:
        """Bool [Bm, Hkv or 1, kv_len]: keys that some query of a KV head's group sees."""
        if self.used.shape[1] == 1 or heads == kv_heads:
            return self.used
        return self.used.unflatten(1, (kv_heads, -1)).any(2)


def list_mask_tiles(mask: torch.Tensor, kv_len: int, queries: int, keys: int) -> MaskTiles:
    """Look at a mask once, in one launch.

    Args:
        mask: bool or floating point, four dimensions that broadcast to [B, H, q_len, kv_len], any strides.
        kv_len: number of keys.
        queries, keys: sizes of a tile, powers of two.
    """
    batch, heads, rows, _ = mask.shape
    q_tiles, room, device = -(-rows // queries), -(-kv_len // keys), mask.device
    lists = torch.empty((batch, heads, q_tiles, 2, room), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads, q_tiles, 2), dtype=torch.int32, device=device)
    used = torch.zeros((batch, heads, kv_len), dtype=torch.bool, device=device)
    strides, unit, dense = mask_strides(mask)
    launch(
        list_tiles,
        batch * heads * q_tiles,
        (mask, lists, counts, used),
        (heads, rows, kv_len, q_tiles, room, *strides),
        (1 if rows == 1 else queries, keys, unit, dense, mask.dtype == torch.bool),
        kinds_of((mask,)),
        _WARPS,
    )
    return MaskTiles(mask, lists, counts, used, queries, keys)


def mask_strides(mask: torch.Tensor) -> tuple[tuple[int, ...], int, bool]:
    """Strides of a mask as kernels take them: (all but the last in units, 0 where it broadcasts), unit, last is 1."""
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    dense = strides[3] == 1
    unit = _ALIGNED if dense and not any(stride % _ALIGNED for stride in strides[:3]) else 1
    return (*(stride // unit for stride in strides[:3]), strides[3]), unit, dense


@triton.jit(do_not_specialize=["heads", "rows", "kv_len", "q_tiles", "room", "mask_b", "mask_h", "mask_q", "mask_k"])
def list_tiles(
    mask, lists, counts, used, heads, rows, kv_len, q_tiles, room, mask_b, mask_h, mask_q, mask_k,
    BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, DENSE: tl.constexpr, BOOL: tl.constexpr,
):  # fmt: skip
    """One program per tile of BM queries of a head; ``used`` must be False everywhere."""
    program = tl.program_id(0).to(tl.int64)
    tile, head = program % q_tiles, program // q_tiles
    b, h = head // heads, head % heads
    row = tile * BM + tl.arange(0, BM)
    of_row = mask + (b * mask_b + h * mask_h + row[:, None] * mask_q) * UNIT
    whole_list = lists + program * 2 * room
    part_list = whole_list + room
    whole_count, part_count = 0, 0
    for i in tl.range(0, tl.cdiv(kv_len, BN)):
        column = i * BN + tl.arange(0, BN)
        exists = (row < rows)[:, None] & (column < kv_len)[None, :]
        at = of_row + column[None, :].to(tl.int64) * (1 if DENSE else mask_k)
        if BOOL:
            seen = tl.load(at, mask=exists, other=0) != 0
            plain = seen
        else:
            bias = tl.load(at, mask=exists, other=float("-inf")).to(tl.float32)
            seen = bias != float("-inf")
            plain = bias == 0.0
        some_query = tl.max(seen.to(tl.int32), 0)
        tl.store(used + head * kv_len + column, some_query != 0, mask=(column < kv_len) & (some_query != 0))
        seen_at_all = tl.max(some_query)
        whole = tl.min((plain | (row >= rows)[:, None]).to(tl.int32))
        tl.store(whole_list + whole_count, i, mask=whole != 0)
        tl.store(part_list + part_count, i, mask=(whole == 0) & (seen_at_all != 0))
        whole_count += whole
        part_count += tl.where(whole == 0, seen_at_all, 0)
    tl.store(counts + program * 2, whole_count)
    tl.store(counts + program * 2 + 1, part_count)
