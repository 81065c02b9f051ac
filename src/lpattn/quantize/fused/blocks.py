"""What lpattn's own attention kernels read: q with a scale per token, k and v with one per block of keys.

Owns the allocation of the results and the launches. The passes themselves are :mod:`.per_block`'s.
"""

from __future__ import annotations

import functools
from enum import Enum
from typing import NamedTuple

import torch

from lpattn.quantize.fused import turning
from lpattn.quantize.fused.device import check_device, overlaps_on
from lpattn.quantize.fused.inputs import (
    NO_EPS,
    NO_MORE,
    Alike,
    Keys,
    More,
    Rotation,
    addresses_of,
    alike,
    more_of,
    used_keys,
)
from lpattn.quantize.fused.launcher import INTERPRETED, Launch, short_way
from lpattn.quantize.fused.memory import Layout, PerBlock, laid_out, part_of, round_up
from lpattn.quantize.fused.per_block import quantize_blocks, sample_blocks
from lpattn.quantize.fused.reading import how_to_read, lanes_of
from lpattn.quantize.fused.tile import E4M3_MAX
from lpattn.types import HadamardMode, Norm

BLOCK = 128
"""Keys that share a scale."""

# Warps per program that were the fastest on an H100.
_SAMPLE_WARPS = 16
_WARPS = 4
_WIDE_WARPS = 8
"""Where a tile has more than 128 lanes, or is rotated."""

_TURNED_TOKENS = 32
"""Tokens of q that a program rotates at a time. cos and sin of so many stay in registers from head to head; those of
BLOCK tokens, four times as large as the tokens, come from the caches again and again."""
_Q_PROGRAMS, _K_PROGRAMS = 4, 1
"""Programs per multiprocessor below which a program takes no more heads, up to the most."""

_ROW_BYTES = 16
"""Rows of q and k are padded to a multiple of this: what loads of 16 bytes and TMA descriptors need."""


class Precision(str, Enum):
    """What q, k and v are rounded to.

    * ``E4M3``: all three.
    * ``INT8_F16``: q and k to integers of 8 bits, v to float16.
    """

    E4M3 = "e4m3"
    INT8_F16 = "int8_f16"

    __str__ = str.__str__


def quantize_per_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    factor: float = 1.0,
    qk_max: float = E4M3_MAX.value,
    precision: Precision = Precision.E4M3,
    hadamard: HadamardMode = HadamardMode.NONE,
    rope: Rotation | None = None,
    norm: Norm | None = None,
    keys: Keys | None = None,
    used: torch.Tensor | None = None,
    with_lse_shift: bool = False,
) -> PerBlock:
    """Quantize for lpattn's own kernels in two launches, without waiting for the device.

    Args:
        query: [B, H, q_len, D], float16, bfloat16 or float32, any strides.
        key: [B, Hkv, kv_len, D] in the same dtype.
        value: [B, Hkv, kv_len, D_v] in the same dtype.
        factor: what q is multiplied by, such as the softmax scale times log2(e).
        qk_max: what the largest magnitude of a scale's values in q and k becomes at most, in (0, 448]; e4m3 only.
        precision: what q, k and v are rounded to.
        hadamard: which operands are transformed along head_dim, after rotation: any D, padded to a power of two.
        rope: rotates q and k first.
        norm: normalizes q and k before that; weights come first, and what is of the whole token last.
        keys: which tokens of k and v are used: these come first, in their order, and are followed by zeros.
        used: bool [B, Hkv or 1, kv_len], which tokens of k and v are used: the others become zeros where they are, and
            enter no scale and (unless another head uses them) no constant. Not together with ``keys``.
        with_lse_shift: also compute q.constant, which the smoothing of k takes from every logit.

    Precision:
        Norm and rotation are float32, as are the transform (inputs rounded to their own dtype) and smoothing. The
        constants are means of a sample of 256 tokens, or of a sixteenth of them up to 4096. Scales of e4m3 are powers
        of two (for v, times sqrt(2)) that map the largest magnitude to at most ``qk_max`` (448 for v): at least 2^-56
        for q and k; for v at least 2^-60 of what the largest sampled value would get. An inf or NaN becomes NaN, alone
        (with a rotation: with the other lane of its pair; with a Hadamard transform: with its whole token; what a norm
        makes of it comes first), and enters neither scale nor constant. Magnitudes above about 1e36 may overflow in the
        transform. int8 has no NaN: there, the scale of its token (of its block, in k) becomes NaN, but for a token of q
        whose zeros a norm divides by zero: it stays zeros. The scales of int8 map the largest magnitude to
        127; v in float16 is scaled like v in e4m3. The oracle is :func:`lpattn.quantize.quantize_e4m3` with
        ``power_of_two=True``, given the constants.
    """
    if keys is not None and used is not None:
        raise ValueError("keys packs the keys, and used keeps them where they are: pass one of the two")
    sampled, flags = keys, None
    if used is not None:
        batch, kv_heads, kv_len, _ = key.shape
        sampled = used_keys(used[:, :, None], batch, kv_len)
        flags = used.expand(batch, kv_heads, kv_len)
    more = more_of(rope, sampled, norm)
    at = (query.data_ptr(), key.data_ptr(), value.data_ptr())
    plan = plan_per_block(
        query,
        key,
        value,
        at,
        factor=factor,
        qk_max=qk_max,
        precision=precision,
        hadamard=hadamard,
        more=more,
        packed=keys is not None,
        flags=flags,
        with_lse_shift=with_lse_shift,
    )
    return plan.run(query, key, value, at, short_way(plan.layout.device), more, flags)


