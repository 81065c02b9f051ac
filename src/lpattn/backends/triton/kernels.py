"""Which of lpattn's kernels runs a call, and how: the one place where they are told apart.

All of them read what :func:`lpattn.quantize.fused.quantize_per_block` writes. Triton is imported when a call runs.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lpattn.backends.triton import packed
from lpattn.kernels import hopper
from lpattn.quantize import E4M3_MAX
from lpattn.types import AttentionCall, CausalKind, Norm, Reason

if TYPE_CHECKING:
    from lpattn.kernels.hopper.launch import Attention
    from lpattn.kernels.mask_tiles import MaskTiles
    from lpattn.quantize.fused import Keys, PerBlock, Rotation
    from lpattn.quantize.fused.blocks import Quantization
    from lpattn.quantize.fused.inputs import More

LARGEST_HEAD_DIM = 256
FIRST_WITH_E4M3 = (8, 9)
"""The first architecture whose tensor cores multiply e4m3."""

Result = tuple[torch.Tensor, torch.Tensor | None]


class Kernel(ABC):
    """Runs a call from tensors to the output."""

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None,
        rotation: Rotation | None,
        norm: Norm | None = None,
    ) -> Result:
        """Quantize and attend: ([B, q_len, H, D_v], contiguous, in call.dtype; lse or None).

        Keys that no query sees for their position are cut off already.
        """

    @abstractmethod
    def _rounding(self) -> dict[str, Any]:
        """``qk_max`` and ``precision`` of the quantization."""

    def _quantize(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        rotation: Rotation | None,
        norm: Norm | None,
        keys: Keys | None,
        used: torch.Tensor | None = None,
    ) -> PerBlock:
        """What the kernel reads; the arguments are those of ``quantize_per_block``, or follow from the call."""
        return self._fused.quantize_per_block(
            query,
            key,
            value,
            factor=call.softmax_scale * math.log2(math.e),
            **self._rounding(),
            hadamard=call.hadamard,
            rope=rotation,
            norm=norm,
            keys=keys,
            used=used,
            with_lse_shift=call.return_lse,
        )

    @functools.cached_property
    def _fused(self) -> ModuleType:
        # At the first call, since `import lpattn` must not wait for Triton; kept, since an import statement takes time.
        from lpattn.quantize import fused

        return fused


class Steps(NamedTuple):
    """What the Hopper kernel does with calls that are alike.

    Attributes:
        quantization, attention: in this order.
    """

    quantization: Quantization
    attention: Attention


_STEPS_SIZE = 64
"""Different strides and alignments of one call whose steps are remembered."""


class HopperKernel(Kernel):
    """The Gluon kernel: the fastest on sm_90, with bool masks.

    Args:
        exponential: how P is made; see :func:`lpattn.kernels.hopper.launch.attend`.
    """

    def __init__(self, exponential: str) -> None:
        self._exponential = exponential
        self._steps: dict[Hashable, Steps] = {}

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None,
        rotation: Rotation | None,
        norm: Norm | None = None,
    ) -> Result:
        keys, tiles, flags = self._looked_at(attn_mask, call, key.shape[2])
        more = self._fused.more_of(rotation, keys, norm)
        at = (query.data_ptr(), key.data_ptr(), value.data_ptr())
        facts = (
            call,
            self._fused.alike(query, key, value, at, more),
            None if tiles is None or flags is None else (tiles.mask.shape, flags.stride()),
        )
        steps = self._steps.get(facts)
        if steps is None:
            if len(self._steps) >= _STEPS_SIZE:
                self._steps.clear()
            steps = self._steps[facts] = self._steps_for(query, key, value, at, call, more, tiles, flags)
        quantization, attention = steps
        stream = self._fused.short_way(attention.layout.device)
        quantized = quantization.run(query, key, value, at, stream, more, flags)
        return attention.run(quantized, stream, tiles)

    def _looked_at(
        self, attn_mask: torch.Tensor | None, call: AttentionCall, kv_len: int
    ) -> tuple[Keys | None, MaskTiles | None, torch.Tensor | None]:
        """Of a mask: the used keys; where these stay in their places also tiles, and flags [B, Hkv, kv_len]."""
        if attn_mask is None:
            return None, None, None
        if call.key_padding:
            return self._fused.used_keys(attn_mask, call.batch, kv_len), None, None
        tiles = self._launch.tiles_of(attn_mask, kv_len, call.head_dim_v)
        flags = tiles.used_by(call.num_kv_heads, call.num_heads)
        keys = self._fused.used_keys(flags[:, :, None], call.batch, kv_len)
        return keys, tiles, flags.expand(call.batch, call.num_kv_heads, kv_len)

    def _steps_for(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        at: tuple[int, int, int],
        call: AttentionCall,
        more: More | None,
        tiles: MaskTiles | None,
        flags: torch.Tensor | None,
    ) -> Steps:
        from lpattn.quantize.fused.blocks import plan_per_block

        # Keys that are used come first, unless tiles of a mask say where they are.
        comes_first = call.key_padding
        quantization = plan_per_block(
            query,
            key,
            value,
            at,
            factor=call.softmax_scale * math.log2(math.e),
            **self._rounding(),
            hadamard=call.hadamard,
            more=more,
            packed=comes_first,
            flags=flags,
            with_lse_shift=call.return_lse,
        )
        attention = self._launch.plan_attention(
            quantization.layout,
            call.dtype,
            causal=call.causal is CausalKind.TOP_LEFT,
            return_lse=call.return_lse,
            exponential=self._exponential,
            packed=comes_first,
            mask_shape=None if tiles is None else tiles.mask.shape[:3],
        )
        return Steps(quantization, attention)

    def _rounding(self) -> dict[str, Any]:
        return {"qk_max": self._launch.QK_MAX, "precision": self._fused.Precision.E4M3}

    @functools.cached_property
    def _launch(self) -> ModuleType:
        # As self._fused.
        from lpattn.kernels.hopper import launch

        return launch


class PortableKernel(Kernel):
    """The kernel in plain Triton: everything that SDPA means, from sm_80 on.

    Args:
        int8: whether q and k become int8 and v float16, instead of all three e4m3.
    """

    def __init__(self, int8: bool) -> None:
        self._int8 = int8

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None,
        rotation: Rotation | None,
        norm: Norm | None = None,
    ) -> Result:
        from lpattn.kernels.attention import Band, attend
        from lpattn.kernels.mask_tiles import list_mask_tiles
        from lpattn.kernels.shapes import tile_shape
        from lpattn.quantize.fused import used_keys
        from lpattn.quantize.fused.reading import lanes_of

        lanes = lanes_of(max(call.head_dim, call.head_dim_v))
        bias_bits = 0 if attn_mask is None or attn_mask.dtype == torch.bool else 8 * attn_mask.element_size()
        shape = tile_shape(call.capability, lanes, int8=self._int8, bias_bits=bias_bits)
        keys = tiles = used = None
        if attn_mask is not None and call.key_padding:
            keys = used_keys(attn_mask, call.batch, key.shape[2])
        elif attn_mask is not None:
            tiles = list_mask_tiles(attn_mask, key.shape[2], shape.queries, shape.keys)
            used = tiles.used_by(call.num_kv_heads, call.num_heads).expand(call.batch, -1, -1)
        quantized = self._quantize(query, key, value, call, rotation, norm, keys, used)
        band = Band(after=0) if call.causal is CausalKind.TOP_LEFT else Band()
        return attend(quantized, shape, call.dtype, band=band, mask=tiles, return_lse=call.return_lse)

    def attend_packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        call: AttentionCall,
    ) -> Result:
        """Quantize and attend: ([T_q, H, D_v] in call.dtype, lse [T_q, H] or None)."""
        from lpattn.kernels.attention import Band, attend
        from lpattn.kernels.shapes import tile_shape
        from lpattn.quantize.fused.reading import lanes_of

        assert call.varlen is not None
        before, after = (None if n < 0 else n for n in call.varlen.window)
        total, total_k = query.shape[0], key.shape[0]
        max_q, max_k = min(call.q_len, total), min(call.kv_len, total_k)
        padded = packed.padded_queries(query, cu_seqlens_q, max_q)
        key, value = (packed.as_batch(x, call.batch, max_k) for x in (key, value))
        wrong = packed.contradictory(cu_seqlens_q, total, max_q) | packed.contradictory(cu_seqlens_k, total_k, max_k)
        keys = packed.key_lists(cu_seqlens_k, total_k, max_k)
        quantized = self._quantize(padded, key, value, call, None, None, keys)
        out, lse = attend(
            quantized,
            tile_shape(call.capability, lanes_of(max(call.head_dim, call.head_dim_v)), int8=self._int8),
            call.dtype,
            band=Band(before, after, from_end=True),
            q_counts=packed.lengths_of(cu_seqlens_q, max_q),
            return_lse=call.return_lse,
        )
        of_tokens = None if lse is None else packed.pack(lse.transpose(1, 2), cu_seqlens_q, total, -torch.inf, wrong)
        return packed.pack(out, cu_seqlens_q, total, 0.0, wrong), of_tokens

    def _rounding(self) -> dict[str, Any]:
        precision = self._fused.Precision
        return {"qk_max": E4M3_MAX, "precision": precision.INT8_F16 if self._int8 else precision.E4M3}


def portable_for(call: AttentionCall, int8: bool) -> PortableKernel:
    """The portable kernel with the recipe that the architecture has, or with int8 if that is asked for."""
    return PortableKernel(int8 or (call.capability is not None and call.capability < FIRST_WITH_E4M3))


def detours(call: AttentionCall, int8: bool) -> list[Reason]:
    """Why a call runs on the portable kernel although its architecture has a faster one; empty elsewhere."""
    if not _has_faster(call, int8):
        return []
    return [*hopper.reasons_against(call), *hopper.reasons_against_triton()]


@functools.lru_cache(maxsize=1024)
def kernel_for(call: AttentionCall, int8: bool, exponential: str = "step") -> Kernel:
    """The kernel that runs a call of at most :data:`LARGEST_HEAD_DIM` lanes.

    Args:
        call: the call.
        int8: whether q and k are to become int8 although the architecture has e4m3.
        exponential: of the Hopper kernel, where that runs.
    """
    if _has_faster(call, int8) and not detours(call, int8):
        return HopperKernel(exponential)
    return portable_for(call, int8)


def _has_faster(call: AttentionCall, int8: bool) -> bool:
    """Whether there is a faster kernel than the portable one for such a call's architecture and precision."""
    return call.capability == hopper.ARCHITECTURE and not int8
