"""Launches the Hopper kernel: tile shapes by head_dim, descriptors, the grid."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lpattn.kernels.hopper import softmax
from lpattn.kernels.hopper.attention import KEYS, ROWS, attention
from lpattn.quantize.fused import PerBlock
from lpattn.quantize.fused.launcher import launch
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
        late: P is computed after the P V of the tile before has ended: fewer registers, less overlap.
    """

    keys: int
    stages: int
    consumers: int
    registers: int
    mean_registers: int
    parts: int
    late: bool


TILES = {
    64: Tile(keys=128, stages=4, consumers=3, registers=160, mean_registers=128, parts=1, late=True),
    128: Tile(keys=128, stages=4, consumers=2, registers=240, mean_registers=168, parts=1, late=False),
    256: Tile(keys=64, stages=4, consumers=2, registers=240, mean_registers=168, parts=2, late=True),
}
"""By head_dim, rounded up."""

EXPONENTIALS = {"linear": softmax.LINEAR.value, "step": softmax.STEP.value, "quadratic": softmax.QUADRATIC.value}


def tile_of(head_dim: int) -> tuple[int, Tile]:
    """The head_dim that is computed with, and the tile."""
    lanes = next(lanes for lanes in TILES if head_dim <= lanes)
    return lanes, TILES[lanes]


def attend(
    quantized: PerBlock,
    dtype: torch.dtype,
    *,
    causal: bool = False,
    return_lse: bool = False,
    exponential: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of quantized q, k and v, in one launch.

    Args:
        quantized: with q times the softmax scale times log2(e), and ``qk_max`` :data:`QK_MAX`.
        dtype: of the output: float16, bfloat16 or float32.
        causal: query i sees keys 0..i.
        return_lse: also return the log-sum-exp.
        exponential: how P is made: "step" (default), "quadratic" (default with return_lse, whose sums have no bias),
            or "linear", the fastest and least exact; see :mod:`.softmax`.

    Returns:
        The output [B, q_len, H, D], contiguous, still without V's constant and transformed where V was (Hadamard); and
        the natural log-sum-exp in float32 [B, H, q_len] or None.
    """
    batch, heads, q_len, pitch = quantized.query.shape
    dim, device = quantized.value.shape[3], quantized.query.device
    lanes, tile = tile_of(dim)
    kind = EXPONENTIALS[exponential or ("quadratic" if return_lse else "step")]
    # V's constant has been transformed with V, and is added before the transform is undone.
    constant = quantized.v_constant if quantized.hadamard is HadamardMode.NONE else None
    out = torch.empty((batch, q_len, heads, dim), dtype=dtype, device=device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device) if return_lse else None
    shift = quantized.lse_shift if return_lse else None
    q_tiles = -(-q_len // (tile.consumers * ROWS.value))
    tiles = q_tiles * batch * heads
    scales = (quantized.q_scale, quantized.k_scale, quantized.v_scale, constant)
    descriptors = (
        _descriptor(quantized.query, pitch, ROWS.value, lanes),
        _descriptor(quantized.key, pitch, tile.keys, lanes),
        _descriptor(quantized.value, KEYS.value, lanes, tile.keys),
    )
    # What the kernel is compiled for, of tensors: they are parts of larger ones, and may not be aligned.
    kinds = (dtype, quantized.key_counts is None, *(x is not None and x.data_ptr() % 16 == 0 for x in scales))
    launch(
        attention,
        min(tiles, _multiprocessors(device)),
        (*scales, out, lse, shift, quantized.key_counts, *descriptors),
        (heads, quantized.k_scale.shape[1], q_len, quantized.kv_len, q_tiles, tiles),
        (
            tile.keys,
            lanes,
            tile.stages,
            tile.consumers,
            causal,
            kind,
            tile.parts,
            tile.late,
            dim,
            0 if constant is None else constant.shape[2],
            tile.registers,
        ),
        (kinds, return_lse, shift is None),
        num_warps=4,
        maxnreg=tile.mean_registers,
    )
    return out, lse


def _descriptor(x: torch.Tensor, width: int, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], [rows, columns], _layout(columns))


@functools.cache
def _layout(columns: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=min(columns, 128), element_bitwidth=8, rank=2)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
