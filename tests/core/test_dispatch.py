"""From a call and settings to a choice: who runs, who does not, and how errors and warnings say so."""

import threading

import pytest
import torch
import torch.nn.functional as F

import lpattn
from lpattn import AttentionCall, CausalKind, LpattnWarning, Provenance, Reason, UnsupportedCallError, dispatch
from lpattn.settings import OnUnsupported, Settings

NAMED = Settings("narrow", provenance=Provenance.ARGUMENT)
AUTOMATIC = Settings()


# The automatic choice


def test_the_highest_rank_wins(add_backend, make_call):
    for name, rank in (("low", 1.2), ("best", 2.5), ("middle", 2.0)):
        add_backend(name, rank=rank)
    choice = dispatch.choose(make_call(), AUTOMATIC)
    assert (choice.backend, choice.provenance, choice.exact_reason) == ("best", Provenance.AUTOMATIC, None)
    assert set(choice.reasons) == {"low", "middle", "bf16_reference", "fp8_fa3", "fp8_triton"}
    assert choice.reasons["low"] == (Reason("slower", "expected x1.20 as fast as exact attention, best x2.50"),)
    assert [r.code for r in choice.reasons["bf16_reference"]] == ["slower"]
    assert [r.code for r in choice.reasons["fp8_triton"]] == ["not_registered"]


@pytest.mark.parametrize(
    "settings", [AUTOMATIC, Settings("fake", provenance=Provenance.ARGUMENT)], ids=["auto", "named"]
)
def test_a_choice_says_why_it_is_not_the_fastest_kernel(add_backend, make_call, settings):
    backend = add_backend("fake", rank=2.0)
    assert dispatch.choose(make_call(q_len=1024), settings).detours == ()
    why = Reason("length", "q_len 1030: the fast kernel takes whole tiles")
    backend.detours = lambda call: [] if call.q_len % 128 == 0 else [why]
    # Lengths of one class, whose decision is remembered: what is said is of each.
    for length in (1024, 1030, 1024):
        call, expected = make_call(q_len=length), () if length == 1024 else (why,)
        assert dispatch.choose(call, settings).detours == expected
        explained = str(dispatch.explain_call(call, settings))
        assert ("not by its fastest kernel: q_len 1030" in explained) is (length == 1030)


def test_a_backend_that_fails_to_say_why_it_is_slow_runs_all_the_same(add_backend, make_call):
    add_backend("fake", rank=2.0).detours = lambda call: 1 / 0
    choice = dispatch.choose(make_call(), AUTOMATIC)
    assert choice.backend == "fake"
    assert choice.detours == (Reason("detours_failed", "its detours() raised ZeroDivisionError: division by zero"),)


def test_the_rank_may_depend_on_the_call(add_backend, make_call):
    add_backend("short", rank=lambda call: 3.0 if call.kv_len < 100 else 1.1)
    add_backend("long", rank=lambda call: 2.0 if call.kv_len >= 100 else 0.3)
    assert dispatch.choose(make_call(q_len=50, kv_len=50), AUTOMATIC).backend == "short"
    assert dispatch.choose(make_call(q_len=500, kv_len=500), AUTOMATIC).backend == "long"


def test_a_faster_backend_that_cannot_run_gives_way(add_backend, make_call):
    add_backend("fast", rank=9.0, head_dims=frozenset({64}))
    add_backend("able", rank=1.5)
    choice = dispatch.choose(make_call(), AUTOMATIC)
    assert choice.backend == "able"
    assert choice.reasons["fast"] == (Reason("head_dim", "head_dim 32: has kernels for 64"),)


def test_a_backend_whose_probe_refuses_the_device_gives_way(add_backend, make_call):
    add_backend("fast", rank=9.0, device=[Reason("driver", "driver 535: needs 550")])
    add_backend("able", rank=1.5)
    choice = dispatch.choose(make_call(), AUTOMATIC)
    assert choice.backend == "able"
    assert choice.reasons["fast"] == (Reason("driver", "driver 535: needs 550"),)


@pytest.mark.parametrize(
    ("rank", "code", "text"),
    [
        (1.0, "not_faster", "fake: not faster than exact attention here: x1.00 expected"),
        (0.4, "not_faster", "fake: not faster than exact attention here: x0.40 expected"),
        (0.0, "not_measured", "fake: nobody measured whether it is faster than exact attention here"),
        (float("nan"), "not_measured", "fake: nobody measured whether it is faster than exact attention here"),
    ],
)
def test_what_is_not_faster_runs_exactly_and_quietly(add_backend, make_model, qkv, rank, code, text):
    fake = add_backend(rank=rank)
    model = lpattn.apply_low_precision_attention(make_model())
    x = qkv()[0]
    out = model(x)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(x, x, x))
    report = lpattn.attention_report(model)["attn"]
    assert (report.low, report.exact, report.provenance) == ({}, {code: 1}, "automatic")
    assert report.reasons[code] == f'{text} (name it to run it all the same: backend="fake")'
    assert not fake.calls


