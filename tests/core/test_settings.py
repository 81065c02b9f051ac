"""What a user may ask for: refused at once where it cannot be, strict where it was named, tolerant where it was not."""

import pytest
import torch

import lpattn
from lpattn import BackendUnavailableError, InvalidArgumentError, LpattnWarning, Reason, UnknownBackendError
from lpattn.settings import OnUnsupported, Settings, from_text
from lpattn.types import Provenance

NARROW = {"head_dims": frozenset({64})}


@pytest.fixture
def entry(make_model, qkv):
    """The three places that take settings."""

    def enter(kind, **settings):
        if kind == "call":
            return lpattn.low_precision_sdpa(*qkv(), **settings)
        if kind == "context":
            return lpattn.low_precision_attention(**settings)
        return lpattn.apply_low_precision_attention(make_model(), **settings)

    return enter


ENTRIES = pytest.mark.parametrize("kind", ["call", "context", "apply"])


# Values


@ENTRIES
def test_unknown_backends_are_refused_with_the_valid_ones(entry, kind):
    with pytest.raises(UnknownBackendError) as caught:
        entry(kind, backend="fp8_tritn")
    assert "unknown backend 'fp8_tritn'; did you mean 'fp8_triton'?" in str(caught.value)
    assert "known backends: bf16_reference, fp8_fa3, fp8_triton" in str(caught.value)
    assert isinstance(caught.value, ValueError)


