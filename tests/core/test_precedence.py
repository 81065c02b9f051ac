"""Call argument > context manager > layer rule > model > environment > automatic; the report says which decided."""

import contextlib
import itertools
import threading

import pytest

import lpattn

LEVELS = ["argument", "context manager", "layer rule", "model", "environment", "automatic"]


def backend_of(level):
    return f"by_{level.replace(' ', '_')}"


@pytest.fixture
def attend_with(add_backend, make_model, monkeypatch, qkv):
    """Run a model's attention with a backend of its own named at each of the levels; who ran, and the provenance."""
    for level in LEVELS:
        # Whatever is named may be slow; only the automatic choice looks at the rank.
        add_backend(backend_of(level), rank=2.0 if level == "automatic" else 0.5)
    x = qkv()[0]

    def run(levels):
        named = {level: backend_of(level) if level in levels else None for level in LEVELS}
        if named["environment"]:
            monkeypatch.setenv("LPATTN_BACKEND", named["environment"])
        rules = {"attn": named["layer rule"]} if named["layer rule"] else None
        model = lpattn.apply_low_precision_attention(make_model(), named["model"], layers=rules)
        if named["argument"]:
            model.attn.options = {"backend": named["argument"]}
        context = named["context manager"]
        with lpattn.low_precision_attention(context) if context else contextlib.nullcontext():
            model(x)
        report = lpattn.attention_report(model)["attn"]
        assert report.exact == {}
        (ran,) = report.low
        return ran, report.provenance

    return run


@pytest.mark.parametrize(("stronger", "weaker"), list(itertools.combinations(LEVELS, 2)))
def test_the_stronger_of_two_levels_decides(attend_with, stronger, weaker):
    assert attend_with({stronger, weaker}) == (backend_of(stronger), stronger)


@pytest.mark.parametrize("count", range(1, 7))
def test_the_strongest_of_many_levels_decides(attend_with, count):
    levels = LEVELS[-count:]
    assert attend_with(levels) == (backend_of(levels[0]), levels[0])


def test_an_automatic_layer_rule_is_stronger_than_model_and_environment(add_backend, make_model, monkeypatch, qkv):
    add_backend("fast", rank=3.0)
    add_backend("named", rank=0.5)
    monkeypatch.setenv("LPATTN_BACKEND", "named")
    model = lpattn.apply_low_precision_attention(make_model(), "named", layers={"*": "auto"})
    model(qkv()[0])
    report = lpattn.attention_report(model)["attn"]
    assert (report.low, report.provenance) == ({"fast": 1}, "layer rule")


def test_an_exact_layer_rule_is_quiet_and_says_so(add_backend, make_model, qkv):
    fake = add_backend()
    model = lpattn.apply_low_precision_attention(make_model(), "fake", layers={"attn": "exact"})
    model(qkv()[0])
    report = lpattn.attention_report(model)["attn"]
    assert (report.low, report.exact, report.provenance) == ({}, {"layer_rule": 1}, "layer rule")
    assert not fake.calls


def test_a_context_that_names_no_backend_leaves_it_to_the_environment(add_backend, monkeypatch, qkv):
    fast, named = add_backend("fast", rank=3.0), add_backend("named", rank=0.5)
    monkeypatch.setenv("LPATTN_BACKEND", "named")
    with lpattn.low_precision_attention():
        lpattn.low_precision_sdpa(*qkv())
    assert (len(named.calls), len(fast.calls)) == (1, 0)


def test_a_context_that_names_no_backend_leaves_it_to_the_model(add_backend, make_model, qkv):
    add_backend("fast", rank=3.0)
    add_backend("named", rank=0.5)
    model = lpattn.apply_low_precision_attention(make_model(), "named")
    with lpattn.low_precision_attention():
        model(qkv()[0])
    report = lpattn.attention_report(model)["attn"]
    assert (report.low, report.provenance) == ({"named": 1}, "model")


