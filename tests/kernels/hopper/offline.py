"""Compiles the Hopper kernel on any machine and prints what ptxas made of it; a script, since tests are interpreted.

`python offline.py 128:step 64:step-causal-lse ...`: head_dim, then what is asked for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource

from lpattn.kernels.hopper.attention import ROWS, attention
from lpattn.kernels.hopper.launch import EXPONENTIALS, layout_of, tile_of
from lpattn.quantize.fused.reading import lanes_of

# Scripts have no package: what they share lies in the folder of all tests.
sys.path.insert(0, str(Path(__file__).parents[2]))

from offline_tools import loops, tool


def compile_kernel(dim: int, asked: set[str]) -> Any:
    """The compiled kernel."""
    lanes, tile = tile_of(dim)

    def descriptor(rows: int, columns: int) -> str:
        return f"tensordesc<fp8e4nv[{rows}, {columns}],{layout_of(columns)!r}>"

    types = dict.fromkeys(("q_scale", "k_scale", "v_scale", "v_constant"), "*fp32")
    types |= {"lists": "*i32", "list_counts": "*i32", "words": "*i32"}
    types |= {"out": "*fp16" if "half" in asked else "*bf16", "lse": "*fp32", "lse_shift": "*fp32", "counts": "*i32"}
    types |= {"q_desc": descriptor(ROWS.value, lanes), "k_desc": descriptor(tile.keys, lanes)}
    types |= {"v_desc": descriptor(lanes, tile.keys)}
    kind = next(kind for name, kind in EXPONENTIALS.items() if name in asked)
    constants = {
        "BN": tile.keys, "D": lanes, "STAGES": tile.stages, "CONSUMERS": tile.consumers, "CAUSAL": "causal" in asked,
        "KIND": kind, "LATE": tile.late, "DIM": dim, "LANES": lanes_of(dim), "ACROSS": tile.across,
        "PARTS": tile.listed_parts if "mask" in asked else tile.parts,
        "AHEAD": kind in tile.ahead, "EARLY": kind in tile.early, "REGISTERS": tile.registers,
        "HADAMARD": "hadamard" in asked, "V_ROWS": lanes_of(dim) if "hadamard" in asked else dim,
    }  # fmt: skip
    if "lse" not in asked:
        constants |= {"lse": None, "lse_shift": None}
    if "keys" not in asked:
        constants |= {"counts": None}
    if "mask" not in asked:
        constants |= {"lists": None, "list_counts": None, "words": None}
    names = attention.arg_names
    # The rest are numbers.
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = GluonASTSource(fn=attention, signature=signature, constexprs=places, attrs=aligned)
    options = {"num_warps": 4, "maxnreg": tile.mean_registers}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main_loops(sass: str, consumers: int) -> list[list[str]]:
    """Instructions of the loop over key tiles that are seen whole, of each consumer: registers differ among them."""
    # Packed arithmetic makes P; epilogues have none of it. Loops over other tiles are longer, and those around these.
    return [
        body
        for body in loops(sass)
        if sum(n.startswith("QGMMA") for n in body) >= 4 and sum(n.startswith("HFMA2") for n in body) >= 16
    ][:consumers]


def report(configuration: str) -> dict[str, Any]:
    """What is to be known of one configuration."""
    dim, asked = configuration.split(":")
    compiled = compile_kernel(int(dim), set(asked.split("-")))
    options = ("-v", "--gpu-name=sm_90a", "-o", "/dev/null")
    ptxas = tool(get_ptxas(90).path, *options, data=compiled.asm["ptx"].encode(), suffix=".ptx")
    sass = tool("cuobjdump", "--dump-sass", data=compiled.asm["cubin"])
    _, tile = tile_of(int(dim))
    bodies = main_loops(sass, tile.consumers)
    return {
        "configuration": configuration,
        "triton": triton.__version__,
        "serialized": [line for line in ptxas.splitlines() if "C75" in line or "serializ" in line],
        "instructions": [len(body) for body in bodies],
        "spills": [sum(name.startswith(("LDL", "STL")) for name in body) for body in bodies],
        "exponentials": [sum(name.startswith("MUFU.EX2") for name in body) for body in bodies],
        "shared": compiled.metadata.shared,
    }


if __name__ == "__main__":
    for configuration in sys.argv[1:]:
        print(json.dumps(report(configuration)), flush=True)
