"""torch.compile of applied models: one graph, the numbers of eager mode, and every call counted."""

import pytest
import torch
from torch import nn

import lpattn

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

# nn.TransformerEncoder packs padded batches into nested tensors, about which PyTorch warns.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")


def llama():
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids, mask = torch.randint(5, 99, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    mask[1, :15] = 0

    def run(model):
        return model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, 15:]

    return transformers.LlamaModel(config), run


def bert():
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    ids, mask = torch.randint(5, 99, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    mask[1, 9:] = 0
    return transformers.BertModel(config), lambda model: model(ids, attention_mask=mask).last_hidden_state[:, :9]


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 8),
        "encoder_hidden_states": torch.randn(2, 8, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(8, 3),
    }
    return model, lambda model: model(**inputs, return_dict=False)[0]


def encoder():
    """Eager mode packs the padded batch and fills it up with zeros; compiled code does not, also without lpattn."""
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    x, padding = torch.randn(3, 40, 64), torch.arange(40) >= torch.tensor([40, 13, 6])[:, None]
    return nn.TransformerEncoder(layer, 2), lambda model: model(x, src_key_padding_mask=padding)[~padding]


CASES = {
    "llama": {"build": llama, "bug": "mask_dropped", "attention": "LlamaAttention", "qk": 1.3},
    "bert": {"build": bert, "bug": "mask_dropped", "attention": "BertSelfAttention", "qk": 2.0, "vo": 1.0},
    "flux": {"build": flux, "bug": "causal", "attention": "FluxAttention", "vo": 4.0},
    "encoder": {"build": encoder, "bug": "mask_dropped", "attention": "MultiheadAttention", "calls": 2, "qk": 1.3},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def count(report, backend):
    return sum(layer.low.get(backend, 0) + layer.exact.get("requested", 0) for layer in report.values())


@pytest.mark.parametrize("order", ["apply-compile", "compile-apply"])
@pytest.mark.parametrize("backend", ["bf16_reference", "fp8_emulated"])
def test_compiled_is_eager(subject, backend, order, fp8_emulated):
    eager, _ = subject.under(backend)
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    try:
        if order == "compile-apply":
            compiled = torch.compile(subject.model, backend=compiler, fullgraph=True)
            lpattn.apply_low_precision_attention(compiled, backend)
        else:
            lpattn.apply_low_precision_attention(subject.model, backend)
            compiled = torch.compile(subject.model, backend=compiler, fullgraph=True)
        with torch.no_grad():
            first = subject.run(compiled)
            once = lpattn.attention_report(compiled)
            second = subject.run(compiled)
            twice = lpattn.attention_report(subject.model)
    finally:
        lpattn.remove_low_precision_attention(subject.model)
    torch.testing.assert_close(first, eager)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert len(graphs) == 1
    operators = [node.target for node in graphs[0].graph.nodes if "lpattn" in str(node.target)]
    assert len(operators) == subject.calls
    for report, calls in ((once, subject.calls), (twice, 2 * subject.calls)):
        assert set(report) == subject.layers
        assert count(report, backend) == calls
        assert all("requested" in layer.exact for layer in report.values()) is (backend == "bf16_reference")


def test_low_precision_keeps_the_answer(subject, fp8_emulated):
    subject.check_low_precision(fp8_emulated)


def test_weights_are_counted_per_call(fp8_emulated):
    """nn.MultiheadAttention with need_weights=True: exact, compiled as in eager mode, and counted each time it runs."""
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(64, 4, batch_first=True).eval(), torch.randn(2, 24, 64)
    with torch.no_grad():
        want = model(x, x, x)
        lpattn.apply_low_precision_attention(model, fp8_emulated)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for calls in (1, 2, 3):
            torch.testing.assert_close(compiled(x, x, x), want)
            assert dict(lpattn.attention_report(model)[""].exact) == {"need_weights": calls}


def test_removed_after_compiling(subject, fp8_emulated):
    """Nothing stale runs: the guard fails, and the untouched model is compiled."""
    compiled = torch.compile(subject.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        lpattn.apply_low_precision_attention(compiled, fp8_emulated)
        low = subject.run(compiled)
        lpattn.remove_low_precision_attention(compiled)
        exact = subject.run(compiled)
    torch.testing.assert_close(exact, subject.want)
    assert not torch.equal(low, exact)
    assert len(lpattn.attention_report(subject.model)) == 0


def test_planted_bug_is_noticed_when_compiled(subject, planted, sqnr):
    with planted(subject.bug) as backend, torch.no_grad():
        lpattn.apply_low_precision_attention(subject.model, backend)
        got = subject.run(torch.compile(subject.model, backend="aot_eager", fullgraph=True))
        lpattn.remove_low_precision_attention(subject.model)
    assert sqnr(subject.want, got) < 15
