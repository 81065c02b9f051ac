"""Launches the Hopper kernel: tile shapes by head_dim, descriptors, the grid."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lpattn.kernels.hopper import softmax
from lpattn.kernels.hopper.attention import KEYS, ROWS, attention
from lpattn.kernels.mask_tiles import MaskTiles, list_mask_tiles, list_strides, word_strides
from lpattn.quantize.fused import PerBlock
from lpattn.quantize.fused.device import multiprocessors
from lpattn.quantize.fused.inputs import addresses_of
from lpattn.quantize.fused.launcher import Launch, short_way
from lpattn.quantize.fused.memory import Layout
from lpattn.quantize.fused.reading import lanes_of
from lpattn.types import HadamardMode

QK_MAX: float = softmax.QK_MAX.value
"""What q and k are to be quantized to at most."""


class Tile(NamedTuple):
    """How a head_dim is attended; found by measuring on an H100.

    Attributes:
        keys: per tile of K and V.
        stages: tiles of K and V in flight.
        consumers: of 64 query rows and four warps each.
        registers: per thread of a consumer.
        mean_registers: per thread, over all warps.
        parts: of head_dim, that P V is done in.
        listed_parts: the same with a mask, which takes registers.
        late: P is computed after the P V of the tile before has ended: fewer registers, less overlap.
        early: exponentials whose codes are put together before that P V has ended, and moved then.
        ahead: exponentials with which the next tiles are waited for in front of the end of P V, so that it overlaps
            with the row maximum. Where that takes more registers than there are, it is slower.
        across: threads that store a row of the output side by side, 16 bytes each.
    """

    keys: int
    stages: int
    consumers: int
    registers: int
    mean_registers: int
    parts: int
    listed_parts: int
    late: bool
    early: tuple[int, ...]
    ahead: tuple[int, ...]
    across: int


EXPONENTIALS = {"linear": softmax.LINEAR.value, "step": softmax.STEP.value, "ex2": softmax.EX2.value}

TILES = {
    64: Tile(
        keys=128,
        stages=4,
        consumers=3,
        registers=160,
        mean_registers=128,
        parts=1,
        listed_parts=1,
        late=True,
        early=(),
        ahead=(softmax.LINEAR.value,),
        across=8,
    ),
    128: Tile(
        keys=128,
        stages=4,
        consumers=2,
        registers=240,
        mean_registers=168,
        parts=1,
        listed_parts=1,
        late=False,
        early=(softmax.LINEAR.value,),
        ahead=tuple(EXPONENTIALS.values()),
        across=4,
    ),
    256: Tile(
        keys=128,
        stages=2,
        consumers=2,
        registers=232,
        mean_registers=168,
        parts=4,
        listed_parts=8,
        late=True,
        early=(),
        ahead=(),
        across=4,
    ),
}
"""By head_dim, rounded up."""

if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
    # Its compiler has no registers for 128 keys, and would spill them.
    TILES[256] = TILES[256]._replace(keys=64, stages=4, registers=240)


def tile_of(head_dim: int) -> tuple[int, Tile]:
    """The head_dim that is computed with, and the tile."""
    lanes = next(lanes for lanes in TILES if head_dim <= lanes)
    return lanes, TILES[lanes]


def tiles_of(mask: torch.Tensor, kv_len: int, head_dim: int) -> MaskTiles:
    """What :func:`attend` wants to know of a bool mask, four dimensions that broadcast to [B, H, q_len, kv_len]."""
    _, tile = tile_of(head_dim)
    return list_mask_tiles(mask, kv_len, tile.consumers * ROWS.value, tile.keys, with_words=True)


def attend(
    quantized: PerBlock,
    dtype: torch.dtype,
    *,
    causal: bool = False,
    mask: MaskTiles | None = None,
    return_lse: bool = False,
    exponential: str = "step",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of quantized q, k and v, in one launch.

    Args:
        quantized: with q times the softmax scale times log2(e), and ``qk_max`` :data:`QK_MAX`.
        dtype: of the output: float16, bfloat16 or float32.
        causal: query i sees keys 0..i.
        mask: of :func:`tiles_of`, for ``quantized.dim_v``; neither together with ``causal`` nor with packed keys.
        return_lse: also return the log-sum-exp; ``quantized`` has ``lse_shift`` then.
        exponential: how P is made: "step", "linear", the fastest and least exact, or "ex2", which the others are
            measured against; see :mod:`.softmax`.

    Returns:
        The output [B, q_len, H, D], contiguous, a Hadamard transform of v undone in float32; and the natural
        log-sum-exp in float32 [B, H, q_len] or None.
    """
    layout = quantized.layout
    plan = plan_attention(
        layout,
        dtype,
        causal=causal,
        return_lse=return_lse,
        exponential=exponential,
        packed=quantized.key_counts is not None,
        mask_shape=None if mask is None else mask.mask.shape[:3],
    )
    return plan.run(quantized, short_way(layout.device), mask)


def plan_attention(
    layout: Layout,
    dtype: torch.dtype,
    *,
    causal: bool,
    return_lse: bool,
    exponential: str,
    packed: bool,
    mask_shape: tuple[int, ...] | None = None,
) -> Attention:
    """How :func:`attend` attends to what is laid out like that.

    Args:
        layout: of the operands.
        dtype, causal, return_lse, exponential: of :func:`attend`.
        packed: whether the operands have ``key_counts``.
        mask_shape: the first three dimensions of a mask.
    """
    return _plan(layout, dtype, causal, EXPONENTIALS[exponential], not packed, return_lse, mask_shape)


