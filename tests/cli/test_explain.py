"""`lpattn explain` says what lpattn.explain would say of the same tensors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import lpattn
from lpattn.dispatch import explain_call

Cli = Any

CPU = ("--device", "cpu")
CALL = ("explain", "--shape", "2,8,64,128", *CPU)


def test_it_prints_what_the_function_says(cli: Cli, half: str) -> None:
    q, k, v = (torch.zeros(2, heads, length, 64) for heads, length in ((8, 48), (2, 80), (2, 80)))
    expected = lpattn.explain(q, k, v, torch.zeros(2, 1, 48, 80), scale=0.5, backend=half, on_unsupported="fallback")
    options = ("--kv-heads", "2", "--kv-len", "80", "--mask", "additive", "--scale", "0.5", "--dtype", "float32")
    result = cli("explain", "--shape", "2,8,48,64", *options, *CPU, "--backend", half, "--on-unsupported", "fallback")
    assert (result.code, result.out) == (0, f"{expected}\n")


def test_it_describes_the_whole_call(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("lpattn.cli.explain.explain_call", lambda c, s: seen.append((c, s)) or explain_call(c, s))
    options = (
        "--causal",
        "--lse",
        "--head-dim-v",
        "32",
        "--hadamard",
        "QKV",
        "--scale",
        "0",
        "--dtype",
        "torch.float16",
    )
    assert cli(*CALL, *options).code == 0
    ((call, settings),) = seen
    assert (call.batch, call.num_heads, call.q_len, call.head_dim) == (2, 8, 64, 128)
    assert (call.num_kv_heads, call.kv_len, call.head_dim_v) == (8, 64, 32)
    assert (call.causal, call.return_lse, call.softmax_scale, call.dtype) == ("top_left", True, 0.0, torch.float16)
    assert (call.hadamard, settings.hadamard) == (lpattn.HadamardMode.QKV, lpattn.HadamardMode.QKV)
    assert (call.mask, call.mask_shape, call.capability) == ("none", None, None)


@pytest.mark.parametrize(
    ("value", "kind", "shape"),
    [
        ("none", "none", None),
        ("bool", "bool", [2, 1, 64, 80]),
        ("additive", "additive", [2, 1, 64, 80]),
        ("key_padding", "bool", [2, 1, 1, 80]),
    ],
)
def test_masks(cli: Cli, value: str, kind: str, shape: list[int] | None) -> None:
    call = json.loads(cli(*CALL, "--kv-len", "80", "--mask", value, "--json").out)["call"]
    assert (call["mask"], call["mask_shape"]) == (kind, shape)


def test_it_allocates_no_tensors(cli: Cli) -> None:
    assert cli("explain", "--shape", "1024,1024,1048576,1024", *CPU).code == 0


def test_a_call_that_would_be_an_error_gives_1(cli: Cli, half: str) -> None:
    result = cli("explain", "--shape", "1,8,64,80", *CPU, "--backend", half)
    assert result.code == 1
    assert result.out.startswith("No backend can run this attention call: q [1, 8, 64, 80] bfloat16 on cpu")
    assert "head_dim 80: has kernels for 64, 128" in result.out


def test_a_hypothetical_architecture_is_judged_by_capabilities(cli: Cli, half: str) -> None:
    fits = cli("explain", "--shape", "1,8,64,64", "--arch", "sm_90", "--backend", half)
    assert fits.code == 0
    assert "sm_90" in fits.out
    assert fits.out.endswith("capabilities are judged for it, probes speak of this machine.\n")
    other = cli("explain", "--shape", "1,8,64,64", "--arch", "sm_120a", "--backend", half)
    assert other.code == 1
    assert "architecture sm_120: has kernels for sm_89 to sm_90" in other.out


@pytest.mark.parametrize(
    ("text", "capability"), [("sm_90", [9, 0]), ("sm120", [12, 0]), ("8.9", [8, 9]), ("90a", [9, 0])]
)
def test_an_architecture_may_be_written_in_several_ways(cli: Cli, text: str, capability: list[int]) -> None:
    document = json.loads(cli("explain", "--shape", "1,1,1,1", "--arch", text, "--json").out)
    assert document["call"]["capability"] == capability
    assert document["call"]["device"] == "cuda:0"
    assert document["hypothetical"]


def test_json_has_the_choice_and_all_reasons(cli: Cli, half: str, absent: str) -> None:
    document = json.loads(cli(*CALL, "--json").out)
    assert document["choice"]["backend"] == "bf16_reference"
    assert document["choice"]["provenance"] == "automatic"
    assert document["choice"]["exact_reason"]["code"] == "no_backend"
    assert document["choice"]["detours"] == []
    assert [r["code"] for r in document["reasons"][half]] == ["not_automatic"]
    missing = {
        "code": "not_installed",
        "message": "the wheel [test] is missing",
        "remedy": "pip install test-wheel[all]",
    }
    assert missing in document["reasons"][absent]
    assert not document["hypothetical"]


def test_json_of_an_error_has_no_choice(cli: Cli, absent: str) -> None:
    result = cli(*CALL, "--json", "--backend", absent)
    assert result.code == 1
    assert json.loads(result.out)["choice"] is None


def test_the_environment_decides_where_no_backend_is_named(
    cli: Cli, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPATTN_BACKEND", half)
    assert f"{half}      chosen (environment)" in cli(*CALL).out


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--shape", "1,2,3"), ["--shape", "four sizes B,H,S,D", "'1,2,3'"]),
        (("--shape", "1,2,3,x"), ["--shape", "four integers", "'1,2,3,x'"]),
        (("--shape", "1,2,0,4"), ["--shape", "at least 1", "'1,2,0,4'"]),
        (("--kv-heads", "3"), ["--kv-heads", "8 heads", "got 3"]),
        (("--kv-len", "-1"), ["--kv-len", "'-1'"]),
        (("--head-dim-v", "1.5"), ["--head-dim-v", "'1.5'"]),
        (("--dtype", "float8"), ["--dtype", "bfloat16, float16, float32, float64", "'float8'"]),
        (("--device", "toaster"), ["--device", "'toaster'", "cuda:0"]),
        (("--device", "cuda:99"), ["--device", "no cuda:99", "--arch"]),
        (("--arch", "hopper"), ["--arch", "'hopper'", "sm_90"]),
        (("--arch", "sm_999"), ["--arch", "'sm_999'", "one of sm_50, ", "sm_100", "sm_121"]),
        (("--arch", "9.5"), ["--arch", "'9.5'"]),
        (("--arch", "sm_90"), ["--arch", "--device cpu"]),
        (("--mask", "dense"), ["--mask", "dense", "additive"]),
        (("--mask", "bool", "--causal"), ["--causal", "--mask bool"]),
        (("--scale", "inf"), ["--scale", "'inf'"]),
    ],
)
def test_bad_usage_names_the_value(cli: Cli, options: tuple[str, ...], texts: list[str]) -> None:
    result = cli(*CALL, *options)
    assert (result.code, result.out) == (2, "")
    message = result.err.partition("error: ")[2]
    assert [text for text in texts if text not in message] == []


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--backend", "fp8_fa33"), ["'fp8_fa33'", "did you mean 'fp8_fa3'", "known backends: ", "bf16_reference"]),
        (("--hadamard", "qk"), ["hadamard", "'qk'", "did you mean 'qkv'"]),
        (("--backend", "bf16_reference", "--hadamard", "qkv"), ["'bf16_reference' cannot apply hadamard='qkv'"]),
        (("--on-unsupported", "ignore"), ["on_unsupported", "'fallback', 'raise'", "'ignore'"]),
    ],
)
def test_settings_that_are_an_error_of_lpattn_give_1_as_in_other_commands(
    cli: Cli, options: tuple[str, ...], texts: list[str]
) -> None:
    result = cli(*CALL, *options)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("lpattn: ")
    assert [text for text in texts if text not in result.err] == []


def test_the_shape_is_required(cli: Cli) -> None:
    result = cli("explain")
    assert result.code == 2
    assert "--shape" in result.err


def test_an_unknown_name_in_the_environment_is_an_error(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPATTN_BACKEND", "fp8_fa33")
    result = cli(*CALL)
    assert result.code == 1
    assert "LPATTN_BACKEND='fp8_fa33'" in result.err
