"""Every planted bug is found, by the check that is there for it and in its words; a correct backend fails nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lpattn
from lpattn.backends.reference import ReferenceBackend
from lpattn.testing import CHECKS, BackendTests, Status, run_check, run_checks, suite_for
from lpattn.testing.builtin import ReferenceTests
from lpattn.testing.subject import Subject

_SPEC = importlib.util.spec_from_file_location("lpattn_planted_bugs", Path(__file__).with_name("planted_bugs.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
planted = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = planted
_SPEC.loader.exec_module(planted)

# These start processes or compile, and are tried below on one correct backend each.
SLOW = {"import_is_pure", "fakes", "strict_compile"}


@pytest.fixture
def register() -> Iterator[object]:
    """Register backends; the fixture clean_slate removes them."""

    def register(backend: lpattn.Backend) -> str:
        lpattn.register_backend(backend)
        return backend.name

    return register


@pytest.mark.parametrize("name", planted.BUGS)
def test_the_bug_is_found(register, name: str) -> None:
    bug = planted.BUGS[name]
    outcome = run_check(Subject(register(bug.backend())), bug.check)
    assert outcome.status is Status.FAILED, f"{bug.check} found nothing: {outcome.detail}"
    assert bug.says in outcome.detail


@pytest.mark.parametrize("statement", ["torch.cuda.is_available()", "torch.cuda.device_count()", "print('hello')"])
def test_work_at_import_is_found(register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str) -> None:
    source = Path(planted.__file__).read_text(encoding="utf-8")
    (tmp_path / "planted_at_import.py").write_text(f"{source}\n{statement}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("planted_at_import")
    outcome = run_check(Subject(register(module.Honest())), "import_is_pure")
    monkeypatch.delitem(sys.modules, "planted_at_import")
    assert outcome.status is Status.FAILED
    assert ("prints" if "print" in statement else "calls CUDA, which belongs into probe()") in outcome.detail


# Checks that no bug of planted_bugs.py is for: what they find as well.
ALSO = {"refusals_reach_the_user": "supports_forgets_the_data", "fakes": "key_is_smoothed_in_place"}


@pytest.mark.parametrize("check", ALSO)
def test_the_bug_is_found_by_this_check_as_well(register, check: str) -> None:
    outcome = run_check(Subject(register(planted.BUGS[ALSO[check]].backend())), check)
    assert outcome.status is Status.FAILED


def test_every_check_has_a_bug_that_it_finds() -> None:
    found = {bug.check for bug in planted.BUGS.values()} | {"import_is_pure", *ALSO}
    # lpattn's own dispatcher answers empty calls; tests/gpu plants bugs for the other two.
    assert set(CHECKS) - found == {"empty_calls", "other_streams", "cuda_graphs"}


def failures(suite: BackendTests, skip: set[str]) -> list[tuple[str, str]]:
    return [(o.check, o.detail) for o in run_checks(suite, skip=tuple(skip)) if o.status.is_failure]


def test_a_correct_backend_fails_nothing(register) -> None:
    assert failures(suite_for(register(planted.Honest())), {"import_is_pure"}) == []


LESS = {
    "no_gqa": {"gqa": False},
    "few_lanes": {"head_dims": frozenset({4, 8})},
    "one_lane": {"head_dims": frozenset({1})},
    "no_masks": {"masks": frozenset({lpattn.MaskKind.NONE}), "key_padding": True},
}


@pytest.mark.parametrize("less", LESS.values(), ids=LESS)
def test_a_correct_backend_that_declares_less_fails_nothing(register, less) -> None:
    class Less(ReferenceBackend):
        name = "declares_less"
        capabilities = dataclasses.replace(ReferenceBackend.capabilities, **less)

    assert failures(suite_for(register(Less())), SLOW) == []


@pytest.mark.parametrize("name", ["fa3_per_head", "per_block_f16"])
def test_other_correct_recipes_fail_nothing(register, name: str) -> None:
    emulated = pytest.importorskip("lpattn_emulated", reason="the plugin lpattn-emulated is not on the path")
    from lpattn.quantize import RECIPES

    values = {"name": f"emulated_{name}", "recipe": RECIPES[name]}
    backend = type("Emulated", (emulated.EmulatedBackend,), values)()
    assert failures(suite_for(register(backend)), SLOW) == []


class TestReference(ReferenceTests):
    """The built-in reference, by the class that plugin authors use."""
