"""FP8 (e4m3) quantization of attention in plain PyTorch: the oracle that kernels are compared with.

It says *what* a low-precision backend computes: which values share a scale, what is subtracted or rotated before the
cast, where P is rounded. It runs on any device and imports torch alone; it knows no kernel, backend or dispatcher.
"""

from __future__ import annotations

from lpattn.quantize.e4m3 import E4M3_MAX, Granularity, Quantized, quantize_e4m3, round_e4m3
from lpattn.quantize.emulate import emulated_attention
from lpattn.quantize.exponential import Exponential, e4m3_weights
from lpattn.quantize.hadamard import hadamard_transform
from lpattn.quantize.recipe import FA3_PER_HEAD, PER_BLOCK, PER_BLOCK_F16, RECIPES, Recipe, RowSum
from lpattn.quantize.smoothing import channel_mean

__all__ = [
    "E4M3_MAX",
    "FA3_PER_HEAD",
    "PER_BLOCK",
    "PER_BLOCK_F16",
    "RECIPES",
    "Exponential",
    "Granularity",
    "Quantized",
    "Recipe",
    "RowSum",
    "channel_mean",
    "e4m3_weights",
    "emulated_attention",
    "hadamard_transform",
    "quantize_e4m3",
    "round_e4m3",
]