class _Address:
    """All that Triton asks the tensor of a descriptor for, when it launches a kernel that is compiled."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class Attention(NamedTuple):
    """The launch for operands that are laid out alike, and what it writes.

    Attributes:
        layout: of the operands.
        dtype: of the output; ``out_shape`` and ``lse_shape`` (None: there is none) are what is written.
        descriptors: of q, k and v, all but their addresses.
        launch: the launch.
    """

    layout: Layout
    dtype: torch.dtype
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...] | None
    descriptors: tuple[tuple[list[int], list[int], list[int], gl.NVMMASharedLayout], ...]
    launch: Launch

    def run(
        self, quantized: PerBlock, stream: int | None, mask: MaskTiles | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend. ``stream`` is what :func:`lpattn.quantize.fused.launcher.short_way` says; returns as attend()."""
        layout, dtype, out_shape, lse_shape, (q, k, v), launch = self
        device, key_counts = layout.device, quantized.key_counts
        out = torch.empty(out_shape, dtype=dtype, device=device)
        lse = None if lse_shape is None else torch.empty(lse_shape, dtype=torch.float32, device=device)
        of_mask = (None, None, None) if mask is None else (mask.lists, mask.counts, mask.words)
        start = quantized.address
        # By the addresses of what it takes, and by the tensors themselves, in the same order.
        launch.on(
            stream,
            (
                start + layout.q_scale.start,
                start + layout.k_scale.start,
                start + layout.v_scale.start,
                start + layout.v_constant.start,
                out.data_ptr(),
                None if lse is None else lse.data_ptr(),
                None if lse is None or layout.lse_shift is None else start + layout.lse_shift.start,
                None if key_counts is None else key_counts.data_ptr(),
                *addresses_of(of_mask),
                _descriptor(*q, _Address(start + layout.query.start)),
                _descriptor(*k, _Address(start + layout.key.start)),
                _descriptor(*v, _Address(start + layout.value.start)),
            ),
            lambda: (
                quantized.q_scale,
                quantized.k_scale,
                quantized.v_scale,
                quantized.v_constant,
                out,
                lse,
                None if lse is None else quantized.lse_shift,
                key_counts,
                *of_mask,
                _descriptor(*q, quantized.query),
                _descriptor(*k, quantized.key),
                _descriptor(*v, quantized.value),
            ),
        )
        return out, lse


@functools.lru_cache(maxsize=1024)
def _plan(
    layout: Layout,
    dtype: torch.dtype,
    causal: bool,
    kind: int,
    all_keys: bool,
    return_lse: bool,
    mask_shape: tuple[int, ...] | None,
) -> Attention:
    batch, heads, q_len, pitch = layout.query.shape
    kv_heads, kv_len, dim, device = layout.key.shape[1], layout.kv_len, layout.dim_v, layout.device
    rows_v = layout.value.shape[3]
    lanes, tile = tile_of(dim)
    blocks = -(-kv_len // KEYS.value)
    kv_rows = batch * kv_heads * blocks
    rows = tile.consumers * ROWS.value
    q_tiles = -(-q_len // rows)
    tiles = q_tiles * batch * heads
    steps: tuple[int, ...] = (0,) * 7
    if mask_shape is not None:
        of_lists, room = list_strides(mask_shape, kv_len, rows, tile.keys)
        steps = (*of_lists, room, *word_strides(mask_shape, kv_len, tile.keys))
    launch = Launch(
        attention,
        min(tiles, multiprocessors(device)),
        (heads, kv_heads, q_len, kv_len, q_tiles, tiles, *steps),
        (
            tile.keys,
            lanes,
            tile.stages,
            tile.consumers,
            causal,
            kind,
            tile.parts if mask_shape is None else tile.listed_parts,
            tile.late,
            dim,
            lanes_of(dim),
            tile.across,
            kind in tile.ahead,
            kind in tile.early,
            tile.registers,
            rows_v,
            layout.hadamard is not HadamardMode.NONE,
        ),
        (dtype, all_keys, return_lse, layout.lse_shift is None, mask_shape is None),
        num_warps=4,
        launch_pdl=False,
        device=device,
        maxnreg=tile.mean_registers,
    )
    return Attention(
        layout=layout,
        dtype=dtype,
        out_shape=(batch, q_len, heads, dim),
        lse_shape=(batch, heads, q_len) if return_lse else None,
        descriptors=(
            ([batch * heads * q_len, pitch], [pitch, 1], [ROWS.value, lanes], layout_of(lanes)),
            ([kv_rows * KEYS.value, pitch], [pitch, 1], [tile.keys, lanes], layout_of(lanes)),
            ([kv_rows * rows_v, KEYS.value], [KEYS.value, 1], [lanes, tile.keys], layout_of(tile.keys)),
        ),
        launch=launch,
    )


def _descriptor(
    shape: list[int], strides: list[int], block: list[int], layout: gl.NVMMASharedLayout, of: torch.Tensor | _Address
) -> TensorDescriptor:
    """A descriptor of memory whose plan is known to be right: its constructor would check it again at every call."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = of, shape, strides
    made.block_shape, made.layout, made.padding = block, layout, "zero"
    return made


@functools.cache
def layout_of(columns: int) -> gl.NVMMASharedLayout:
    """The layout of a tile in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(columns, 128), element_bitwidth=8, rank=2)
