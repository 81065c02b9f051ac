"""Measure when low precision pays on this machine, and write src/lpattn/speedups.json from it.

All rows of this architecture are replaced, those with a Hadamard mode too; those of other architectures are kept.
Without --write, the table is only printed; --from takes the file of an earlier ``attention.py --sweep --sweep-out`` or
of ``calibrate.py --out`` instead of measuring again.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from attention import Bench, add_hadamard, run_sweep, sweep_modes
from cases import DIMS, LENGTHS, sweep
from common import REPOSITORY, Budget, parser, provenance
from labels import AUTO, mask_of, parts_of

SPEEDUPS = REPOSITORY / "src" / "lpattn" / "speedups.json"


def tables(results: list[dict[str, Any]], capability: list[int]) -> list[dict[str, Any]]:
    """Rows of speedups.json: per backend, Hadamard mode and kind of call, [length, speed against exact]."""
    points: dict[tuple[Any, ...], list[list[float]]] = defaultdict(list)
    for result in results:
        shape = result["shape"]
        grouped = shape["num_heads"] != shape["num_kv_heads"]
        for name, ratio in result["speedup"].items():
            if name != AUTO:
                key = (*parts_of(name), shape["head_dim"], shape["causal"], grouped, mask_of(shape))
                points[key].append([shape["length"], round(ratio, 3)])
    return [
        {
            "backend": backend,
            "capability": capability,
            "head_dim": dim,
            "causal": causal,
            "gqa": grouped,
            "hadamard": mode,
            "mask": mask,
            "speedup_by_length": sorted(found),
        }
        for (backend, mode, dim, causal, grouped, mask), found in sorted(points.items())
    ]


def merged(path: Path, new: list[dict[str, Any]], source: dict[str, Any]) -> dict[str, Any]:
    """The file's content with the rows of one architecture replaced."""
    old = json.loads(path.read_text()) if path.exists() else {"tables": []}
    arch = "sm_{}{}".format(*source["capability"])
    kept = [row for row in old["tables"] if row["capability"] != source["capability"]]
    return {"measured": {**old.get("measured", {}), arch: source}, "tables": kept + new}


def dump(data: dict[str, Any]) -> str:
    """JSON with one table per line, so that a new calibration reads well as a diff."""
    head = json.dumps(data["measured"], indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in data["tables"])
    return f'{{\n "measured": {head},\n "tables": [\n{rows}\n ]\n}}\n'


def main() -> int:
    arguments = parser(__doc__ or "", budget=240.0)
    arguments.add_argument(
        "--write", type=Path, nargs="?", const=SPEEDUPS, help=f"write this file (default {SPEEDUPS})"
    )
    arguments.add_argument("--from", dest="source", type=Path, help="results of an earlier sweep")
    add_hadamard(arguments)
    arguments.add_argument("--per-item", type=float, default=1.5, help="seconds of timing per shape (default 1.5)")
    given = arguments.parse_args()
    if given.source is not None:
        data = json.loads(given.source.read_text())
        results, where = data["results"], data["provenance"]
    elif not torch.cuda.is_available():
        print(f"calibrate.py needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    else:
        shapes = sweep((1024, 8192), (128,)) if given.quick else sweep(LENGTHS, DIMS)
        bench = Bench(Budget(given.budget, given.per_item), 5 if given.quick else 60)
        where = provenance()
        results = run_sweep(bench, shapes, sweep_modes(given.hadamard), given.out)
    rows = tables(results, where["capability"])
    for row in rows:
        kind = f"{'causal' if row['causal'] else 'full'}{', gqa' if row['gqa'] else ''}"
        kind += "" if row["mask"] == "none" else f", {row['mask']} mask"
        kind += "" if row["hadamard"] == "none" else f", hadamard {row['hadamard']}"
        print(row["backend"], row["head_dim"], kind, " ".join(f"{n}:x{r}" for n, r in row["speedup_by_length"]))
    if given.write is not None:
        keep = ("date", "command", "commit", "device", "capability", "cuda", "cudnn", "versions", "gpu")
        source = {name: where[name] for name in keep if name in where}
        given.write.write_text(dump(merged(given.write, rows, source)))
        print(f"\nwritten to {given.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