@pytest.mark.parametrize("rank", [0.0, 0.4])
def test_what_keeps_the_fastest_kernel_away_is_said_where_the_other_one_does_not_pay(add_backend, make_call, rank):
    mask, version = Reason("mask", "an additive attn_mask", "pass it as bool"), Reason("gluon", "an old triton")
    add_backend("fake", rank=rank).detours = lambda call: [mask, version]
    reason = dispatch.choose(make_call(), AUTOMATIC).exact_reason
    assert reason.code == ("not_faster" if rank else "not_measured")
    assert reason.message.endswith(", where its fastest kernel does not run: an additive attn_mask; an old triton")
    assert reason.remedy == 'pass it as bool; or name it to run it all the same: backend="fake"'


def test_just_above_one_is_faster(add_backend, make_call):
    add_backend(rank=1.001)
    assert dispatch.choose(make_call(), AUTOMATIC).backend == "fake"


def test_a_backend_that_is_not_automatic_is_never_chosen(add_backend, make_call, qkv):
    fake = add_backend(rank=100.0, automatic=False)
    choice = dispatch.choose(make_call(), AUTOMATIC)
    assert choice.backend == "bf16_reference"
    assert choice.reasons["fake"] == (Reason("not_automatic", "runs only where it is named"),)
    text = "no low-precision backend can run on cpu, except where it is named: fake"
    assert choice.exact_reason == Reason("no_backend", text)
    add_backend("another", automatic=False)
    add_backend("absent", automatic=False, device=[Reason("driver", "driver 535: needs 550")])
    assert dispatch.choose(make_call(), AUTOMATIC).exact_reason.message == f"{text}, another"
    lpattn.low_precision_sdpa(*qkv(), backend="fake")
    assert len(fake.calls) == 1


def test_of_equal_ranks_the_first_one_wins(add_backend, make_call):
    add_backend("zebra"), add_backend("aardvark")
    assert dispatch.choose(make_call(), AUTOMATIC).backend == "zebra"


def test_the_exact_reason_is_that_of_the_backend_that_came_closest(add_backend, make_call):
    add_backend("far", dtypes=frozenset({torch.float16}), head_dims=frozenset({64}))
    add_backend("near", head_dims=frozenset({64, 128}))
    add_backend("absent", device=[Reason("driver", "driver 535: needs 550")])
    choice = dispatch.choose(make_call(), AUTOMATIC)
    assert choice.exact_reason == Reason("head_dim", "near: head_dim 32: has kernels for 64, 128")
    assert [r.code for r in choice.reasons["far"]] == ["dtype", "head_dim"]
    assert [r.code for r in choice.reasons["absent"]] == ["driver"]
    add_backend("slow", rank=0.5)
    assert dispatch.choose(make_call(), AUTOMATIC).exact_reason.code == "not_faster"


# A named backend


def test_a_named_backend_runs_whatever_its_rank(add_backend, make_call):
    add_backend("fast", rank=9.0)
    add_backend("narrow", rank=0.1, automatic=False)
    choice = dispatch.choose(make_call(), NAMED)
    assert (choice.backend, choice.provenance, choice.exact_reason) == ("narrow", Provenance.ARGUMENT, None)
    excluded = (Reason("excluded", 'excluded by backend="narrow"'),)
    assert choice.reasons == dict.fromkeys(["fast", "bf16_reference", "fp8_fa3", "fp8_triton"], excluded)


def test_a_named_backend_never_falls_back_silently(add_backend, qkv):
    narrow, fast = add_backend("narrow", head_dims=frozenset({64})), add_backend("fast")
    for _ in range(2):
        with pytest.raises(UnsupportedCallError):
            lpattn.low_precision_sdpa(*qkv(), backend="narrow")
    with pytest.warns(LpattnWarning):
        lpattn.low_precision_sdpa(*qkv(), backend="narrow", on_unsupported="fallback")
    assert not narrow.calls
    assert not fast.calls


def test_the_named_reference_is_exact_on_request(make_call):
    choice = dispatch.choose(make_call(), Settings("bf16_reference", provenance=Provenance.MODEL))
    assert choice.exact_reason == Reason("requested", 'backend="bf16_reference" is exact attention')


