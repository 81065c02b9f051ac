"""Prints, as JSON, the operators that a call seen before runs on the host; a script, since tests are interpreted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import stand_ins

import lpattn


class Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def main() -> None:
    found = {}
    with stand_ins.registered():
        for backend in (stand_ins.TRITON, stand_ins.FA3, "bf16_reference"):
            for layout, length in (("bhsd", 16), ("bshd", 16), ("step", 1)):
                x = torch.zeros(1, 4, length, 128, dtype=torch.bfloat16)
                x = x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "bshd" else x
                lpattn.low_precision_sdpa(x, x, x, backend=backend)
                with Record() as record:
                    lpattn.low_precision_sdpa(x, x, x, backend=backend)
                found[f"{backend} {layout}"] = record.names
    print(json.dumps(found))


if __name__ == "__main__":
    main()
