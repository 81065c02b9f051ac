"""Which key tiles of a mask a kernel must look at: two passes over the mask whose results stay on the device.

Any structure that a mask may have (padding, a window, blocks, a prefix) is thus found, and none is guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lpattn.quantize.fused.inputs import addresses_of
from lpattn.quantize.fused.launcher import Launch, short_way
from lpattn.quantize.fused.memory import part_of

_WARPS = 4
_ROWS = 32
"""Rows that a program looks at together; sizes of tiles are multiples of it."""
_AT_ONCE = 128
"""Tiles that are put into lists at a time."""
_PART, _WHOLE = tl.constexpr(1), tl.constexpr(2)
"""What a tile may be; one of which nothing is seen is 0."""
WORD_KEYS = 32
"""Keys of a word."""
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
        words: int32 [Bm, Hm, Qm, words], of a bool mask, or None: bit j of word w says whether key 32w + j is seen.
    """

    mask: torch.Tensor
    lists: torch.Tensor
    counts: torch.Tensor
    used: torch.Tensor
    queries: int
    keys: int
    words: torch.Tensor | None

    def used_by(self, kv_heads: int, heads: int) -> torch.Tensor:
        """Bool [Bm, Hkv or 1, kv_len]: keys that some query of a KV head's group sees."""
        if self.used.shape[1] == 1 or heads == kv_heads:
            return self.used
        return self.used.unflatten(1, (kv_heads, -1)).any(2)


def list_mask_tiles(mask: torch.Tensor, kv_len: int, queries: int, keys: int, *, with_words: bool = False) -> MaskTiles:
    """Look at a mask once, in two launches.

    Args:
        mask: bool or floating point, four dimensions that broadcast to [B, H, q_len, kv_len], any strides.
        kv_len: number of keys.
        queries, keys: sizes of a tile: a multiple of 32, and a power of two that is one.
        with_words: also write the mask as :attr:`MaskTiles.words`. The mask is bool.
    """
    at = mask.data_ptr()
    plan = _plan(mask.shape, mask.stride(), mask.dtype, at % 16 == 0, kv_len, queries, keys, with_words, mask.device)
    return plan.run(mask, at)


class _Plan(NamedTuple):
    """The launches for masks that are alike, and what they write."""

    queries: int
    keys: int
    lists_shape: tuple[int, ...]
    used_shape: tuple[int, ...]
    words_shape: tuple[int, ...] | None
    look: Launch
    list: Launch

    def run(self, mask: torch.Tensor, at: int) -> MaskTiles:
        """Look at a mask, which is at that address."""
        device = mask.device
        stream = short_way(device)
        lists = torch.empty(self.lists_shape, dtype=torch.int32, device=device)
        counts = torch.empty(self.lists_shape[:-1], dtype=torch.int32, device=device)
        used = torch.zeros(self.used_shape, dtype=torch.bool, device=device)
        words = None if self.words_shape is None else torch.empty(self.words_shape, dtype=torch.int32, device=device)
        found = torch.empty((*self.lists_shape[:3], self.lists_shape[4]), dtype=torch.int8, device=device)
        self.look.on(
            stream,
            (at, *addresses_of((found, used, words))),
            lambda: (mask.view(torch.uint8) if mask.dtype == torch.bool else mask, found, used, words),
        )
        self.list.on(stream, addresses_of((found, lists, counts)), lambda: (found, lists, counts))
        return MaskTiles(mask, lists, counts, used, self.queries, self.keys, words)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    aligned: bool,
    kv_len: int,
    queries: int,
    keys: int,
    with_words: bool,
    device: torch.device,
) -> _Plan:
    batch, heads, rows, _ = shape
    lists_shape = _lists_shape(shape, kv_len, queries, keys)
    *_, q_tiles, _, room = lists_shape
    in_units, unit, dense = mask_strides(shape, strides)
    look = Launch(
        look_at_tiles,
        batch * heads * q_tiles * room,
        (heads, rows, kv_len, q_tiles, room, *in_units),
        (queries, 1 if rows == 1 else _ROWS, keys, unit, dense, dtype == torch.bool),
        (dtype, aligned, with_words),
        _WARPS,
        False,
        device,
    )
    return _Plan(
        queries,
        keys,
        lists_shape=lists_shape,
        used_shape=(batch, heads, kv_len),
        words_shape=(batch, heads, rows, _words_of_a_query(kv_len, keys)) if with_words else None,
        look=look,
        list=Launch(list_tiles, batch * heads * q_tiles, (room,), (_AT_ONCE,), (), 1, False, device),
    )


def list_strides(shape: tuple[int, ...], kv_len: int, queries: int, keys: int) -> tuple[tuple[int, ...], int]:
    """How far apart the lists of a mask of that shape are.

    Returns:
        (pairs of lists between one batch entry, head or tile of queries and the next, 0 where the mask broadcasts;
        the key tiles that a list has room for)
    """
    *sizes, _, room = _lists_shape(shape, kv_len, queries, keys)
    return _contiguous(sizes, 1), room


def word_strides(shape: tuple[int, ...], kv_len: int, keys: int) -> tuple[int, ...]:
    """Words between one batch entry, head or query of a mask of that shape and the next, 0 where it broadcasts."""
    return _contiguous(shape[:3], _words_of_a_query(kv_len, keys))


