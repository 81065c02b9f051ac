"""Probes, and registration in process: what they answer, refuse and remember."""

import pytest
import torch

import lpattn
from lpattn import Reason, RegistrationError, UnknownBackendError
from lpattn.registry import Registry, registry

CPU = torch.device("cpu")

# Probes


def test_a_probe_is_asked_once_per_device(add_backend):
    reason = Reason("driver", "driver 535: needs 550")
    fake = add_backend(device=[reason])
    other = torch.device("meta")
    for _ in range(3):
        assert registry.probe("fake", CPU) == (reason,)
        assert registry.probe("fake", other) == (reason,)
    assert fake.probed == [CPU, other]


def test_registering_does_not_probe(add_backend):
    assert add_backend().probed == []


def test_a_probe_that_raises_is_recorded_once(add_backend):
    fake = add_backend(device=OSError("libcuda.so.1: cannot open"))
    expected = (Reason("probe_failed", "its probe raised OSError: libcuda.so.1: cannot open"),)
    assert registry.probe("fake", CPU) == expected
    assert registry.probe("fake", CPU) == expected
    assert len(fake.probed) == 1


def test_available_backends_lists_every_name_with_its_reasons(add_backend):
    add_backend("ready", automatic=False)
    add_backend("broken", device=[Reason("driver", "driver 535: needs 550")])
    infos = {info.name: info for info in lpattn.available_backends("cpu")}
    assert set(infos) == {"bf16_reference", "fp8_fa3", "fp8_triton", "ready", "broken"}
    assert (infos["ready"].available, infos["ready"].reasons, infos["ready"].automatic) == (True, (), False)
    assert infos["ready"].source == "registered"
    assert not infos["broken"].available
    assert infos["broken"].reasons[0].code == "driver"
    assert infos["bf16_reference"].source == "built-in"
    assert infos["bf16_reference"].version == str(torch.__version__)
    assert infos["fp8_triton"].source == "not loaded"
    assert [r.code for r in infos["fp8_triton"].reasons] == ["not_registered"]
    assert all(info.device == CPU for info in infos.values())


@pytest.mark.parametrize("device", ["cuda:99", "no_such_device"])
def test_available_backends_refuses_a_device_that_is_not_there(device):
    with pytest.raises(lpattn.InvalidArgumentError, match=device):
        lpattn.available_backends(device)


# Registration in process


def test_register_and_unregister(add_backend, qkv):
    fake = add_backend("mine")
    lpattn.low_precision_sdpa(*qkv(), backend="mine")
    assert len(fake.calls) == 1
    lpattn.unregister_backend("MINE")
    with pytest.raises(UnknownBackendError, match="mine"):
        lpattn.low_precision_sdpa(*qkv(), backend="mine")
    add_backend("mine")


def test_a_name_is_taken_once(add_backend, make_backend):
    first = add_backend("mine")
    with pytest.raises(RegistrationError, match="backend name 'mine' is already taken by registered"):
        lpattn.register_backend(make_backend("mine"))
    assert registry.get("mine") is first


@pytest.mark.parametrize("name", ["auto", "exact", "bf16_reference", "fp8_triton"])
def test_words_of_lpattn_are_reserved(make_backend, name):
    with pytest.raises(RegistrationError, match=f"backend name '{name}' is reserved by lpattn"):
        lpattn.register_backend(make_backend(name))


@pytest.mark.parametrize("method", ["supports", "rank"])
def test_a_plugin_whose_questions_raise_stops_nobody(add_backend, qkv, monkeypatch, method):
    """The automatic choice asks every backend: one that is broken must not break the calls of the others."""
    broken, best = add_backend("broken", rank=9.0), add_backend("best", rank=2.0)

    def fail(call):
        raise RuntimeError("a bug")

    monkeypatch.setattr(broken, method, fail)
    lpattn.low_precision_sdpa(*qkv())
    assert len(best.calls) == 1
    (reason,) = lpattn.explain(*qkv()).reasons["broken"]
    assert reason.code == f"{method}_failed"
    assert "a bug" in reason.message


@pytest.mark.parametrize("name", ["My_fp8", "fp8-mine", "8bit", "", "fp8 ", "fp8\n", "a|b", "ä", None, 8])
def test_names_are_lower_case_identifiers(make_backend, name):
    with pytest.raises(RegistrationError, match="must be a lower-case identifier such as 'my_fp8'; got"):
        lpattn.register_backend(make_backend(name))


def test_what_is_registered_must_be_a_backend(make_backend):
    with pytest.raises(RegistrationError, match="pass an instance, not the class"):
        lpattn.register_backend(type(make_backend()))
    with pytest.raises(RegistrationError, match=r"must be an instance of lpattn\.Backend; got None"):
        lpattn.register_backend(None)


def test_unregister_refuses_what_was_not_registered_here(install, plugin, make_backend):
    with pytest.raises(RegistrationError, match="bf16_reference was not registered in this process"):
        lpattn.unregister_backend("bf16_reference")
    with pytest.raises(RegistrationError, match="fp8_triton was not registered in this process"):
        lpattn.unregister_backend("fp8_triton")
    with pytest.raises(UnknownBackendError, match="no_such_thing"):
        lpattn.unregister_backend("no_such_thing")
    install(("x", "lpattn-x", plugin(make_backend("x"))))
    reg = Registry()
    with pytest.raises(RegistrationError, match=r"it is lpattn-x 1\.0.*LPATTN_DISABLE_PLUGINS keeps plugins out"):
        reg.unregister("x")
    assert reg.get("x") is not None


def test_every_change_raises_the_generation(add_backend):
    before = registry.generation
    add_backend()
    between = registry.generation
    lpattn.unregister_backend("fake")
    assert before < between < registry.generation


def test_unknown_names_are_answered_with_the_valid_ones(add_backend):
    add_backend("my_kernel")
    with pytest.raises(UnknownBackendError) as caught:
        registry.resolve("fp8_fa4")
    assert str(caught.value) == (
        "unknown backend 'fp8_fa4'; did you mean 'fp8_fa3'? "
        "known backends: bf16_reference, my_kernel, fp8_fa3, fp8_triton\n"
        "`lpattn info` shows where each comes from, and plugins that failed to load"
    )
    with pytest.raises(UnknownBackendError, match=r"^unknown backend 'zzz'; known backends: bf16_reference"):
        registry.resolve("zzz")


def test_a_backend_must_be_named_by_a_string():
    with pytest.raises(lpattn.InvalidArgumentError, match=r"an AttentionBackend, a string or None; got 8 \(int\)"):
        registry.resolve(8)
