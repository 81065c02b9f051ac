"""Layer rules, their helpers, and the report."""

from __future__ import annotations

import json

import pytest
import torch

import lpattn
from lpattn.policy import covers
from lpattn.registry import registry


def ran(model):
    return {
        name.removesuffix(".attn"): next(iter({**layer.low, **layer.exact}), None)
        for name, layer in lpattn.attention_report(model).items()
    }


def test_first_match_wins_and_the_rest_follows_the_model(model, x, marked, other):
    rules = {"blocks.0.*": "EXACT", "blocks.[02]": "OTHER"}
    lpattn.apply_low_precision_attention(model, "marked", layers=rules)
    model(x)
    assert ran(model) == {"blocks.0": "layer_rule", "blocks.1": "marked", "blocks.2": "other"}
    provenance = [layer.provenance for layer in lpattn.attention_report(model).values()]
    assert provenance == ["layer rule", "model", "layer rule"]


def test_auto_is_the_automatic_choice_even_under_the_environment(model, x, marked, monkeypatch):
    monkeypatch.setenv("LPATTN_BACKEND", "marked")
    lpattn.apply_low_precision_attention(model, layers={"blocks.1": "auto"})
    with pytest.warns(lpattn.LpattnWarning, match="no low-precision backend can run on cpu"):
        model(x)
    assert ran(model) == {"blocks.0": "marked", "blocks.1": "no_backend", "blocks.2": "marked"}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("blocks.0", "blocks.0", True),
        ("blocks.0", "blocks.0.attn", True),
        ("blocks.0.*", "blocks.0", True),
        ("blocks.0.*", "blocks.0.attn.inner", True),
        ("blocks.0", "blocks.01", False),
        ("blocks.0.*", "blocks.01.attn", False),
        ("blocks.[01]", "blocks.1.attn", True),
        ("*.cross_attn*", "blocks.3.cross_attn2.core", True),
        ("*.cross_attn*", "blocks.3.attn", False),
        ("*", "", True),
        ("*", "anything.at.all", True),
    ],
)
def test_patterns(pattern, name, expected):
    assert covers(pattern, name) is expected


def test_callable_rules(model, x, marked):
    def rule(name, module):
        assert module is model.get_submodule(name)
        return {"blocks.0.attn": False, "blocks.1.attn": "marked", "blocks.2.attn": None}.get(name, True)

    lpattn.apply_low_precision_attention(model, "marked", layers=rule)
    model(x)
    assert ran(model) == {"blocks.0": "layer_rule", "blocks.1": "marked", "blocks.2": "marked"}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["blocks.0"], "layers must be a dict"),
        ({"blocks.0": None}, r"got 'blocks\.0': None"),
        ({0: "exact"}, "got 0: 'exact'"),
        (lambda name, module: 7, "returned 7"),
    ],
)
def test_wrong_rules(model, layers, message):
    with pytest.raises(lpattn.InvalidArgumentError, match=message):
        lpattn.apply_low_precision_attention(model, "bf16_reference", layers=layers)


def test_a_rule_that_matches_nothing_is_said(model):
    with pytest.warns(lpattn.LpattnWarning, match=r"decide on no module of Model that runs attention: 'bloks\.0'"):
        lpattn.apply_low_precision_attention(model, "bf16_reference", layers={"bloks.0": "exact"})


def test_exact_ends(model, x, marked):
    rules = lpattn.exact_ends(model, first=1, last=1)
    assert rules == {"blocks.0": "exact", "blocks.2": "exact"}
    lpattn.apply_low_precision_attention(model, "marked", layers=rules)
    model(x)
    assert ran(model) == {"blocks.0": "layer_rule", "blocks.1": "marked", "blocks.2": "layer_rule"}
    assert lpattn.exact_ends(model, first=0, last=9) == dict.fromkeys(["blocks.0", "blocks.1", "blocks.2"], "exact")
    with pytest.raises(lpattn.InvalidArgumentError, match="first=-1"):
        lpattn.exact_ends(model, first=-1)
    with pytest.raises(lpattn.InvalidArgumentError, match=r"no nn\.ModuleList"):
        lpattn.exact_ends(torch.nn.Linear(2, 2))


def test_an_unavailable_backend_in_a_rule_is_refused(model):
    with pytest.raises(lpattn.BackendUnavailableError, match="fp8_triton"):
        lpattn.apply_low_precision_attention(model, "bf16_reference", layers={"blocks.0": "fp8_triton"})


