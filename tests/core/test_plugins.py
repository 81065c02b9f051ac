"""Finding backends: plugins are loaded lazily and each apart, and what fails is recorded and harms nothing else."""

import threading
import time
import types

import pytest
import torch

import lpattn
from lpattn import Reason, RegistrationError
from lpattn.registry import Registry, Source, registry

CPU = torch.device("cpu")
BUILT_IN = {"bf16_reference", "fp8_fa3", "fp8_triton", "fp8_triton_fast", "int8_triton"}


def only_failure(reg):
    (failure,) = reg.failures()
    return failure


def raiser(error):
    def load():
        raise error

    return load


# Loading


def test_nothing_is_loaded_before_the_first_question(install, plugin, make_backend):
    loaded = []

    def load():
        loaded.append("x")
        return plugin(make_backend("late"))

    install(("x", "lpattn-x", load))
    reg = Registry()
    assert not loaded
    assert reg.get("late").name == "late"
    reg.backends(), reg.names(), reg.failures()
    assert loaded == ["x"]


def test_a_plugin_says_where_it_comes_from(install, plugin, make_backend):
    install(("some_entry", "lpattn-x", plugin(make_backend("one"), make_backend("two"))))
    reg = Registry()
    assert set(reg.backends()) == BUILT_IN | {"one", "two"}
    source = reg.source("two")
    assert (source.kind, source.distribution, source.version) == ("plugin", "lpattn-x", "1.0")
    assert source.entry_point == "some_entry"
    assert str(source) == "lpattn-x 1.0"
    assert str(reg.source("bf16_reference")) == "built-in"
    assert source.load_seconds > 0
    assert reg.failures() == []


def test_built_in_backends_come_first(install, plugin, make_backend):
    install(("a", "lpattn-a", plugin(make_backend("aaa"))))
    assert list(Registry().backends()) == [
        "bf16_reference",
        "fp8_fa3",
        "fp8_triton",
        "fp8_triton_fast",
        "int8_triton",
        "aaa",
    ]


def with_unknown_hook(plugin, make_backend):
    whole = plugin(make_backend("broken"))
    whole.lpattn_kernels = lpattn.hookimpl(lambda: [])
    return whole


def with_attribute(name, value):
    def load(plugin, make_backend):
        backend = make_backend("broken")
        setattr(backend, name, value)
        return plugin(backend)

    return load


