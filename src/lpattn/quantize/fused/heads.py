"""What callers see of the passes: tensors in, e4m3 and scales out."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch

from lpattn.quantize.fused import layout, turning
from lpattn.quantize.fused.device import check_device, multiprocessors, overlaps_on
from lpattn.quantize.fused.inputs import NO_EPS, NO_MORE, Alike, Keys, More, Rotation, addresses_of, alike, more_of
from lpattn.quantize.fused.launcher import INTERPRETED, Launch, short_way
from lpattn.quantize.fused.output import restore
from lpattn.quantize.fused.per_head import quantize_heads
from lpattn.quantize.fused.per_head_sample import sample_heads
from lpattn.quantize.fused.reading import how_to_read, lanes_of, power_of_two
from lpattn.types import HadamardMode, Norm

# Tile shapes and programs per multiprocessor that were the fastest on an H200; with a rotation, on an H100.
_TILE = 4096
"""Elements of a head in a tile of the quantization."""
_WARPS = 2
_PROGRAMS = 4
_SAMPLE_WARPS = 4
_HEAVY_SAMPLE_WARPS = 8
"""A sample that is rotated, transformed or wide needs more registers than 4 warps have."""
_TURNED_TILE = 2048
"""With a rotation: elements of q or k in a tile, and half of those of v."""
_TURNED_WARPS = 4
_WIDE_TURNED_WARPS = 8
"""Of all programs, where there is a rotation; of heads of more than 128 lanes."""
_TURNED_PROGRAMS = 1
"""Programs per multiprocessor below which one takes no more heads, up to the most."""
_PARTS = 64
_TURNED_PARTS, _TURNED_V_PARTS = 2, 16
"""Parts of the sample of a head at most: of q, k and v; with a rotation, of q and k, and of v."""
_TURNED_SAMPLE_REGISTERS = 128
"""Per thread of up to 128 lanes, where all of v is looked at beside a sample that is rotated."""
_RESTORED_TOKENS = 64
_RESTORE_WARPS = 4
_RESTORE_PROGRAMS = 3
_TAKEN = 8
"""So many of :attr:`.inputs.More.tensors` are read here: what tokens are multiplied with comes last, and is not."""
_MANY_TILES = 16
"""Tiles per program where there are more heads than programs."""


class Quantized(Protocol):
    """What :func:`restore_output` has to know of quantized tensors."""

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""

    @property
    def hadamard(self) -> HadamardMode:
        """The mode that was applied."""

    @property
    def buffer(self) -> torch.Tensor:
        """Where V's constant is: see :func:`lpattn.quantize.fused.layout.constants`."""


class PerHead(NamedTuple):
    """q, k and v in e4m3 with a descale per (batch, KV head): value = data * descale (+ constant, for k and v).

    Attributes:
        query: torch.float8_e4m3fn [B, q_len, H, D] in [B, H, S, D] memory; of q times ``factor``.
        key, value: torch.float8_e4m3fn [B, kv_len, Hkv, D] in [B, H, S, D] memory.
        q_descale, k_descale, v_descale: float32 [B, Hkv], powers of two.
        lse_shift: float32 [B, H, q_len], q.constant of k; None unless it was asked for.
        hadamard: the mode that was applied.
        buffer: what the passes told each other: see :mod:`.layout`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    q_descale: torch.Tensor
    k_descale: torch.Tensor
    v_descale: torch.Tensor
    lse_shift: torch.Tensor | None
    hadamard: HadamardMode
    buffer: torch.Tensor

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.key.shape[2]

    @property
    def constants(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What was subtracted from k and from v after rotation and transform.

        float32 [B, Hkv, lanes], lanes being D padded to a power of two. V's is zero where its mean is not significant.
        """
        return _constants(self.buffer, self.k_descale, lanes_of(self.key.shape[3]))


