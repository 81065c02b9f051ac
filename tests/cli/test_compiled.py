"""`lpattn explain --compiled` says what the report says of a compiled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

Cli = Any

MODELS = """
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, rotate):
        super().__init__()
        self.rotate = rotate

    def forward(self, x, cos):
        q = x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * cos if self.rotate else x
        return F.scaled_dot_product_attention(q, q, x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Attention(True), Attention(False)

    def forward(self, x, cos):
        return self.two(self.one(x, cos), cos)


def build():
    return Model(), {"x": torch.randn(1, 2, 6, 8), "cos": torch.randn(1, 1, 6, 8)}


def positional():
    return Model(), (torch.randn(1, 2, 6, 8), torch.randn(1, 1, 6, 8))


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8)

    def forward(self, x, cos):
        q, k = self.norm(x), self.norm(x) + 0.0 * x
        q, k = (t * cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * cos for t in (q, k))
        return F.scaled_dot_product_attention(q, k, x)


def normalized():
    return Normalized(), positional()[1]


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention(False)

    def forward(self, x, cos):
        return torch.cond(x.sum() > 0, lambda x: self.attention(x, x), lambda x: x.clone(), (x,))


def conditional():
    return Conditional(), positional()[1]


def nothing():
    return nn.Linear(2, 2)


def no_attention():
    return nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module of the folder that the command is called in."""
    name = f"models_of_{request.node.name.partition('[')[0]}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_it_says_per_layer_whether_rope_was_fused(cli: Cli, module: str) -> None:
    result = cli("explain", "--compiled", f"{module}:build", "--backend", "bf16_reference")
    one, two = result.out.splitlines()
    assert result.code == 0
    assert one == 'one: exact x1 (backend="bf16_reference" is exact attention) [model]; rope fused'
    assert two.startswith("two: exact x1")
    assert "; rope q: no rotation lies between rope_sdpa" in two


def test_it_says_whether_the_norm_was_fused(cli: Cli, module: str) -> None:
    result = cli("explain", "--compiled", f"{module}:normalized", "--backend", "bf16_reference")
    assert "; rope fused; norm fused in q; k: add" in result.out


def test_as_json(cli: Cli, module: str) -> None:
    result = cli("explain", "--compiled", f"{module}:positional", "--backend", "bf16_reference", "--json")
    layers = json.loads(result.out)["layers"]
    assert layers["one"]["rope"] == "fused"
    assert layers["one"]["norm"] is None
    assert layers["one"]["exact"] == {"requested": 1}
    assert layers["two"]["rope"] != "fused"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:build", "cannot be imported: No module named 'no_such_module'"),
        ("MODULE:no_such_function", "cannot be imported: module"),
        ("MODULE", "must be MODULE:FUNCTION"),
        ("MODULE:nothing", "must return (model, inputs)"),
    ],
)
def test_bad_usage_names_the_value(cli: Cli, module: str, name: str, message: str) -> None:
    result = cli("explain", "--compiled", name.replace("MODULE", module))
    assert result.code == 2
    assert message in result.err


def test_no_attention_gives_1(cli: Cli, module: str) -> None:
    with pytest.warns(UserWarning, match="none of its attention was intercepted"):
        result = cli("explain", "--compiled", f"{module}:no_attention")
    assert (result.code, result.out) == (1, "no attention call was intercepted\n")


def test_a_call_or_a_model(cli: Cli) -> None:
    assert cli("explain").code == 2
    assert cli("explain", "--shape", "1,2,3,8", "--compiled", "a:b").code == 2


@pytest.mark.parametrize(
    "option",
    [
        ("--kv-heads", "2"),
        ("--kv-len", "8"),
        ("--head-dim-v", "8"),
        ("--causal",),
        ("--mask", "none"),
        ("--dtype", "bfloat16"),
        ("--device", "cpu"),
        ("--arch", "sm_90"),
        ("--scale", "0"),
        ("--lse",),
    ],
)
def test_what_describes_a_call_does_not_go_with_a_model(cli: Cli, option: tuple[str, ...]) -> None:
    result = cli("explain", "--compiled", "a:b", *option)
    assert result.code == 2
    assert f"error: {option[0]}: only with --shape, which describes a call" in result.err


def test_all_of_them_are_named(cli: Cli) -> None:
    result = cli("explain", "--compiled", "a:b", "--causal", "--kv-heads", "2")
    assert "error: --kv-heads, --causal: only with --shape, which describes a call" in result.err


def test_a_model_that_does_not_compile(cli: Cli, module: str) -> None:
    """torch.cond refuses applied modules: docs/compile.md says so."""
    result = cli("explain", "--compiled", f"{module}:conditional")
    assert result.code == 1
    assert result.out == ""
    assert f"{module}:conditional: torch.compile cannot compile the model: " in result.err
    assert "torch.cond" in result.err
    assert "Traceback" not in result.err
