"""The attention modules of torch.nn, whose fast paths attend inside one operator and never call SDPA."""

import pytest
import torch
from torch import nn

import lpattn

# nn.TransformerEncoder packs padded batches into nested tensors, about which PyTorch warns.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

DIM, HEADS = 64, 4


def attend(call, heads=HEADS, **options):
    def build():
        return nn.MultiheadAttention(DIM, heads, **{"batch_first": True, **options}), call

    return build


def inputs(length=40, batch=3, seed=1, dim=DIM):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


X, Y = inputs(), inputs(24, seed=2)
PADDED = torch.arange(40) >= torch.tensor([40, 13, 6])[:, None]
LEFT_PADDED = torch.arange(40) < torch.tensor([0, 27, 34])[:, None]
CAUSAL = torch.ones(40, 40, dtype=torch.bool).triu(1)
BIAS = 2 * torch.randn(3 * HEADS, 40, 40, generator=torch.Generator().manual_seed(3))


def mha_fast(model):
    return model(X, X, X, need_weights=False)[0]


def mha_padding(model):
    return model(X, X, X, key_padding_mask=PADDED, need_weights=False)[0]


def mha_mask(model):
    return model(X, X, X, attn_mask=CAUSAL, need_weights=False)[0]


def mha_bias(model):
    """A mask [B * H, q, kv] of finite values."""
    return model(X, X, X, attn_mask=BIAS, need_weights=False)[0]


def mha_padding_and_bias(model):
    """Two float masks at once, as PyTorch wants them to be of one kind."""
    padding = torch.zeros(PADDED.shape).masked_fill(PADDED, -torch.inf)
    return model(X, X, X, key_padding_mask=padding, attn_mask=BIAS, need_weights=False)[0]


def mha_hint(model):
    """The hint makes F.multi_head_attention_forward pass is_causal instead of the mask."""
    x = X.transpose(0, 1)
    return model(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=False)[0]


def mha_cross(model):
    return model(Y, X, X, key_padding_mask=PADDED, need_weights=False)[0]


def mha_sequence_first(model):
    x = X.transpose(0, 1)
    return model(x, x, x, key_padding_mask=PADDED, need_weights=False)[0]


def mha_unbatched(model):
    return model(X[0], X[0], X[0], attn_mask=CAUSAL, need_weights=False)[0]


def layer(**options):
    options = {"dim_feedforward": 96, "batch_first": True, "dropout": 0.1, **options}
    return nn.TransformerEncoderLayer(DIM, HEADS, **options)


def one_layer(call, **options):
    def build():
        return layer(**options), call

    return build


def encoder(call, **options):
    """Two layers; layer_norm_eps and the norm's place are what the fused operator must get right, too."""

    def build():
        return nn.TransformerEncoder(layer(**options), 2, enable_nested_tensor=not options.get("norm_first")), call

    return build


def plain(model):
    return model(X)


def padded(model):
    """All positions, padding included: the packed path fills it with zeros."""
    return model(X, src_key_padding_mask=PADDED)


def left_padded(model):
    return model(X, src_key_padding_mask=LEFT_PADDED)[~LEFT_PADDED]


def masked(model):
    return model(X, CAUSAL)


def whole():
    model = nn.Transformer(DIM, HEADS, 1, 2, 96, batch_first=True, dropout=0.1)
    causal = CAUSAL[:24, :24]

    def run(model):
        return model(X, Y, tgt_mask=causal, src_key_padding_mask=PADDED, memory_key_padding_mask=PADDED)

    return model, run


def case(build, bug, calls, qk=1.3):
    return {"build": build, "bug": bug, "attention": "MultiheadAttention", "calls": calls, "qk": qk}


