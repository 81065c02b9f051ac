"""``fp8_triton``: lpattn's own FP8 attention kernels, in Triton.

Owns the translation of a call into the kernels' terms. The kernels are :mod:`lpattn.kernels`; how q, k and v become
e4m3 is :mod:`lpattn.quantize.fused`'s.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch

from lpattn.backend import Backend, Capabilities
from lpattn.hookspecs import hookimpl
from lpattn.kernels import hopper
from lpattn.policy import measured_speedup
from lpattn.types import AttentionBackend, AttentionCall, CausalKind, HadamardMode, Reason

if TYPE_CHECKING:
    from lpattn.quantize.fused import Rotation


class TritonBackend(Backend):
    """FP8 attention with a scale per query token and per block of 128 keys.

    A key-padding mask becomes a list of the keys that are used: the others are left out of k and v when these are
    quantized, and the kernel is told how many there are.

    Precision:
        Inputs are float16, bfloat16 or float32. A constant per channel is subtracted from k and v (and added back to
        the output; the log-sum-exp is corrected), the rest is rounded to e4m3 (relative error up to 2^-4) with scales
        that are powers of two; about 25 dB SQNR on normal data. Scores are float16. P is rounded to e4m3 after a factor
        2^8, with an exponential whose error is below that of the rounding; the PV of each tile of keys is accumulated
        in the tensor cores' own precision, and tiles in float32, so that accuracy does not fall with length. An inf in
        an input becomes a NaN.

    Source:
        Smoothing k, scales per block: SageAttention (arXiv:2410.02367). Two-level accumulation: SageAttention2
        (arXiv:2411.10958).
    """

    name = AttentionBackend.FP8_TRITON.value
    exponential: ClassVar[str | None] = None
    """How P is made; None: as accurate as its rounding allows."""
    capabilities = Capabilities(
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        device_types=frozenset({"cuda"}),
        architectures=(hopper.ARCHITECTURE, hopper.ARCHITECTURE),
        head_dims=hopper.HEAD_DIMS,
        causal_rectangular=True,
        key_padding=True,
        lse=True,
        hadamard=frozenset(HadamardMode),
        rope=True,
    )

    def probe(self, device: torch.device) -> list[Reason]:
        reasons = []
        capability = None
        if device.type == "cuda" and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability(device)
        elif device.type == "cuda":
            reasons.append(Reason("device", f"{device}: PyTorch {torch.__version__} sees no CUDA device"))
        # What the data says about the device alone: any call that nothing else speaks against will do.
        any_call = AttentionCall(1, 1, 1, 1, 1, 128, 128, torch.bfloat16, device.type, capability=capability)
        return [*reasons, *self.capabilities.reasons_against(any_call), *hopper.reasons_against_triton()]

    def supports(self, call: AttentionCall) -> list[Reason]:
        reasons = super().supports(call)
        known = {reason.code for reason in reasons}
        reasons += [reason for reason in hopper.reasons_against(call) if reason.code not in known]
        if call.hadamard is not HadamardMode.NONE and call.head_dim & (call.head_dim - 1):
            text = f"hadamard {call.hadamard} with head_dim {call.head_dim}: transforms powers of two only"
            reasons.append(Reason("hadamard", text, 'pass hadamard="none"'))
        if 0 in (call.batch, call.num_heads, call.q_len, call.kv_len):
            reasons.append(Reason("empty", "an empty dimension: nothing to compute"))
        if not abs(call.softmax_scale) <= torch.finfo(torch.float32).max:
            reasons.append(Reason("scale", f"scale {call.softmax_scale}: must be a finite float32"))
        return reasons

    def rank(self, call: AttentionCall) -> float:
        return measured_speedup(self.name, call)

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self._attend(query, key, value, call, attn_mask, None)

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
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        from lpattn.quantize.fused import rotation_of

        assert call.rope is not None
        tables = (cos, sin, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        rotation = rotation_of(query, key, tables, call.rope.interleaved)
        return self._attend(query, key, value, call, attn_mask, rotation)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None,
        rotation: Rotation | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        # Triton is imported at the first call: `import lpattn` must not wait for it.
        from lpattn.kernels.hopper.launch import QK_MAX, attend
        from lpattn.quantize.fused import quantize_per_block, restore_output, used_keys

        quantized = quantize_per_block(
            query,
            key,
            value,
            factor=call.softmax_scale * math.log2(math.e),
            qk_max=QK_MAX,
            hadamard=call.hadamard,
            rope=rotation,
            keys=None if attn_mask is None else used_keys(attn_mask, call.batch, call.kv_len),
            with_lse_shift=call.return_lse,
        )
        causal = call.causal is CausalKind.TOP_LEFT
        # The transform's inverse runs on bfloat16, whatever the inputs are.
        transformed = call.hadamard is not HadamardMode.NONE
        dtype = torch.bfloat16 if transformed else query.dtype
        # The log-sum-exp wants sums without a bias, whatever the exponential.
        exponential = None if call.return_lse else self.exponential
        out, lse = attend(quantized, dtype, causal=causal, return_lse=call.return_lse, exponential=exponential)
        if transformed:
            out = restore_output(out, quantized, query.dtype)
        out = out.transpose(1, 2)
        return out if lse is None else (out, lse)


class FastTritonBackend(TritonBackend):
    """``fp8_triton`` with a coarser exponential; runs only where it is named.

    Precision:
        As :class:`TritonBackend`, but that between powers of two P is interpolated linearly: a relative error of 2.95 %
        instead of 2.57 % (standard deviation, rounding to e4m3 included), which costs about 0.4 dB SQNR on normal data.
        With ``return_lse`` it is the same as :class:`TritonBackend`.
    """

    name = "fp8_triton_fast"
    automatic = False
    exponential = "linear"


@hookimpl
def lpattn_backends() -> list[Backend]:
    """FP8 attention in Triton."""
    return [TritonBackend(), FastTritonBackend()]
