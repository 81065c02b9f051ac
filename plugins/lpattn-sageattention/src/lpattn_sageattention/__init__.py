"""The backend `sageattention`: SageAttention's kernels behind lpattn's protocol.

Owns the translation of a call: what is refused, what is done before and after the kernel. Which wheel is installed and
what it can run is :mod:`.wheel`'s business.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from lpattn import AttentionCall, Backend, Capabilities, CausalKind, Reason, hookimpl
from lpattn_sageattention.wheel import TILE_OF_KEYS, TILE_OF_QUERIES, Wheel, installed_wheel

_LARGEST_OFFSET = 2**31
"""Elements that the quantization kernels of version 1 can address."""
_LARGEST_GRID = 2**15
"""Batch entries in one launch: the batch is an axis of the grid that has at most 65535 blocks."""


class SageAttentionBackend(Backend):
    """SageAttention 1.0.6 or 2.x.

    Precision:
        k minus its mean over the keys (float32), q and k in INT8 with a scale per block; P and v in float16 (version 1)
        or e4m3 (version 2). v is divided by a power of two per KV head, so that its largest value lies between 128 and
        256: sums of 64 products stay within float16. lse in float32.

    Source:
        SageAttention (arXiv:2410.02367), SageAttention2 (arXiv:2411.10958).
    """

    name = "sageattention"

    def __init__(self, wheel: Wheel | None = None) -> None:
        self._wheel = installed_wheel() if wheel is None else wheel
        # Decisions on version 1 depend on the length: see supports().
        self.exact_lengths = not self._wheel.masks_partial_tiles  # type: ignore[misc]
        self.capabilities = Capabilities(
            dtypes=self._wheel.dtypes,
            device_types=frozenset({"cuda"}),
            architectures=self._wheel.architectures,
            head_dims=self._wheel.head_dims,
            lse=self._wheel.has_lse,
            strided_last_dim=False,
        )

    @property
    def version(self) -> str:
        return self._wheel.label

    def probe(self, device: torch.device) -> list[Reason]:
        reasons = self.capabilities.reasons_against_device(device)
        # The kernels' libraries need CUDA's, so that loading them says nothing on a machine without.
        capability = None if reasons or device.type != "cuda" else torch.cuda.get_device_capability(device)
        return reasons + list(self._wheel.reasons_against(capability))

    def supports(self, call: AttentionCall) -> list[Reason]:
        reasons = super().supports(call)
        if call.is_empty:
            reasons.append(Reason("empty", "an empty dimension: nothing to compute"))
        if not abs(call.softmax_scale) <= torch.finfo(torch.float32).max:
            reasons.append(Reason("scale", f"scale {call.softmax_scale}: must be a finite float32"))
        partial = call.causal is CausalKind.NONE and call.kv_len % TILE_OF_KEYS
        if partial and not self._wheel.masks_partial_tiles:
            reasons.append(
                Reason(
                    "kv_len",
                    f"kv_len {call.kv_len}, not causal: {self._wheel.label or 'version 1'} counts the missing keys of "
                    f"a tile of {TILE_OF_KEYS} in the row sum, and needs a multiple of it",
                    "install SageAttention 2",
                )
            )
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
        size = max(query[0].numel(), key[0].numel(), 1)
        entries = min(_LARGEST_GRID, max(1, (_LARGEST_OFFSET - 1) // size))
        with torch.cuda.device(query.device) if query.is_cuda else torch.no_grad():
            if call.batch <= entries:
                out, lse = self._attend(query, key, value, call)
            else:
                parts = zip(*(x.split(entries) for x in (query, key, value)), strict=True)
                outs, lses = zip(*(self._attend(q, k, v, call) for q, k, v in parts), strict=True)
                out, lse = torch.cat(outs), None if lses[0] is None else torch.cat(lses)
        if not call.return_lse:
            return out
        assert lse is not None
        return out, lse

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output, lse) of some batch entries."""
        causal = call.causal is CausalKind.TOP_LEFT
        mean = _finite(key).mean(2, keepdim=True, dtype=torch.float32)
        smoothed = (key - mean).to(key.dtype)
        exponent = _exponent(value)
        scaled = torch.ldexp(value.float(), -exponent).to(value.dtype)
        padding = -call.q_len % TILE_OF_QUERIES if causal and not self._wheel.masks_partial_tiles else 0
        q, k, v = (_addressable(F.pad(x, (0, 0, 0, padding)) if padding else x) for x in (query, smoothed, scaled))
        out, lse = self._kernel(q.device)(
            q, k, v, is_causal=causal, sm_scale=call.softmax_scale, return_lse=call.return_lse
        )
        poison = _poison(query, key, causal)
        out = torch.ldexp(out[:, :, : call.q_len].float(), _grouped(exponent, call))
        out = (out + _grouped_keys(poison, call)).to(call.dtype)
        if lse is None:
            return out, None
        # A constant on k moves every logit of the row by the same: softmax forgets it, the log-sum-exp does not.
        shift = (query.float() * _grouped(mean, call)).sum(-1) * call.softmax_scale
        return out, lse[:, :, : call.q_len].float() + shift + _grouped_keys(poison, call).squeeze(-1)

    def _kernel(self, device: torch.device) -> functools.partial[tuple[torch.Tensor, torch.Tensor | None]]:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return functools.partial(self._wheel.forward, capability)


def _finite(x: torch.Tensor) -> torch.Tensor:
    """The tensor with 0 for what is not finite: such values must not reach what other tokens share."""
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _exponent(value: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, 1, 1]: the power of two that brings v's largest value to between 128 and 256."""
    largest = _finite(value).abs().amax((2, 3), keepdim=True).float()
    return torch.frexp(largest.clamp_min(torch.finfo(torch.float32).tiny))[1] - 8


def _poison(query: torch.Tensor, key: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros, and NaN where exact attention gives NaN because of q ([B, H, q_len, 1]) or k ([B, Hkv, q_len or 1, 1])."""
    of_q, of_k = (x.float().mul(0.0).sum(-1, keepdim=True) for x in (query, key))
    return of_q, of_k.cumsum(2) if causal else of_k.sum(2, keepdim=True)


def _grouped(x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """What belongs to a KV head, for each of its query heads."""
    return x.repeat_interleave(call.num_heads // call.num_kv_heads, 1)


def _grouped_keys(poison: tuple[torch.Tensor, torch.Tensor], call: AttentionCall) -> torch.Tensor:
    of_q, of_k = poison
    return of_q + _grouped(of_k, call)


def _addressable(x: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where its elements lie further apart than 32-bit offsets reach."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x if reach < _LARGEST_OFFSET else x.contiguous()


@hookimpl
def lpattn_backends() -> list[Backend]:
    """SageAttention, installed or not: without its wheel the probe says how to get it."""
    return [SageAttentionBackend()]
