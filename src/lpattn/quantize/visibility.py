"""Which keys a query may see: attn_mask and causality as one thing, asked tile by tile.

"Masked" is False or -inf. It knows nothing of quantization; it is told about heads only to line them up with KV heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lpattn.errors import InvalidArgumentError


class Visibility:
    """Keys that queries see, for tensors laid out as [B, Hkv, heads per KV head, q_len, kv_len]."""

    def __init__(
        self,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        shape: tuple[int, int, int, int, int],
        device: torch.device,
    ) -> None:
        """Take a mask as scaled_dot_product_attention does.

        Args:
            attn_mask: bool (True attends) or additive float, broadcastable to [B, H, q_len, kv_len]; or None.
            is_causal: query i sees keys 0..i only, whatever the lengths (top-left alignment).
            shape: (B, Hkv, H / Hkv, q_len, kv_len).
            device: of q.

        Raises:
            InvalidArgumentError: the mask has another dtype, does not broadcast, or lies on another device.
        """
        self.is_causal = is_causal
        self.q_len, self.kv_len = shape[3:]
        self.device = device
        self.mask = None if attn_mask is None else _five_dimensional(attn_mask, shape, device)

    def tiles(self, size: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, first_row): keys start..stop, seen by no query in front of first_row; unseen tiles left out."""
        for start in range(0, min(self.kv_len, self.q_len) if self.is_causal else self.kv_len, size):
            yield start, min(start + size, self.kv_len), start if self.is_causal else 0

    def tile(self, start: int, stop: int, first_row: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the queries from first_row on see of keys start..stop.

        Returns:
            (visible, bias), each broadcastable to [B, Hkv, G, q_len - first_row, stop - start]: visible is bool, or
            None where all is visible; bias is what is added to the logits, in the mask's dtype, or None.
        """
        visible = bias = None
        if self.mask is not None:
            mask = self.mask
            rows = slice(first_row, None) if mask.shape[3] > 1 else slice(None)
            keys = slice(start, stop) if mask.shape[4] > 1 else slice(None)
            mask = mask[..., rows, keys]
            if mask.dtype is torch.bool:
                visible = mask
            else:
                visible, bias = mask != -torch.inf, mask
        if self.is_causal and stop - 1 > first_row:
            queries = torch.arange(first_row, self.q_len, device=self.device)
            causal = queries[:, None] >= torch.arange(start, stop, device=self.device)
            visible = causal if visible is None else visible & causal
        return visible, bias

    def used(self, size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Tokens that take part at all.

        Returns:
            (queries, keys): bool, broadcastable to [B, Hkv, G, q_len] and [B, Hkv, kv_len]: queries that see a key,
            keys that a query sees (of any head of the group). None where all do.
        """
        if self.mask is None:  # every query sees at least key 0
            late = self.is_causal and self.kv_len > self.q_len
            return None, torch.arange(self.kv_len, device=self.device)[None, None] < self.q_len if late else None
        queries = torch.zeros(1, 1, 1, self.q_len, dtype=torch.bool, device=self.device)
        keys = [torch.zeros(1, 1, 0, dtype=torch.bool, device=self.device)]
        for start, stop, first_row in self.tiles(size):
            visible, _ = self.tile(start, stop, first_row)
            if visible is None:
                visible = torch.ones(1, dtype=torch.bool, device=self.device)
            visible = visible.expand(*([1] * (5 - visible.dim())), *visible.shape)
            seen = visible.any(-1)
            later = seen.expand(*seen.shape[:3], self.q_len - first_row)
            queries = queries | torch.nn.functional.pad(later, (first_row, 0))
            keys.append(visible.any(3).any(2).expand(*visible.shape[:2], stop - start))
        shape = torch.broadcast_shapes(*(k.shape[:2] for k in keys))
        seen_keys = torch.cat([k.expand(*shape, -1) for k in keys], dim=2)
        return queries, torch.nn.functional.pad(seen_keys, (0, self.kv_len - seen_keys.shape[2]))


def _five_dimensional(mask: torch.Tensor, shape: tuple[int, int, int, int, int], device: torch.device) -> torch.Tensor:
    batch, kv_heads, group, q_len, kv_len = shape
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise InvalidArgumentError(
            f"attn_mask must be bool (True attends) or floating point (added to the logits); got {mask.dtype}. "
            "Use mask.bool() for a mask of ones and zeros"
        )
    if mask.device != device:
        raise InvalidArgumentError(f"attn_mask must be on q's device, {device}; got {mask.device}")
    full = (batch, kv_heads * group, q_len, kv_len)
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(size not in (1, limit) for size, limit in zip(sizes, full, strict=True)):
        raise InvalidArgumentError(
            f"attn_mask must be broadcastable to [B, H, q_len, kv_len] = {list(full)}; got {list(mask.shape)}"
        )
    mask = mask.reshape(sizes)
    return mask[:, :, None] if sizes[1] == 1 else mask.unflatten(1, (kv_heads, group))
