"""Compiles the kernels for GPUs that are not there, and prints what came out; a script, since tests are interpreted.

`python offline.py 90:128 89:64-causal 80:128-int8 ...` prints a line of JSON for every attention or mask kernel that
these launch, compiled with the arguments, constants and warps that it would be launched with. A configuration is a
compute capability, a head_dim, and what is asked for: causal, window, bool, additive, single (an additive mask of
float32), padding, int8, qkv, f16, lse.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lpattn.kernels import attention, mask_tiles, shapes
from lpattn.quantize import fused
from lpattn.quantize.fused import blocks, inputs
from lpattn.quantize.fused.launcher import Launch
from lpattn.types import HadamardMode

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}
MASKS = {"bool": torch.bool, "additive": torch.bfloat16, "single": torch.float32}

Recorded = list[tuple[Launch, tuple[Any, ...]]]


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
    recorded: Recorded = []
    Launch.on = lambda launch, stream, pointers, tensors: recorded.append((launch, tensors()))  # type: ignore[method-assign]
    for module in (attention, mask_tiles, inputs, blocks):
        module.short_way = lambda device: None
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


def compile_for(capability: int, launch: Launch, tensors: tuple[Any, ...]) -> Any:
    """What the compiler makes of a launch."""
    kernel = launch._kernel
    values = dict(zip(kernel.arg_names, (*tensors, *launch._rest), strict=True))
    types, constants, aligned = {}, {}, {}
    for index, (name, value) in enumerate(values.items()):
        if isinstance(value, torch.Tensor):
            types[name] = TYPES[value.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif value is None or name.isupper():
            types[name], constants[name] = "constexpr", value
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    constants["INTERPRETED"] = False
    return triton.compile(
        ASTSource(kernel, types, {k: v for k, v in constants.items() if k in types}, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={name: value for name, value in launch._options.items() if value is not None},
    )


def described(compiled: Any) -> dict[str, Any]:
    usage, code = dumped(compiled.asm["cubin"], "-res-usage"), dumped(compiled.asm["cubin"], "-sass")
    return {
        "registers": int(re.findall(r"\bREG:(\d+)", usage)[0]),
        "stack": int(re.findall(r"\bSTACK:(\d+)", usage)[0]),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "spills_in_loops": sum(name in ("STL", "LDL") for loop in loops(code) for name in loop),
        "hot_loop": hot_loop(code),
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


def loops(code: str) -> list[list[str]]:
    """The instructions of every loop that computes exponentials, the shortest first: with masks and without."""
    rows = [
        (int(at, 16), name, rest)
        for at, name, rest in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*)", code)
    ]
    found = []
    for at, name, rest in rows:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            inside = [other for place, other, _ in rows if int(target[1], 16) <= place <= at]
            if sum(other.startswith("MUFU.EX2") for other in inside) >= 8:
                found.append([re.sub(r"^((?:MUFU|F2FP|F2F|HADD2)\.\w+|\w+).*", r"\1", name) for name in inside])
    return sorted(found, key=len)


def hot_loop(code: str) -> dict[str, int]:
    """How often every kind of instruction occurs in the shortest of the loops."""
    kinds = next(iter(loops(code)), [])
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    spills = sum(kind in ("STL", "LDL") for kind in kinds)
    return {"all": len(kinds), "spills": spills, **dict(sorted(counts.items(), key=lambda item: -item[1])[:14])}


def dumped(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for configuration in sys.argv[1:]:
        capability, asked = configuration.split(":")
        dim, *options = asked.split("-")
        sizes = [int(o) for o in options if o.isdigit()]
        shape = shapes.TileShape(*sizes, sum_by_product="sum" not in options) if sizes else None
        for launch, tensors in launches(int(capability), int(dim), set(options), shape):
            found = described(compile_for(int(capability), launch, tensors))
            name = launch._kernel.fn.__name__
            print(json.dumps({"configuration": configuration, "kernel": name, **found}), flush=True)
