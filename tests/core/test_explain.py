"""explain: what would happen to a call, and why; nothing runs."""

import pytest
import torch

import lpattn
from lpattn import Provenance, Reason
from lpattn.registry import registry


@pytest.fixture
def spies(add_backend):
    """One backend of each fate; none may be called."""
    return [
        add_backend("best", rank=3.0),
        add_backend("second", rank=2.0, fused_rope=True),
        add_backend("slow", rank=0.5),
        add_backend("narrow", head_dims=frozenset({64}), dtypes=frozenset({torch.float16})),
        add_backend("manual", automatic=False),
        add_backend("absent", device=[Reason("driver", "driver 535: needs 550")]),
    ]


def codes(explanation):
    return {name: [r.code for r in reasons] for name, reasons in explanation.reasons.items()}


OUTCOMES = [
    ({}, "best"),
    ({"backend": "best"}, "best"),
    ({"backend": "manual"}, "manual"),
    ({"hadamard": "qkv"}, "best"),
    ({"return_lse": True}, "best"),
    ({"is_causal": True, "dropout_p": 0.5}, "best"),
    ({"on_unsupported": "raise"}, "best"),
    ({"backend": "bf16_reference"}, "bf16_reference"),
    ({"backend": "narrow", "on_unsupported": "fallback"}, "warning"),
    ({"backend": "narrow"}, "error"),
    ({"backend": "absent"}, "error"),
    ({"backend": "fp8_triton"}, "error"),
]
OPTIONS = [options for options, _ in OUTCOMES]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_known_backend_is_listed_and_none_runs(spies, qkv, monkeypatch, options):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    explanation = lpattn.explain(*qkv(), **options)
    chosen = [] if explanation.choice is None else [explanation.choice.backend]
    assert sorted([*chosen, *explanation.reasons]) == sorted(registry.names())
    assert all(explanation.reasons.values())
    text = str(explanation)
    assert all(name in text for name in registry.names())
    assert explanation.call.describe() in text
    assert all(str(reason) in text for reasons in explanation.reasons.values() for reason in reasons)
    assert not any(spy.calls for spy in spies)


@pytest.mark.parametrize(("options", "outcome"), OUTCOMES)
def test_what_is_explained_is_what_happens(spies, qkv, options, outcome):
    q, k, v = qkv()
    explanation = lpattn.explain(q, k, v, **options)
    if outcome == "error":
        assert explanation.choice is None
        with pytest.raises(lpattn.UnsupportedCallError) as caught:
            lpattn.low_precision_sdpa(q, k, v, **options)
        assert str(explanation) == str(caught.value)
    elif outcome == "warning":
        assert explanation.choice.backend == "bf16_reference"
        with pytest.warns(lpattn.LpattnWarning) as warned:
            lpattn.low_precision_sdpa(q, k, v, **options)
        assert str(explanation.choice.exact_reason) in str(warned[0].message)
    else:
        assert explanation.choice.backend == outcome
        lpattn.low_precision_sdpa(q, k, v, **options)
        assert [spy.name for spy in spies if spy.calls] == [outcome] * (outcome != "bf16_reference")


def test_the_reasons_of_an_automatic_choice(spies, qkv):
    explanation = lpattn.explain(*qkv())
    assert (explanation.choice.backend, explanation.choice.provenance) == ("best", Provenance.AUTOMATIC)
    assert codes(explanation) == {
        "bf16_reference": ["slower"],
        "second": ["slower"],
        "slow": ["not_faster"],
        "narrow": ["dtype", "head_dim"],
        "manual": ["not_automatic"],
        "absent": ["driver"],
        "fp8_fa3": ["not_registered"],
        "fp8_triton": ["not_registered"],
    }


