"""`lpattn info`: the text and the JSON document, also where plugins fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lpattn
from lpattn.registry import Registry

Cli = Any


def plant(folder: Path, name: str, source: str) -> None:
    """A plugin that is installed as far as importlib.metadata can tell: an entry point and a module of that name."""
    metadata = folder / f"{name}-1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (metadata / "entry_points.txt").write_text(f"[lpattn]\n{name} = {name}\n")
    (folder / f"{name}.py").write_text(source)


WORKING = """
import torch, lpattn
class Planted(lpattn.Backend):
    name = "planted_fp8"
    version = "7.1"
    capabilities = lpattn.Capabilities(dtypes=frozenset({torch.bfloat16}))
    def probe(self, device):
        return [lpattn.Reason("driver", "driver 1 is too old", "install driver 2")]
    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        raise NotImplementedError
@lpattn.hookimpl
def lpattn_backends():
    return [Planted()]
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which plugins can be planted; the command finds them in a registry of its own."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("LPATTN_DISABLE_PLUGINS", raising=False)
    monkeypatch.setattr("lpattn.cli.info.registry", Registry())
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("planted"):
            del sys.modules[name]


def find(items: list[dict[str, Any]], key: str, value: str) -> dict[str, Any]:
    (item,) = [item for item in items if item[key] == value]
    return item