CASES = {
    "mha-fast": case(attend(mha_fast), "causal", 1),
    "mha-fast-padding": case(attend(mha_padding), "mask_dropped", 1),
    "mha-fast-mask": case(attend(mha_mask), "mask_dropped", 1),
    "mha-bias": case(attend(mha_bias), "bias_dropped", 1, qk=1.0),
    "mha-bias-head": case(attend(mha_bias), "first_head_mask", 1, qk=1.0),
    "mha-padding-and-bias": case(attend(mha_padding_and_bias), "mask_dropped", 1, qk=1.0),
    "mha-causal-hint": case(attend(mha_hint, batch_first=False), "not_causal", 1),
    "mha-cross": case(attend(mha_cross), "mask_dropped", 1),
    "mha-sequence-first": case(attend(mha_sequence_first, batch_first=False), "first_batch_mask", 1),
    "mha-unbatched": case(attend(mha_unbatched), "mask_dropped", 1),
    "mha-extra-keys": case(attend(mha_padding, add_bias_kv=True, add_zero_attn=True), "mask_dropped", 1),
    "mha-one-head": case(attend(mha_padding, heads=1), "first_batch_mask", 1),
    "layer": case(one_layer(plain), "causal", 1),
    "layer-padded": case(one_layer(padded), "first_batch_mask", 1),
    "layer-masked": case(one_layer(masked), "mask_dropped", 1),
    "layer-norm-first": case(one_layer(plain, norm_first=True, activation="gelu"), "causal", 1),
    "encoder": case(encoder(plain, activation="gelu"), "causal", 2),
    "encoder-padded": case(encoder(padded), "mask_dropped", 2),
    "encoder-padded-gelu": case(encoder(padded, activation="gelu", layer_norm_eps=0.1), "first_batch_mask", 2),
    "encoder-left-padded": case(encoder(left_padded), "mask_dropped", 2),
    "encoder-padded-norm-first": case(encoder(padded, norm_first=True), "mask_dropped", 2),
    "encoder-masked": case(encoder(masked), "mask_dropped", 2),
    "transformer": case(whole, "mask_dropped", 5, qk=1.0),
}


def test_reference_is_the_untouched_model(subject):
    subject.check_reference()


def test_low_precision_keeps_the_answer(subject, fp8_emulated):
    subject.check_low_precision(fp8_emulated)


def test_planted_bug_is_noticed(subject):
    subject.check_bug()


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_weights_are_exact_and_counted_as_such(fast, sharpen, fp8_emulated):
    """With need_weights=True there is no SDPA call to redirect; the report says so, with the reason."""
    torch.manual_seed(0)
    model = sharpen(nn.MultiheadAttention(DIM, HEADS, batch_first=True)).eval()
    key = X if fast else X.clone()
    with torch.no_grad():
        want = model(X, key, X, key_padding_mask=PADDED)
        lpattn.apply_low_precision_attention(model, fp8_emulated)
        got = model(X, key, X, key_padding_mask=PADDED)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        report = lpattn.attention_report(model)
        assert dict(report[""].exact) == {"need_weights": 1}
        assert report[""].low == {}
        without = model(X, key, X, key_padding_mask=PADDED, need_weights=False)[0]
        assert not torch.equal(without, want[0])
        assert dict(lpattn.attention_report(model)[""].low) == {fp8_emulated: 1}


def test_padding_comes_back_as_zeros(sharpen, fp8_emulated):
    """The packed path of nn.TransformerEncoder: a padded row is neither attended to nor filled."""
    torch.manual_seed(0)
    model = sharpen(nn.TransformerEncoder(layer(), 2)).eval()
    with torch.no_grad():
        assert model(X, src_key_padding_mask=PADDED)[PADDED].count_nonzero() == 0, "this is not the packed path"
        lpattn.apply_low_precision_attention(model, fp8_emulated)
        got = model(X, src_key_padding_mask=PADDED)
        assert got[PADDED].count_nonzero() == 0
        # What stands in the padding is of no consequence, however large.
        spoiled = torch.where(PADDED[..., None], torch.tensor(1e30), X)
        torch.testing.assert_close(model(spoiled, src_key_padding_mask=PADDED), got, rtol=0, atol=0)
