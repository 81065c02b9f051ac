"""Compiles the passes for GPUs that are not there, and prints what came out as JSON; not interpreted, so a script.

`python offline.py CAPABILITY CONFIGURATION ...` compiles what each configuration launches, with the arguments, constants
and warps that it launches it with.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lpattn.quantize import fused
from lpattn.quantize.fused import operands
from lpattn.types import HadamardMode

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


def launches(configuration: str, overlaps: bool) -> Iterator[dict[str, Any]]:
    """The arguments of every launch, by name; nothing runs.

    A configuration is a head_dim and what is asked for, such as ``128-half-qkv``.
    """
    dim, *asked = configuration.split("-")
    recorded: list[dict[str, Any]] = []
    signature = inspect.signature(operands.launch)
    operands.launch = lambda *args, **kwargs: recorded.append(signature.bind(*args, **kwargs).arguments)
    operands._overlaps = lambda device: overlaps
    q = torch.zeros(2, 1024, 8, int(dim), dtype=torch.bfloat16).transpose(1, 2)
    k = torch.zeros(2, 1024, 2, int(dim), dtype=torch.bfloat16).transpose(1, 2)
    options: dict[str, Any] = {}
    if "half" in asked or "interleaved" in asked or "partial" in asked:
        table = torch.zeros(1, 1024, 1, int(dim) // (2 if "partial" in asked else 1))
        of_q, of_k = (table.expand(2, -1, heads, -1) for heads in (8, 2))
        options["rope"] = fused.Rotation(of_q, of_q, of_k, of_k, "interleaved" in asked)
    if "qkv" in asked:
        options["hadamard"] = HadamardMode.QKV
    if "keys" in asked:
        options["keys"] = fused.used_keys(torch.ones(2, 1, 1, 1024, dtype=torch.bool), 2, 1024)
        options["with_lse_shift"] = True
    quantized = fused.quantize_per_head(q, k, k, **options)
    out = torch.zeros(2, 1024, 8, int(dim), dtype=torch.bfloat16)
    fused.restore_output(out, quantized, torch.float16 if "keys" in asked else torch.bfloat16)
    yield from recorded


def compile_for(capability: int, launch: dict[str, Any]) -> dict[str, Any]:
    """What the compiler made of a launch."""
    kernel = launch["kernel"]
    values = dict(zip(kernel.arg_names, (*launch["tensors"], *launch["numbers"], *launch["constants"]), strict=True))
    types, constants, aligned = {}, {}, {}
    for index, (name, value) in enumerate(values.items()):
        if isinstance(value, torch.Tensor):
            types[name] = TYPES[value.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif value is None or name.isupper():
            types[name], constants[name] = "constexpr", value
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    options = {"num_warps": launch["num_warps"], "launch_pdl": launch.get("launch_pdl", False)}
    compiled = triton.compile(
        ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", capability, 32), options=options
    )
    ptx = compiled.asm["ptx"]
    loads = re.findall(r"\bld\.global[.\w:]*|\bcp\.async[.\w]*(?=[^;]*, 0x10|[^;]*, 16)", ptx)
    usage = resources(compiled.asm["cubin"])
    return {
        "kernel": kernel.fn.__name__,
        "registers": int(re.findall(r"\bREG:(\d+)", usage)[0]),
        "stack": int(re.findall(r"\bSTACK:(\d+)", usage)[0]),
        "local": int(re.findall(r"\bLOCAL:(\d+)", usage)[0]),
        "wide": sum("v4.b32" in load or "cp.async" in load or "v2.b64" in load for load in loads),
        "narrow": sum(bool(re.search(r"(?<!v\d)\.[bus](8|16)$", load)) for load in loads),
        "threads": 32 * launch["num_warps"],
        "constants": {name: value for name, value in constants.items() if name.isupper()},
    }


def resources(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    capability = int(sys.argv[1])
    for configuration in sys.argv[2:]:
        for launch in launches(configuration, overlaps=capability >= 90):
            print(json.dumps({"configuration": configuration, **compile_for(capability, launch)}), flush=True)
