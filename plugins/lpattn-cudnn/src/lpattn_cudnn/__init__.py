"""The backend `cudnn_fp8`: cuDNN's fused FP8 attention behind lpattn's protocol.

Owns the translation of a call. Quantization is :mod:`.operands`' business, graphs and handles are :mod:`.graphs`'.
"""

from __future__ import annotations

import torch

from lpattn import AttentionCall, Backend, Capabilities, CausalKind, Reason, hookimpl
from lpattn_cudnn.graphs import Graphs, Signature, frontend_version, import_reasons
from lpattn_cudnn.operands import per_query_head, quantize, sign_and_scale

_REMEDY = "pip install --upgrade nvidia-cudnn-cu13 nvidia-cudnn-frontend"


class CudnnBackend(Backend):
    """cuDNN's FP8 forward, with one scale for each of q, k and v.

    Precision:
        k and v minus their means over the keys (float32; v's is added back, the log-sum-exp is corrected), then q, k
        and v in e4m3 with one scale per tensor: cuDNN takes no finer ones. P in e4m3 after a factor 2^8. On sm_90
        cuDNN writes the output in e4m3 only (one scale, from v's largest magnitude; relative error up to 2^-4). From
        sm_100 on the output is bfloat16. V's mean is added to either in float32. An inf in an input becomes a NaN.

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
        reasons = [*self.capabilities.reasons_against_device(device), *import_reasons()]
        if reasons:
            return reasons
        # A real question: does this cuDNN have a plan for a plain call on this device?
        capability = torch.cuda.get_device_capability(device)
        plain = AttentionCall(1, 1, 1, 256, 256, 128, 128, torch.bfloat16, "cuda", device.index or 0, capability)
        if refusal := self._graphs.refusal(_signature(plain)):
            reasons.append(Reason("no_plan", f"cuDNN has no FP8 attention for {device}: {refusal}", _REMEDY))
        return reasons

    def supports(self, call: AttentionCall) -> list[Reason]:
        reasons = super().supports(call)
        if call.is_empty:
            reasons.append(Reason("empty", "an empty dimension: nothing to compute"))
        if not abs(call.softmax_scale) <= torch.finfo(torch.float32).max:
            reasons.append(Reason("scale", f"scale {call.softmax_scale}: must be a finite float32"))
        if not reasons and self._can_ask(call) and (refusal := self._graphs.refusal(_signature(call))):
            text = f"head_dim {call.head_dim}: this cuDNN has no plan for such calls: {refusal}"
            reasons.append(Reason("no_plan", text, _REMEDY))
        return reasons

    @staticmethod
    def _can_ask(call: AttentionCall) -> bool:
        """Whether the call is for a device of this machine, so that cuDNN can be asked for a plan."""
        return (
            call.capability is not None
            and call.device_index < torch.cuda.device_count()
            and call.capability == torch.cuda.get_device_capability(call.device_index)
            and not import_reasons()
        )

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        signature = _signature(call)
        operands = quantize(query, key, value, call)
        data, stats = self._graphs.run(signature, operands)
        out = data.transpose(1, 2).float()
        if signature.fp8_output:
            out /= operands.o_scale
        out = (out + per_query_head(operands.v_mean, call)).to(call.dtype)
        if stats is None:
            return out
        # A constant on k moves every logit of the row by the same: softmax forgets it, the log-sum-exp does not.
        shift = (query.float() * per_query_head(operands.k_mean, call)).sum(-1) * call.softmax_scale
        return out, stats.squeeze(-1) + shift


def _signature(call: AttentionCall) -> Signature:
    """What cuDNN is asked to build for the call."""
    return Signature(
        device_index=call.device_index,
        batch=call.batch,
        num_heads=call.num_heads,
        num_kv_heads=call.num_kv_heads,
        q_len=call.q_len,
        kv_len=call.kv_len,
        head_dim=call.head_dim,
        softmax_scale=sign_and_scale(call.softmax_scale)[1],
        causal=call.causal is CausalKind.TOP_LEFT,
        with_stats=call.return_lse,
        # cuDNN's FP8 forward writes half precision on Blackwell alone.
        fp8_output=call.capability is not None and call.capability < (10, 0),
    )


@hookimpl
def lpattn_backends() -> list[Backend]:
    """CuDNN's FP8 attention, installed or not: without its wheel the probe says how to get it."""
    return [CudnnBackend()]
