"""docs/performance.md holds what the committed result files hold, and nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from lpattn.registry import registry

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    spec = importlib.util.spec_from_file_location("render", REPOSITORY / "benchmarks" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_generated(render):
    assert render.PAGE.read_text() == render.page(), "run python benchmarks/render.py"


def test_the_shipped_speeds_are_those_of_the_sweep(render):
    """speedups.json decides for users: it must be the committed measurement."""
    shipped = json.loads((REPOSITORY / "src" / "lpattn" / "speedups.json").read_text())["tables"]
    points = {
        (row["backend"], row["hadamard"], row["head_dim"], row["causal"], row["gqa"], row["mask"], length): ratio
        for row in shipped
        for length, ratio in row["speedup_by_length"]
    }
    measured = {}
    for result in render.load("h100-sweep.json")["results"]:
        shape = result["shape"]
        grouped = shape["num_heads"] != shape["num_kv_heads"]
        for name, ratio in result["speedup"].items():
            mask = "dense" if shape["holes"] else "additive" if shape["bias"] else "none"
            kind = (*render.parts_of(name), shape["head_dim"], shape["causal"], grouped, mask, shape["length"])
            measured[kind] = round(ratio, 3)
    assert points == measured


@pytest.mark.parametrize("card", ["h200", "h100"])
def test_what_compiled_graphs_take_in_makes_no_block_slower(render, card):
    """As several processes have measured it: what is slower stays with the compiler."""
    measured = 0
    for result in render.latest(render.compiled_files(f"{card}-compiled.json")):
        capabilities = registry.get(result["backend"]).capabilities
        alone = result["model"] == "llama" and result["length"] < capabilities.rope_from
        if result["part"] == "block" and len(result.get("processes", [])) > 1 and not alone:
            assert result["fused_over_opaque"] >= 1.0, result
            measured += 1
    assert measured > 10


def test_the_pictures_are_of_the_results_beside_them(render):
    for path in render.RESULTS.glob("*.png"):
        source = path.with_suffix(".json")
        stamp = f"{source.name} {render.load(source.name)['provenance']['date']}"
        assert stamp.encode() in path.read_bytes(), f"run python benchmarks/plot.py {source}"


PROVENANCE = {"cpu": "a cpu", "versions": {"torch": "1"}, "command": "x.py", "date": "today"}
SHAPE = {"batch": 1, "num_heads": 8, "num_kv_heads": 2, "length": 512, "head_dim": 64, "causal": True}


def call(**changes) -> dict:
    names = ("fp8_fa3", "fp8_fa3+hadamard_qkv", "auto")
    return {
        "shape": SHAPE,
        "best_exact": "exact:sdpa",
        "milliseconds": {"exact:sdpa": 3.0, **dict(zip(names, (2.0, 2.5, 3.125), strict=True))},
        "speedup": dict(zip(names, (1.5, 1.2, 0.96), strict=True)),
        "sqnr_db": dict.fromkeys(names, 25.0),
    } | changes


@pytest.fixture
def page(render, tmp_path, monkeypatch):
    """The page of these result files, by name, and no others."""

    def make(**files: dict) -> str:
        for name, content in files.items():
            path = tmp_path / f"h100-{name}.json"
            path.write_text(json.dumps({"provenance": PROVENANCE, **content}))
        monkeypatch.setattr(render, "RESULTS", tmp_path)
        return render.page()

    return make


def sections(text: str) -> list[str]:
    return [line[3:] for line in text.splitlines() if line.startswith("## ")]


def test_every_card_has_its_rows(page, tmp_path):
    found = {"provenance": PROVENANCE | {"device": "another card"}, "results": [call(speedup={"fp8_fa3": 2.5})]}
    (tmp_path / "h200-attention.json").write_text(json.dumps(found))
    text = page(attention={"results": [call(speedup={"fp8_fa3": 1.5})]})
    assert sections(text) == ["Whole attention calls", "Host time"]
    assert "`h200-attention.json`: another card" in text
    assert text.index("| x2.50 |") < text.index("`h100-attention.json`: a cpu") < text.index("| x1.50 |")


def test_the_hopper_kernel_has_a_section_of_its_own(page):
    result = {
        "shape": call()["shape"],
        "best_exact": "exact:fa3_bf16",
        "milliseconds": {"kernel:step": 2.0, "exact:fa3_bf16": 3.0, "exact:sdpa": 4.0},
        "teraflops": {"kernel:step": 900.0, "exact:fa3_bf16": 600.0, "exact:sdpa": 450.0},
        "over_fa3_fp8": {"kernel:step": 1.25},
        "over_best_exact": {"kernel:step": 1.5},
        "sqnr_db": {"kernel:step": 25.0, "exact:fa3_bf16": 53.0, "exact:sdpa": 53.0},
    }
    text = page(hopper={"results": [result]})
    assert "| kernel alone, step | 2.000 | 900 | x1.25 | x1.50 | 25.0 |" in text
    assert "exact, sdpa" not in text  # only the best one


def test_what_was_not_measured_is_left_out(page):
    assert sections(page()) == ["Host time"]
    assert sections(page(attention={"results": [call(speedup={"fp8_fa3": 1.5})]})) == [
        "Whole attention calls",
        "Host time",
    ]


def test_every_part_of_the_attention_benchmark_has_its_section(page):
    alone = {"backend": "fp8_fa3", "milliseconds": 1.5, "teraflops": 900.0}
    automatic = {"ran_on": "bf16_reference", "over_sdpa": 0.96, "graph_over_sdpa": 0.99}
    padded = call(shape=SHAPE | {"kv_lengths": [512, 300]})
    accuracy = {"shape": SHAPE, "data": "bias", "sqnr_db": {"exact:sdpa": 50.0, "fp8_fa3": 23.0}}
    text = page(
        attention={
            "results": [call(kernel_alone=alone, automatic=automatic)],
            "biased": [call()],
            "padding": [padded],
            "accuracy": [accuracy],
        }
    )
    assert sections(text) == [
        "Whole attention calls",
        "With a Hadamard rotation",
        "The automatic choice",
        "Biased data",
        "Key padding",
        "Accuracy",
        "Host time",
    ]
    assert "| 1, 8/2, 512, 64, causal | sdpa 3.000 | fp8_fa3 2.000 | x1.50 | 25.0 | 1.500 |" in text
    assert "| fp8_fa3, Hadamard qkv 2.500 | x1.20 | 25.0 | 1.25 |" in text
    assert "| 1, 8/2, 512, 64, causal | bf16_reference | x0.96 | x0.99 |" in text
    assert "| 1, 8/2, 512, 64, causal, keys 512 and 300 |" in text
    assert "| S | data | exact sdpa | fp8_fa3 |" in text


def test_the_kernel_alone_is_in_no_ratio(page):
    """What leaves out the quantization is compared with nothing."""
    alone = {"backend": "fp8_fa3", "milliseconds": 0.001, "teraflops": 900.0}
    with_it, without = (page(attention={"results": [call(**extra)]}) for extra in ({"kernel_alone": alone}, {}))
    ratios = [[cell for cell in text.split("|") if cell.strip().startswith("x")] for text in (with_it, without)]
    assert ratios[0] == ratios[1]


def test_the_picture_is_shown_where_there_is_one(page, tmp_path):
    sweep = {"results": [call(speedup={"fp8_fa3": 1.5, "fp8_fa3+hadamard_qkv": 1.2})]}
    text = page(sweep=sweep)
    assert "| fp8_fa3, Hadamard qkv, 64, causal, GQA | x1.20 |" in text
    assert "![" not in text
    (tmp_path / "h100-sweep.png").touch()
    assert "![Speed by length](../benchmarks/results/h100-sweep.png)" in page(sweep=sweep)


def test_dense_masks_have_rows_of_their_own(page):
    masked = {**SHAPE, "causal": False, "holes": True}
    full = {**SHAPE, "causal": False}
    found = [call(shape=shape, speedup={"fp8_fa3": ratio}) for shape, ratio in ((full, 1.5), (masked, 1.75))]
    text = page(sweep={"results": found})
    assert "| fp8_fa3, 64, full, GQA | x1.50 |" in text
    assert "| fp8_fa3, 64, dense mask, GQA | x1.75 |" in text


def test_targets_have_their_section(page):
    line = {"what": "speed", "wanted": ">= 1.2x", "found": 1.19, "met": False, "limited": True}
    unmeasured = {**line, "what": "accuracy", "found": None, "met": None}
    told = {**line, "what": "kernel alone", "met": None, "limited": False}
    text = page(targets={"targets": [line, unmeasured, told]})
    assert "| speed | >= 1.2x | 1.190 | missed |" in text
    assert "| accuracy | >= 1.2x |  | not measured |" in text
    assert "kernel alone" not in text


def test_quantization_has_its_section(page):
    both = {"graph": 0.1, "events": 0.2}
    variant = {
        "bytes": 2 * 10**6,
        "milliseconds": both,
        "terabytes_per_second": both,
        "fraction_of_copy": {"graph": 0.8, "events": 0.4},
        "over_plain": {"graph": 1.25, "events": 1.0},
    }
    result = {"shape": SHAPE, "layout": "bshd", "rope": "half-split", "variants": {"per_head+rope": variant}}
    host = {"shape": SHAPE, "microseconds": {"quantize": 30.2}}
    text = page(quantization={"results": [result], "host": host})
    assert (
        "| 1, 8/2, 512, 64 | BSHD | per_head, RoPE half-split | 2.0 | 0.100 | 0.10 | 80% | 1.25 | 0.200 | 40% |" in text
    )
    assert "| quantize | 30 |" in text
