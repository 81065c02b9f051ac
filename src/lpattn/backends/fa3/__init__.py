"""``fp8_fa3``: FlashAttention-3's FP8 forward on Hopper, from the wheel ``fa3-fwd`` or the official build.

Owns the translation of a call into the kernel's terms. Where the kernel comes from and what it was built with is
:mod:`.wheel`'s business, how q, k and v become e4m3 is :mod:`lpattn.quantize.fused`'s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from lpattn.backend import Backend, Capabilities
from lpattn.backends.fa3.wheel import HEAD_DIMS, NOT_INSTALLED, Wheel, installed_wheels, is_installed
from lpattn.hookspecs import hookimpl
from lpattn.policy import measured_speedup
from lpattn.types import AttentionBackend, AttentionCall, CausalKind, HadamardMode, Norm, Reason

if TYPE_CHECKING:
    from lpattn.quantize.fused import PerHead, Rotation
    from lpattn.quantize.fused.heads import HeadQuantization

_NO_TRITON = Reason(
    "not_installed", "triton, in which q, k and v are quantized, is not installed", "pip install triton"
)


_ROPE_FROM = 16384
"""benchmarks/results/*-compiled-blocks-fa3*.json: with its rotation taken in, a block of Llama's is now faster and now
slower up to 8192 tokens, by 2 % at most, depending on the card, and faster on both at 16384."""

_PLANS_SIZE = 256
"""Different calls, strides and alignments for which it is remembered how they are quantized."""


class FA3Backend(Backend):
    """FlashAttention-3 with q, k and v in e4m3, one scale per (batch, kv head) each.

    A key-padding mask becomes a list of the keys that are used: the others are left out of k and v when these are
    quantized, and the kernel is told how many there are.

    Precision:
        Inputs are float16, bfloat16 or float32. A constant per channel is subtracted from k and v (and added back to
        the output; the log-sum-exp is corrected), the rest is rounded to e4m3 (relative error up to 2^-4); about 25 dB
        SQNR on normal data. P is rounded to e4m3 after a factor 2^8; PV is accumulated over the whole row in the tensor
        cores' own precision, which is below float32: without the constant, a V whose mean is far from zero would lose
        accuracy with length. The kernel writes bfloat16, to which the constant is added in float32, and which is cast
        to the inputs' dtype. An inf in an input becomes a NaN.

    Source:
        FlashAttention-3 (arXiv:2407.08608, section 3.3). Smoothing k: SageAttention (arXiv:2410.02367).
    """

    name = AttentionBackend.FP8_FA3.value
    capabilities = Capabilities(
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        device_types=frozenset({"cuda"}),
        architectures=((9, 0), (9, 0)),
        head_dims=HEAD_DIMS,
        key_padding=True,
        lse=True,
        hadamard=frozenset(HadamardMode),
        rope=True,
        rope_from=_ROPE_FROM,
        norm=True,
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
        reasons = self.capabilities.reasons_against_device(device)
        if not is_installed("triton"):
            reasons.append(_NO_TRITON)
        if not self._wheels:
            return [*reasons, NOT_INSTALLED]
        # The library needs CUDA's, so that its import says nothing on a machine without.
        against = [wheel.reasons_against(load=torch.cuda.is_available()) for wheel in self._wheels]
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
        assert call.rope is not None
        tables = (cos, sin, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        rotation = self._fused.rotation_of(query, key, tables, call.rope.interleaved)
        return self._attend(query, key, value, call, attn_mask, rotation, norm)

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
        fused = self._fused
        sign, scale = _split_scale(call.softmax_scale)
        keys = None if attn_mask is None else fused.used_keys(attn_mask, call.batch, call.kv_len)
        more = fused.more_of(rotation, keys, norm)
        at = (query.data_ptr(), key.data_ptr(), value.data_ptr())
        facts = (call, fused.alike(query, key, value, at, more))
        plan = self._plans.get(facts)
        if plan is None:
            if len(self._plans) >= _PLANS_SIZE:
                self._plans.clear()
            plan = self._plans[facts] = fused.plan_per_head(
                query, key, value, at, factor=sign, hadamard=call.hadamard, more=more, with_lse_shift=call.return_lse
            )
        quantized = plan.run(query, key, value, at, fused.short_way(plan.device), more)
        result = self.forward(quantized, call, None if keys is None else keys.counts)
        out = fused.restore_output(result[0], quantized, query.dtype).transpose(1, 2)
        if quantized.lse_shift is None:
            return out
        # -inf is what the kernel makes of a NaN in the row, unless there is no key.
        lse = result[1]
        lse = lse.masked_fill(lse == -torch.inf, torch.nan).add_(quantized.lse_shift, alpha=scale)
        return out, lse if keys is None else lse.masked_fill(keys.counts[:, None, None] == 0, -torch.inf)

    def forward(
        self, quantized: PerHead, call: AttentionCall, key_counts: torch.Tensor | None = None
    ) -> Sequence[torch.Tensor]:
        """The kernel alone, on operands that are quantized.

        Args:
            quantized: q, k and v.
            call: the call that they are of.
            key_counts: int32 [B], how many keys are used; None: all.

        Returns:
            The output [B, q_len, H, D] in bfloat16, before V's constant is added, the log-sum-exp, and what else
            FlashAttention-3 returns.
        """
        return self._operator(
            quantized.query,
            quantized.key,
            quantized.value,
            q_descale=quantized.q_descale,
            k_descale=quantized.k_descale,
            v_descale=quantized.v_descale,
            softmax_scale=_split_scale(call.softmax_scale)[1],
            # The kernel's causal mask is aligned at the bottom right; supports() admits square ones only.
            is_causal=call.causal is CausalKind.TOP_LEFT,
            # More splits over the keys would be chosen by a heuristic, and add in another order.
            num_splits=1,
            seqused_k=key_counts,
        )

    @functools.cached_property
    def _plans(self) -> dict[Hashable, HeadQuantization]:
        """How calls are quantized, by what a plan depends on."""
        return {}

    @functools.cached_property
    def _fused(self) -> ModuleType:
        # Triton is imported at the first call: `import lpattn` must not wait for it.
        from lpattn.quantize import fused

        return fused

    @functools.cached_property
    def _operator(self) -> torch._ops.OpOverload:
        wheel = self._wheel
        if wheel is None:
            raise RuntimeError(f"{self.name}: {NOT_INSTALLED}")
        return wheel.forward()


@functools.lru_cache(maxsize=64)
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
