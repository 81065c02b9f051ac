"""``bf16_reference``: exact attention in the inputs' own dtype, for every call that SDPA accepts, on every device."""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.nn.functional as F

from lpattn.backend import Backend, Capabilities
from lpattn.hookspecs import hookimpl
from lpattn.norm import normalize_both
from lpattn.rope import rotate_heads_first
from lpattn.types import AttentionBackend, AttentionCall, CausalKind, HadamardMode, MaskKind, Norm, Reason

_LSE_ROWS = 1024
"""Rows of scores that the log-sum-exp holds in memory at once."""


class ReferenceBackend(Backend):
    """PyTorch's own SDPA: what lpattn falls back on and what everything else is compared with."""

    name = AttentionBackend.BF16_REFERENCE.value
    exact = True
    capabilities = Capabilities(
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
        head_dim_v_differs=True,
        masks=frozenset(MaskKind),
        causal_rectangular=True,
        lse=True,
        dropout=True,
        hadamard=frozenset({HadamardMode.NONE}),
        rope=True,
        norm=True,
        norm_over_heads=True,
        varlen=True,
        backward=True,
    )

    @property
    def version(self) -> str:
        return str(torch.__version__)

    def probe(self, device: torch.device) -> list[Reason]:
        return []

    def rank(self, call: AttentionCall) -> float:
        return 1.0

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if call.is_empty and not call.requires_grad:
            # SDPA says the same where it says anything: not all of its kernels take empty tensors.
            out = query.new_zeros(call.batch, call.q_len, call.num_heads, call.head_dim_v).transpose(1, 2)
            lse = query.new_full((call.batch, call.num_heads, call.q_len), -torch.inf, dtype=torch.float32)
            return (out, lse) if call.return_lse else out
        scaled, scale, mask = query, call.softmax_scale, attn_mask
        if scale <= 0.0:
            # Some of PyTorch's kernels hide keys by -inf in front of the scale, which then shows them, or makes NaN.
            scaled, scale = (-query, -scale) if scale < 0.0 else (query * 0.0, 1.0)
        if mask is not None and mask.dtype == torch.float32 and query.dtype == torch.float64:
            mask = mask.double()  # PyTorch's kernel for the CPU takes its memory for that of a float64 mask
        elif mask is not None and mask.dtype == torch.float32 and query.is_cuda:
            # So does cuDNN beside q in 16 bits, which PyTorch prefers on Hopper: NaN. No other kernel but that for
            # tests takes such masks, and to round the mask would be to change it.
            scaled, key, value = scaled.float(), key.float(), value.float()
        out = F.scaled_dot_product_attention(
            scaled,
            key,
            value,
            mask,
            dropout_p,
            call.causal is CausalKind.TOP_LEFT,
            scale=scale,
            enable_gqa=call.num_heads != call.num_kv_heads,
        )
        out = out.to(query.dtype)
        return (out, log_sum_exp(query, key, call, attn_mask)) if call.return_lse else out

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
        query, key = normalize_both(query, key, norm)
        q, k = rotate_heads_first(query, key, cos, sin, cos_k, sin_k, call.rope.interleaved)
        return self.attention(q, k, value.transpose(1, 2), call, attn_mask, dropout_p)

    def varlen_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        call: AttentionCall,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert call.varlen is not None
        left, right = call.varlen.window
        out = query.new_zeros(query.shape[0], call.num_heads, call.head_dim_v)
        lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
        # One sequence after the other, with the lengths on the host: SDPA knows of no packed ones.
        of_q, of_k = (itertools.pairwise(cu.tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
        for (start, end), (first, last) in zip(of_q, of_k, strict=True):
            q = query[start:end].transpose(0, 1)[None]
            k, v = (x[first:last].transpose(0, 1)[None] for x in (key, value))
            mask = None
            if left >= 0 or right >= 0:
                # How far a key is behind its query, both counted from the end.
                ahead = torch.arange(last - first, device=q.device) - (last - first)
                ahead = ahead - (torch.arange(end - start, device=q.device) - (end - start))[:, None]
                mask = ((ahead >= -left) if left >= 0 else ahead == ahead) & ((ahead <= right) if right >= 0 else True)
                mask = mask[None, None]
            one = dataclasses.replace(
                call,
                batch=1,
                q_len=end - start,
                kv_len=last - first,
                mask=MaskKind.NONE if mask is None else MaskKind.BOOL,
                mask_shape=None if mask is None else tuple(mask.shape),
                varlen=None,
            )
            result = self.attention(q, k, v, one, mask)
            found = result[0] if isinstance(result, tuple) else result
            out = out.index_copy(0, torch.arange(start, end, device=q.device), found[0].transpose(0, 1))
            if isinstance(result, tuple):
                lse[start:end] = result[1][0].T
        return (out, lse) if call.return_lse else out


def log_sum_exp(
    query: torch.Tensor, key: torch.Tensor, call: AttentionCall, attn_mask: torch.Tensor | None
) -> torch.Tensor:
    """Natural log of the softmax denominator, float32 [B, H, q_len]; -inf for rows that attend to nothing.

    Precision:
        Scores and sum in float32 (float64 for float64 inputs), rounded to float32 at the end. SDPA does not return the
        log-sum-exp on every device and for every mask, so it is computed apart, a block of rows at a time.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    _, heads, q_len, _ = query.shape
    groups = heads // call.num_kv_heads
    keys = key.to(wide).transpose(-1, -2).unsqueeze(2)
    rows = []
    for start in range(0, q_len, _LSE_ROWS):
        stop = min(start + _LSE_ROWS, q_len)
        block = query[:, :, start:stop].to(wide).unflatten(1, (call.num_kv_heads, groups))
        scores = (block @ keys * call.softmax_scale).flatten(1, 2)
        if call.causal is CausalKind.TOP_LEFT:
            allowed = torch.ones(stop - start, call.kv_len, dtype=torch.bool, device=query.device).tril(start)
            scores = scores.masked_fill(~allowed, -torch.inf)
        if attn_mask is not None:
            part = attn_mask[:, :, start:stop] if attn_mask.shape[2] != 1 else attn_mask
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.to(wide)
        rows.append(scores.logsumexp(-1))
    return torch.cat(rows, dim=2).float()


@hookimpl
def lpattn_backends() -> list[Backend]:
    """The built-in reference."""
    return [ReferenceBackend()]
