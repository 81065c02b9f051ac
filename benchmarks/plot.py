"""Plot results; needs no GPU.

Of a sweep, the speed by length against the best exact kernel, a panel per kind of mask and head_dim. Of hopper.py, the
TFLOP/s of every kernel and call, a panel per shape.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from labels import AUTO, kind_of, parts_of

Line = tuple[str, str, bool]
"""Backend, Hadamard mode, and whether KV heads are shared."""


KINDS = ("full", "causal", "dense mask", "additive mask")


def panels(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], dict[Line, list[tuple[int, float]]]]:
    """Points (length, speed) by line, by panel (kind of mask, head_dim)."""
    found: dict[tuple[str, int], dict[Line, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        shape = result["shape"]
        for name, ratio in result["speedup"].items():
            if name != AUTO:
                line = (*parts_of(name), shape["num_heads"] != shape["num_kv_heads"])
                found[kind_of(shape), shape["head_dim"]][line].append((shape["length"], ratio))
    return {panel: {line: sorted(points) for line, points in lines.items()} for panel, lines in sorted(found.items())}


def label(line: Line) -> str:
    backend, mode, grouped = line
    return backend + ("" if mode == "none" else f", Hadamard {mode}") + (", GQA" if grouped else "")


def stamp(name: str, data: Mapping[str, Any]) -> str:
    """What the picture was made from, as it says in its own metadata."""
    return f"{name} {data['provenance']['date']}"


def draw(data: Mapping[str, Any], name: str, out: Path) -> None:
    """Write the picture of a sweep.

    Args:
        data: content of the result file.
        name: of the result file.
        out: a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = panels(data["results"])
    rows = [kind for kind in KINDS if any(kind == panel[0] for panel in drawn)]
    columns = sorted({panel[1] for panel in drawn})
    size = (4 * len(columns), 3 * len(rows) + 0.8)
    figure, axes = pyplot.subplots(len(rows), len(columns), figsize=size, squeeze=False, sharex=True, sharey=True)
    colors: dict[tuple[str, str], str] = {}
    handles = {}
    for (kind, dim), lines in drawn.items():
        axis = axes[rows.index(kind)][columns.index(dim)]
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"head_dim {dim}, {kind}", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        for line, points in sorted(lines.items()):
            color = colors.setdefault(line[:2], f"C{len(colors)}")
            style = "--" if line[2] else "-"
            handles[label(line)] = axis.plot(*zip(*points, strict=True), style, marker=".", color=color)[0]
    lengths = sorted({result["shape"]["length"] for result in data["results"]})[::2]
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
        axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    for axis in axes[:, 0]:
        axis.set_ylabel("speed")
        axis.set_ylim(bottom=0)
    where = data["provenance"]
    figure.suptitle(f"Attention against the best exact kernel, {where.get('device', where['cpu'])}", fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=9)
    figure.tight_layout(rect=(0, 0.04 + 0.03 * len(handles) / 3, 1, 1))
    figure.savefig(out, dpi=90, metadata={"Source": stamp(name, data)})
    pyplot.close(figure)


def draw_kernels(data: Mapping[str, Any], name: str, out: Path) -> None:
    """Write the picture of a run of hopper.py; the arguments are those of :func:`draw`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2
    rows = -(-len(data["results"]) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(9, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(data["results"]) :]:
        axis.set_axis_off()
    for axis, result in zip(axes.flat, data["results"], strict=False):
        speeds, shape = result["teraflops"], result["shape"]
        kind = "causal" if shape["causal"] else "full"
        heads = f"{shape['num_heads']}/{shape['num_kv_heads']}"
        axis.set_title(f"{heads} heads, {shape['length']} tokens, head_dim {shape['head_dim']}, {kind}", fontsize=9)
        labels = sorted(speeds, key=lambda label: (label.partition(":")[0], speeds[label]))
        colors = {"exact": "C7", "kernel": "C0", "whole": "C1"}
        bars = axis.barh(labels, [speeds[n] for n in labels], color=[colors[n.partition(":")[0]] for n in labels])
        axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("TFLOP/s", fontsize=8)
        axis.margins(x=0.12)
    figure.suptitle(f"Exact kernels, kernels alone, whole calls: {data['provenance']['device']}", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(out, dpi=90, metadata={"Source": stamp(name, data)})
    pyplot.close(figure)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("source", type=Path, help="result of calibrate.py, attention.py --sweep-out or hopper.py")
    arguments.add_argument("--out", type=Path, help="the PNG (default: the result file's name with .png)")
    given = arguments.parse_args()
    out = given.out or given.source.with_suffix(".png")
    data = json.loads(given.source.read_text())
    of_kernels = any("over_fa3_fp8" in result for result in data["results"])
    (draw_kernels if of_kernels else draw)(data, given.source.name, out)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
