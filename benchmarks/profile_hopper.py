"""A few launches of the Hopper kernel, for a profiler to look at the last one.

    ncu --clock-control none --set full -k regex:^attention -s 2 -c 1 python benchmarks/profile_hopper.py flux

What it said is kept as `benchmarks/results/h100-profile-*.txt`.
"""

from __future__ import annotations

import argparse

import torch
from cases import FLUX, LONG, Shape, inputs

SHAPES = {
    "flux": FLUX,
    "16k": LONG,
    "16k-d64": Shape(1, 32, 32, 16384, 64, False),
    "16k-d256": Shape(1, 16, 16, 16384, 256, False),
}


@torch.inference_mode()
def main() -> None:
    """Quantize once, attend three times."""
    from lpattn.kernels.hopper.launch import QK_MAX, attend
    from lpattn.quantize.fused import quantize_per_block

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("shape", choices=SHAPES)
    shape = SHAPES[arguments.parse_args().shape]
    factor = shape.head_dim**-0.5 * 1.4426950408889634
    operands = quantize_per_block(*inputs(shape, "randn", "cuda"), factor=factor, qk_max=QK_MAX)
    for _ in range(3):
        attend(operands, torch.bfloat16)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
