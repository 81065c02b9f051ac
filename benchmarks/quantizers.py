"""Quantizations of q, k and v under test, their inputs, and whether what they return is their input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import Shape, Tensors, decibels
from labels import name_of

from lpattn.norm import normalize_both
from lpattn.quantize import hadamard_transform
from lpattn.rope import rotate
from lpattn.types import HadamardMode, Norm

LAYOUTS = ("bhsd", "bshd")
"""Memory layouts, as the dimensions from the slowest to the fastest; q, k and v are always seen as [B, H, S, D]."""


@dataclass(frozen=True)
class Inputs:
    """q, k, v [B, H, S, D] bfloat16, tables [1, S, 1, D] that rotate q and k, and the norm in front of that."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    norm: Norm

    def tables(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables as [B, S, H, D] of x: q or k."""
        size = (x.shape[0], -1, x.shape[1], -1)
        return self.cos.expand(size), self.sin.expand(size)

    def bytes(self, rope: bool) -> int:
        """What must move: each input, with ``rope`` the tables too, read once; each e4m3 output written once."""
        read = (self.q, self.k, self.v, *((self.cos, self.sin) if rope else ()))
        return sum(x.numel() * x.element_size() for x in read) + sum(x.numel() for x in (self.q, self.k, self.v))


@dataclass(frozen=True)
class Kind:
    """What happens on the way to e4m3."""

    mode: HadamardMode = HadamardMode.NONE
    rope: bool = False
    norm: bool = False

    def name(self, quantizer: str) -> str:
        return name_of(quantizer, self.mode) + ("+norm" if self.norm else "") + ("+rope" if self.rope else "")


KINDS = (Kind(), Kind(HadamardMode.QKV), Kind(HadamardMode.V_ONLY), Kind(rope=True), Kind(rope=True, norm=True))


@dataclass(frozen=True)
class Quantizer:
    """A quantization of q, k and v under test.

    Attributes:
        run: takes q, k, v, and by keyword ``hadamard``, ``rope`` and ``norm``.
        dequantized: what its result stands for: q, k and v as float32 [B, H, S, D], not transformed any more.
    """

    run: Callable[..., Any]
    dequantized: Callable[[Any], Tensors]


def quantizers() -> dict[str, Quantizer]:
    from lpattn.quantize import fused

    return {
        "per_head": Quantizer(fused.quantize_per_head, dequantized_per_head),
        "per_block": Quantizer(fused.quantize_per_block, dequantized_per_block),
    }


def dequantized_per_head(quantized: Any) -> Tensors:
    k_constant, v_constant = quantized.constants
    qk, v = quantized.hadamard is HadamardMode.QKV, quantized.hadamard is not HadamardMode.NONE
    dim, kv_heads = quantized.query.shape[-1], quantized.key.shape[2]

    def value(data: torch.Tensor, descale: torch.Tensor, constant: torch.Tensor | None, transformed: bool) -> Any:
        descale = descale.repeat_interleave(data.shape[2] // kv_heads, 1)
        return _value(data.transpose(1, 2), descale[..., None], constant, transformed, dim)

    return (
        value(quantized.query, quantized.q_descale, None, qk),
        value(quantized.key, quantized.k_descale, k_constant, qk),
        value(quantized.value, quantized.v_descale, v_constant, v),
    )


def dequantized_per_block(quantized: Any) -> Tensors:
    from lpattn.kernels.hopper.emulation import unpermuted
    from lpattn.quantize.fused import BLOCK

    qk, v = quantized.hadamard is HadamardMode.QKV, quantized.hadamard is not HadamardMode.NONE
    # All three have the head_dim of v here.
    kv_len, dim = quantized.kv_len, quantized.dim_v
    k_scale, v_scale = (scale.repeat_interleave(BLOCK, -1) for scale in (quantized.k_scale, quantized.v_scale))
    return (
        _value(quantized.query, quantized.q_scale, None, qk, dim),
        _value(quantized.key, k_scale, quantized.k_constant, qk, dim)[:, :, :kv_len],
        _value(unpermuted(quantized.value), v_scale, quantized.v_constant, v, dim)[:, :, :kv_len],
    )


def _value(
    data: torch.Tensor, scale: torch.Tensor, constant: torch.Tensor | None, transformed: bool, dim: int
) -> torch.Tensor:
    """What [B, H, S, lanes] stands for: ``dim`` lanes, with scales that broadcast to [B, H, S]."""
    x = data.float() * scale[..., None]
    if constant is not None:
        x += constant[:, :, None, : x.shape[-1]]
    return (hadamard_transform(x) if transformed else x)[..., :dim]


def make(shape: Shape, layout: str, interleaved: bool, device: str) -> Inputs:
    """Random inputs. Tables that interleave are float32, as in diffusers, others bfloat16, as in transformers."""

    def one(heads: int) -> torch.Tensor:
        sizes = {"b": shape.batch, "h": heads, "s": shape.length, "d": shape.head_dim}
        x = torch.randn([sizes[d] for d in layout], device=device, dtype=torch.bfloat16)
        return x if layout == "bhsd" else x.transpose(1, 2)

    angles = 2 * math.pi * torch.rand(1, shape.length, 1, shape.head_dim, device=device)
    cos, sin = (x if interleaved else x.bfloat16() for x in (angles.cos(), angles.sin()))
    weights = 1 + torch.randn(2, shape.head_dim, device=device, dtype=torch.bfloat16) / 10
    norm = Norm(1e-6, 1e-6, *weights)
    return Inputs(one(shape.num_heads), one(shape.num_kv_heads), one(shape.num_kv_heads), cos, sin, interleaved, norm)


def bound(quantizer: Quantizer, kind: Kind, inputs: Inputs) -> Callable[[], Any]:
    """The call, its arguments made."""
    rope = None
    if kind.rope:
        from lpattn.quantize.fused import Rotation

        rope = Rotation(*inputs.tables(inputs.q), *inputs.tables(inputs.k), inputs.interleaved)
    norm = inputs.norm if kind.norm else None
    return functools.partial(quantizer.run, inputs.q, inputs.k, inputs.v, hadamard=kind.mode, rope=rope, norm=norm)


def quality(quantizer: Quantizer, kind: Kind, inputs: Inputs) -> dict[str, float]:
    """SQNR in dB of q, k and v after quantization, against what they are after norm and rotation alone."""
    found = quantizer.dequantized(bound(quantizer, kind, inputs)())
    q, k = normalize_both(inputs.q.float(), inputs.k.float(), inputs.norm if kind.norm else None)
    if kind.rope:
        tables = (inputs.cos, inputs.sin, inputs.interleaved)
        q, k = (rotate(x.transpose(1, 2), *tables).transpose(1, 2) for x in (q, k))
    wanted = (q, k, inputs.v.float())
    return {name: round(_sqnr(*both), 2) for name, *both in zip("qkv", wanted, found, strict=True)}


def _sqnr(expected: torch.Tensor, found: torch.Tensor) -> float:
    noise = (found - expected).square().sum(dtype=torch.float64)
    return decibels(float(expected.square().sum(dtype=torch.float64)), float(noise))