# name: (what the entry point loads, part of the recorded message)
BROKEN = {
    "crashes_on_import": (lambda p, b: raiser(ImportError("no cuda_13")), "ImportError: no cuda_13"),
    "hook_raises": (lambda p, b: p(error=KeyError("flags")), "KeyError: 'flags'"),
    "unknown_hook": (with_unknown_hook, "unknown hook 'lpattn_kernels'"),
    "no_hook": (lambda p, b: types.SimpleNamespace(), "bad_entry implements no lpattn_backends hook"),
    "hook_returns_none": (
        lambda p, b: types.SimpleNamespace(lpattn_backends=lpattn.hookimpl(lambda: None)),
        "'NoneType' object is not iterable",
    ),
    "protocol": (
        with_attribute("protocol_version", 7),
        "broken was written for protocol version 7; this lpattn speaks version 1: install a version of it that fits",
    ),
    "capabilities": (with_attribute("capabilities", {"gqa": True}), "broken.capabilities must be an lpattn.Capab"),
    "bad_name": (
        lambda p, b: p(b("My-FP8")),
        "FakeBackend: a backend's name must be a lower-case identifier such as 'my_fp8'; got 'My-FP8'",
    ),
    "class": (lambda p, b: p(type(b())), "pass an instance, not the class"),
    "no_backend": (lambda p, b: p("broken"), "a backend must be an instance of lpattn.Backend; got 'broken'"),
    "duplicate": (
        lambda p, b: p(b("bf16_reference")),
        "backend name 'bf16_reference' is reserved by lpattn; choose another name",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_recorded_and_harms_nothing_else(install, plugin, make_backend, kind):
    make, message = BROKEN[kind]
    load = make(plugin, make_backend)
    before, after = plugin(make_backend("before")), plugin(make_backend("zafter"))
    install(("a", "lpattn-before", before), ("bad_entry", "lpattn-bad", load), ("z", "lpattn-after", after))
    reg = Registry()
    assert set(reg.backends()) == BUILT_IN | {"before", "zafter"}
    failure = only_failure(reg)
    assert message in failure.message
    assert (failure.source.distribution, failure.source.entry_point) == ("lpattn-bad", "bad_entry")
    assert failure.traceback.startswith("Traceback (most recent call last):")
    assert failure.message in failure.traceback
    assert reg.get("bf16_reference").exact


def test_the_traceback_leads_to_the_plugin(install, plugin):
    def load():
        return a_line_in_the_plugin()

    def a_line_in_the_plugin():
        raise OSError("libcuda.so.1")

    install(("x", "lpattn-x", load))
    assert "a_line_in_the_plugin" in only_failure(Registry()).traceback


def test_one_bad_backend_of_a_plugin_leaves_its_others(install, plugin, make_backend):
    install(("x", "lpattn-x", plugin(make_backend("good"), make_backend("Bad"), make_backend("fine"))))
    reg = Registry()
    assert set(reg.backends()) == BUILT_IN | {"good", "fine"}
    assert "'Bad'" in only_failure(reg).message


@pytest.mark.parametrize("attribute", ["name", "capabilities", "protocol_version"])
def test_a_backend_whose_data_raises_is_recorded(install, plugin, make_backend, attribute):
    def broken(self):
        raise RuntimeError("needs a device")

    backend = make_backend("broken")
    backend.__class__ = type("Broken", (type(backend),), {attribute: property(broken)})
    install(("a", "lpattn-bad", plugin(backend)), ("z", "lpattn-good", plugin(make_backend("good"))))
    reg = Registry()
    assert set(reg.backends()) == BUILT_IN | {"good"}
    assert "needs a device" in only_failure(reg).message


def test_a_plugin_that_exits_on_import_is_recorded(install, plugin, make_backend):
    install(("a", "lpattn-bad", raiser(SystemExit(2))), ("z", "lpattn-good", plugin(make_backend("good"))))
    reg = Registry()
    try:
        reg.backends()
    except SystemExit:
        pytest.fail("SystemExit came through")
    assert "good" in reg.backends()
    assert "SystemExit" in only_failure(reg).message


def test_loading_that_was_interrupted_starts_again(install, plugin, make_backend):
    interrupts = iter([KeyboardInterrupt()])

    def load():
        if error := next(interrupts, None):
            raise error
        return plugin(make_backend("a"))

    install(("a", "lpattn-a", load), ("z", "lpattn-z", plugin(make_backend("z"))))
    reg = Registry()
    with pytest.raises(KeyboardInterrupt):
        reg.backends()
    assert set(reg.backends()) == BUILT_IN | {"a", "z"}


def test_two_distributions_may_use_one_entry_point_name(install, plugin, make_backend):
    install(("fp8", "lpattn-a", plugin(make_backend("a"))), ("fp8", "lpattn-b", plugin(make_backend("b"))))
    reg = Registry()
    assert set(reg.backends()) == BUILT_IN | {"a", "b"}
    assert reg.failures() == []


# Names that two want


@pytest.fixture
def conflict(install, plugin, make_backend):
    install(
        ("a", "lpattn-a", plugin(make_backend("shared"), make_backend("own"))),
        ("b", "lpattn-b", plugin(make_backend("shared"))),
    )
    return Registry()


def test_of_two_plugins_with_one_name_neither_wins(conflict):
    assert set(conflict.backends()) == BUILT_IN | {"own"}
    assert conflict.get("shared") is None
    assert "shared" in conflict.names()
    message = "RegistrationError: backend name 'shared' is claimed by lpattn-a 1.0 and lpattn-b 1.0"
    assert {f.source.distribution: f.message for f in conflict.failures()} == {"lpattn-a": message, "lpattn-b": message}
    assert conflict.probe("shared", CPU) == (
        Reason(
            "conflict",
            "it is claimed by lpattn-a 1.0 and lpattn-b 1.0",
            "uninstall all but one, or name them in LPATTN_DISABLE_PLUGINS",
        ),
    )


def test_a_third_claim_is_named_as_well(install, plugin, make_backend):
    install(*((name, f"lpattn-{name}", plugin(make_backend("shared"))) for name in "abc"))
    (reason,) = Registry().absence("shared")
    assert "lpattn-a 1.0 and lpattn-b 1.0 and lpattn-c 1.0" in reason.message


def test_a_conflict_is_a_failure_of_every_plugin_that_claims_the_name(install, plugin, make_backend):
    install(
        *((name, f"lpattn-{name}", plugin(make_backend("shared"))) for name in "abc"),
        ("d", "lpattn-d", plugin(make_backend("own"))),
        ("e", "lpattn-e", raiser(ImportError("no cuda_13"))),
    )
    failures = {f.source.distribution: f for f in Registry().failures()}
    assert set(failures) == {"lpattn-a", "lpattn-b", "lpattn-c", "lpattn-e"}
    for name in "abc":
        failure = failures[f"lpattn-{name}"]
        assert "is claimed by lpattn-a 1.0 and lpattn-b 1.0 and lpattn-c 1.0" in failure.message
        assert (failure.source.entry_point, failure.traceback) == (name, "")


def test_a_plugin_that_claims_a_name_twice_fails_once(install, plugin, make_backend):
    install(("a", "lpattn-a", plugin(make_backend("twice"), make_backend("twice"))))
    reg = Registry()
    assert reg.get("twice") is None
    message = "backend name 'twice' is claimed by lpattn-a 1.0 (2 times)"
    assert only_failure(reg).message == f"RegistrationError: {message}"
    with pytest.raises(RegistrationError, match=r"\(it is claimed by lpattn-a 1\.0 \(2 times\)\), so it cannot be"):
        reg.unregister("twice")


def test_using_a_name_in_conflict_is_an_error_that_names_both(conflict, monkeypatch, qkv):
    assert "shared" in conflict.names()
    monkeypatch.setattr(registry, "_conflicts", conflict._conflicts)
    q, k, v = qkv()
    with pytest.raises(lpattn.UnsupportedCallError, match=r"shared +it is claimed by lpattn-a 1\.0 and lpattn-b 1\.0"):
        lpattn.low_precision_sdpa(q, k, v, backend="shared")
    with pytest.raises(lpattn.BackendUnavailableError, match=r"it is claimed by lpattn-a 1\.0 and lpattn-b 1\.0"):
        lpattn.low_precision_attention("shared")


def test_disabling_one_of_two_ends_the_conflict(install, plugin, make_backend, monkeypatch):
    monkeypatch.setenv("LPATTN_DISABLE_PLUGINS", "lpattn-b")
    install(
        ("a", "lpattn-a", plugin(make_backend("shared"))),
        ("b", "lpattn-b", plugin(make_backend("shared"))),
    )
    assert str(Registry().source("shared")) == "lpattn-a 1.0"


def test_a_refused_registration_leaves_the_conflict_as_it_was(conflict, make_backend):
    before = conflict.absence("shared")
    with pytest.raises(RegistrationError, match="shared"):
        conflict.register(make_backend("shared"), Source("registered"))
    assert conflict.absence("shared") == before


# Keeping plugins out


@pytest.mark.parametrize("value", ["1", "true", "ALL", " 1 "])
def test_all_plugins_can_be_kept_out(install, plugin, make_backend, monkeypatch, value):
    monkeypatch.setenv("LPATTN_DISABLE_PLUGINS", value)
    install(("x", "lpattn-x", raiser(AssertionError("was loaded"))))
    reg = Registry()
    assert set(reg.backends()) == BUILT_IN
    assert reg.failures() == []


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_plugins_are_let_in_by_default(install, plugin, make_backend, monkeypatch, value):
    monkeypatch.setenv("LPATTN_DISABLE_PLUGINS", value)
    install(("x", "lpattn-x", plugin(make_backend("x"))))
    reg = Registry()
    assert set(reg.backends()) == BUILT_IN | {"x"}
    assert reg.failures() == []


@pytest.mark.parametrize("value", ["x_entry,lpattn-y", " lpattn-x , y_entry ", "lpattn-y,,x_entry"])
def test_plugins_are_kept_out_by_distribution_or_entry_point(install, plugin, make_backend, monkeypatch, value):
    monkeypatch.setenv("LPATTN_DISABLE_PLUGINS", value)
    install(
        ("x_entry", "lpattn-x", raiser(AssertionError("x was loaded"))),
        ("y_entry", "lpattn-y", raiser(AssertionError("y was loaded"))),
        ("z_entry", "lpattn-z", plugin(make_backend("z"))),
    )
    reg = Registry()
    assert set(reg.backends()) == BUILT_IN | {"z"}
    assert reg.failures() == []


def test_a_name_that_keeps_nothing_out_is_recorded(install, plugin, make_backend, monkeypatch):
    monkeypatch.setenv("LPATTN_DISABLE_PLUGINS", "lpattn_x,x")
    install(("x", "lpattn-x", plugin(make_backend("x"))), ("y", "lpattn-y", plugin(make_backend("y"))))
    reg = Registry()
    assert set(reg.backends()) == BUILT_IN | {"y"}
    message = "LPATTN_DISABLE_PLUGINS names lpattn_x, but no such plugin is installed"
    assert only_failure(reg).message == message


# Asking while it loads


def test_a_plugin_may_ask_the_registry_while_it_loads(install, plugin, make_backend):
    seen = []

    def load():
        seen.extend(reg.backends())
        reg.resolve("bf16_reference")
        return plugin(make_backend("curious"))

    install(("a", "lpattn-a", plugin(make_backend("first"))), ("b", "lpattn-b", load))
    reg = Registry()
    assert set(reg.backends()) == BUILT_IN | {"first", "curious"}
    assert set(seen) == BUILT_IN | {"first"}
    assert reg.failures() == []


def test_threads_that_ask_at_once_see_the_full_registry(install, plugin, make_backend):
    loads = []

    def slow(name):
        def load():
            loads.append(name)
            time.sleep(0.02)
            return plugin(make_backend(name))

        return load

    install(*((name, f"lpattn-{name}", slow(name)) for name in "abcd"))
    reg = Registry()
    barrier = threading.Barrier(16)
    answers = []

    def ask(index):
        barrier.wait()
        questions = (
            lambda: set(reg.backends()) >= set("abcd"),
            lambda: reg.get("d") is not None,
            lambda: set(reg.names()) >= set("abcd"),
            lambda: reg.absence("d") == (),
        )
        answers.append(questions[index % len(questions)]())

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 16
    assert sorted(loads) == list("abcd")