def test_the_text_of_an_explanation(add_backend, qkv):
    add_backend("best", rank=3.0)
    add_backend("narrow", head_dims=frozenset({64}), dropout=False)
    assert str(lpattn.explain(*qkv(), dropout_p=0.5)) == (
        "q [2, 4, 6, 8] float32 on cpu, not causal, mask none, dropout\n"
        "  best           chosen (automatic)\n"
        "  bf16_reference expected x1.00 as fast as exact attention, best x3.00\n"
        "  narrow         head_dim 8: has kernels for 64\n"
        "                 dropout_p > 0: has no dropout (set dropout_p=0.0, or model.eval())\n"
        "  fp8_fa3        no backend of this name is registered (install or register it again; see `lpattn info`)\n"
        "  fp8_triton     no backend of this name is registered (install or register it again; see `lpattn info`)"
    )


def test_the_text_where_exact_attention_runs(add_backend, qkv):
    add_backend("slow", rank=0.5)
    lines = str(lpattn.explain(*qkv())).splitlines()
    assert lines[1] == (
        "  bf16_reference chosen (automatic), exact: slow: not faster than exact attention here: x0.50 expected "
        '(name it to run it all the same: backend="slow")'
    )


def test_an_error_is_explained_by_its_own_text(spies, qkv):
    explanation = lpattn.explain(*qkv(), backend="narrow")
    assert explanation.choice is None
    assert codes(explanation)["narrow"] == ["dtype", "head_dim"]
    assert codes(explanation)["best"][0] == "excluded"
    assert str(explanation).startswith("No backend can run this attention call: q [2, 4, 6, 8] float32 on cpu")


def test_the_surroundings_count(spies, qkv, monkeypatch):
    with lpattn.low_precision_attention("second"):
        assert lpattn.explain(*qkv()).choice.provenance is Provenance.CONTEXT
    monkeypatch.setenv("LPATTN_BACKEND", "slow")
    choice = lpattn.explain(*qkv()).choice
    assert (choice.backend, choice.provenance) == ("slow", Provenance.ENVIRONMENT)


def test_autocast_counts(spies, qkv):
    with torch.autocast("cpu", torch.float16):
        assert lpattn.explain(*qkv()).call.dtype == torch.float16


def test_inputs_that_require_grad_are_explained_as_they_run(spies, qkv):
    q, k, v = qkv()
    explanation = lpattn.explain(q.requires_grad_(), k, v)
    assert explanation.choice.backend == "bf16_reference"
    assert explanation.choice.exact_reason.code == "requires_grad"
    assert lpattn.explain(q, k, v, backend="best").choice is None
    with torch.no_grad():
        assert lpattn.explain(q, k, v).choice.backend == "best"


@pytest.mark.parametrize(
    ("shape", "text"),
    [((4, 6, 8), "q, k, v of 3, 3, 3 dimensions"), ((2, 4, 6, 0), "head_dim 0")],
)
def test_calls_that_lpattn_leaves_alone(shape, text):
    q = torch.zeros(shape)
    with pytest.raises(lpattn.InvalidArgumentError, match=f"always run on PyTorch's own SDPA: {text}"):
        lpattn.explain(q, q, q)


@pytest.mark.parametrize("options", [{}, {"backend": "best"}])
def test_empty_calls_are_explained(spies, options):
    q = torch.zeros(0, 4, 6, 8)
    choice = lpattn.explain(q, q, q, **options).choice
    assert (choice.backend, choice.exact_reason.code) == ("bf16_reference", "empty")


def test_nothing_is_counted_and_nothing_is_warned_about(add_backend, make_model, qkv):
    add_backend(head_dims=frozenset({64}))

    class Explains(torch.nn.Module):
        def forward(self, q, k, v):
            lpattn.explain(q, k, v)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    model = lpattn.apply_low_precision_attention(torch.nn.Sequential(Explains()))
    with pytest.warns(lpattn.LpattnWarning) as caught:
        model[0](*qkv())
    assert len(caught) == 1
    assert lpattn.attention_report(model)["0"].exact == {"head_dim": 1}
