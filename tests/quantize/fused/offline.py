"""Compiles the passes for GPUs that are not there, and prints what came out; a script, since tests are interpreted.

`python offline.py 90:128-half 100:64 ...` prints a line of JSON for every kernel that these launch, compiled with the
arguments, constants and options that it would be launched with. A configuration is a compute capability, a head_dim,
and what is asked for: a rotation (half, interleaved, partial), norm or span (a norm of all heads; bare: without
weights), a Hadamard mode (qkv, v_only), keys, a padding mask with lse, and blocks, the passes for scales per token and
block. Where Triton refuses a kernel, the line says so.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from lpattn.quantize import fused
from lpattn.quantize.fused import blocks, heads, inputs
from lpattn.quantize.fused.launcher import Launch
from lpattn.quantize.fused.layout import PART
from lpattn.types import HadamardMode, Norm

# Scripts have no package: what they share lies in the folder of all tests.
sys.path.insert(0, str(Path(__file__).parents[2]))

from offline_tools import Recorded, compile_launch, record, tool, usage


def launches(capability: int, dim: int, *asked: str) -> Recorded:
    """Every launch with its tensors; nothing runs."""
    recorded = record(heads, blocks, inputs)
    heads.overlaps_on = lambda device: capability >= 90
    blocks.overlaps_on = heads.overlaps_on
    heads._plan.cache_clear()
    heads._restore.cache_clear()
    q = torch.zeros(2, 1024, 8, dim, dtype=torch.bfloat16).transpose(1, 2)
    k = torch.zeros(2, 1024, 2, dim, dtype=torch.bfloat16).transpose(1, 2)
    options: dict[str, Any] = {}
    if {"half", "interleaved", "partial"} & set(asked):
        table = torch.zeros(1, 1024, 1, dim // (2 if "partial" in asked else 1))
        options["rope"] = fused.rotation_of(q, k, [table] * 4, "interleaved" in asked)
    if "norm" in asked:
        options["norm"] = Norm(1e-6, 1e-6, *torch.zeros(2, dim, dtype=torch.bfloat16))
    if "span" in asked:
        weights = [torch.zeros(x.shape[1], dim, dtype=torch.bfloat16) for x in (q, k)]
        bare = "bare" in asked
        options["norm"] = Norm(None, None, *((None, None) if bare else weights), *torch.zeros(2, 2, 1024))
    for mode in HadamardMode:
        if mode.value in asked:
            options["hadamard"] = mode
    if "keys" in asked:
        options["keys"] = fused.used_keys(torch.ones(2, 1, 1, 1024, dtype=torch.bool), 2, 1024)
        options["with_lse_shift"] = True
    if "blocks" in asked:
        fused.quantize_per_block(q, k, k, **options)
        return recorded
    quantized = fused.quantize_per_head(q, k, k, **options)
    out = torch.zeros(2, 1024, 8, dim, dtype=torch.bfloat16)
    fused.restore_output(out, quantized, torch.float16 if "keys" in asked else torch.bfloat16)
    return recorded


def described(capability: int, launch: Launch, tensors: tuple[Any, ...]) -> dict[str, Any]:
    """What the compiler made of a launch."""
    name = launch._kernel.fn.__name__
    try:
        compiled = compile_launch(capability, launch, tensors)
    except triton.CompilationError as error:
        return {"kernel": name, "refused": str(error).strip().splitlines()[-1]}
    values = dict(zip(launch._kernel.arg_names, (*tensors, *launch._rest), strict=True))
    ptx = compiled.asm["ptx"]
    loads = re.findall(r"\bld\.global[.\w:]*|\bcp\.async\.c.*\b0x10\b", ptx)
    cubin = compiled.asm["cubin"]
    return {
        "kernel": name,
        **usage(cubin),
        "shared": compiled.metadata.shared,
        # Casts of one register twice, in which ptxas 12.8 leaves half of the result undefined.
        "twins": len(re.findall(r"E4M3\.F32\.PACK_AB_MERGE_C \w+, (\w+), \1,", tool("nvdisasm", "-c", data=cubin))),
        # Of 16 bytes; of the 2 bytes of one element.
        "wide": sum(load.endswith((".v4.b32", ".v2.b64", "0x10")) for load in loads),
        "narrow": sum(load.endswith((".b16", ".u16")) and ".v" not in load for load in loads),
        # 16 bytes for each thread are so many loads of a tile.
        "per_tile": values.get("TOKENS", PART.value) * values.get("D", 0) // (8 * 32 * launch._options["num_warps"]),
    }


if __name__ == "__main__":
    for configuration in sys.argv[1:]:
        capability, asked = configuration.split(":")
        dim, *options = asked.split("-")
        for launch, tensors in launches(int(capability), int(dim), *options):
            found = described(int(capability), launch, tensors)
            print(json.dumps({"configuration": configuration, **found}), flush=True)
