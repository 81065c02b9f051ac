from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import lpattn
from lpattn import AttentionCall, Backend, Capabilities, HadamardMode, Reason
from lpattn.cli import main

Cli = Callable[..., "Result"]


class Result:
    """What one run of the command gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.delenv("LPATTN_BACKEND", raising=False)

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


class HalfBackend(Backend):
    """Attention in float16, on any device: low precision enough for tests, and quick."""

    name = "test_half"
    automatic = False
    capabilities = Capabilities(
        dtypes=frozenset({torch.float32, torch.bfloat16}),
        head_dims=frozenset({64, 128}),
        architectures=((8, 9), (9, 0)),
        hadamard=frozenset({HadamardMode.NONE, HadamardMode.QKV}),
    )

    def probe(self, device: torch.device) -> list[Reason]:
        return []

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> torch.Tensor:
        q, k, v = query.half(), key.half(), value.half()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=call.causal != "none")
        return out.to(query.dtype)


class AbsentBackend(HalfBackend):
    """One that no machine can run."""

    name = "test_absent"

    def probe(self, device: torch.device) -> list[Reason]:
        return [Reason("not_installed", "the wheel [test] is missing", "pip install test-wheel[all]")]


@pytest.fixture
def half() -> Iterator[str]:
    lpattn.register_backend(HalfBackend())
    yield HalfBackend.name
    lpattn.unregister_backend(HalfBackend.name)


@pytest.fixture
def absent() -> Iterator[str]:
    lpattn.register_backend(AbsentBackend())
    yield AbsentBackend.name
    lpattn.unregister_backend(AbsentBackend.name)
