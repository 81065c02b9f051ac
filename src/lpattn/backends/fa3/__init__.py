"""``fp8_fa3``: FlashAttention-3's FP8 forward on Hopper, from the wheel ``fa3-fwd`` or the official build.

Owns the translation of a call into the kernel's terms. Where the kernel comes from and what it was built with is
:mod:`.wheel`'s business, how q, k and v become e4m3 is :mod:`.operands`'.
"""

from __future__ import annotations

import functools
import math

import torch

from lpattn.backend import Backend, Capabilities
from lpattn.backends.fa3.operands import quantize_qk, quantize_v
from lpattn.backends.fa3.wheel import HEAD_DIMS, NOT_INSTALLED, Wheel, installed_wheels
from lpattn.hookspecs import hookimpl
from lpattn.policy import measured_speedup
from lpattn.types import AttentionBackend, AttentionCall, CausalKind, Reason

_FLOAT16_SAFE = 65280.0
"""The largest bfloat16 that float16 holds."""


class FA3Backend(Backend):
    """FlashAttention-3 with q, k and v in e4m3, one scale per (batch, kv head) each.

    Precision:
        Inputs are float16, bfloat16 or float32 and are rounded to e4m3 (relative error up to 2^-4); about 25 dB SQNR on
        normal data. P is rounded to e4m3 after a factor 2^8; PV is accumulated over the whole row in the tensor cores'
        own precision, which is below float32: a V whose mean is far from zero loses accuracy with length. The kernel
        writes bfloat16, and float16 and float32 outputs are cast from that. An inf in an input becomes a NaN.

    Source:
        FlashAttention-3 (arXiv:2407.08608, section 3.3).
    """

    name = AttentionBackend.FP8_FA3.value
    capabilities = Capabilities(
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        device_types=frozenset({"cuda"}),
        architectures=((9, 0), (9, 0)),
        head_dims=HEAD_DIMS,
        lse=True,
    )

    @functools.cached_property
    def _wheels(self) -> tuple[Wheel, ...]:
        return installed_wheels()

    @property
    def _wheel(self) -> Wheel | None:
        """The build that runs: the first usable one, else the first one, else None."""
        usable = [w for w in self._wheels if not w.reasons_against(load=torch.cuda.is_available())]
        return next(iter([*usable, *self._wheels]), None)

    @property
    def version(self) -> str:
        wheel = self._wheel
        return "" if wheel is None else wheel.label

    def probe(self, device: torch.device) -> list[Reason]:
        has_cuda = torch.cuda.is_available()
        capability = None
        reasons = []
        if device.type == "cuda" and has_cuda:
            capability = torch.cuda.get_device_capability(device)
        elif device.type == "cuda":
            reasons.append(Reason("device", f"{device}: PyTorch {torch.__version__} sees no CUDA device"))
        # What the data says about the device alone: any call that nothing else speaks against will do.
        any_call = AttentionCall(1, 1, 1, 1, 1, 128, 128, torch.bfloat16, device.type, capability=capability)
        reasons += self.capabilities.reasons_against(any_call)
        if not self._wheels:
            return [*reasons, NOT_INSTALLED]
        # The library needs CUDA's, so that its import says nothing on a machine without.
        against = [wheel.reasons_against(load=has_cuda) for wheel in self._wheels]
        if all(against):
            reasons += [reason for of_wheel in against for reason in of_wheel]
        return reasons

    def supports(self, call: AttentionCall) -> list[Reason]:
        reasons = [r for r in super().supports(call) if r.code != "head_dim"]
        wheel = self._wheel
        dims = HEAD_DIMS if wheel is None else wheel.head_dims
        if call.head_dim not in dims:
            built = ", ".join(str(d) for d in sorted(dims)) or "none"
            who = "fa3-fwd" if wheel is None else "this wheel"
            reasons.append(Reason("head_dim", f"head_dim {call.head_dim}: {who} has kernels for {built}"))
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
        sign, scale = _split_scale(call.softmax_scale)
        q, q_descale = quantize_qk(query, key.shape[1], sign)
        k, k_descale = quantize_qk(key, key.shape[1])
        v, v_descale = quantize_v(value)
        out, lse, *_ = self._forward(
            q,
            k,
            v,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            softmax_scale=scale,
            # The kernel's causal mask is aligned at the bottom right; supports() admits square ones only.
            is_causal=call.causal is CausalKind.TOP_LEFT,
            # More splits over the keys would be chosen by a heuristic, and add in another order.
            num_splits=1,
        )
        out = out.transpose(1, 2)
        if query.dtype == torch.float16:
            # bfloat16 rounds values next to 65504 up to 65536, which float16 does not have.
            out = out.clamp(-_FLOAT16_SAFE, _FLOAT16_SAFE)
        out = out.to(query.dtype)
        if not call.return_lse:
            return out
        # Every row attends to something here, so that -inf can only be what the kernel makes of a NaN in the row.
        return out, lse.masked_fill(lse == -torch.inf, torch.nan)

    @functools.cached_property
    def _forward(self) -> torch._ops.OpOverload:
        wheel = self._wheel
        if wheel is None:
            raise RuntimeError(f"{self.name}: {NOT_INSTALLED}")
        return wheel.forward()


def _split_scale(softmax_scale: float) -> tuple[float, float]:
    """A factor for q, and a positive scale for the kernel.

    The kernel takes the row's maximum before it scales, which is wrong for negative scales; and it multiplies the scale
    by -inf (the maximum of a tile in which a row sees no key), which is NaN for zero.
    """
    if abs(softmax_scale) < torch.finfo(torch.float32).tiny:
        return 0.0, 1.0
    return math.copysign(1.0, softmax_scale), abs(softmax_scale)


@hookimpl
def lpattn_backends() -> list[Backend]:
    """FlashAttention-3 in FP8."""
    return [FA3Backend()]
