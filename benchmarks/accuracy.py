"""Accuracy of exact and low-precision attention on several kinds of data: a part of attention.py's result."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from cases import DATA, Shape, decibels, energies, inputs
from common import Budget, table
from labels import EXACT
from variants import exact_variants, low_variants

LENGTHS = (512, 4608, 16384, 131072)
MODES = ("none", "qkv")
EXACT_NAMES = (f"{EXACT}fa3_bf16", f"{EXACT}sdpa")
"""Exact kernels to compare with; the first one that the machine has."""

ROWS = 256
SEEDS = 4
"""Of the noise of a head with outliers, most is in a few rows, and one draw of the data is 2 dB from the next."""


def shape_of(length: int) -> Shape:
    return Shape(1, 8 if length <= 16384 else 2, 8 if length <= 16384 else 2, length, 128, False)


@torch.inference_mode()
def measure(budget: Budget, lengths: Sequence[int], device: str = "cuda") -> tuple[list[dict[str, Any]], list[str]]:
    """SQNR of each variant on each kind of data until the budget ends, and what was left out."""
    results, left_out = [], []
    for length in lengths:
        for data in DATA:
            if budget.item():
                results.append(measure_one(shape_of(length), data, device))
            else:
                left_out.append(f"accuracy at {length}, {data}")
    return results, left_out


def measure_one(shape: Shape, data: str, device: str) -> dict[str, Any]:
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    refused: dict[str, str] = {}
    for seed in range(SEEDS):
        qkv = inputs(shape, data, device, seed=seed)
        exact = exact_variants(qkv, shape, device)
        name = next(n for n in EXACT_NAMES if n in exact)
        for label, run in {name: exact[name], **low_variants(qkv, shape, device, MODES)}.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    of_signal, of_noise = energies(run(), qkv, shape, rows=ROWS, all_heads=True)
            except Exception as error:
                refused[label] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            signal[label] = signal.get(label, 0.0) + of_signal
            noise[label] = noise.get(label, 0.0) + of_noise
    found = {label: round(decibels(signal[label], noise[label]), 2) for label in signal if label not in refused}
    return {
        "shape": asdict(shape),
        "data": data,
        "rows": ROWS,
        "seeds": SEEDS,
        "sqnr_db": found,
        "refused": refused,
    }


def report(results: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(n for r in results for n in r["sqnr_db"]))
    rows = [["length, data", *(n.removeprefix(EXACT) for n in names)]]
    for r in results:
        values = [f"{r['sqnr_db'][n]:.1f}" if n in r["sqnr_db"] else "-" for n in names]
        rows.append([f"{r['shape']['length']}, {r['data']}", *values])
    return table(rows)