def test_with_fallback_the_choice_keeps_all_reasons(add_backend, make_call):
    add_backend("narrow", head_dims=frozenset({64}), dtypes=frozenset({torch.float16}))
    add_backend("other")
    settings = Settings("narrow", on_unsupported=OnUnsupported.FALLBACK, provenance=Provenance.MODEL)
    choice = dispatch.choose(make_call(), settings)
    assert (choice.backend, choice.provenance) == ("bf16_reference", Provenance.MODEL)
    assert [r.code for r in choice.reasons["narrow"]] == ["dtype", "head_dim"]
    assert [r.code for r in choice.reasons["other"]] == ["excluded"]
    assert "bf16_reference" not in choice.reasons
    assert choice.exact_reason.code == "dtype"


# Errors


@pytest.fixture
def gpu_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return AttentionCall(
        batch=2,
        num_heads=16,
        num_kv_heads=16,
        q_len=1024,
        kv_len=1024,
        head_dim=80,
        head_dim_v=80,
        dtype=torch.bfloat16,
        device_type="cuda",
        capability=(9, 0),
        softmax_scale=80**-0.5,
        causal=CausalKind.TOP_LEFT,
        dropout=True,
    )


def test_the_error_of_a_named_backend(add_backend, gpu_call):
    add_backend("narrow", head_dims=frozenset({64, 96, 128}), dropout=False)
    add_backend("a_very_long_backend_name")
    with pytest.raises(UnsupportedCallError) as caught:
        dispatch.choose(gpu_call, NAMED)
    assert str(caught.value) == (
        "No backend can run this attention call: "
        "q [2, 16, 1024, 80] bfloat16 on cuda:0 (NVIDIA H200, sm_90), causal, mask none, dropout\n"
        "  narrow                   head_dim 80: has kernels for 64, 96, 128\n"
        "                           dropout_p > 0: has no dropout (set dropout_p=0.0, or model.eval())\n"
        '  bf16_reference           excluded by backend="narrow"\n'
        '  a_very_long_backend_name excluded by backend="narrow"\n'
        '  fp8_fa3                  excluded by backend="narrow"\n'
        '  fp8_triton               excluded by backend="narrow"\n'
        'Use backend=None to let lpattn choose, or on_unsupported="fallback" to run such calls exactly.'
    )


def test_the_error_of_a_strict_automatic_choice(add_backend, gpu_call):
    add_backend("narrow", head_dims=frozenset({64}))
    add_backend("manual", automatic=False, dropout=False)
    add_backend("absent", device=[Reason("driver", "driver 535: needs 550", "update it")])
    with pytest.raises(UnsupportedCallError) as caught:
        dispatch.choose(gpu_call, Settings(on_unsupported=OnUnsupported.RAISE))
    assert str(caught.value) == (
        "No backend can run this attention call: "
        "q [2, 16, 1024, 80] bfloat16 on cuda:0 (NVIDIA H200, sm_90), causal, mask none, dropout\n"
        "  narrow         head_dim 80: has kernels for 64\n"
        "  manual         runs only where it is named\n"
        "                 dropout_p > 0: has no dropout (set dropout_p=0.0, or model.eval())\n"
        "  absent         driver 535: needs 550 (update it)\n"
        "  fp8_fa3        no backend of this name is registered (install or register it again; see `lpattn info`)\n"
        "  fp8_triton     no backend of this name is registered (install or register it again; see `lpattn info`)\n"
        "  bf16_reference exact, where on_unsupported='raise' wants low\n"
        'Use backend=None to let lpattn choose, or on_unsupported="fallback" to run such calls exactly.'
    )


def test_the_remedy_of_a_hadamard_mode_that_nobody_offers(add_backend, make_call):
    none = frozenset({lpattn.HadamardMode.NONE})
    add_backend(hadamard=none)
    with pytest.raises(UnsupportedCallError) as caught:
        dispatch.choose(
            make_call(hadamard=lpattn.HadamardMode.QKV),
            Settings(None, lpattn.HadamardMode.QKV, OnUnsupported.RAISE),
        )
    text = str(caught.value)
    assert "  fake           hadamard qkv: offers none" in text
    assert text.endswith('\nUse hadamard="none", or on_unsupported="fallback" to run such calls exactly.')