def quantize_per_head(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    factor: float = 1.0,
    hadamard: HadamardMode = HadamardMode.NONE,
    rope: Rotation | None = None,
    norm: Norm | None = None,
    keys: Keys | None = None,
    with_lse_shift: bool = False,
) -> PerHead:
    """Quantize in two launches, without waiting for the device.

    Args:
        query: [B, H, q_len, D], float16, bfloat16 or float32, any strides.
        key, value: [B, Hkv, kv_len, D] in the same dtype.
        factor: what q is multiplied by.
        hadamard: which operands are transformed along head_dim, after rotation. D must then be a power of two, 32 or
            more.
        rope: rotates q and k first.
        norm: normalizes q and k before that, over each head.
        keys: which tokens of k and v are used: these come first, in their order, and are followed by zeros.
        with_lse_shift: also compute q.constant, which the smoothing of k takes from every logit.

    Precision:
        Norm and rotation are float32, as are the transform (inputs rounded to their own dtype) and smoothing. Scales
        are powers of two, at least 2^-56 (2^-126 for v). They map a bound of the sampled magnitudes (the largest, plus
        the largest constant) to at most 448, with a headroom of 16 where not all tokens were sampled: e4m3 is floating
        point, and loses precision only below 2^-6. An inf or NaN becomes NaN, alone (with a rotation: with
        the other lane of its pair; with a Hadamard transform: with its whole token; what a norm makes of it comes
        first), and enters neither scale nor constant. Magnitudes above about 1e36 may overflow in the transform.
    """
    if norm is not None and norm.over_heads:
        raise ValueError("the norm spans heads: passes per head take norms over each head alone")
    more = more_of(rope, keys, norm)
    at = (query.data_ptr(), key.data_ptr(), value.data_ptr())
    plan = plan_per_head(
        query, key, value, at, factor=factor, hadamard=hadamard, more=more, with_lse_shift=with_lse_shift
    )
    return plan.run(query, key, value, at, short_way(plan.device), more)


def plan_per_head(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    at: tuple[int, int, int],
    *,
    factor: float,
    hadamard: HadamardMode,
    more: More | None,
    with_lse_shift: bool,
) -> HeadQuantization:
    """How :func:`quantize_per_head` quantizes such tensors. It holds for all that are :func:`.inputs.alike`.

    Args:
        query, key, value, factor, hadamard, with_lse_shift: of :func:`quantize_per_head`.
        at: addresses of q, k and v.
        more: what :func:`lpattn.quantize.fused.inputs.more_of` makes of the rest.
    """
    return _plan(
        query.shape,
        key.shape,
        alike(query, key, value, at, more),
        hadamard,
        factor,
        with_lse_shift,
        query.device,
    )


class HeadQuantization(NamedTuple):
    """The two launches for tensors that are alike, and what they write.

    Attributes:
        device: theirs.
        hadamard: which operands are transformed.
        bytes: of q, k and v in e4m3, which are views of one tensor: ``q_shape`` and ``q_strides``, from its beginning,
            ``kv_shape`` and ``kv_strides`` from ``k_start`` and ``v_start``.
        floats: shape of what the passes tell each other, of which the first three rows are the descales.
        shift_shape: of the correction of the log-sum-exp; None: there is none.
        sample, quantize: the launches.
    """

    device: torch.device
    hadamard: HadamardMode
    bytes: int
    q_shape: tuple[int, ...]
    q_strides: tuple[int, ...]
    kv_shape: tuple[int, ...]
    kv_strides: tuple[int, ...]
    k_start: int
    v_start: int
    floats: tuple[int, ...]
    shift_shape: tuple[int, ...] | None
    sample: Launch
    quantize: Launch

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        at: tuple[int, int, int],
        stream: int | None,
        more: More | None,
    ) -> PerHead:
        """Quantize. ``stream`` is what :func:`.launcher.short_way` says; the rest as of :func:`plan_per_head`."""
        device = self.device
        data = torch.empty(self.bytes, dtype=torch.float8_e4m3fn, device=device)
        q_out = data.as_strided(self.q_shape, self.q_strides)
        k_out = data.as_strided(self.kv_shape, self.kv_strides, self.k_start)
        v_out = data.as_strided(self.kv_shape, self.kv_strides, self.v_start)
        buffer = torch.empty(self.floats, dtype=torch.float32, device=device)
        shift = None
        if self.shift_shape is not None:
            shift = torch.empty(self.shift_shape, dtype=torch.float32, device=device)

        # Each launch by the addresses of what it takes, and by the tensors themselves, in the same order.
        extra = (NO_MORE if more is None else more.tensors)[:_TAKEN]
        read_at = (*at, *addresses_of(extra), buffer.data_ptr())
        self.sample.on(stream, read_at, lambda: (query, key, value, *extra, buffer))
        out_at = data.data_ptr()
        written_at = (out_at, out_at + self.k_start, out_at + self.v_start, None if shift is None else shift.data_ptr())
        self.quantize.on(
            stream,
            (*read_at, *written_at),
            lambda: (query, key, value, *extra, buffer, q_out, k_out, v_out, shift),
        )
        return PerHead(q_out, k_out, v_out, buffer[0], buffer[1], buffer[2], shift, self.hadamard, buffer)


