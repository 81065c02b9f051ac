"""The backend `cudnn_fp8`: cuDNN's fused FP8 attention behind lpattn's protocol.

Owns quantization and the translation of a call. Graphs and handles are :mod:`.graphs`' business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lpattn import AttentionCall, Backend, Capabilities, CausalKind, Reason, hookimpl
from lpattn.quantize import E4M3_MAX
from lpattn_cudnn.graphs import Graphs, Signature, frontend_version, import_reasons


class CudnnBackend(Backend):
    """cuDNN's FP8 forward, with one scale for each of q, k and v.

    Precision:
        k and v minus their means over the keys (float32; v's is added back, the log-sum-exp is corrected), then q, k
        and v in e4m3 with one scale per tensor: cuDNN takes no finer ones. P in e4m3 after a factor 2^8. The output is
        bfloat16, to which v's mean is added in float32. An inf in an input becomes a NaN.

    Source:
        cuDNN frontend, operation "SDPA FP8 forward". Smoothing k: SageAttention (arXiv:2410.02367).
    """

    name = "cudnn_fp8"
    automatic = False  # nobody measured its speed
    capabilities = Capabilities(
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        device_types=frozenset({"cuda"}),
        architectures=((9, 0), (10, 3)),
        head_dims=frozenset({64, 128, 192, 256}),
        lse=True,
    )

    def __init__(self) -> None:
        self._graphs = Graphs()

    @property
    def version(self) -> str:
        return frontend_version()

    def probe(self, device: torch.device) -> list[Reason]:
        capability = None
        reasons = []
        if device.type == "cuda" and not torch.cuda.is_available():
            reasons.append(Reason("device", f"{device}: PyTorch {torch.__version__} sees no CUDA device"))
        elif device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            reasons.append(Reason("device", f"{device}: this machine has {torch.cuda.device_count()} CUDA devices"))
        elif device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
        any_call = AttentionCall(1, 1, 1, 256, 256, 128, 128, torch.bfloat16, device.type, capability=capability)
        reasons += self.capabilities.reasons_against(any_call)
        installed = import_reasons()
        if reasons or installed:
            return reasons + list(installed)
        # A real question: does this cuDNN have a plan for a plain call on this device?
        refusals = [self._graphs.refusal(device.index or 0, dim) for dim in sorted(self.capabilities.head_dims or ())]
        if all(refusals):
            text = f"cuDNN has no FP8 attention for {device}: {refusals[0]}"
            reasons.append(Reason("no_plan", text, "pip install --upgrade nvidia-cudnn-cu13 nvidia-cudnn-frontend"))
        return reasons

    def supports(self, call: AttentionCall) -> list[Reason]:
        reasons = super().supports(call)
        if call.is_empty:
            reasons.append(Reason("empty", "an empty dimension: nothing to compute"))
        if not abs(call.softmax_scale) <= torch.finfo(torch.float32).max:
            reasons.append(Reason("scale", f"scale {call.softmax_scale}: must be a finite float32"))
        asks = not reasons and call.capability is not None and torch.cuda.is_available() and not import_reasons()
        if asks and (refusal := self._graphs.refusal(call.device_index, call.head_dim)):
            text = f"head_dim {call.head_dim}: this cuDNN has no plan for it: {refusal}"
            reasons.append(Reason("head_dim", text))
        return reasons

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        operands = quantize(query, key, value, call)
        signature = Signature(
            device_index=call.device_index,
            batch=call.batch,
            num_heads=call.num_heads,
            num_kv_heads=call.num_kv_heads,
            q_len=call.q_len,
            kv_len=call.kv_len,
            head_dim=call.head_dim,
            softmax_scale=operands.softmax_scale,
            causal=call.causal is CausalKind.TOP_LEFT,
            with_stats=call.return_lse,
        )
        out, stats = self._graphs.run(
            signature,
            operands.query,
            operands.key,
            operands.value,
            operands.q_descale,
            operands.k_descale,
            operands.v_descale,
        )
        out = (out.transpose(1, 2).float() + _grouped(operands.v_mean, call)).to(call.dtype)
        if stats is None:
            return out
        # A constant on k moves every logit of the row by the same: softmax forgets it, the log-sum-exp does not.
        shift = (query.float() * _grouped(operands.k_mean, call)).sum(-1) * call.softmax_scale
        return out, stats.squeeze(-1) + shift


@dataclass(frozen=True)
class Operands:
    """What the kernel takes, and what is added afterwards.

    Attributes:
        query, key, value: e4m3, [B, S, H, D] contiguous.
        q_descale, k_descale, v_descale: float32 [1]; value = data * descale.
        softmax_scale: positive; its sign went into q.
        k_mean, v_mean: float32 [B, Hkv, 1, D], what was subtracted.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    q_descale: torch.Tensor
    k_descale: torch.Tensor
    v_descale: torch.Tensor
    softmax_scale: float
    k_mean: torch.Tensor
    v_mean: torch.Tensor


def quantize(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> Operands:
    """Smooth k and v, and round all three to e4m3.

    Args:
        query: [B, H, q_len, D]; ``key``, ``value``: [B, Hkv, kv_len, D]. Any strides.
        call: its softmax scale and sizes.
    """
    k_mean, v_mean = (_finite(x).mean(2, keepdim=True, dtype=torch.float32) for x in (key, value))
    # Kernels take the row's maximum before they scale: a scale of 0 or below is q's instead.
    sign, scale = (0.0, 1.0) if call.softmax_scale == 0.0 else (math.copysign(1.0, call.softmax_scale), 0.0)
    scale = scale or abs(call.softmax_scale)
    q, q_descale = _to_e4m3(query.float() * sign)
    k, k_descale = _to_e4m3(key.float() - k_mean)
    v, v_descale = _to_e4m3(value.float() - v_mean)
    return Operands(q, k, v, q_descale, k_descale, v_descale, scale, k_mean, v_mean)


def _to_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, S, H, D] contiguous in e4m3, descale [1]); an inf becomes NaN, and neither enters the scale."""
    descale = (_finite(x).abs().amax() / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = torch.where(x.isfinite(), x / descale, torch.nan)
    return scaled.transpose(1, 2).to(torch.float8_e4m3fn, memory_format=torch.contiguous_format), descale.reshape(1)


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _grouped(x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """What belongs to a KV head, for each of its query heads."""
    return x.repeat_interleave(call.num_heads // call.num_kv_heads, 1)


@hookimpl
def lpattn_backends() -> list[Backend]:
    """CuDNN's FP8 attention, installed or not: without its wheel the probe says how to get it."""
    return [CudnnBackend()]