def test_report_as_text_and_mapping(model, x, marked):
    lpattn.apply_low_precision_attention(model, "marked", layers={"blocks.0": "exact"})
    assert str(lpattn.attention_report(model)) == "no attention call was intercepted"
    model(x)
    report = lpattn.attention_report(model)
    assert str(report).splitlines() == [
        "blocks.0.attn: exact x1 (a layer rule keeps this layer exact) [layer rule]",
        "blocks.1.attn: marked x1 [model]",
        "blocks.2.attn: marked x1 [model]",
    ]
    assert report["blocks.1.attn"]["low"] == report["blocks.1.attn"].low == {"marked": 1}
    part = lpattn.attention_report(model.blocks[1])
    assert list(part) == ["attn"]
    layer = part["attn"]
    document = json.loads(json.dumps(dict(layer)))
    assert (
        document
        == layer
        == dict.fromkeys(("rope", "norm"))
        | {
            "low": {"marked": 1},
            "exact": {},
            "reasons": {},
            "detours": {},
            "provenance": "model",
            "captured": False,
        }
    )
    assert repr(report) == "<AttentionReport: layers 3, calls in low precision 2, exact 1>"
    assert repr(layer).startswith("LayerReport(low={'marked': 1}, exact={}, ")
    with pytest.raises(KeyError):
        layer["lo"]


def test_report_says_why_it_was_not_the_fastest_kernel(model, x, marked):
    lpattn.apply_low_precision_attention(model, "marked", layers={"blocks.0": "exact"})
    model(x)
    registry.get("marked").detours = lambda call: [lpattn.Reason("mask", "a mask", "pass none")]
    model(x)
    report = lpattn.attention_report(model)
    assert report["blocks.1.attn"].detours == {}  # the decision was remembered
    model(x[:, :3])
    report = lpattn.attention_report(model)
    assert report["blocks.1.attn"].detours == {"mask": "a mask (pass none)"}
    assert report["blocks.0.attn"].detours == {}
    assert "marked x3 [model]; some not by its fastest kernel: a mask (pass none)" in str(report)


def test_fallback_reports_that_hadamard_was_not_applied(model, x, classes):
    class Picky(classes.MarkedBackend):
        def supports(self, call):
            return [lpattn.Reason("picky", "not today")]

    lpattn.register_backend(Picky("picky", 1.0))
    lpattn.apply_low_precision_attention(model, "picky", "qkv", on_unsupported="fallback")
    with pytest.warns(lpattn.LpattnWarning, match=r"not today(.|\n)*hadamard='qkv' is not applied"):
        model(x)
    assert ran(model) == dict.fromkeys(["blocks.0", "blocks.1", "blocks.2"], "picky")


def test_rules_that_never_decide_are_said(model):
    rules = {"*": "exact", "blocks.1": "auto", "blocks.0.attn.qkv": "auto"}
    with pytest.warns(lpattn.LpattnWarning, match=r"'blocks\.1', 'blocks\.0\.attn\.qkv'"):
        lpattn.apply_low_precision_attention(model, "bf16_reference", layers=rules)


def test_a_shared_module_is_covered_under_each_of_its_names(classes, x, marked):
    block = classes.Block().eval()
    model = torch.nn.Sequential(block, classes.Block().eval(), block)
    lpattn.apply_low_precision_attention(model, "marked", layers={"2": "exact"})
    model(x)
    assert {n: dict(layer.exact) for n, layer in lpattn.attention_report(model).items()} == {
        "0.attn": {"layer_rule": 2},
        "1.attn": {},
    }


def test_a_rule_that_is_no_backend_names_the_words(model):
    with pytest.raises(lpattn.UnknownBackendError, match=r"layer rule 'exakt' is not 'exact', 'auto' or a backend"):
        lpattn.apply_low_precision_attention(model, layers={"*": "exakt"})


@pytest.mark.parametrize("wrong", [None, 1, "model"])
def test_a_report_of_something_that_is_no_module(wrong):
    with pytest.raises(lpattn.InvalidArgumentError, match=r"must be a torch\.nn\.Module"):
        lpattn.attention_report(wrong)
    with pytest.raises(lpattn.InvalidArgumentError, match=r"must be a torch\.nn\.Module"):
        lpattn.exact_ends(wrong)


def test_exact_ends_takes_whole_numbers(model):
    with pytest.raises(lpattn.InvalidArgumentError, match="first='1'"):
        lpattn.exact_ends(model, "1", 1)


def test_exact_rules_take_no_part_in_a_hadamard_mode(model, x, marked):
    lpattn.apply_low_precision_attention(model, "marked", "qkv", layers={"blocks.0": "bf16_reference"})
    model(x)
    assert ran(model) == {"blocks.0": "layer_rule", "blocks.1": "marked", "blocks.2": "marked"}
    assert {call.hadamard.value for call in marked.calls} == {"qkv"}
