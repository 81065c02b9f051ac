"""`lpattn demo`: what it says is what ran, and its numbers are measured."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lpattn
from lpattn.cli.demo_model import MyModel, exact_output, interleaved_medians, sqnr

Cli = Any
SMALL = ("demo", "--seq-len", "64")

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = [torch.device("cpu")]
    monkeypatch.setattr("lpattn.cli.demo.local_devices", lambda: cpu)


def test_it_runs_the_automatic_choice_and_every_backend_of_the_device(cli: Cli, half: str, absent: str) -> None:
    document = json.loads(cli(*SMALL, "--json").out)
    runs = {run["requested"]: run for run in document["runs"]}
    assert {None, half} <= set(runs)
    assert absent not in runs
    assert document["failed"] == {}
    assert (document["device"], document["dtype"], document["model"]["seq_len"]) == ("cpu", "float32", 64)
    automatic, low = runs[None], runs[half]
    assert (automatic["backend"], low["backend"]) == ("bf16_reference", half)
    assert automatic["report"][""]["exact"] == {"no_backend": 1}
    assert low["report"][""]["low"] == {half: 1}
    assert low["explanation"]["choice"]["provenance"] == "model"
    assert low["explanation"]["call"]["q_len"] == 64
    # float16 has 11 bits, about 66 dB; float32 has 24.
    assert 50.0 < low["sqnr_db"] < 90.0 < document["untouched_sqnr_db"]
    for run in runs.values():
        eager = run["eager"]
        assert eager["seconds"] > 0.0
        assert eager["ratio"] == pytest.approx(eager["seconds"] / eager["untouched_seconds"])
        assert run["compiled"] is None


def test_the_text_says_what_ran_and_why_the_others_did_not(cli: Cli, half: str) -> None:
    result = cli(*SMALL, "--backend", half)
    assert result.code == 0
    assert result.out.startswith(
        "MyModel: causal self-attention, embed_dim 512, 4 heads of 128, 64 tokens, float32 on cpu\n"
    )
    assert f'apply_low_precision_attention(model, backend="{half}")' in result.out
    said = [line.split(maxsplit=1) for line in result.out.splitlines()]
    assert [half, "chosen (model)"] in said
    assert ["bf16_reference", f'excluded by backend="{half}"'] in said
    assert f"  (root): {half} x1 [model]\n" in result.out
    assert "SQNR of the model's output against float64: " in result.out
    assert "Times are medians of 9 forwards in which the two models took turns" in result.out
    assert "backend=None" not in result.out


def test_a_rotation_that_is_not_applied_is_said(cli: Cli, half: str) -> None:
    text = cli(*SMALL, "--hadamard", "qkv").out
    assert "hadamard='qkv' is not applied to exact attention." in text
    assert "could not run" not in text


def test_a_backend_without_the_rotation_is_left_out_with_its_reason(cli: Cli, half: str) -> None:
    result = cli(*SMALL, "--hadamard", "v_only")
    assert result.code == 0
    assert f'backend="{half}" could not run:' in result.out
    assert f"  backend '{half}' cannot apply hadamard='v_only'" in result.out


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--backend", "fp8_fa33"), ["unknown backend 'fp8_fa33'", "did you mean 'fp8_fa3'"]),
        (("--backend", "test_absent"), ["cannot run on any device", "pip install test-wheel[all]"]),
        (("--backend", "test_half", "--hadamard", "v_only"), ["cannot apply hadamard='v_only'"]),
        (("--hadamard", "v"), ["hadamard", "'v'"]),
    ],
)
def test_errors_are_a_message_and_1(
    cli: Cli, half: str, absent: str, options: tuple[str, ...], texts: list[str]
) -> None:
    result = cli(*SMALL, *options)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("lpattn: ")
    assert "Traceback" not in result.err
    assert [text for text in texts if text not in result.err] == []


def test_a_call_that_the_environment_s_backend_cannot_run_is_an_error(
    cli: Cli, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPATTN_BACKEND", absent)
    assert cli(*SMALL).code == 1


@pytest.mark.parametrize("length", ["0", "many"])
def test_a_bad_length_is_bad_usage(cli: Cli, length: str) -> None:
    result = cli("demo", "--seq-len", length)
    assert result.code == 2
    assert f"argument --seq-len: must be an integer of at least 1; got {length!r}" in result.err


def test_it_says_how_to_get_the_emulation_where_it_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpattn.cli.demo.EMULATION", "fp8_missing")
    assert "fp8_missing shows on any device what FP8 does" in cli(*SMALL).out
    assert json.loads(cli(*SMALL, "--json").out)["install"] == {"fp8_missing": "pip install lpattn-emulated"}


def test_it_runs_the_emulation_where_it_is_installed(cli: Cli) -> None:
    if not any(backend.name == "fp8_emulated" for backend in lpattn.available_backends("cpu")):
        pytest.skip("lpattn-emulated is not installed")
    result = cli(*SMALL, "--backend", "fp8_emulated", "--hadamard", "qkv", "--json")
    (run,) = json.loads(result.out)["runs"]
    assert run["backend"] == "fp8_emulated"
    assert 15.0 < run["sqnr_db"] < 50.0


def test_the_random_state_is_left_alone(cli: Cli) -> None:
    before = torch.get_rng_state()
    assert cli(*SMALL, "--backend", "bf16_reference").code == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_reference_is_attention_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpattn.cli.demo_model._ROWS", 5)
    model = MyModel(32, 4).double()
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = model.heads(x)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(exact_output(model, x), model.out_proj(attended.transpose(1, 2).flatten(2)))
        torch.testing.assert_close(exact_output(model, x), model(x))


def test_sqnr_is_ten_decibels_for_a_tenth_of_the_energy() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert sqnr(reference, reference * (1.0 + math.sqrt(0.1))) == pytest.approx(10.0, abs=1e-5)
    assert sqnr(reference, reference) == math.inf


def test_measured_functions_take_turns() -> None:
    turns: list[str] = []
    functions = [lambda: turns.append("a"), lambda: turns.append("b")]
    assert len(interleaved_medians(functions, 3, torch.device("cpu"))) == 2
    assert turns == ["a", "b"] * 5