def test_the_inner_context_wins_and_the_outer_one_returns(add_backend, qkv):
    inner, outer = add_backend("inner"), add_backend("outer", rank=3.0)
    q, k, v = qkv()
    with lpattn.low_precision_attention("outer"):
        with lpattn.low_precision_attention("inner"):
            lpattn.low_precision_sdpa(q, k, v)
        assert (len(inner.calls), len(outer.calls)) == (1, 0)
        lpattn.low_precision_sdpa(q, k, v)
    assert (len(inner.calls), len(outer.calls)) == (1, 1)


def test_options_of_a_call_keep_the_backend_around_it(add_backend, make_model, qkv):
    fake = add_backend(rank=0.5)
    model = lpattn.apply_low_precision_attention(make_model(), "fake")
    model.attn.options = {"hadamard": "v_only"}
    model(qkv()[0])
    report = lpattn.attention_report(model)["attn"]
    assert (report.low, report.provenance) == ({"fake": 1}, "model")
    assert fake.calls[0].hadamard is lpattn.HadamardMode.V_ONLY


def test_a_call_takes_the_hadamard_mode_around_it(add_backend, make_model, qkv):
    fake = add_backend()
    other = add_backend("other")
    model = lpattn.apply_low_precision_attention(make_model(), "fake", "qkv")
    model(qkv()[0])
    assert fake.calls[0].hadamard is lpattn.HadamardMode.QKV
    model.attn.options = {"backend": "other"}
    model(qkv()[0])
    assert other.calls[0].hadamard is lpattn.HadamardMode.QKV


def test_a_backend_named_by_the_call_is_strict_within_a_tolerant_model(add_backend, make_model, qkv):
    add_backend(), add_backend("narrow", head_dims=frozenset({64}))
    model = lpattn.apply_low_precision_attention(make_model(), "fake", on_unsupported="fallback")
    model.attn.options = {"backend": "narrow"}
    with pytest.raises(lpattn.UnsupportedCallError, match="head_dim 8"):
        model(qkv()[0])


def test_a_tolerant_call_within_a_strict_model(add_backend, make_model, qkv):
    add_backend(head_dims=frozenset({64}))
    model = lpattn.apply_low_precision_attention(make_model(), "fake")
    model.attn.options = {"on_unsupported": "fallback"}
    with pytest.warns(lpattn.LpattnWarning, match="head_dim 8"):
        model(qkv()[0])
    report = lpattn.attention_report(model)["attn"]
    assert (report.exact, report.provenance) == ({"head_dim": 1}, "model")


def test_models_with_different_backends_do_not_influence_each_other(add_backend, make_model, qkv):
    first, second = add_backend("first"), add_backend("second")
    x = qkv()[0]
    one = lpattn.apply_low_precision_attention(make_model(), "first")
    two = lpattn.apply_low_precision_attention(make_model(), "second", "v_only")
    plain = make_model()
    for _ in range(3):
        one(x), two(x), plain(x)
    assert [len(first.calls), len(second.calls)] == [3, 3]
    assert lpattn.attention_report(one)["attn"].low == {"first": 3}
    assert lpattn.attention_report(two)["attn"].low == {"second": 3}
    assert {str(c.hadamard) for c in first.calls} == {"none"}
    assert {str(c.hadamard) for c in second.calls} == {"v_only"}
    lpattn.remove_low_precision_attention(one)
    one(x), two(x)
    assert [len(first.calls), len(second.calls)] == [3, 4]


def test_a_context_ends_at_its_thread(add_backend, make_model, qkv):
    in_context, of_model = add_backend("in_context"), add_backend("of_model")
    model = lpattn.apply_low_precision_attention(make_model(), "of_model")
    x = qkv()[0]
    with lpattn.low_precision_attention("in_context"):
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        thread.join()
        assert (len(in_context.calls), len(of_model.calls)) == (0, 1)
        model(x)
    assert (len(in_context.calls), len(of_model.calls)) == (1, 1)
