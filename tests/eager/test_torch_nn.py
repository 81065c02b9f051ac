"""nn.MultiheadAttention and nn.TransformerEncoder(Layer), whose fast paths attend without calling SDPA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lpattn

NESTED_PROTOTYPE = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")


def compiled(module, how):
    return module if how is None else torch.compile(module, backend=how, fullgraph=True)


@pytest.fixture(params=[None, "aot_eager"])
def how(request):
    torch._dynamo.reset()
    return request.param


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.mha = nn.MultiheadAttention(32, 4, **options)

    def forward(self, q, k, v, **options):
        return self.mha(q, k, v, **options)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"batch_first": False},
        {"batch_first": True, "bias": False},
        {"batch_first": True, "kdim": 16, "vdim": 24},
        {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=lambda o: "-".join(o),
)
@pytest.mark.parametrize("masks", ["none", "padding", "mask", "both", "float"])
def test_multihead_attention_equals_the_original_and_is_counted(options, masks, how):
    torch.manual_seed(0)
    model = Attend(**options).eval()
    batch, length = (5, 7) if options["batch_first"] else (7, 5)
    q = torch.randn(batch, length, 32)
    k, v = torch.randn(batch, length, options.get("kdim", 32)), torch.randn(batch, length, options.get("vdim", 32))
    if "kdim" not in options:
        k = v = q
    n, s = (batch, length) if options["batch_first"] else (length, batch)
    call = {"need_weights": False}
    if masks in ("padding", "both"):
        call["key_padding_mask"] = torch.arange(s).expand(n, s) >= torch.tensor([s, s - 2, 3, s, 1, s, 4])[:n, None]
    if masks in ("mask", "both"):
        call["attn_mask"] = torch.ones(s, s, dtype=torch.bool).triu(1)
    if masks == "float":
        call["attn_mask"] = torch.randn(s, s)
    expected = model(q, k, v, **call)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    torch.testing.assert_close(compiled(model, how)(q, k, v, **call), expected)
    assert lpattn.attention_report(model)["mha"].exact == {"requested": 1}


def test_multihead_attention_runs_on_the_backend(marked, how):
    torch.manual_seed(0)
    model = Attend(batch_first=True).eval()
    x = torch.randn(2, 6, 32)
    exact = model(x, x, x, need_weights=False)
    lpattn.apply_low_precision_attention(model, "marked")
    bias = model.mha.out_proj.bias
    torch.testing.assert_close(compiled(model, how)(x, x, x, need_weights=False) - bias, 2 * (exact - bias))
    assert lpattn.attention_report(model)["mha"].low == {"marked": 1}


def test_need_weights_is_counted_as_exact(marked, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(32, 4, batch_first=True)).eval()
    x = torch.randn(2, 6, 32)
    expected = model[0](x, x, x)
    lpattn.apply_low_precision_attention(model, "marked")
    for got, want in zip(compiled(model[0], how)(x, x, x), expected, strict=True):
        torch.testing.assert_close(got, want)
    layer = lpattn.attention_report(model)["0"]
    assert layer.exact == {"need_weights": 1}
    assert not layer.low


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "both"])
def test_encoder_layer(norm_first, activation, mask, how, marked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation=activation, norm_first=norm_first, batch_first=True).eval()
    x = torch.randn(3, 6, 32)
    call = {}
    if mask in ("padding", "both"):
        call["src_key_padding_mask"] = torch.arange(6).expand(3, 6) >= torch.tensor([6, 4, 1])[:, None]
    if mask in ("causal", "both"):
        call["src_mask"] = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = layer(x, **call)
    lpattn.apply_low_precision_attention(layer, "bf16_reference")
    torch.testing.assert_close(compiled(layer, how)(x, **call), expected)
    assert lpattn.attention_report(layer)["self_attn"].exact == {"requested": 1}
    lpattn.apply_low_precision_attention(layer, "marked")
    assert not torch.allclose(compiled(layer, how)(x, **call), expected)
    assert lpattn.attention_report(layer)["self_attn"].low == {"marked": 1}


def outcome(run, x):
    """What compiled code returns; the type of its error where it raises one."""
    torch._dynamo.reset()
    try:
        return torch.compile(run, backend="aot_eager", fullgraph=True)(x, is_causal=True)
    except Exception as error:
        return type(error)


def hooked(layer):
    layer.linear1.register_forward_hook(lambda *args: None)


def with_another_eps(layer):
    layer.norm2.eps = 1e-3


@pytest.mark.parametrize(
    ("fast", "options", "change"),
    [
        (True, {}, None),
        (True, {"norm_first": True, "activation": "gelu"}, None),
        (False, {"batch_first": False}, None),
        (False, {"bias": False}, None),
        (False, {"nhead": 1}, None),
        (False, {"activation": nn.functional.silu}, None),
        (False, {}, nn.Module.train),
        (False, {}, hooked),
        (False, {}, with_another_eps),
    ],
)
def test_a_compiled_encoder_layer_takes_the_causal_hint_without_a_mask_as_the_original_does(fast, options, change):
    """The fast path ignores it, and the slow path refuses it."""
    torch.manual_seed(0)
    options = {"nhead": 4, "batch_first": True, "dropout": 0.0, **options}
    layer = nn.TransformerEncoderLayer(32, dim_feedforward=64, **options).eval()
    if change is not None:
        change(layer)
    x = torch.randn(3, 6, 32)
    expected = outcome(layer, x)
    assert isinstance(expected, torch.Tensor) is fast
    lpattn.apply_low_precision_attention(layer, "bf16_reference")
    found = outcome(layer, x)
    if fast:
        torch.testing.assert_close(found, expected)
        assert lpattn.attention_report(layer)["self_attn"].exact == {"requested": 1}
    else:
        assert found is expected


def test_compiled_multihead_attention_refuses_the_causal_hint_without_a_mask(marked):
    model = lpattn.apply_low_precision_attention(Attend(batch_first=True).eval(), "marked")
    x, mask = torch.randn(3, 6, 32), torch.ones(6, 6, dtype=torch.bool).triu(1)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        run(x, x, x, need_weights=False, is_causal=True)
    assert not marked.calls
    run(x, x, x, need_weights=False, is_causal=True, attn_mask=mask)
    assert [call.causal for call in marked.calls] == [lpattn.CausalKind.TOP_LEFT]


@pytest.mark.parametrize("causal", [False, True])
def test_encoder_that_looks_whether_its_mask_is_causal(causal, how, marked):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, mask = torch.randn(3, 6, 32), nn.Transformer.generate_square_subsequent_mask(6)
    if not causal:
        mask[5, 2] = -torch.inf
    expected = model(x, mask=mask)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    torch.testing.assert_close(compiled(model, how)(x, mask=mask), expected)
    lpattn.apply_low_precision_attention(model, "marked")
    assert not torch.allclose(compiled(model, how)(x, mask=mask), expected)
    assert [dict(layer.low) for layer in lpattn.attention_report(model).values()] == [{"marked": 1}] * 2


def test_layer_rules_name_the_attention_inside_of_the_fast_path(marked):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3).eval()
    lpattn.apply_low_precision_attention(model, "marked", layers={"layers.1.self_attn": "exact"})
    model(torch.randn(2, 6, 32))
    report = lpattn.attention_report(model)
    assert [dict(report[f"layers.{i}.self_attn"].low) for i in range(3)] == [{"marked": 1}, {}, {"marked": 1}]
    assert report["layers.1.self_attn"].exact == {"layer_rule": 1}


@NESTED_PROTOTYPE
def test_padded_encoder_keeps_its_packed_path():
    """nn.TransformerEncoder packs padded batches into nested tensors and fills padding with zeros: so it must stay."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 6, 32), torch.arange(6).expand(3, 6) >= torch.tensor([6, 4, 1])[:, None]
    expected = model(x, src_key_padding_mask=padding)
    assert (expected[padding] == 0).all()
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)
    assert {n: layer.exact for n, layer in lpattn.attention_report(model).items()} == {
        "layers.0.self_attn": {"requested": 1},
        "layers.1.self_attn": {"requested": 1},
    }