@ENTRIES
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": 8}, r"backend must be an AttentionBackend, a string or None; got 8 \(int\)"),
        ({"hadamard": "v"}, r"hadamard must be one of 'none', 'qkv', 'v_only'; got 'v'"),
        ({"hadamard": "vonly"}, r"got 'vonly'; did you mean 'v_only'\?"),
        ({"hadamard": True}, r"hadamard must be one of 'none', 'qkv', 'v_only'; got True"),
        ({"on_unsupported": "ignore"}, r"on_unsupported must be one of 'fallback', 'raise'; got 'ignore'"),
        ({"on_unsupported": "rais"}, r"did you mean 'raise'\?"),
    ],
)
def test_values_that_are_not_valid(entry, kind, settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        entry(kind, **settings)


@pytest.mark.parametrize("settings", [{"backend": ["fake"]}, {"hadamard": ["qkv"]}, {"on_unsupported": ["raise"]}])
def test_values_that_cannot_be_hashed_are_named(entry, settings):
    with pytest.raises(InvalidArgumentError, match=next(iter(settings))):
        entry("call", **settings)


@ENTRIES
def test_options_that_contradict_each_other_are_refused_when_configured(entry, kind, add_backend):
    add_backend("rotates")
    with pytest.raises(InvalidArgumentError) as caught:
        entry(kind, backend="bf16_reference", hadamard="qkv")
    assert str(caught.value) == (
        "backend 'bf16_reference' cannot apply hadamard='qkv'; it offers: none\n"
        "Use hadamard='none', or a backend that offers it: rotates"
    )


@ENTRIES
def test_a_hadamard_mode_that_the_backend_lacks_is_refused(entry, kind, add_backend):
    add_backend(hadamard=frozenset({lpattn.HadamardMode.NONE, lpattn.HadamardMode.V_ONLY}))
    with pytest.raises(InvalidArgumentError, match=r"'fake' cannot apply hadamard='qkv'; it offers: none, v_only"):
        entry(kind, backend="fake", hadamard="qkv", on_unsupported="fallback")
    entry(kind, backend="fake", hadamard="v_only")


def test_refused_settings_leave_the_model_untouched(make_model):
    model = make_model()
    with pytest.raises(InvalidArgumentError):
        lpattn.apply_low_precision_attention(model, "bf16_reference", "qkv")
    assert not any("forward" in vars(m) for m in model.modules())


# The environment


def test_an_unknown_name_in_the_environment_is_an_error(entry, monkeypatch, make_model, qkv):
    model = lpattn.apply_low_precision_attention(make_model())
    monkeypatch.setenv("LPATTN_BACKEND", "fp8_tritn")
    message = (
        r"^environment variable LPATTN_BACKEND='fp8_tritn': unknown backend 'fp8_tritn'; did you mean 'fp8_triton'"
    )
    for kind in ("call", "context", "apply"):
        with pytest.raises(UnknownBackendError, match=message):
            entry(kind)
    with pytest.raises(UnknownBackendError, match=message):
        model(qkv()[0])


def test_the_environment_is_read_at_the_call(add_backend, monkeypatch, qkv):
    one, two = add_backend("one", rank=0.5), add_backend("two", rank=0.5)
    for name in ("ONE", "two", "one"):
        monkeypatch.setenv("LPATTN_BACKEND", name)
        lpattn.low_precision_sdpa(*qkv())
    assert (len(one.calls), len(two.calls)) == (2, 1)


def test_an_empty_variable_says_nothing(add_backend, monkeypatch, qkv):
    fake = add_backend()
    monkeypatch.setenv("LPATTN_BACKEND", "")
    lpattn.low_precision_sdpa(*qkv())
    assert len(fake.calls) == 1


def test_the_environment_is_strict(add_backend, monkeypatch, qkv):
    add_backend(**NARROW)
    add_backend("other")
    monkeypatch.setenv("LPATTN_BACKEND", "fake")
    with pytest.raises(lpattn.UnsupportedCallError, match="head_dim 8: has kernels for 64"):
        lpattn.low_precision_sdpa(*qkv())
    with pytest.warns(LpattnWarning, match="head_dim 8"):
        lpattn.low_precision_sdpa(*qkv(), on_unsupported="fallback")


def test_a_contradiction_with_the_environment_names_it(monkeypatch, qkv):
    monkeypatch.setenv("LPATTN_BACKEND", "bf16_reference")
    with pytest.raises(
        InvalidArgumentError, match=r"^environment variable LPATTN_BACKEND='bf16_reference': .*hadamard"
    ):
        lpattn.low_precision_sdpa(*qkv(), hadamard="qkv")


# What cannot run on this machine

DRIVER = [Reason("driver", "driver 535: needs 550", "update it"), Reason("build", "wheel was built without FP8")]
LISTING = (
    "backend 'fake' cannot run on any device of this machine:\n"
    "  cpu      driver 535: needs 550 (update it)\n"
    "  cpu      wheel was built without FP8\n"
)


@pytest.fixture
def only_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("kind", ["context", "apply"])
def test_a_backend_that_cannot_run_here_is_refused_at_once(entry, kind, add_backend, only_cpu):
    add_backend(device=DRIVER)
    with pytest.raises(BackendUnavailableError) as caught:
        entry(kind, backend="fake")
    remedy = 'Use backend=None to let lpattn choose, or on_unsupported="fallback" to run such calls exactly.'
    assert str(caught.value) == LISTING + remedy
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("kind", ["context", "apply"])
def test_with_fallback_it_is_one_warning(entry, kind, add_backend, only_cpu):
    add_backend(device=DRIVER)
    with pytest.warns(LpattnWarning) as caught:
        entry(kind, backend="fake", on_unsupported="fallback")
    expected = LISTING + 'Its calls run exactly, because on_unsupported="fallback".'
    assert [str(w.message) for w in caught] == [expected]
    assert caught[0].filename in (__file__, entry.__code__.co_filename)


def test_a_refusal_leaves_the_model_untouched(add_backend, make_model):
    add_backend(device=DRIVER)
    model = make_model()
    with pytest.raises(BackendUnavailableError):
        lpattn.apply_low_precision_attention(model, layers={"attn": "fake"})
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("kind", ["context", "apply"])
def test_a_backend_of_the_environment_that_cannot_run_here(entry, kind, add_backend, monkeypatch):
    add_backend(device=DRIVER)
    monkeypatch.setenv("LPATTN_BACKEND", "fake")
    with pytest.raises(BackendUnavailableError, match="needs 550"):
        entry(kind)
    entry(kind, backend="bf16_reference")


def test_a_backend_that_some_device_can_run_is_not_refused(entry, add_backend, make_backend, monkeypatch):
    fake = add_backend()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    fake.probe = lambda device: [] if device == torch.device("cuda", 1) else DRIVER
    entry("context", backend="fake")


@pytest.mark.parametrize("name", ["fp8_fa3", "fp8_triton"])
def test_a_reserved_name_without_a_backend_is_refused(entry, name):
    with pytest.raises(BackendUnavailableError, match="no backend of this name is registered"):
        entry("apply", backend=name)


# on_unsupported


@pytest.fixture
def narrow_call(add_backend, qkv):
    """A call that the only backend, named or not, cannot run."""
    add_backend(**NARROW)
    q, k, v = qkv()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def run(**settings):
        torch.testing.assert_close(lpattn.low_precision_sdpa(q, k, v, **settings), expected)

    return run


@pytest.mark.parametrize("settings", [{}, {"on_unsupported": "fallback"}])
def test_the_automatic_choice_falls_back(narrow_call, settings):
    with pytest.warns(LpattnWarning, match="fake: head_dim 8: has kernels for 64") as caught:
        narrow_call(**settings)
    assert len(caught) == 1


@pytest.mark.parametrize("settings", [{"backend": "fake"}, {"backend": "fake", "on_unsupported": "raise"}])
def test_a_named_backend_is_strict(narrow_call, settings):
    with pytest.raises(lpattn.UnsupportedCallError, match="head_dim 8: has kernels for 64"):
        narrow_call(**settings)


def test_a_named_backend_with_fallback(narrow_call):
    with pytest.warns(LpattnWarning, match="head_dim 8: has kernels for 64") as caught:
        narrow_call(backend="fake", on_unsupported="fallback")
    assert len(caught) == 1


def test_the_automatic_choice_made_strict(narrow_call):
    with pytest.raises(lpattn.UnsupportedCallError, match="head_dim 8: has kernels for 64"):
        narrow_call(on_unsupported="raise")


def test_policy_is_no_error_to_strict_settings(add_backend, qkv):
    fake = add_backend(rank=0.9)
    lpattn.low_precision_sdpa(*qkv(), on_unsupported="raise")
    assert not fake.calls


# Settings travel as text


@pytest.mark.parametrize("backend", [None, "fake", "bf16_reference"])
@pytest.mark.parametrize("policy", [None, *OnUnsupported])
@pytest.mark.parametrize("provenance", list(Provenance))
def test_settings_survive_as_text(backend, policy, provenance):
    for mode in lpattn.HadamardMode:
        settings = Settings(backend, mode, policy, provenance, scope=7)
        copy = from_text(settings.text)
        fields = (copy.backend, copy.hadamard, copy.on_unsupported, copy.provenance, copy.scope)
        assert fields == (backend, mode, policy, provenance, 7)
        assert copy == settings
        assert hash(copy) == hash(settings)
        assert copy.strict == (policy is OnUnsupported.RAISE or (policy is None and backend is not None))
        assert settings != Settings(backend, mode, policy, provenance, scope=8)


def test_a_plugin_that_is_not_installed_is_named_with_its_package(qkv):
    with pytest.raises(UnknownBackendError, match="pip install lpattn-emulated"):
        lpattn.low_precision_sdpa(*qkv(), backend="fp8_emulated")
