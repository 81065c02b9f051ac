"""Choices are remembered per class of lengths, in a bounded cache, and never change by being remembered."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lpattn
from lpattn import CausalKind, HadamardMode, MaskKind, Provenance, Reason, UnsupportedCallError, dispatch
from lpattn.registry import registry
from lpattn.settings import OnUnsupported, Settings

AUTOMATIC = Settings()


@pytest.fixture(autouse=True)
def empty_cache():
    dispatch._cache.clear()


# Which calls share a choice


@pytest.mark.parametrize("rank", [2.0, 0.5])
def test_ten_thousand_lengths_share_few_choices(add_backend, make_call, rank):
    fake = add_backend(rank=rank)
    call = make_call()
    for length in range(1, 10_001):
        dispatch.choose(dataclasses.replace(call, q_len=length, kv_len=length), AUTOMATIC)
    assert len(dispatch._cache) < 100
    assert len(fake.asked) < 100


def test_ten_thousand_fallbacks_fill_nothing(add_backend, make_call):
    add_backend(head_dims=frozenset({64}))
    call = make_call()
    for length in range(1, 10_001):
        dispatch.choose(dataclasses.replace(call, q_len=length, kv_len=length), AUTOMATIC)
    assert len(dispatch._cache) < 100


def test_batches_and_masks_share_choices_too(add_backend, make_call):
    add_backend()
    for n in range(1, 1001):
        mask = {"mask": MaskKind.BOOL, "mask_shape": (n, 1, n, n)}
        dispatch.choose(make_call(batch=n, q_len=n, kv_len=n, **mask), AUTOMATIC)
    # Small numbers stay exact; from 16 on there are four classes per octave.
    assert len(dispatch._cache) <= 16 + 4 * 6


def test_the_cache_is_bounded(add_backend, make_call, monkeypatch):
    add_backend()
    monkeypatch.setattr(dispatch, "_CACHE_SIZE", 50)
    for dim in range(1, 200):
        dispatch.choose(make_call(head_dim=dim), AUTOMATIC)
    assert len(dispatch._cache) <= 50


def test_a_remembered_call_is_not_decided_again(add_backend, make_call):
    fake = add_backend()
    first = dispatch.choose(make_call(), AUTOMATIC)
    asked = len(fake.asked)
    assert dispatch.choose(make_call(), AUTOMATIC) is first
    assert len(fake.asked) == asked


@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": 64},
        {"head_dim_v": 64},
        {"dtype": torch.float16},
        {"num_heads": 8},
        {"num_kv_heads": 2},
        {"causal": CausalKind.TOP_LEFT},
        {"hadamard": HadamardMode.QKV},
        {"return_lse": True},
        {"requires_grad": True},
        {"dropout": True},
        {"softmax_scale": 0.0},
        {"contiguous_last_dim": False},
        {"mask": MaskKind.BOOL, "mask_shape": (1, 1, 64, 64)},
        {"q_len": 1},
        {"q_len": 63},
        {"kv_len": 65},
        {"kv_len": 1000},
        {"device_type": "cuda", "capability": (9, 0)},
        {"device_index": 1},
    ],
)
def test_calls_that_differ_are_decided_apart(make_call, fields):
    assert dispatch.length_class(make_call(**fields)) != dispatch.length_class(make_call())


@pytest.mark.parametrize("name", ["backend", "hadamard", "on_unsupported", "provenance"])
def test_settings_that_differ_are_decided_apart(add_backend, make_call, name):
    add_backend()
    other = {
        "backend": "fake",
        "hadamard": HadamardMode.QKV,
        "on_unsupported": OnUnsupported.RAISE,
        "provenance": Provenance.LAYER_RULE,
    }
    dispatch.choose(make_call(), AUTOMATIC)
    dispatch.choose(make_call(), dataclasses.replace(AUTOMATIC, **{name: other[name]}))
    assert len(dispatch._cache) == 2


lengths = st.one_of(
    st.integers(0, 40), st.sampled_from([63, 64, 65, 95, 96, 97, 111, 112, 127, 128, 129]), st.integers(1, 10**6)
)


@given(q_len=lengths, kv_len=lengths, q_mask=st.booleans(), kv_mask=st.booleans())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_class_keeps_what_decisions_depend_on(make_call, q_len, kv_len, q_mask, kv_mask):
    shape = (1, 4, q_len if q_mask else 1, kv_len if kv_mask else 1)
    call = make_call(q_len=q_len, kv_len=kv_len, mask=MaskKind.BOOL, mask_shape=shape)
    typical = dispatch.length_class(call)
    assert (typical.q_len == typical.kv_len) == (q_len == kv_len)
    assert (typical.q_len < typical.kv_len) == (q_len < kv_len)
    for exact, rounded in ((q_len, typical.q_len), (kv_len, typical.kv_len)):
        assert (rounded == exact) if exact < 16 else (0.79 * exact <= rounded <= exact)
        assert rounded > 1 or exact <= 1


def test_backends_that_need_exact_lengths_are_asked_per_length(add_backend, make_call):
    def even_only(call):
        return [] if call.kv_len % 2 == 0 else [Reason("odd", f"kv_len {call.kv_len}: must be even")]

    fake = add_backend(supports=even_only, exact_lengths=True)
    chosen = {
        length: dispatch.choose(make_call(q_len=length, kv_len=length), AUTOMATIC).backend for length in range(96, 112)
    }
    assert chosen == {n: "bf16_reference" if n % 2 else "fake" for n in range(96, 112)}
    assert {call.kv_len for call in fake.asked} == set(range(96, 112))
    lpattn.unregister_backend("fake")
    add_backend("other")
    dispatch._cache.clear()
    for length in range(96, 112):
        dispatch.choose(make_call(q_len=length, kv_len=length), AUTOMATIC)
    assert len(dispatch._cache) == 1


@pytest.mark.parametrize("request_", [AUTOMATIC, Settings("fake", on_unsupported=OnUnsupported.FALLBACK)])
def test_the_reasons_of_a_fallback_name_the_values_of_this_call(add_backend, make_call, request_):
    add_backend(causal_rectangular=False)
    for q_len, kv_len in ((100, 101), (105, 106)):
        call = make_call(q_len=q_len, kv_len=kv_len, causal=CausalKind.TOP_LEFT)
        reason = dispatch.choose(call, request_).exact_reason
        assert f"causal with q_len {q_len} and kv_len {kv_len}" in reason.message


def test_ranks_are_asked_about_calls_that_can_exist(add_backend, make_call):
    seen = []
    add_backend(rank=lambda call: seen.append(call) or 2.0)
    dispatch.choose(make_call(q_len=100, kv_len=200, mask=MaskKind.BOOL, mask_shape=(1, 4, 100, 200)), AUTOMATIC)
    (call,) = seen
    full = (call.batch, call.num_heads, call.q_len, call.kv_len)
    assert all(m in (1, f) for m, f in zip(call.mask_shape, full, strict=True))


@pytest.mark.parametrize("lengths", [(97, 110), (110, 97)])
def test_which_length_came_first_does_not_matter(add_backend, make_call, lengths):
    add_backend(rank=lambda call: 2.0 if call.kv_len > 100 else 0.5)
    chosen = {dispatch.choose(make_call(q_len=n, kv_len=n), AUTOMATIC).backend for n in lengths}
    assert chosen == {"bf16_reference"}


# What makes a remembered choice stale


def test_registering_and_unregistering_drop_what_was_remembered(add_backend, make_call, qkv):
    add_backend("first", rank=2.0)
    assert dispatch.choose(make_call(), AUTOMATIC).backend == "first"
    add_backend("second", rank=3.0)
    assert dispatch.choose(make_call(), AUTOMATIC).backend == "second"
    lpattn.unregister_backend("second")
    assert dispatch.choose(make_call(), AUTOMATIC).backend == "first"
    lpattn.unregister_backend("first")
    assert dispatch.choose(make_call(), AUTOMATIC).backend == "bf16_reference"


def test_plans_are_dropped_as_well(add_backend, qkv):
    q, k, v = qkv()
    first = add_backend("first", rank=2.0)
    lpattn.low_precision_sdpa(q, k, v)
    second = add_backend("second", rank=3.0)
    lpattn.low_precision_sdpa(q, k, v)
    lpattn.unregister_backend("second")
    lpattn.low_precision_sdpa(q, k, v)
    assert (len(first.calls), len(second.calls)) == (2, 1)


def test_a_backend_of_the_same_name_is_a_new_one(add_backend, qkv):
    q, k, v = qkv()
    old = add_backend()
    lpattn.low_precision_sdpa(q, k, v, backend="fake")
    lpattn.unregister_backend("fake")
    new = add_backend(head_dims=frozenset({64}))
    with pytest.raises(UnsupportedCallError):
        lpattn.low_precision_sdpa(q, k, v, backend="fake")
    assert (len(old.calls), len(new.calls)) == (1, 0)


def test_a_hadamard_mode_is_checked_against_the_new_backend(add_backend, qkv):
    q, k, v = qkv()
    add_backend()
    lpattn.low_precision_sdpa(q, k, v, backend="fake", hadamard="qkv")
    lpattn.unregister_backend("fake")
    add_backend(hadamard=frozenset({HadamardMode.NONE}))
    with pytest.raises(lpattn.InvalidArgumentError, match="cannot apply hadamard='qkv'"):
        lpattn.low_precision_sdpa(q, k, v, backend="fake", hadamard="qkv")


# The remembered choice is the fresh one

dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
dims = st.sampled_from([32, 64, 80, 128])


def subsets(values, always=None):
    chosen = st.frozensets(st.sampled_from(list(values)), min_size=1)
    return chosen if always is None else chosen.map(lambda s: s | {always})


# Few restrictions at a time, so that most backends run many of the calls.
capabilities = st.fixed_dictionaries(
    {},
    optional={
        "dtypes": subsets([torch.float16, torch.bfloat16, torch.float32]),
        "device_types": st.sampled_from([frozenset({"cuda"}), frozenset({"cuda", "cpu"})]),
        "architectures": st.sampled_from([((9, 0), (9, 0)), ((8, 0), (12, 0))]),
        "head_dims": subsets([32, 64, 80, 128]),
        "head_dim_v_differs": st.booleans(),
        "masks": subsets(MaskKind, MaskKind.NONE),
        "key_padding": st.booleans(),
        "causal": st.booleans(),
        "causal_rectangular": st.booleans(),
        "gqa": st.booleans(),
        "lse": st.booleans(),
        "dropout": st.booleans(),
        "hadamard": subsets(HadamardMode, HadamardMode.NONE),
        "strided_last_dim": st.booleans(),
        "backward": st.booleans(),
    },
)
fakes = st.fixed_dictionaries(
    {
        "data": capabilities,
        "slope": st.sampled_from([-1.0, -0.1, 0.1, 1.0]),
        "break_even": st.sampled_from([1, 17, 98, 100, 105, 1000]),
        "automatic": st.sampled_from([True, True, False]),
        "modulus": st.sampled_from([0, 0, 0, 0, 8]),
        "present": st.sampled_from([True, True, True, False]),
    }
)
close_lengths = st.sampled_from([0, 1, 15, 16, 17, 18, 64, 65, 96, 97, 99, 100, 101, 110, 111, 112, 1000, 1023])


@st.composite
def kinds_of_calls(draw):
    """A function that makes calls which differ in their lengths only."""
    heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 1)]))
    dim = draw(dims)
    kind = draw(st.sampled_from(list(MaskKind)))
    expanded = draw(st.tuples(*[st.booleans()] * 4))
    device_type = draw(st.sampled_from(["cpu", "cuda"]))
    fields = {
        "head_dim_v": draw(st.one_of(st.just(dim), dims)),
        "dtype": draw(dtypes),
        "device_type": device_type,
        "capability": draw(st.sampled_from([(8, 0), (9, 0), (12, 0)])) if device_type == "cuda" else None,
        "mask": kind,
        "causal": draw(st.sampled_from(CausalKind)) if kind is MaskKind.NONE else CausalKind.NONE,
        "dropout": draw(st.booleans()),
        "hadamard": draw(st.sampled_from(HadamardMode)),
        "return_lse": draw(st.booleans()),
        "contiguous_last_dim": draw(st.booleans()),
        "requires_grad": draw(st.sampled_from([False, False, True])),
    }

    def make(batch, q_len, kv_len):
        full = (batch, heads, q_len, kv_len or q_len)
        mask_shape = tuple(1 if e else f for e, f in zip(expanded, full, strict=True))
        return lpattn.AttentionCall(
            *(batch, heads, kv_heads, q_len, kv_len or q_len, dim),
            mask_shape=None if kind is MaskKind.NONE else mask_shape,
            **fields,
        )

    return make


sizes = st.tuples(st.sampled_from([1, 2, 16, 17]), close_lengths, st.one_of(st.none(), close_lengths))


def decision(call, settings):
    """What was decided; without the wording, in which lengths may be named."""
    try:
        choice = dispatch.choose(call, settings)
    except UnsupportedCallError:
        return "error"
    codes = {name: [r.code for r in reasons] for name, reasons in choice.reasons.items()}
    return choice.backend, choice.provenance, codes, choice.exact_reason and choice.exact_reason.code


@given(
    backends=st.lists(fakes, min_size=1, max_size=4),
    kinds=st.lists(kinds_of_calls(), min_size=1, max_size=2),
    sizes=st.lists(sizes, min_size=4, max_size=20),
    wanted=st.sampled_from([None, None, 0]),
    policy=st.sampled_from([None, *OnUnsupported]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_remembered_choice_equals_a_fresh_one(make_backend, backends, kinds, sizes, wanted, policy):
    def make(index, data, slope, break_even, automatic, modulus, present):
        def supports(call):
            odd = modulus and call.kv_len % modulus
            return [Reason("length", f"kv_len {call.kv_len}: must be a multiple of {modulus}")] if odd else []

        return make_backend(
            f"fake{index}",
            rank=lambda call: 1.0 + slope * (call.kv_len / break_even - 1.0),
            device=[] if present else [Reason("driver", "driver 535: needs 550")],
            supports=supports,
            exact_lengths=bool(modulus),
            automatic=automatic,
            **data,
        )

    made = [make(index, **options) for index, options in enumerate(backends)]
    for backend in made:
        lpattn.register_backend(backend)
    try:
        request = Settings(
            None if wanted is None else f"fake{wanted}",
            on_unsupported=policy,
            provenance=Provenance.AUTOMATIC if wanted is None else Provenance.MODEL,
        )
        calls = [make(*size) for size in sizes for make in kinds]
        remembered = [decision(call, request) for call in calls]
        fresh = []
        for call in calls:
            registry.generation += 1
            fresh.append(decision(call, request))
        assert remembered == fresh
    finally:
        for backend in made:
            lpattn.unregister_backend(backend.name)
