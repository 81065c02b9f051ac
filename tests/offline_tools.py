"""What the scripts share that compile kernels for GPUs that are not there, and look at what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lpattn.quantize.fused.launcher import Launch

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

Recorded = list[tuple[Launch, tuple[Any, ...]]]


def record(*modules: Any) -> Recorded:
    """From now on, a list of the launches of these modules, with their tensors; nothing runs."""
    recorded: Recorded = []
    Launch.on = lambda launch, stream, pointers, tensors: recorded.append((launch, tensors()))  # type: ignore[method-assign]
    for module in modules:
        module.short_way = lambda device: None
    return recorded


def compile_launch(capability: int, launch: Launch, tensors: tuple[Any, ...]) -> Any:
    """What the compiler makes of a launch, with the arguments, constants and options that it would be launched with."""
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
    options = {name: value for name, value in launch._options.items() if value is not None}
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def tool(path: str | Path, *options: str, data: bytes, suffix: str = ".cubin") -> str:
    """Output of one of the compiler's tools on a file: a path, or the name of one that Triton brings along."""
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / path
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        done = subprocess.run([own, *options, file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{path} failed: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def usage(cubin: bytes) -> dict[str, int]:
    """The registers of a thread, and the bytes of its stack, where spilled ones lie."""
    said = tool("cuobjdump", "-res-usage", data=cubin)
    return {
        name: int(re.findall(rf"\b{key}:(\d+)", said)[0]) for name, key in (("registers", "REG"), ("stack", "STACK"))
    }


def loops(sass: str) -> list[list[str]]:
    """The instructions of every loop, by name, the shortest loop first; a loop around others has theirs too."""
    rows = [
        (int(at, 16), name, rest)
        for at, name, rest in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*)", sass)
    ]
    found = []
    for at, name, rest in rows:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            found.append([other for place, other, _ in rows if int(target[1], 16) <= place <= at])
    return sorted(found, key=len)