def test_decoder_layer(how):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True).eval()
    x, memory = torch.randn(2, 6, 32), torch.randn(2, 9, 32)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = layer(x, memory, tgt_mask=mask)
    lpattn.apply_low_precision_attention(layer, "bf16_reference")
    torch.testing.assert_close(compiled(layer, how)(x, memory, tgt_mask=mask), expected)
    assert list(lpattn.attention_report(layer)) == ["self_attn", "multihead_attn"]


def test_functional_multi_head_attention(marked, how):
    """Models that call F.multi_head_attention_forward themselves, as CLIP's attention pooling does."""

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(96, 32)), nn.Parameter(torch.randn(96))
            self.out = nn.Linear(32, 32, bias=False)

        def forward(self, x):
            return torch.nn.functional.multi_head_attention_forward(
                x, x, x, 32, 4, self.w, self.b, None, None, False, 0.0, self.out.weight, None, need_weights=False
            )[0]

    torch.manual_seed(0)
    model, x = Pool().eval(), torch.randn(6, 2, 32)
    expected = model(x)
    lpattn.apply_low_precision_attention(model, "marked")
    torch.testing.assert_close(compiled(model, how)(x), 2 * expected)


def test_without_weights_there_are_none_as_in_the_original(marked):
    mha = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert mha(x, x, x, need_weights=False)[1] is None
        lpattn.apply_low_precision_attention(mha, "marked")
        assert mha(x, x, x, need_weights=False)[1] is None
    assert marked.calls
