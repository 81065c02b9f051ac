"""How the pass gets into inductor and out again: nobody's configuration changes, and caches tell graphs apart."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass

import lpattn
from lpattn.compile import install
from lpattn.compile.install import Wrapped, rope_pass


class Attention(nn.Module):
    """Half-split RoPE, then attention, as one function of x and tables."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        q, k = (t * cos + torch.cat((-t[..., 8:], t[..., :8]), -1) * sin for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v)


@pytest.fixture
def model():
    model = Attention().eval()
    model.qkv.weight.mul_(6)
    return model


@pytest.fixture
def inputs():
    angle = torch.randn(1, 1, 12, 8).repeat(1, 1, 1, 2)
    return torch.randn(2, 12, 32), angle.cos(), angle.sin()


class Users(CustomGraphPass):
    """A pass that a user has set; with an identity or without."""

    def __init__(self, uuid="mine"):
        self.graphs, self._uuid = [], uuid

    def __call__(self, graph):
        self.graphs.append(graph)

    def uuid(self):
        return self._uuid


@pytest.fixture
def slot():
    """Puts a value where inductor looks for passes, and what was there back."""
    before = inductor_config.post_grad_custom_pre_pass

    def put(value):
        inductor_config.post_grad_custom_pre_pass = value

    yield put
    put(before)


def present():
    return inductor_config.post_grad_custom_pre_pass


def test_nothing_stays_in_the_configuration(model, inputs, compiled, spy):
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    assert present() is None
    compiled(model)(*inputs)
    assert len(spy.fused) == 1
    assert present() is None
    lpattn.remove_low_precision_attention(model)
    assert present() is None


def test_nor_after_a_compilation_that_failed(model, inputs):
    seen = []

    def failing(graph, example_inputs):
        seen.append(present())
        raise RuntimeError("no code today")

    lpattn.apply_low_precision_attention(model, "bf16_reference")
    with pytest.raises(Exception, match="no code today"):
        torch.compile(model, backend=failing)(*inputs)
    assert seen == [rope_pass]
    assert present() is None


@pytest.mark.parametrize("strict", [False, True])
# The settings in force are kept per thread while a layer runs, and put back.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects happened:UserWarning")
def test_nor_after_an_export(strict, model, inputs):
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    exported = torch.export.export(model, inputs, strict=strict)
    assert "lpattn.sdpa" in str(exported.graph)
    assert present() is None


@pytest.mark.parametrize("form", ["object", "function", "list", "tuple", "list of one", "empty list"])
def test_the_users_pass_keeps_working(form, model, inputs, compiled, spy, slot):
    if form not in ("object", "function") and not install._TAKES_SEVERAL:
        pytest.skip("this torch takes one pass")
    mine, other = Users(), Users("other")
    value = {
        "object": mine,
        "function": lambda graph: mine(graph),
        "list": [mine, other],
        "tuple": (mine, other),
        "list of one": [mine],
        "empty list": [],
    }[form]
    slot(value)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    compiled(model)(*inputs)
    assert len(mine.graphs) == (form != "empty list")
    assert len(other.graphs) == (form in ("list", "tuple"))
    assert len(spy.fused) == 1
    assert present() is value


def test_a_pass_that_is_set_between_applying_and_compiling(model, inputs, compiled, spy, slot):
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    mine = Users()
    slot(mine)
    compiled(model)(*inputs)
    assert (len(mine.graphs), len(spy.fused)) == (1, 1)
    assert present() is mine


def test_where_one_object_fits(slot, monkeypatch):
    """As in torch 2.11: both passes in one object, with both identities or none."""
    monkeypatch.setattr(install, "_TAKES_SEVERAL", False)
    mine = Users()
    slot(mine)
    install.install()
    both = present()
    assert isinstance(both, Wrapped)
    assert both.uuid() == ("mine", rope_pass.uuid())
    graph = torch.fx.Graph()
    both(graph)
    assert mine.graphs == [graph]
    install.install()
    assert present() is both
    install.uninstall()
    assert present() is mine
    for without in (Users(None), lambda graph: None):
        assert Wrapped(without).uuid() is None


def test_what_somebody_has_put_over_it_stays(slot):
    install.install()
    theirs = Users()
    slot(theirs)
    install.uninstall()
    assert present() is theirs


def test_inert_without_our_operators():
    graph = torch.fx.symbolic_trace(lambda x: x.sin() + 1).graph
    before = str(graph)
    rope_pass(graph)
    assert str(graph) == before


def test_the_identity_depends_on_what_the_result_depends_on(monkeypatch):
    class Other(lpattn.Backend):
        name = "identity_test"
        capabilities = lpattn.Capabilities(dtypes=frozenset({torch.float32}))

        def probe(self, device):
            return []

        def attention(self, *args, **kwargs):
            raise NotImplementedError

    found = [rope_pass.uuid()]
    assert rope_pass.uuid() == found[0]
    lpattn.register_backend(Other())
    found.append(rope_pass.uuid())
    for has in ("rope", "norm"):
        monkeypatch.setattr(Other, "capabilities", dataclasses.replace(Other.capabilities, **{has: True}))
        found.append(rope_pass.uuid())
    lpattn.unregister_backend("identity_test")
    monkeypatch.setenv("LPATTN_BACKEND", "bf16_reference")
    found.append(rope_pass.uuid())
    monkeypatch.setattr(install, "_sources", lambda: "changed")
    found.append(rope_pass.uuid())
    assert len(set(found)) == 6


