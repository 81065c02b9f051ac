"""Models on the GPU: applied, eager and compiled, with fp8_fa3 named and with the automatic choice."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpattn
from lpattn import AttentionBackend

# Inductor and the model libraries warn about all kinds of things; lpattn's own warnings stay errors.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::lpattn.LpattnWarning"),
]


class MyModel(nn.Module):
    def __init__(self, width: int = 512, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def wide_weights(model: nn.Module) -> nn.Module:
    """Weights that keep activations of size one: attention then decides the output."""
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


@pytest.fixture
def model() -> nn.Module:
    return wide_weights(MyModel()).to("cuda", torch.bfloat16).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 1024, 512, device="cuda", dtype=torch.bfloat16)


@torch.inference_mode()
@pytest.mark.parametrize("backend", [AttentionBackend.FP8_FA3, "fp8_fa3"])
def test_a_named_backend_eager(fa3, tools, model, x, backend) -> None:
    want = model(x)
    assert lpattn.apply_low_precision_attention(model, backend) is model
    got = model(x)
    assert 20 < tools.sqnr(want, got) < 45
    assert lpattn.attention_report(model)[""]["low"] == {"fp8_fa3": 1}
    lpattn.remove_low_precision_attention(model)
    assert torch.equal(model(x), want)


@torch.inference_mode()
def test_the_automatic_choice_eager(fa3, tools, model, x) -> None:
    want = model(x)
    got = lpattn.apply_low_precision_attention(model)(x)
    assert tools.sqnr(want, got) > 20
    report = lpattn.attention_report(model)[""]
    assert sum(report["low"].values()) + sum(report["exact"].values()) == 1


@torch.inference_mode()
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("backend", [None, "fp8_fa3"])
def test_compiled(fa3, tools, model, x, backend, mode) -> None:
    torch._dynamo.reset()
    want = model(x)
    eager = lpattn.apply_low_precision_attention(copy.deepcopy(model), backend)(x)
    compiled = torch.compile(lpattn.apply_low_precision_attention(model, backend), fullgraph=True, mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(x).clone()
    assert tools.sqnr(want, got) > 20
    # Inductor may fuse and round the projections differently, but the attention is the same.
    assert tools.sqnr(eager, got) > 30
    if backend is not None:
        assert lpattn.attention_report(model)[""]["low"]["fp8_fa3"] >= 1


@torch.inference_mode()
def test_compiled_with_changing_lengths(fa3, tools, model) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lpattn.apply_low_precision_attention(copy.deepcopy(model), fa3), fullgraph=True, dynamic=True
    )
    for length in (100, 257, 1024):
        x = torch.randn(2, length, 512, device="cuda", dtype=torch.bfloat16)
        assert tools.sqnr(model(x), compiled(x)) > 20


@torch.inference_mode()
def test_the_environment(fa3, model, x, monkeypatch) -> None:
    monkeypatch.setenv("LPATTN_BACKEND", "fp8_fa3")
    lpattn.apply_low_precision_attention(model)(x)
    report = lpattn.attention_report(model)[""]
    assert report["low"] == {"fp8_fa3": 1}
    assert report["provenance"] == "environment"


@torch.inference_mode()
def test_autocast(fa3, tools, model, x) -> None:
    model = model.float()
    with torch.autocast("cuda", torch.bfloat16):
        want = model(x.float())
        got = lpattn.apply_low_precision_attention(model, fa3)(x.float())
    assert want.dtype == got.dtype
    assert tools.sqnr(want, got) > 20
    assert lpattn.attention_report(model)[""]["low"] == {"fp8_fa3": 1}


def test_autocast_of_the_function(fa3, tools) -> None:
    q, k, v = tools.make(1, 2, 2, 256, 256, 64, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out = lpattn.low_precision_sdpa(q, k, v, backend=fa3)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16


def test_inputs_that_require_grad_run_exactly(fa3, model, x) -> None:
    lpattn.apply_low_precision_attention(model, fa3, on_unsupported="fallback")
    with pytest.warns(lpattn.LpattnWarning, match="require grad"):
        model(x).float().sum().backward()
    assert model.q_proj.weight.grad is not None


@torch.inference_mode()
def test_multi_head_attention_and_its_fast_path(fa3, tools) -> None:
    mha = wide_weights(nn.MultiheadAttention(512, 8, batch_first=True)).to("cuda", torch.bfloat16).eval()
    x = torch.randn(2, 512, 512, device="cuda", dtype=torch.bfloat16)
    want, _ = mha(x, x, x, need_weights=False)
    lpattn.apply_low_precision_attention(mha, fa3)
    got, _ = mha(x, x, x, need_weights=False)
    assert 20 < tools.sqnr(want, got) < 45
    assert lpattn.attention_report(mha)[""]["low"] == {"fp8_fa3": 1}


@torch.inference_mode()
def test_the_fast_path_of_an_encoder_layer(fa3, tools) -> None:
    layer = nn.TransformerEncoderLayer(512, 8, 1024, batch_first=True).to("cuda", torch.bfloat16).eval()
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 512, 512, device="cuda", dtype=torch.bfloat16)
    want = encoder(x)
    lpattn.apply_low_precision_attention(encoder, fa3)
    assert tools.sqnr(want, encoder(x)) > 20
    report = lpattn.attention_report(encoder)
    assert [entry["low"] for entry in report.values()] == [{"fp8_fa3": 1}] * 2


@torch.inference_mode()
def test_another_thread_and_another_model_stay_exact(fa3, model, x) -> None:
    other = copy.deepcopy(model)
    want = model(x)
    lpattn.apply_low_precision_attention(model, fa3)
    results: dict[int, bool] = {}

    def work(index: int) -> None:
        with torch.inference_mode():
            mine = [other(x) if index % 2 else model(x) for _ in range(10)]
        torch.cuda.synchronize()
        results[index] = all(torch.equal(r, want) for r in mine)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {i: bool(i % 2) for i in range(6)}
    assert lpattn.attention_report(model)[""]["low"] == {"fp8_fa3": 30}


@torch.inference_mode()
def test_the_context_manager(fa3, tools) -> None:
    q, k, v = tools.make(1, 4, 4, 512, 512, 64)
    plain = F.scaled_dot_product_attention(q, k, v)
    with lpattn.low_precision_attention(fa3):
        inside = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(inside, lpattn.low_precision_sdpa(q, k, v, backend=fa3))
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), plain)


@torch.inference_mode()
def test_a_whole_model_in_a_cuda_graph(fa3, model, x) -> None:
    lpattn.apply_low_precision_attention(model, fa3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(x)
    x.normal_()
    graph.replay()
    assert torch.equal(captured, model(x))


# The exact reference on CUDA


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_with_lse(tools, dtype, causal) -> None:
    q, k, v = tools.make(2, 4, 2, 300, 500, 64, dtype)
    out, lse = lpattn.low_precision_sdpa(
        q, k, v, is_causal=causal, enable_gqa=True, backend="bf16_reference", return_lse=True
    )
    rows = torch.arange(300, device="cuda")
    expected, expected_lse = tools.exact_rows(q, k, v, rows, causal, 0.125)
    assert tools.sqnr(expected, out) > 45
    assert (lse - expected_lse).abs().max() < 1e-2
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True))


@torch.inference_mode()
def test_the_emulated_backend_agrees_with_the_kernel(fa3, emulated, tools) -> None:
    q, k, v = tools.make(1, 4, 4, 300, 300, 64)
    kernel = lpattn.low_precision_sdpa(q, k, v, is_causal=True, backend=fa3)
    in_plain_torch = lpattn.low_precision_sdpa(q, k, v, is_causal=True, backend=emulated)
    assert tools.sqnr(in_plain_torch, kernel) > 20


# Model libraries


def tiny_llama(head_dim: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=4 * head_dim,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
    )
    return wide_weights(transformers.LlamaForCausalLM(config)).to("cuda", torch.bfloat16).eval()


@torch.inference_mode()
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama(fa3, tools, head_dim) -> None:
    llama = tiny_llama(head_dim)
    tokens = torch.randint(128, (2, 300), device="cuda")
    want = llama(tokens).logits
    lpattn.apply_low_precision_attention(llama, fa3, on_unsupported="fallback")
    assert tools.sqnr(want, llama(tokens).logits) > 15
    report = lpattn.attention_report(llama)
    assert [entry["low"] for entry in report.values()] == [{"fp8_fa3": 1}] * 2
    assert all(name.endswith("self_attn") for name in report)


@torch.inference_mode()
def test_llama_with_a_padded_batch_falls_back_for_its_masks(fa3, tools) -> None:
    llama = tiny_llama(64)
    tokens = torch.randint(128, (2, 64), device="cuda")
    keep = torch.ones_like(tokens)
    keep[0, :20] = 0
    want = llama(tokens, attention_mask=keep).logits[keep.bool()]
    lpattn.apply_low_precision_attention(llama, fa3, on_unsupported="fallback")
    with pytest.warns(lpattn.LpattnWarning, match="takes key-padding masks only"):
        got = llama(tokens, attention_mask=keep).logits[keep.bool()]
    assert tools.sqnr(want, got) > 40
    assert [entry["exact"] for entry in lpattn.attention_report(llama).values()] == [{"mask": 1}] * 2


@torch.inference_mode()
def test_llama_layers(fa3, tools) -> None:
    llama = tiny_llama(64)
    lpattn.apply_low_precision_attention(llama, fa3, layers={"model.layers.0": "exact"})
    llama(torch.randint(128, (1, 100), device="cuda"))
    first, second = lpattn.attention_report(llama).values()
    assert first["exact"] == {"layer_rule": 1}
    assert second["low"] == {"fp8_fa3": 1}


@torch.inference_mode()
def test_llama_generates(fa3) -> None:
    llama = tiny_llama(64)
    lpattn.apply_low_precision_attention(llama, fa3, on_unsupported="fallback")
    prompt = torch.randint(128, (1, 200), device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lpattn.LpattnWarning)
        generated = llama.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated.shape == (1, 208)
    for entry in lpattn.attention_report(llama).values():
        # transformers decides by its version which of these calls carry a dense mask; none may be missed.
        assert sum(entry["low"].values()) + sum(entry["exact"].values()) == 8
        assert set(entry["exact"]) <= {"mask"}


@torch.inference_mode()
def test_llama_compiled(fa3, tools) -> None:
    torch._dynamo.reset()
    llama = tiny_llama(64)
    tokens = torch.randint(128, (1, 256), device="cuda")
    want = llama(tokens, use_cache=False).logits
    lpattn.apply_low_precision_attention(llama, fa3, on_unsupported="fallback")
    compiled = torch.compile(llama)
    with warnings.catch_warnings():
        # While it is traced, transformers makes a dense mask.
        warnings.simplefilter("ignore", lpattn.LpattnWarning)
        got = compiled(tokens, use_cache=False).logits
    assert tools.sqnr(want, got) > 15
    assert len(lpattn.attention_report(llama)) == 2


@torch.inference_mode()
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("compiled", [False, True])
def test_flux(fa3, tools, head_dim, compiled) -> None:
    torch._dynamo.reset()
    diffusers = pytest.importorskip("diffusers")
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=head_dim,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8),
    )
    flux = wide_weights(flux).to("cuda", torch.bfloat16).eval()
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(1, 256, 4, **bf16),
        "encoder_hidden_states": torch.randn(1, 32, 32, **bf16),
        "pooled_projections": torch.randn(1, 32, **bf16),
        "timestep": torch.tensor([0.5], **bf16),
        "img_ids": torch.randint(16, (256, 3), device="cuda").to(torch.bfloat16),
        "txt_ids": torch.zeros(32, 3, **bf16),
    }
    want = flux(**inputs).sample
    lpattn.apply_low_precision_attention(flux, fa3, on_unsupported="fallback")
    run = torch.compile(flux) if compiled else flux
    assert tools.sqnr(want, run(**inputs).sample) > 15
    low = [entry["low"] for entry in lpattn.attention_report(flux).values()]
    assert low == [{"fp8_fa3": 1}] * 2