@functools.lru_cache(maxsize=1024)
def _plan(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    inputs: Alike,
    hadamard: HadamardMode,
    factor: float,
    with_lse_shift: bool,
    device: torch.device,
) -> HeadQuantization:
    check_device(device)
    *_, kinds, turns, norms, more_kinds = inputs
    batch, heads, q_len, dim = q_shape
    kv_heads, kv_len = k_shape[1:3]
    groups, lanes = batch * kv_heads, lanes_of(dim)
    # 16-byte boundaries: what Triton compiles a kernel for includes the alignment of its tensors.
    k_start = -(-batch * heads * q_len * dim // 16) * 16
    v_start = k_start + -(-groups * kv_len * dim // 16) * 16

    exact = kv_len >= layout.EXACT_FROM
    most, most_of_v = (_PARTS, _PARTS) if turns is None else (_TURNED_PARTS, _TURNED_V_PARTS)
    q_parts, k_parts = (layout.parts(length, layout.FEW.value, most) for length in (q_len, kv_len))
    v_least = (layout.ALL if exact else layout.FEW).value
    v_parts = layout.parts(kv_len, v_least, most_of_v)
    parts = batch * heads * q_parts + groups * (k_parts + v_parts)

    eps = NO_EPS if norms is None else norms.eps
    strides, constants = how_to_read(dim, inputs, hadamard)
    numbers = (batch, heads, kv_heads, q_len, kv_len, q_parts, k_parts, v_parts, v_least, *strides, *eps)
    overlaps = overlaps_on(device)
    wide = lanes > 128
    light = turns is None and norms is None and hadamard is HadamardMode.NONE and not wide
    sample = Launch(
        sample_heads,
        parts,
        numbers,
        (*constants, overlaps),
        (kinds, more_kinds),
        _SAMPLE_WARPS if light else _HEAVY_SAMPLE_WARPS,
        overlaps,
        device,
        _TURNED_SAMPLE_REGISTERS if turns is not None and exact and not wide else None,
    )
    q_rows = power_of_two(heads // kv_heads * (q_parts if turns is None else _TURNED_PARTS))
    turned_tokens, q_each, k_each = 1, 1, 1
    if turns is None:
        # Normalized values take more registers, a transform 16 tokens at least.
        tokens = _TILE // lanes if norms is None else max(_TILE // 2 // lanes, 16)
        q_tiles, kv_tiles = -(-q_len // tokens), -(-kv_len // tokens)
        each = _tiles_per_program(max(q_tiles, kv_tiles), batch * heads + 2 * groups, _PROGRAMS, device)
        programs = batch * heads * -(-q_tiles // each) + groups * -(-kv_tiles // each)
        warps = _WARPS
    else:
        tokens, turned_tokens = (max(n // lanes, 16) for n in (2 * _TURNED_TILE, _TURNED_TILE))
        kv_tiles = -(-kv_len // tokens)
        each = _tiles_per_program(kv_tiles, groups, _PROGRAMS, device)
        q_tiles, k_tiles = -(-q_len // turned_tokens), -(-kv_len // turned_tokens)
        _, _, q_turns, k_turns = turns
        # Heads with angles of their own have nothing to share.
        if not q_turns[2]:
            q_each = turning.heads_each(batch * q_tiles, heads, _TURNED_PROGRAMS, device)
            q_each = turning.whole_groups(q_each, heads, kv_heads)
        if not k_turns[2]:
            k_each = turning.heads_each(batch * k_tiles, kv_heads, _TURNED_PROGRAMS, device)
        programs = batch * (-(-heads // q_each) * q_tiles + -(-kv_heads // k_each) * k_tiles)
        warps = _WIDE_TURNED_WARPS if wide else _TURNED_WARPS
    quantize = Launch(
        quantize_heads,
        programs + groups * -(-kv_tiles // each),
        (*numbers, each, q_each, k_each, float(factor)),
        (*constants, tokens, turned_tokens, q_rows, _TURNED_PARTS, overlaps, INTERPRETED),
        (kinds, more_kinds, with_lse_shift),
        warps,
        overlaps,
        device,
        turning.registers(turns, dim, hadamard),
    )
    return HeadQuantization(
        device=device,
        hadamard=hadamard,
        bytes=v_start + groups * kv_len * dim,
        q_shape=(batch, q_len, heads, dim),
        q_strides=(heads * q_len * dim, dim, q_len * dim, 1),
        kv_shape=(batch, kv_len, kv_heads, dim),
        kv_strides=(kv_heads * kv_len * dim, dim, kv_len * dim, 1),
        k_start=k_start,
        v_start=v_start,
        # The first three rows are the descales: see layout.py.
        floats=(-(-layout.size(groups, lanes, parts) // max(groups, 1)), batch, kv_heads),
        shift_shape=(batch, heads, q_len) if with_lse_shift else None,
        sample=sample,
        quantize=quantize,
    )


def restore_output(out: torch.Tensor, quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """Add V's constant to an attention output, undo V's Hadamard transform, and cast: one launch.

    Args:
        out: [B, q_len, H, D], contiguous: attention over ``quantized.value``. Overwritten where ``dtype`` is its own.
        quantized: what the attention ran on.
        dtype: of the result.

    Returns:
        [B, q_len, H, D] in ``dtype``, contiguous.

    Precision:
        The sum is float32; the transform takes it rounded to out's dtype. Values beyond float16's range become its
        largest where that is the dtype.
    """
    to = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    buffer = quantized.buffer
    from_at, to_at = out.data_ptr(), to.data_ptr()
    kinds = (out.dtype, dtype, from_at % 16, to_at % 16)
    hadamard = quantized.hadamard is not HadamardMode.NONE
    device = out.device
    undo = _restore(out.shape, quantized.num_kv_heads, hadamard, kinds, device)
    undo.on(short_way(device), (from_at, to_at, buffer.data_ptr()), lambda: (out, to, buffer))
    return to


@functools.lru_cache(maxsize=1024)
def _restore(
    shape: tuple[int, ...],
    kv_heads: int,
    hadamard: bool,
    kinds: tuple[torch.dtype, torch.dtype, int, int],
    device: torch.device,
) -> Launch:
    batch, q_len, heads, dim = shape
    dtype = kinds[1]
    limit = torch.finfo(dtype).max if dtype == torch.float16 else 0.0
    tiles = -(-q_len // _RESTORED_TOKENS)
    each = _tiles_per_program(tiles, batch * heads, _RESTORE_PROGRAMS, device)
    overlaps = overlaps_on(device)
    return Launch(
        restore,
        batch * heads * -(-tiles // each),
        (batch, heads, kv_heads, q_len, each, limit),
        (dim, lanes_of(dim), hadamard, _RESTORED_TOKENS, overlaps),
        kinds,
        _RESTORE_WARPS,
        overlaps,
        device,
    )


def _constants(buffer: torch.Tensor, of_head: torch.Tensor, lanes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, Hkv, lanes] of k and v, B and Hkv being the leading sizes of ``of_head``."""
    batch, kv_heads = of_head.shape[:2]
    groups = batch * kv_heads
    rows = buffer.view(-1)[3 * groups : 3 * groups * (1 + lanes)].view(3, batch, kv_heads, lanes)
    return rows[1], rows[2]


def _tiles_per_program(tiles: int, heads: int, per_multiprocessor: int, device: torch.device) -> int:
    """So many that all programs run at once and take equally long; fewer where there are more heads than that."""
    programs = per_multiprocessor * multiprocessors(device) // heads
    return -(-tiles // programs) if programs else _MANY_TILES