def test_one_line_per_graph(model, inputs, compiled, caplog, capsys):
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    with caplog.at_level(logging.DEBUG, logger="lpattn.compile"):
        compiled(model)(*inputs)
    lines = [record.message for record in caplog.records if record.name.startswith("lpattn.compile")]
    assert lines == ["RoPE fused into 1 of 1 attention calls, a norm into 0"]
    assert capsys.readouterr() == ("", "")


def test_a_defect_of_the_proof_does_not_break_compilation(model, inputs, compiled, spy, reasons, monkeypatch, caplog):
    want = model(*inputs)
    monkeypatch.setattr("lpattn.compile.graph._prove", lambda *_: 1 / 0)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    torch.testing.assert_close(compiled(model)(*inputs), want)
    assert reasons(model) == {"": "the proof failed: ZeroDivisionError: division by zero"}
    assert "the proof failed" in caplog.text


# Which calls are worth it


def test_a_layer_that_is_kept_exact_is_left_to_the_compiler(model, inputs, compiled, spy, reasons):
    lpattn.apply_low_precision_attention(model, "bf16_reference", layers={"*": "exact"})
    compiled(model)(*inputs)
    assert (len(spy.fused), spy.plain) == (0, 1)
    assert reasons(model) == {"": "the call runs exactly: a layer rule keeps this layer exact"}


def test_what_automatic_runs_exactly_is_left_to_the_compiler(model, inputs, compiled, spy, reasons):
    lpattn.apply_low_precision_attention(model)
    with pytest.warns(lpattn.LpattnWarning):
        compiled(model)(*inputs)
    assert (len(spy.fused), spy.plain) == (0, 1)
    assert reasons(model)[""].startswith("the call runs exactly: no low-precision backend can run on cpu")


def test_a_backend_without_a_fused_rotation(model, inputs, compiled, reasons):
    class Plain(lpattn.Backend):
        name = "plain_test"
        automatic = False
        capabilities = lpattn.Capabilities(dtypes=frozenset({torch.float32}))

        def probe(self, device):
            return []

        def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
            return F.scaled_dot_product_attention(query, key, value)

    lpattn.register_backend(Plain())
    want = model(*inputs)
    lpattn.apply_low_precision_attention(model, "plain_test")
    torch.testing.assert_close(compiled(model)(*inputs), want)
    assert reasons(model) == {"": "plain_test has no fused rotation"}


def test_another_compiler_says_that_nobody_looked(model, inputs, reasons):
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    torch.compile(model, backend="aot_eager")(*inputs)
    assert reasons(model)[""].startswith("not looked for")


# Inductor itself, and its caches

PROGRAM = """
import json, sys, torch
import torch._inductor.config as inductor_config
sys.path.insert(0, {folder!r})
from torch._dynamo.utils import counters
import lpattn
from test_install import Attention, Users

torch.manual_seed(0)
model = Attention().eval()
model.qkv.weight.data.mul_(6)
angle = torch.randn(1, 1, 12, 8).repeat(1, 1, 1, 2)
inputs = torch.randn(2, 12, 32), angle.cos(), angle.sin()
found = []
with torch.no_grad():
    want = model(*inputs)
    for users, rules in json.loads(sys.argv[1]):
        inductor_config.post_grad_custom_pre_pass = users and Users(None if users == "anonymous" else users)
        torch._dynamo.reset()
        counters.clear()
        lpattn.apply_low_precision_attention(model, "bf16_reference", layers=rules)
        got = torch.compile(model, fullgraph=True)(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        (layer,) = lpattn.attention_report(model).values()
        hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        found.append([layer.rope, hits > 0])
print(json.dumps(found))
"""

KEPT = "the call runs exactly: a layer rule keeps this layer exact"


@pytest.mark.slow
def test_caches(tmp_path):
    """Cold, warm in a second process, and with everything changed that the result may depend on."""

    def in_new_process(scenarios, **environment):
        own = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
        program = PROGRAM.format(folder=os.path.dirname(__file__))
        command = [sys.executable, "-c", program, json.dumps(scenarios)]
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [tuple(found) for found in json.loads(done.stdout.splitlines()[-1])]

    # What the user has set as a pass, and layer rules.
    scenarios = [(None, None), (None, {"*": "exact"}), ("users", None), ("anonymous", None)]
    ropes = ["fused", KEPT, "fused", "fused"]
    assert in_new_process(scenarios) == [(rope, False) for rope in ropes]
    # A pass without an identity switches caches off, as it does without lpattn.
    assert in_new_process(scenarios) == list(zip(ropes, [True] * 3 + [False], strict=True))
    assert in_new_process(scenarios[:1], LPATTN_BACKEND="bf16_reference") == [("fused", False)]