def _lists_shape(shape: tuple[int, ...], kv_len: int, queries: int, keys: int) -> tuple[int, int, int, int, int]:
    batch, heads, rows = shape[:3]
    return batch, heads, -(-rows // queries), 2, -(-kv_len // keys)


def _words_of_a_query(kv_len: int, keys: int) -> int:
    """All of its last tile's, too."""
    return -(-kv_len // keys) * keys // WORD_KEYS


def _contiguous(sizes: Sequence[int], last: int) -> tuple[int, ...]:
    """Strides of a contiguous tensor with these sizes and a last one, of all but that; 0 where it broadcasts."""
    strides = part_of(torch.int32, (*sizes, last), 0).strides
    return tuple(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=False))


def mask_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], int, bool]:
    """Strides of a mask as kernels take them: (all but the last in units, 0 where it broadcasts), unit, last is 1."""
    steps = tuple([0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)])
    dense = steps[3] == 1
    unit = _ALIGNED if dense and not any(step % _ALIGNED for step in steps[:3]) else 1
    return (*(step // unit for step in steps[:3]), steps[3]), unit, dense


@triton.jit(do_not_specialize=["heads", "rows", "kv_len", "q_tiles", "room", "mask_b", "mask_h", "mask_q", "mask_k"])
def look_at_tiles(
    mask, found, used, words, heads, rows, kv_len, q_tiles, room, mask_b, mask_h, mask_q, mask_k,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, DENSE: tl.constexpr,
    BOOL: tl.constexpr,
):  # fmt: skip
    """One program per tile of QUERIES queries and BN keys; ``used`` must be False everywhere.

    A tile is gone through by ROWS rows, which leaves registers for many programs at a time: the memory is the limit.
    """
    WORDS: tl.constexpr = BN // 32
    program = tl.program_id(0).to(tl.int64)
    i, head_tile = program % room, program // room
    tile, head = head_tile % q_tiles, head_tile // q_tiles
    b, h = head // heads, head % heads
    column = i * BN + tl.arange(0, BN)
    word = i * WORDS + tl.arange(0, WORDS)
    inside = i * BN + BN <= kv_len
    some = tl.zeros((ROWS, WORDS), tl.int32)
    whole = tl.full((ROWS, WORDS), -1, tl.int32)
    end = tl.minimum(tile * QUERIES + QUERIES, rows)
    for first in tl.range(tile * QUERIES, end, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < rows)[:, None]
        # Rows behind the last one are asked for as that one.
        at = mask + (b * mask_b + h * mask_h + tl.minimum(row, rows - 1)[:, None] * mask_q) * UNIT
        at += column[None, :] * (1 if DENSE else mask_k)
        exists = (column < kv_len)[None, :]
        if BOOL:
            seen = _words_of(_of_tile(at, inside, exists, 0) != 0)
            plain = seen
        else:
            bias = _of_tile(at, inside, exists, float("-inf")).to(tl.float32)
            seen = _words_of(bias != float("-inf"))
            plain = _words_of(bias == 0.0)
        some |= tl.where(there, seen, 0)
        whole &= tl.where(there, plain, -1)
        if words is not None:
            tl.store(words + (head * rows + row)[:, None] * (room * WORDS) + word[None, :], seen, mask=there)
    # By key: [WORDS, 32].
    some_query = (tl.reduce(some, 0, _either)[:, None] >> tl.arange(0, 32)[None, :]) & 1
    key = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(used + head * kv_len + key, some_query != 0, mask=(key < kv_len) & (some_query != 0))
    all_plain = tl.min((whole == -1).to(tl.int32))
    tl.store(found + program, tl.where(all_plain != 0, _WHOLE, tl.max(some_query)).to(tl.int8))


@triton.jit
def _of_tile(at, inside, exists, other):
    """Load rows of a tile, asking each element whether it exists only where keys may be missing: byte by byte."""
    if inside:  # noqa: SIM108
        found = tl.load(at)
    else:
        found = tl.load(at, mask=exists, other=other)
    return found


@triton.jit
def _words_of(bits):
    """Bool [ROWS, BN] to int32 [ROWS, BN / 32], 32 neighbours in a word, the first one lowest."""
    ROWS: tl.constexpr = bits.shape[0]
    BN: tl.constexpr = bits.shape[1]
    moved = bits.to(tl.int32) << (tl.arange(0, BN) % 32)[None, :]
    return tl.sum(tl.reshape(moved, (ROWS, BN // 32, 32)), 2)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["room"])
def list_tiles(found, lists, counts, room, AT_ONCE: tl.constexpr):
    """One program per tile of queries: its key tiles in two lists."""
    program = tl.program_id(0).to(tl.int64)
    whole_list = lists + program * 2 * room
    whole_count, part_count = 0, 0
    for first in tl.range(0, room, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        kind = tl.load(found + program * room + tile, mask=tile < room, other=0)
        whole, part = (kind == _WHOLE).to(tl.int32), (kind == _PART).to(tl.int32)
        tl.store(whole_list + whole_count + tl.cumsum(whole, 0) - 1, tile, mask=whole != 0)
        tl.store(whole_list + room + part_count + tl.cumsum(part, 0) - 1, tile, mask=part != 0)
        whole_count += tl.sum(whole)
        part_count += tl.sum(part)
    tl.store(counts + program * 2, whole_count)
    tl.store(counts + program * 2 + 1, part_count)
