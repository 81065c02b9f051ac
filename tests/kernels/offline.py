"""Compiles the kernels for GPUs that are not there, and prints what came out; a script, since tests are interpreted.

`python offline.py 90:128 89:64-causal 80:128-int8 ...` prints a line of JSON for every attention or mask kernel that
these launch, compiled with the arguments, constants and warps that it would be launched with. A configuration is a
compute capability, a head_dim, and what is asked for: causal, window, bool, additive, single (an additive mask of
float32), padding, int8, qkv, f16, lse.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from lpattn.kernels import attention, mask_tiles, shapes
from lpattn.quantize import fused
from lpattn.quantize.fused import blocks, inputs
from lpattn.types import HadamardMode

# Scripts have no package: what they share lies in the folder of all tests.
sys.path.insert(0, str(Path(__file__).parents[1]))

from offline_tools import Recorded, compile_launch, loops, record, tool, usage

MASKS = {"bool": torch.bool, "additive": torch.bfloat16, "single": torch.float32}


def operands(dim: int, asked: set[str]) -> fused.PerBlock:
    """Operands as the quantization lays them out."""
    q = torch.zeros(1, 8, 1024, dim, dtype=torch.bfloat16)
    k = torch.zeros(1, 2, 1024, dim, dtype=torch.bfloat16)
    keys = fused.used_keys(torch.ones(1, 1, 1, 1024, dtype=torch.bool), 1, 1024) if "padding" in asked else None
    return fused.quantize_per_block(
        q,
        k,
        k,
        precision=fused.Precision.INT8_F16 if "int8" in asked else fused.Precision.E4M3,
        hadamard=HadamardMode.QKV if "qkv" in asked else HadamardMode.NONE,
        keys=keys,
        with_lse_shift="lse" in asked,
    )


def launches(capability: int, dim: int, asked: set[str], shape: shapes.TileShape | None) -> Recorded:
    """Every launch with its tensors; nothing runs."""
    recorded = record(attention, mask_tiles, inputs, blocks)
    lanes = max(1 << (dim - 1).bit_length(), 32)
    kind = {"int8": "int8" in asked, "bias_bits": 32 if "single" in asked else 16 if "additive" in asked else 0}
    shape = shape or shapes.tile_shape(divmod(capability, 10), lanes, **kind)
    mask, band = None, attention.Band()
    if "causal" in asked:
        band = attention.Band(after=0)
    elif "window" in asked:
        band = attention.Band(before=256, after=0)
    elif kinds := asked & MASKS.keys():
        dense = torch.empty(1, 1, 1024, 1024, dtype=MASKS[kinds.pop()])
        mask = mask_tiles.list_mask_tiles(dense, 1024, shape.queries, shape.keys)
    dtype = torch.float16 if "f16" in asked else torch.bfloat16
    attention.attend(operands(dim, asked), shape, dtype, band=band, mask=mask, return_lse="lse" in asked)
    # What quantizes is compiled for its own tests.
    kernels = (attention.attend_tiles, mask_tiles.look_at_tiles, mask_tiles.list_tiles)
    return [(launch, tensors) for launch, tensors in recorded if launch._kernel in kernels]


def described(compiled: Any) -> dict[str, Any]:
    cubin = compiled.asm["cubin"]
    code = tool("cuobjdump", "-sass", data=cubin)
    exponential = loops_of_exponentials(code)
    return {
        **usage(cubin),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "spills_in_loops": sum(name in ("STL", "LDL") for loop in exponential for name in loop),
        "hot_loop": hot_loop(exponential),
        "moved": moved(compiled.asm["ttgir"]),
    }


def moved(code: str) -> list[str]:
    """Tiles of scores or of P that change their layout for anything but a product: through shared memory, then.

    Beside what that costs, Triton 3.6 gets a tile of e4m3 wrong on its way.
    """
    found = re.findall(
        r"ttg\.convert_layout %\w+(?:#\d+)? : tensor<(\d+x\d+xf(?:32|8\w+)), #\w+> -> tensor<[^#]*(#.*)>", code
    )
    return [tile for tile, to in found if "dot_op" not in to and not re.search(r"x1xf32", tile)]


def loops_of_exponentials(code: str) -> list[list[str]]:
    """The instructions of every loop that computes exponentials, the shortest first: with masks and without."""
    return [
        [re.sub(r"^((?:MUFU|F2FP|F2F|HADD2)\.\w+|\w+).*", r"\1", name) for name in loop]
        for loop in loops(code)
        if sum(name.startswith("MUFU.EX2") for name in loop) >= 8
    ]


def hot_loop(found: list[list[str]]) -> dict[str, int]:
    """How often every kind of instruction occurs in the shortest of the loops."""
    kinds = next(iter(found), [])
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    spills = sum(kind in ("STL", "LDL") for kind in kinds)
    return {"all": len(kinds), "spills": spills, **dict(sorted(counts.items(), key=lambda item: -item[1])[:14])}


if __name__ == "__main__":
    for configuration in sys.argv[1:]:
        capability, asked = configuration.split(":")
        dim, *options = asked.split("-")
        sizes = [int(o) for o in options if o.isdigit()]
        shape = shapes.TileShape(*sizes, sum_by_product="sum" not in options) if sizes else None
        for launch, tensors in launches(int(capability), int(dim), set(options), shape):
            found = described(compile_launch(int(capability), launch, tensors))
            name = launch._kernel.fn.__name__
            print(json.dumps({"configuration": configuration, "kernel": name, **found}), flush=True)
