"""Measure when low precision pays on this machine, and write src/lpattn/speedups.json from it.

Rows of other architectures in that file are kept. Without --write, the table is only printed; --from takes the results
of an earlier ``attention.py --sweep --out FILE`` instead of measuring again.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from attention import DIMS, LENGTHS, measure_all, report, sweep
from common import REPOSITORY, Budget, parser, provenance, write

SPEEDUPS = REPOSITORY / "src" / "lpattn" / "speedups.json"


def tables(results: list[dict[str, Any]], capability: list[int]) -> list[dict[str, Any]]:
    """Rows of speedups.json: per backend and kind of call, [length, speed against the best exact kernel]."""
    points: dict[tuple[Any, ...], list[list[float]]] = defaultdict(list)
    for result in results:
        shape = result["shape"]
        grouped = shape["num_heads"] != shape["num_kv_heads"]
        for backend, ratio in result["speedup"].items():
            key = (backend, shape["head_dim"], shape["causal"], grouped)
            points[key].append([shape["length"], round(ratio, 3)])
    return [
        {
            "backend": backend,
            "capability": capability,
            "head_dim": dim,
            "causal": causal,
            "gqa": grouped,
            "hadamard": "none",
            "speedup_by_length": sorted(found),
        }
        for (backend, dim, causal, grouped), found in sorted(points.items())
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
    arguments = parser(__doc__ or "", budget=420.0)
    arguments.add_argument(
        "--write", type=Path, nargs="?", const=SPEEDUPS, help=f"write this file (default {SPEEDUPS})"
    )
    arguments.add_argument("--from", dest="source", type=Path, help="results of attention.py --sweep --out FILE")
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
        results, left_out = measure_all(shapes, Budget(given.budget, given.per_item), 5 if given.quick else 40)
        where = provenance()
        print(f"\n{report(results)}")
        if left_out:
            print(f"\nleft out, for want of time or memory: {'; '.join(left_out)}")
        write(given.out, {"results": results, "left_out": left_out})
    rows = tables(results, where["capability"])
    for row in rows:
        kind = f"{'causal' if row['causal'] else 'full'}{', gqa' if row['gqa'] else ''}"
        print(row["backend"], row["head_dim"], kind, " ".join(f"{n}:x{r}" for n, r in row["speedup_by_length"]))
    if given.write is not None:
        keep = ("date", "command", "commit", "device", "capability", "cuda", "cudnn", "versions", "gpu")
        source = {name: where[name] for name in keep if name in where}
        given.write.write_text(dump(merged(given.write, rows, source)))
        print(f"\nwritten to {given.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