def test_what_has_nothing_to_do_with_the_hadamard_mode_has_another_remedy(add_backend, make_call):
    add_backend("narrow", device=[Reason("driver", "driver 535: needs 550")])
    with pytest.raises(UnsupportedCallError, match="Use backend=None to let lpattn choose, or on_unsupported"):
        dispatch.choose(make_call(hadamard=lpattn.HadamardMode.QKV), NAMED)


def test_reasons_of_probe_and_call_come_together(add_backend, make_call):
    add_backend("narrow", device=[Reason("driver", "driver 535: needs 550")], head_dims=frozenset({64}))
    with pytest.raises(UnsupportedCallError) as caught:
        dispatch.choose(make_call(), NAMED)
    text = "  narrow         driver 535: needs 550\n                 head_dim 32: has kernels for 64\n"
    assert text in str(caught.value)


def test_a_reason_that_probe_and_call_share_is_given_once(add_backend, make_call):
    reason = Reason("device", "device cpu: runs on cuda")
    add_backend("narrow", device=[reason], device_types=frozenset({"cuda"}))
    assert dispatch.reasons_against("narrow", make_call()) == (reason,)


# Warnings


def warnings_of(run):
    with pytest.warns(LpattnWarning) as caught:
        run()
    return [str(w.message) for w in caught]


def test_the_warning_of_a_fallback(add_backend, qkv):
    add_backend("narrow", head_dims=frozenset({64}))
    q, k, v = qkv()
    (text,) = warnings_of(
        lambda: lpattn.low_precision_sdpa(q, k, v, backend="narrow", hadamard="qkv", on_unsupported="fallback")
    )
    assert text == (
        "attention runs exactly, not in low precision (head_dim 8: has kernels for 64): "
        "q [2, 4, 6, 8] float32 on cpu, not causal, mask none\n"
        "  narrow         head_dim 8: has kernels for 64\n"
        '  fp8_fa3        excluded by backend="narrow"\n'
        '  fp8_triton     excluded by backend="narrow"\n'
        "hadamard='qkv' is not applied to such calls.\n"
        "This is said once per reason; attention_report(model) counts such calls."
    )


def test_one_warning_per_reason_and_scope(add_backend, make_model, qkv):
    add_backend("narrow", head_dims=frozenset({64}), dtypes=frozenset({torch.float32}))
    one, two = (
        lpattn.apply_low_precision_attention(make_model(), "narrow", on_unsupported="fallback") for _ in range(2)
    )
    x = qkv()[0]
    assert len(warnings_of(lambda: [one(x) for _ in range(5)])) == 1
    one(x), one(qkv(q_len=9)[0])
    (text,) = warnings_of(lambda: [one(x.half()) for _ in range(5)])
    assert "dtype float16" in text
    one(x), one(x.half())
    assert len(warnings_of(lambda: [two(x) for _ in range(5)])) == 1
    assert lpattn.attention_report(one)["attn"].exact == {"head_dim": 8, "dtype": 6}
    assert lpattn.attention_report(two)["attn"].exact == {"head_dim": 5}


def test_applying_again_warns_again(add_backend, make_model, qkv):
    add_backend("narrow", head_dims=frozenset({64}))
    model = make_model()
    for _ in range(2):
        lpattn.apply_low_precision_attention(model, "narrow", on_unsupported="fallback")
        assert len(warnings_of(lambda: [model(qkv()[0]) for _ in range(2)])) == 1


def test_each_context_warns_once(add_backend, qkv):
    add_backend("narrow", head_dims=frozenset({64}))
    context = lpattn.low_precision_attention("narrow", on_unsupported="fallback")

    def enter_twice(context):
        for _ in range(2):
            with context:
                lpattn.low_precision_sdpa(*qkv())

    assert len(warnings_of(lambda: enter_twice(context))) == 1
    other = lpattn.low_precision_attention("narrow", on_unsupported="fallback")
    assert len(warnings_of(lambda: enter_twice(other))) == 1


# Many threads


def test_threads_choose_at_once(add_backend, make_call, monkeypatch):
    monkeypatch.setattr(dispatch, "_CACHE_SIZE", 8)
    add_backend("short", rank=lambda call: 2.0 if call.kv_len < 200 else 0.5)
    add_backend("long", rank=lambda call: 1.5)
    errors = []

    def work(seed):
        try:
            for n in range(300):
                length = 20 + (n * 37 + seed * 11) % 400
                choice = dispatch.choose(make_call(q_len=length, kv_len=length), AUTOMATIC)
                assert choice.backend == ("short" if length < 192 else "long" if length >= 224 else choice.backend)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_the_codes_that_are_no_limits():
    assert set(dispatch.POLICY_CODES) == {"not_faster", "not_measured"}
