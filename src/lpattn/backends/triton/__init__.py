"""``fp8_triton``, ``fp8_triton_fast`` and ``int8_triton``: lpattn's own attention kernels, in Triton.

Owns what they can run and the reasons why not. Which kernel runs a call is :mod:`.kernels`' business, how q, k and v
are rounded :mod:`lpattn.quantize.fused`'s.
"""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, ClassVar

import torch

from lpattn.backend import Backend, Capabilities
from lpattn.backends.triton.kernels import LARGEST_HEAD_DIM, detours, kernel_for, portable_for
from lpattn.hookspecs import hookimpl
from lpattn.policy import measured_speedup
from lpattn.types import AttentionBackend, AttentionCall, CausalKind, HadamardMode, MaskKind, Norm, Reason

if TYPE_CHECKING:
    from lpattn.quantize.fused import Rotation


class TritonBackend(Backend):
    """FP8 attention with a scale per query token and per block of 128 keys; on sm_80 and sm_86 as ``int8_triton``.

    A key-padding mask becomes a list of the keys that are used: the others are left out of k and v when these are
    quantized. Of any other mask, a pass on the device lists the tiles of which something is seen: the kernel runs over
    these alone, and looks at the mask in those that are not seen in full. Keys that no query sees enter no scale.

    Precision:
        Inputs are float16, bfloat16 or float32. A constant per channel is subtracted from k and v (and added back to
        the output; the log-sum-exp is corrected), the rest is rounded to e4m3 (relative error up to 2^-4); about 25 dB
        SQNR on normal data. Scores are float32 (float16 in the Hopper kernel). P is rounded to e4m3 after a factor
        2^8; the PV of each tile of keys is accumulated in the tensor cores' own precision, and tiles in float32, so
        that accuracy does not fall with length. An inf in an input becomes a NaN.

    Source:
        Smoothing k, scales per block: SageAttention (arXiv:2410.02367). Two-level accumulation: SageAttention2
        (arXiv:2411.10958).
    """

    name = AttentionBackend.FP8_TRITON.value
    int8: ClassVar[bool] = False
    exponential: ClassVar[str] = "step"
    capabilities = Capabilities(
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        device_types=frozenset({"cuda"}),
        architectures=((8, 0), (12, 1)),
        head_dims=frozenset(range(1, LARGEST_HEAD_DIM + 1)),
        head_dim_v_differs=True,
        masks=frozenset(MaskKind),
        causal_rectangular=True,
        lse=True,
        hadamard=frozenset(HadamardMode),
        rope=True,
        norm=True,
        norm_over_heads=True,
        varlen=True,
    )

    def probe(self, device: torch.device) -> list[Reason]:
        reasons = self.capabilities.reasons_against_device(device)
        if importlib.util.find_spec("triton") is None:
            reasons.append(Reason("not_installed", "triton is not installed", "pip install triton"))
        return reasons

    def supports(self, call: AttentionCall) -> list[Reason]:
        reasons = [r for r in super().supports(call) if r.code != "head_dim"]
        for name in ("head_dim", "head_dim_v"):
            if getattr(call, name) > LARGEST_HEAD_DIM:
                text = f"{name} {getattr(call, name)}: has kernels for {LARGEST_HEAD_DIM} at most"
                reasons.append(Reason(name, text))
        if 0 in (call.batch, call.num_heads, call.q_len, call.kv_len, call.head_dim, call.head_dim_v):
            reasons.append(Reason("empty", "an empty dimension: nothing to compute"))
        if not abs(call.softmax_scale) * math.log2(math.e) <= torch.finfo(torch.float32).max:
            reasons.append(Reason("scale", f"scale {call.softmax_scale}: times log2(e), must be a finite float32"))
        return reasons

    def rank(self, call: AttentionCall) -> float:
        # What was measured on sm_90 is the Hopper kernel; with additive masks, which it never takes, the portable one.
        unmeasured = any(reason.code != "mask" for reason in self.detours(call))
        return 0.0 if call.varlen is not None or unmeasured else measured_speedup(self.name, call)

    def detours(self, call: AttentionCall) -> list[Reason]:
        return detours(call, self.int8)

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self._attend(query, key, value, call, attn_mask, None, None)

    def rope_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        cos_k: torch.Tensor | None = None,
        sin_k: torch.Tensor | None = None,
        *,
        norm: Norm | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        from lpattn.quantize.fused import rotation_of

        assert call.rope is not None
        tables = (cos, sin, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        rotation = rotation_of(query, key, tables, call.rope.interleaved)
        return self._attend(query, key, value, call, attn_mask, rotation, norm)

    def varlen_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        call: AttentionCall,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        kernel = portable_for(call, self.int8)
        out, lse = kernel.attend_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, call)
        return out if lse is None else (out, lse)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None,
        rotation: Rotation | None,
        norm: Norm | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if call.causal is CausalKind.TOP_LEFT and call.kv_len > call.q_len:
            # No query sees the keys behind, so they must not count in a scale either.
            key, value = key[:, :, : call.q_len], value[:, :, : call.q_len]
        kernel = kernel_for(call, self.int8, self.exponential)
        out, lse = kernel.attend(query, key, value, call, attn_mask, rotation, norm)
        out = out.transpose(1, 2)
        return out if lse is None else (out, lse)


class Int8TritonBackend(TritonBackend):
    """Attention with q and k in int8, and v and P in float16: slower than FP8 where there is FP8, and more accurate.

    Masks are treated as in ``fp8_triton``.

    Precision:
        Inputs are float16, bfloat16 or float32. A constant per channel is subtracted from k and v (and added back to
        the output; the log-sum-exp is corrected). q and k are rounded to 8-bit integers with a scale per query token
        and per block of 128 keys, v to float16; about 37 dB SQNR on normal data. P is rounded to float16. Scores,
        softmax and sums are float32. A NaN or inf in q makes its row NaN; in k, the rows that see a key of its block.

    Source:
        SageAttention (arXiv:2410.02367).
    """

    name = "int8_triton"
    int8 = True


class FastTritonBackend(TritonBackend):
    """``fp8_triton`` with a coarser exponential in the Hopper kernel; runs only where it is named.

    Precision:
        As ``fp8_triton``, but that the Hopper kernel interpolates P linearly between powers of two: a relative error of
        2.95 % instead of 2.57 % (standard deviation, the rounding to e4m3 included), about 0.3 dB SQNR on normal data.
        Where the portable kernel runs, it is ``fp8_triton``.
    """

    name = "fp8_triton_fast"
    automatic = False
    exponential = "linear"


@hookimpl
def lpattn_backends() -> list[Backend]:
    """Attention in FP8 and in INT8, in Triton."""
    return [TritonBackend(), FastTritonBackend(), Int8TritonBackend()]