def plan_per_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    at: tuple[int, int, int],
    *,
    factor: float,
    qk_max: float,
    precision: Precision,
    hadamard: HadamardMode,
    more: More | None = None,
    packed: bool = False,
    flags: torch.Tensor | None = None,
    with_lse_shift: bool = False,
) -> Quantization:
    """How :func:`quantize_per_block` quantizes such tensors. It holds for all that are alike.

    They are alike with the same shapes, strides, dtype, device and alignment to 16 bytes, where ``more`` says the same
    but for its tensors, and flags have the same strides.

    Args:
        query, key, value, factor, qk_max, precision, hadamard, with_lse_shift: of :func:`quantize_per_block`.
        at: addresses of q, k and v.
        more: what :func:`lpattn.quantize.fused.inputs.more_of` makes of the rest.
        packed: whether keys that are used come first.
        flags: bool [B, Hkv, kv_len], which tokens are used, where they stay in their places.
    """
    return _plan(
        query.shape,
        value.shape,
        alike(query, key, value, at, more),
        hadamard,
        factor,
        qk_max,
        precision,
        with_lse_shift,
        packed,
        None if flags is None else flags.stride(),
        query.device,
    )


class Quantization(NamedTuple):
    """The launches for tensors that are alike, and what they write.

    Attributes:
        layout: of what they write.
        packed: whether keys that are used come first.
        sample, quantize: the launches.
    """

    layout: Layout
    packed: bool
    sample: Launch
    quantize: Launch

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        at: tuple[int, int, int],
        stream: int | None,
        more: More | None = None,
        flags: torch.Tensor | None = None,
    ) -> PerBlock:
        """Quantize. ``stream`` is what :func:`.launcher.short_way` says; the rest as of :func:`plan_per_block`."""
        layout, packed, sample, quantize = self
        extra = NO_MORE if more is None else more.tensors
        extra_at = NO_MORE if more is None else addresses_of(more.tensors)
        memory = torch.empty(layout.bytes, dtype=torch.uint8, device=layout.device)
        found = PerBlock(layout, memory, extra[1] if packed else None)
        start = found.address
        k_constant, v_constant = start + layout.k_constant.start, start + layout.v_constant.start
        # Each launch by the addresses of what it takes, and by the tensors themselves, in the same order.
        sample.on(
            stream,
            (*at[1:], *extra_at[:2], *extra_at[4:6], extra_at[7], extra_at[9], k_constant, v_constant),
            lambda: (key, value, *extra[:2], *extra[4:6], extra[7], extra[9], found.k_constant, found.v_constant),
        )
        quantize.on(
            stream,
            (
                *at,
                *extra_at,
                None if flags is None else flags.data_ptr(),
                k_constant,
                v_constant,
                start + layout.query.start,
                start + layout.key.start,
                start + layout.value.start,
                start + layout.q_scale.start,
                start + layout.k_scale.start,
                start + layout.v_scale.start,
                None if layout.lse_shift is None else start + layout.lse_shift.start,
            ),
            lambda: (
                query,
                key,
                value,
                *extra,
                flags,
                found.k_constant,
                found.v_constant,
                found.query,
                found.key,
                found.value,
                found.q_scale,
                found.k_scale,
                found.v_scale,
                found.lse_shift,
            ),
        )
        return found


