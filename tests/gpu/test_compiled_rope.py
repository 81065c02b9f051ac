"""RoPE and the norm fused into the quantization by inductor: numbers, CUDA graphs, lengths, a model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lpattn
from lpattn.backends.fa3 import FA3Backend
from lpattn.norm import normalize_both

# Inductor and the model libraries warn about all kinds of things; lpattn's own warnings stay errors.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::lpattn.LpattnWarning"),
]


class Attention(nn.Module):
    """RoPE as Llama (half-split, in bfloat16, grouped heads), FLUX (interleaved, in float32, heads normalized) or Wan
    (the same, all heads normalized at a time) has it.
    """

    def __init__(self, like: str) -> None:
        super().__init__()
        self.like = like
        self.norm = {"flux": nn.RMSNorm(128), "wan": nn.RMSNorm(8 * 128)}.get(like, nn.Identity())
        if isinstance(self.norm, nn.RMSNorm):
            # The same for all of them: one is compared with another.
            nn.init.normal_(self.norm.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(0))

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if self.like == "wan":
            x = self.norm(x.transpose(1, 2).flatten(2)).unflatten(2, (8, 128)).transpose(1, 2)
        else:
            x = self.norm(x)
        if self.like != "llama":
            a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
            return (x.float() * cos + torch.stack((-b, a), -1).flatten(3).float() * sin).to(x.dtype)
        a, b = x.chunk(2, -1)
        return x * cos.to(x.dtype) + torch.cat((-b, a), -1) * sin.to(x.dtype)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.like == "llama", enable_gqa=True)


def make(like: str, length: int) -> tuple[torch.Tensor, ...]:
    kv_heads = 2 if like == "llama" else 8
    qkv = [torch.randn(1, length, h, 128, device="cuda", dtype=torch.bfloat16) for h in (8, kv_heads, kv_heads)]
    angle = torch.arange(length, device="cuda")[:, None] * 10000.0 ** -(torch.arange(64, device="cuda") / 64)
    full = angle.repeat_interleave(2, -1) if like != "llama" else torch.cat((angle, angle), -1)
    return (*qkv, full.cos(), full.sin())


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> object:
    # Tests take short rotations, which fp8_fa3 would leave to the compiler.
    monkeypatch.setattr(FA3Backend, "capabilities", dataclasses.replace(FA3Backend.capabilities, rope_from=0))
    torch._dynamo.reset()
    with torch.inference_mode():
        yield
    torch._dynamo.reset()


@pytest.fixture(params=["llama", "flux", "wan"])
def like(request: pytest.FixtureRequest) -> str:
    return str(request.param)


BACKENDS = {"llama": "fp8_fa3", "flux": "fp8_fa3", "wan": "fp8_triton"}


def applied(like: str) -> Attention:
    model = Attention(like).to("cuda", torch.bfloat16).eval()
    lpattn.apply_low_precision_attention(model, BACKENDS[like])
    return model


def rope(model: nn.Module) -> str | None:
    (layer,) = lpattn.attention_report(model).values()
    (backend,) = layer.low
    assert backend in BACKENDS.values()
    return layer.rope


def norm(model: nn.Module) -> str | None:
    (layer,) = lpattn.attention_report(model).values()
    return layer.norm


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_fused_is_as_exact_as_not_fused(fa3, tools, like, mode) -> None:
    inputs = make(like, 1000)
    exact = Attention(like).to("cuda")(*(x.float() for x in inputs[:3]), *inputs[3:])
    model = applied(like)
    apart = tools.sqnr(exact, model(*inputs))
    assert rope(model) is None  # eager mode has no fusion
    under = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(4):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        got = under(*inputs).clone()
    assert rope(model) == "fused"
    assert norm(model) == ("fused" if like != "llama" else None)
    assert apart > 18
    assert tools.sqnr(exact, got) > apart - 1.0


def test_a_planted_bug_would_show(fa3, tools, like) -> None:
    """With the rotation the other way round, what the test above measures falls far below its limit."""
    inputs = make(like, 1000)
    exact = Attention(like).to("cuda", torch.bfloat16)(*inputs)
    turned = torch.compile(applied(like), fullgraph=True)(*inputs[:4], -inputs[4])
    assert tools.sqnr(exact, turned) < 12


@pytest.mark.parametrize("backend", ["fp8_fa3", "fp8_triton", "int8_triton"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [128, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_the_quantization_is_as_exact_as_one_in_front_of_it(
    fa3, tools, backend, interleaved, rotary_dim, dtype
) -> None:
    torch.manual_seed(0)
    size = torch.logspace(-1, 1, 700, device="cuda")[:, None, None]
    q, k, v = ((torch.randn(2, 700, h, 128, device="cuda") * size).to(dtype) for h in (8, 2, 2))
    angle = torch.randn(1, 700, 1, rotary_dim, device="cuda")
    weights = (1 + torch.rand(2, 128, device="cuda")).to(dtype).unbind()
    both = lpattn.Norm(1e-6, 0.01, *weights)
    options = {"interleaved": interleaved, "enable_gqa": True}
    tables = (angle.cos(), angle.sin())
    want = lpattn.low_precision_rope_sdpa(
        *(x.float() for x in (q, k, v)), *tables, norm=both, backend="bf16_reference", **options
    )
    of_q, of_k = normalize_both(q, k, both)
    apart = lpattn.low_precision_rope_sdpa(of_q, of_k, v, *tables, backend=backend, **options)
    got = lpattn.low_precision_rope_sdpa(q, k, v, *tables, norm=both, backend=backend, **options)
    assert tools.sqnr(want, apart) > 18
    assert tools.sqnr(want, got) > tools.sqnr(want, apart) - 0.5
    other = lpattn.Norm(1e-6, 0.01, weights[0].flip(0), weights[1])
    wrong = lpattn.low_precision_rope_sdpa(q, k, v, *tables, norm=other, backend=backend, **options)
    assert tools.sqnr(want, wrong) < 15, "this would not show a wrong weight"


def test_ten_lengths_are_one_graph(fa3, tools, like) -> None:
    model, plain = applied(like), Attention(like).to("cuda", torch.bfloat16)
    counter = CompileCounterWithBackend("inductor")
    under = torch.compile(model, backend=counter, fullgraph=True)
    for length in range(1000, 1100, 10):
        inputs = make(like, length)
        for tensor, dim in zip(inputs, (1, 1, 1, 0, 0), strict=True):
            torch._dynamo.mark_dynamic(tensor, dim)
        assert tools.sqnr(plain(*inputs), under(*inputs)) > 17
    assert counter.frame_count == 1
    assert rope(model) == "fused"
    assert norm(model) == ("fused" if like != "llama" else None)


def test_models_of_transformers(tools) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=1024,
    )
    model = transformers.LlamaModel(config).to("cuda", torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    ids = torch.randint(128, (1, 1024), device="cuda")
    run = {"input_ids": ids, "use_cache": False}
    want = model(**run).last_hidden_state
    # While it is traced, the model makes a mask of what is causal, which fp8_fa3 does not take.
    lpattn.apply_low_precision_attention(model, "fp8_triton")
    got = torch.compile(model)(**run).last_hidden_state
    report = lpattn.attention_report(model)
    assert tools.sqnr(want, got) > 15, str(report)
    assert all(layer.low and layer.rope == "fused" for layer in report.values()), str(report)
