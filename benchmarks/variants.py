"""What can run an attention call on this machine: exact kernels, low-precision backends, FlashAttention-3's kernel."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from cases import Shape, Tensors
from labels import EXACT, name_of
from torch.nn.attention import SDPBackend, sdpa_kernel

import lpattn

Run = Callable[[], torch.Tensor]

NOT_FOR_SPEED = {"bf16_reference", "int8_triton"}
"""Exact attention, and what is chosen for its accuracy."""

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def options(shape: Shape, device: str) -> dict[str, Any]:
    """The arguments of SDPA after q, k and v."""
    grouped = shape.num_heads != shape.num_kv_heads
    return {"attn_mask": shape.mask(device), "is_causal": shape.causal, "enable_gqa": grouped}


def fa3_function() -> Callable[..., torch.Tensor] | None:
    """FlashAttention-3's own function, from whichever build is installed."""
    for module in ("fa3_fwd_interface", "flash_attn_interface"):
        if importlib.util.find_spec(module) is not None:
            return importlib.import_module(module).flash_attn_func
    return None


def exact_variants(qkv: Tensors, shape: Shape, device: str) -> dict[str, Run]:
    """Exact kernels. PyTorch's flash attention takes no masks; where it runs, its memory-efficient one is slower."""
    given = options(shape, device)

    def sdpa(kernel: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(*qkv, **given)

    masked = given["attn_mask"] is not None
    names = ("cudnn", "efficient") if masked else ("cudnn", "flash")
    found: dict[str, Run] = {f"{EXACT}{name}": functools.partial(sdpa, KERNELS[name]) for name in names}
    found[f"{EXACT}sdpa"] = functools.partial(F.scaled_dot_product_attention, *qkv, **given)
    if (function := fa3_function()) is not None and not masked:
        bshd = [x.transpose(1, 2) for x in qkv]
        found[f"{EXACT}fa3_bf16"] = lambda: function(*bshd, causal=shape.causal).transpose(1, 2)
    return found


def low_variants(qkv: Tensors, shape: Shape, device: str, modes: Sequence[str]) -> dict[str, Run]:
    """The low-precision backends, quantization included, each with each Hadamard mode."""
    found: dict[str, Run] = {}
    for info in lpattn.available_backends(device):
        if info.available and info.automatic and info.name not in NOT_FOR_SPEED:
            for mode in modes:
                found[name_of(info.name, mode)] = functools.partial(
                    lpattn.low_precision_sdpa,
                    *qkv,
                    **options(shape, device),
                    backend=info.name,
                    hadamard=mode,
                    on_unsupported="raise",
                )
    return found


class KernelAlone:
    """FlashAttention-3 in FP8 on operands that were quantized beforehand: what no whole call can be faster than."""

    def __init__(self, qkv: Tensors, shape: Shape) -> None:
        self._qkv = qkv
        self._causal = shape.causal

    def __call__(self) -> torch.Tensor:
        """[B, S, H, D], not yet what attention is: see :meth:`restored`."""
        return self._run()

    @functools.cached_property
    def _quantized(self) -> Any:
        from lpattn.quantize.fused import quantize_per_head

        return quantize_per_head(*self._qkv)

    @functools.cached_property
    def _run(self) -> Run:
        if (function := fa3_function()) is None:
            raise RuntimeError("FlashAttention-3 is not installed")
        quantized = self._quantized
        bshd = (quantized.query, quantized.key, quantized.value)
        descales = {name: getattr(quantized, name) for name in ("q_descale", "k_descale", "v_descale")}
        return functools.partial(function, *bshd, causal=self._causal, **descales)

    def restored(self) -> torch.Tensor:
        """[B, H, S, D]: the output with what quantization took from V."""
        from lpattn.quantize.fused import restore_output

        out = self()
        return restore_output(out, self._quantized, out.dtype).transpose(1, 2)