@functools.lru_cache(maxsize=1024)
def _plan(
    q_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    inputs: Alike,
    hadamard: HadamardMode,
    factor: float,
    qk_max: float,
    precision: Precision,
    with_lse_shift: bool,
    packed: bool,
    flag_strides: tuple[int, ...] | None,
    device: torch.device,
) -> Quantization:
    e4m3 = precision is Precision.E4M3
    if e4m3:
        check_device(device)
    *_, kinds, turns, norms, more_kinds = inputs
    batch, heads, q_len, dim = q_shape
    kv_heads, kv_len, dim_v = v_shape[1:]
    groups = batch * kv_heads
    blocks = -(-kv_len // BLOCK)
    lanes, lanes_v = lanes_of(dim), lanes_of(dim_v)
    dim_out = lanes if hadamard is HadamardMode.QKV else round_up(dim, _ROW_BYTES)
    rows_v = dim_v if hadamard is HadamardMode.NONE else lanes_v
    if not e4m3:
        rows_v = round_up(rows_v, _ROW_BYTES)

    single, eight_bit = torch.float32, torch.float8_e4m3fn if e4m3 else torch.int8
    # V's constant comes first, and floors of V's scales follow it.
    parts, size = laid_out(
        4 * (lanes_v + 1) * groups,
        {
            "k_constant": (single, (batch, kv_heads, lanes)),
            "q_scale": (single, (batch, heads, q_len)),
            "k_scale": (single, (batch, kv_heads, blocks)),
            "v_scale": (single, (batch, kv_heads, blocks)),
            "lse_shift": (single, (batch, heads, q_len)) if with_lse_shift else None,
            "query": (eight_bit, (batch, heads, q_len, dim_out)),
            "key": (eight_bit, (batch, kv_heads, blocks * BLOCK, dim_out)),
            "value": (eight_bit, (batch, kv_heads, blocks, rows_v, BLOCK))
            if e4m3
            else (torch.float16, (batch, kv_heads, blocks * BLOCK, rows_v)),
        },
    )
    layout = Layout(
        bytes=size,
        v_constant=part_of(single, (batch, kv_heads, lanes_v), 0),
        hadamard=hadamard,
        kv_len=kv_len,
        dim_v=dim_v,
        device=device,
        **parts,  # type: ignore[arg-type]
    )

    turned = turns is not None
    # Heads with angles of their own have nothing to share.
    shares = turns is not None and not turns[2][2]
    q_tokens = _TURNED_TOKENS if turned else BLOCK
    q_tiles = -(-q_len // q_tokens)
    q_each = turning.heads_each(batch * q_tiles, heads, _Q_PROGRAMS, device) if shares else 1
    k_each = turning.heads_each(batch * blocks, kv_heads, _K_PROGRAMS, device) if turned else 1

    strides, reading = how_to_read(dim, inputs, hadamard)
    unit, dense, turn_unit, turn_dense, _, _, *transforms = reading
    eps_q, eps_k = NO_EPS if norms is None else norms.eps
    factors = (float(factor), float(qk_max))
    constants = (unit, dense, turn_unit, turn_dense, dim, lanes, dim_v, lanes_v, *transforms)
    wide = max(lanes, lanes_v) > 128
    overlaps = overlaps_on(device)
    sample = Launch(
        sample_blocks,
        2 * groups,
        (batch, kv_heads, kv_len, *strides[4:12], *strides[16:20], eps_k),
        (*constants, overlaps),
        (kinds, more_kinds),
        _SAMPLE_WARPS,
        overlaps,
        device,
    )
    quantize = Launch(
        quantize_blocks,
        batch * (-(-heads // q_each) * q_tiles + -(-kv_heads // k_each) * blocks) + groups * blocks,
        (
            batch,
            heads,
            kv_heads,
            q_len,
            kv_len,
            q_each,
            k_each,
            *strides,
            eps_q,
            eps_k,
            *(flag_strides or (0, 0, 0)),
            *factors,
        ),
        (*constants, dim_out, rows_v, packed, BLOCK, q_tokens, overlaps, INTERPRETED),
        (kinds, more_kinds, with_lse_shift, precision, flag_strides is None),
        _WIDE_WARPS if wide or turned else _WARPS,
        overlaps,
        device,
        None if wide else turning.registers(turns, dim, hadamard),
    )
    return Quantization(layout, packed, sample, quantize)
