"""The memory in which q, k and v lie when they are quantized per block: one piece, and which tensor is where in it."""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lpattn.types import HadamardMode

_PART_BYTES = 128
"""Tensors in the memory start at a multiple of this."""


class Part(NamedTuple):
    """Of the memory: what lies where.

    Attributes:
        dtype, shape, strides: of the tensor, which is contiguous.
        start: in bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor, of uint8 memory."""
        return memory.view(self.dtype).as_strided(self.shape, self.strides, self.start // self.dtype.itemsize)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tensors of a :class:`PerBlock` lie, and what is to be known of them besides.

    There is one of each kind: it is hashed, and told from others, by what it is and not by what it says.

    Attributes:
        bytes: size of the memory.
        query, q_scale, key, k_scale, value, v_scale, k_constant, v_constant, lse_shift: of PerBlock.
        hadamard, kv_len, dim_v: of PerBlock.
        device: of the memory.
    """

    bytes: int
    query: Part
    q_scale: Part
    key: Part
    k_scale: Part
    value: Part
    v_scale: Part
    k_constant: Part
    v_constant: Part
    lse_shift: Part | None
    hadamard: HadamardMode
    kv_len: int
    dim_v: int
    device: torch.device


class _View:
    """A tensor of a PerBlock, made when it is asked for, and kept."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, found: PerBlock, owner: type) -> torch.Tensor:
        part: Part = getattr(found.layout, self._name)
        # Found there from now on, as with functools.cached_property.
        view = found.__dict__[self._name] = part.of(found.memory)
        return view


class PerBlock:
    """q with a scale per token, k and v with one per block of 128 keys: value = data * scale (+ constant for k and v).

    All of it lies in one piece of memory. Tensors are views that are made when they are asked for: a launch takes their
    addresses, and can do without.

    Attributes:
        query: [B, H, q_len, D'], contiguous; of q times ``factor``. torch.float8_e4m3fn, or torch.int8. D' is D rounded
            up to a multiple of 16, lanes past D being zeros; or, with Hadamard mode QKV, all lanes of the transform.
        q_scale: float32 [B, H, q_len]. Powers of two, as k's are; those of int8 are not.
        key: [B, Hkv, blocks * 128, D'] in q's dtype, contiguous; zeros past the keys that are used.
        k_scale: float32 [B, Hkv, blocks].
        value: e4m3: [B, Hkv, blocks, D_v', 128], contiguous: each block transposed, with the keys of every group of 16
            permuted (see :mod:`.per_block`). D_v' is D_v, or, with a Hadamard transform, all of its lanes. float16, in
            order: [B, Hkv, blocks * 128, D_v'], D_v' as D' from D. Zeros past the keys that are used.
        v_scale: float32 [B, Hkv, blocks], powers of two times sqrt(2): their ratios are powers of two.
        k_constant, v_constant: float32 [B, Hkv, lanes], what was subtracted from k and v after rotation and transform,
            lanes being D or D_v padded to a power of two, at least 32.
        key_counts: int32 [B], how many keys come first, where ``keys`` packed them; else None: all of them.
        lse_shift: float32 [B, H, q_len], q.constant of k, times ``factor``; None unless it was asked for.
        hadamard: the mode that was applied.
        kv_len: number of keys.
        dim_v: D_v.
        layout: where everything lies.
        memory: uint8, all of it; ``address`` is where it begins.
    """

    query = _View()
    q_scale = _View()
    key = _View()
    k_scale = _View()
    value = _View()
    v_scale = _View()
    k_constant = _View()
    v_constant = _View()

    def __init__(self, layout: Layout, memory: torch.Tensor, key_counts: torch.Tensor | None) -> None:
        self.layout = layout
        self.memory = memory
        self.address: int = memory.data_ptr()
        self.key_counts = key_counts

    @property
    def lse_shift(self) -> torch.Tensor | None:
        """See the class."""
        part = self.layout.lse_shift
        return None if part is None else part.of(self.memory)

    @property
    def hadamard(self) -> HadamardMode:
        """See the class."""
        return self.layout.hadamard

    @property
    def kv_len(self) -> int:
        """See the class."""
        return self.layout.kv_len

    @property
    def dim_v(self) -> int:
        """See the class."""
        return self.layout.dim_v


def laid_out(
    start: int, asked: dict[str, tuple[torch.dtype, tuple[int, ...]] | None]
) -> tuple[dict[str, Part | None], int]:
    """Parts behind each other, from ``start`` on, and where they end, in bytes.

    Each starts at a multiple of 128 bytes: Triton compiles for the alignment of its tensors, and copies of tiles want
    as much.
    """
    parts: dict[str, Part | None] = {}
    end = start
    for name, what in asked.items():
        end = round_up(end, _PART_BYTES)
        parts[name] = None if what is None else part_of(*what, end)
        if what is not None:
            end += what[0].itemsize * math.prod(what[1])
    return parts, round_up(end, _PART_BYTES)


def part_of(dtype: torch.dtype, shape: tuple[int, ...], start: int) -> Part:
    """A contiguous tensor of that shape, ``start`` bytes from the beginning."""
    strides = [1, *itertools.accumulate(reversed(shape[1:]), operator.mul)]
    return Part(dtype, shape, tuple(reversed(strides)), start)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n."""
    return -(-n // multiple) * multiple