def test_the_document_describes_the_machine(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPATTN_DISABLE_PLUGINS", "")
    result = cli("info", "--json")
    assert result.code == 0
    document = json.loads(result.out)
    assert (document["lpattn"], document["protocol_version"]) == (lpattn.__version__, 1)
    environment = document["environment"]
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["torch"] == torch.__version__
    assert environment["variables"] == {"LPATTN_BACKEND": None, "LPATTN_DISABLE_PLUGINS": ""}
    assert environment["problem"] is None
    assert document["devices"][-1]["name"] == "cpu"
    reference = find(document["backends"], "name", "bf16_reference")
    assert reference["devices"]["cpu"] == {"available": True, "reasons": []}
    assert (reference["exact"], reference["source"]["kind"], reference["protocol_version"]) == (True, "built-in", 1)


def test_it_says_of_each_device_what_available_backends_says(cli: Cli) -> None:
    document = json.loads(cli("info", "--json").out)
    for device in document["devices"]:
        for known in lpattn.available_backends(device["name"]):
            shown = find(document["backends"], "name", known.name)
            assert shown["devices"][device["name"]]["available"] == known.available
            assert [r["message"] for r in shown["devices"][device["name"]]["reasons"]] == [
                reason.message for reason in known.reasons
            ]
            assert (shown["version"], shown["automatic"]) == (known.version, known.automatic)


def test_the_document_describes_plugins(cli: Cli, plugins: Path) -> None:
    plant(plugins, "planted", WORKING)
    document = json.loads(cli("info", "--json").out)
    plugin = find(document["plugins"], "distribution", "planted")
    assert plugin.pop("load_seconds") > 0.0
    assert plugin == {
        "distribution": "planted",
        "version": "1.5",
        "entry_point": "planted",
        "protocol_version": 1,
        "backends": ["planted_fp8"],
        "conflicts": [],
        "failed": False,
    }
    backend = find(document["backends"], "name", "planted_fp8")
    assert (backend["version"], backend["automatic"], backend["exact"]) == ("7.1", True, False)
    assert backend["devices"]["cpu"]["reasons"] == [
        {"code": "driver", "message": "driver 1 is too old", "remedy": "install driver 2"}
    ]


def test_the_text_has_every_reason_and_its_remedy(cli: Cli, plugins: Path) -> None:
    plant(plugins, "planted", WORKING)
    text = cli("info").out
    (line,) = [line.split() for line in text.splitlines() if line.lstrip().startswith("planted_fp8 ")][:1]
    assert line == ["planted_fp8", "-", "yes", "7.1", "planted", "1.5"]
    devices = ", ".join(str(d) for d in lpattn.registry.local_devices())
    assert f"  planted_fp8 on {devices}: driver 1 is too old\n    install driver 2\n" in text
    assert "planted 1.5 (entry point planted): planted_fp8, loaded in " in text


def test_markup_in_a_reason_is_printed_as_it_is(cli: Cli, absent: str) -> None:
    text = cli("info").out
    assert f"  {absent} on " in text
    assert ": the wheel [test] is missing\n    pip install test-wheel[all]\n" in text


def test_a_plugin_that_fails_is_one_line(cli: Cli, plugins: Path) -> None:
    plant(plugins, "planted_broken", "raise OSError('libfoo.so: not found\\nsecond line')")
    result = cli("info")
    assert result.code == 0
    assert "  planted_broken 1.5 (entry point planted_broken): failed\n" in result.out
    assert "  planted_broken 1.5 (planted_broken): OSError: libfoo.so: not found\n" in result.out
    assert "lpattn info --verbose shows the tracebacks" in result.out
    assert "Traceback" not in result.out


def test_verbose_and_json_have_the_traceback(cli: Cli, plugins: Path) -> None:
    plant(plugins, "planted_broken", "raise OSError('libfoo.so: not found')")
    text = cli("info", "--verbose").out
    assert "    Traceback (most recent call last):" in text
    assert "    OSError: libfoo.so: not found" in text
    assert "--verbose" not in text
    document = json.loads(cli("info", "--json").out)
    plugin = find(document["plugins"], "distribution", "planted_broken")
    assert plugin["failed"]
    assert plugin["load_seconds"] > 0
    (failure,) = [f for f in document["failures"] if f["source"]["distribution"] == "planted_broken"]
    assert failure["message"] == "OSError: libfoo.so: not found"
    assert failure["traceback"].rstrip().endswith("OSError: libfoo.so: not found")


def test_a_plugin_of_another_protocol_version_is_reported(cli: Cli, plugins: Path) -> None:
    plant(plugins, "planted_old", WORKING.replace('"planted_fp8"', '"planted_fp8"\n    protocol_version = 99'))
    text = cli("info").out
    assert "planted_fp8 was written for protocol version 99; this lpattn speaks version 1" in text
    plugin = find(json.loads(cli("info", "--json").out)["plugins"], "distribution", "planted_old")
    assert (plugin["protocol_version"], plugin["backends"], plugin["failed"]) == (99, [], True)


def test_two_plugins_with_one_name_are_both_named_and_neither_has_it(cli: Cli, plugins: Path) -> None:
    for name in ("planted_one", "planted_two"):
        plant(plugins, name, WORKING)
    document = json.loads(cli("info", "--json").out)
    (conflict,) = document["conflicts"]
    assert conflict["name"] == "planted_fp8"
    assert [source["distribution"] for source in conflict["sources"]] == ["planted_one", "planted_two"]
    for name in ("planted_one", "planted_two"):
        plugin = find(document["plugins"], "distribution", name)
        assert (plugin["backends"], plugin["conflicts"], plugin["failed"]) == ([], ["planted_fp8"], True)
        assert plugin["load_seconds"] > 0
    message = "RegistrationError: backend name 'planted_fp8' is claimed by planted_one 1.5 and planted_two 1.5"
    failures = [f for f in document["failures"] if f["source"]["distribution"].startswith("planted")]
    assert {f["source"]["distribution"]: f["message"] for f in failures} == dict.fromkeys(
        ("planted_one", "planted_two"), message
    )
    backend = find(document["backends"], "name", "planted_fp8")
    assert backend["source"] is None
    assert {r["code"] for device in backend["devices"].values() for r in device["reasons"]} == {"conflict"}
    text = cli("info").out
    assert "Nobody has the name planted_fp8: claimed by planted_one 1.5 and planted_two 1.5." in text
    for name in ("planted_one", "planted_two"):
        assert f"{name} 1.5 (entry point {name}): planted_fp8, claimed by several plugins: see below" in text
        assert f"  {name} 1.5 ({name}): {message}\n" in text


def test_a_plugin_that_is_kept_out_is_listed(cli: Cli, plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(plugins, "planted", WORKING)
    monkeypatch.setenv("LPATTN_DISABLE_PLUGINS", "planted")
    text = cli("info").out
    assert "LPATTN_DISABLE_PLUGINS=planted\n" in text
    assert "planted 1.5 (entry point planted): no backends (LPATTN_DISABLE_PLUGINS=planted)" in text
    assert "planted_fp8" not in text


def test_an_unknown_name_in_the_environment_is_shown_and_no_crash(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPATTN_BACKEND", "fp8_fa33")
    result = cli("info")
    assert result.code == 0
    assert "\nLPATTN_BACKEND=fp8_fa33\n" in result.out
    assert "\nenvironment variable LPATTN_BACKEND='fp8_fa33': unknown backend" in result.out


def test_devices_with_the_same_reasons_share_a_line() -> None:
    from lpattn.cli.info import _grouped

    def answer(*messages: str) -> dict[str, Any]:
        return {"available": not messages, "reasons": [{"message": m} for m in messages]}

    devices = {"cuda:0": answer("old"), "cuda:1": answer(), "cuda:2": answer("old"), "cpu": answer("cpu")}
    assert _grouped(devices) == [("cuda:0, cuda:2", [{"message": "old"}]), ("cpu", [{"message": "cpu"}])]
