"""q, k and v to e4m3 in Triton: rotated, Hadamard-transformed, smoothed, scaled and rounded in one read of the inputs.

Owns the passes and how they are launched. What they compute is what :mod:`lpattn.quantize` says in plain PyTorch; which
scales and layout a kernel wants is for the caller to say. Needs triton, and so is imported where it is used.
"""

from __future__ import annotations

from lpattn.quantize.fused.blocks import BLOCK, Precision, quantize_per_block
from lpattn.quantize.fused.heads import PerHead, plan_per_head, quantize_per_head, restore_output
from lpattn.quantize.fused.inputs import Keys, Rotation, alike, more_of, rotation_of, used_keys
from lpattn.quantize.fused.launcher import short_way
from lpattn.quantize.fused.memory import PerBlock

__all__ = [
    "BLOCK",
    "Keys",
    "PerBlock",
    "PerHead",
    "Precision",
    "Rotation",
    "alike",
    "more_of",
    "plan_per_head",
    "quantize_per_block",
    "quantize_per_head",
    "restore_output",
    "rotation_of",
    "short_way",
    "used_keys",
]
