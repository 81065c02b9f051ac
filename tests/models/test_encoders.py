"""Bidirectional encoders with padded batches. The usual bug: they become causal, or attend to their padding."""

import pytest
import torch

import lpattn

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 96,
}
LENGTHS = (40, 17)


def padded():
    """Token ids and attention_mask [2, 40], the second sequence filled up behind its 17 tokens."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return torch.randint(5, 99, mask.shape), mask


def encoder(model):
    ids, mask = padded()

    def run(model):
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]

    return model, run


def bert():
    return encoder(transformers.BertModel(transformers.BertConfig(**SIZES)))


def roberta():
    return encoder(transformers.RobertaModel(transformers.RobertaConfig(**SIZES, pad_token_id=1)))


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=99, dim=64, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=96
    )
    return encoder(transformers.DistilBertModel(config))


def modernbert():
    config = transformers.ModernBertConfig(
        **SIZES,
        local_attention=16,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return encoder(transformers.ModernBertModel(config))


def vit():
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=4
    )
    pixels = torch.randn(2, 3, 32, 32)
    return transformers.ViTModel(config), lambda model: model(pixel_values=pixels).last_hidden_state


CASES = {
    "bert": {"build": bert, "bug": "mask_dropped", "attention": "BertSelfAttention", "qk": 2.0, "vo": 1.0},
    "bert-causal": {"build": bert, "bug": "causal", "attention": "BertSelfAttention", "qk": 2.0, "vo": 1.0},
    "bert-bf16": {
        "build": bert,
        "bug": "causal",
        "attention": "BertSelfAttention",
        "qk": 2.0,
        "vo": 1.0,
        "dtype": torch.bfloat16,
    },
    "roberta": {"build": roberta, "bug": "mask_dropped", "attention": "RobertaSelfAttention", "qk": 1.8},
    "distilbert": {"build": distilbert, "bug": "mask_dropped", "attention": "DistilBertSelfAttention"},
    "modernbert-padding": {"build": modernbert, "bug": "first_batch_mask", "attention": "ModernBertAttention"},
    "modernbert-window": {"build": modernbert, "bug": "mask_dropped", "attention": "ModernBertAttention"},
    "vit": {"build": vit, "bug": "causal", "attention": "ViTAttention", "qk": 1.2},
}


def test_reference_is_the_untouched_model(subject):
    subject.check_reference()


def test_low_precision_keeps_the_answer(subject, fp8_emulated):
    subject.check_low_precision(fp8_emulated)


def test_planted_bug_is_noticed(subject):
    subject.check_bug()


def test_default_weights_would_hide_the_bug(planted, sqnr):
    """Why the weights are scaled: attention of a freshly initialised BERT hardly matters, with or without its mask."""
    torch.manual_seed(0)
    model, run = bert()
    model.eval()
    with planted("mask_dropped") as backend, torch.no_grad():
        want = run(model)
        lpattn.apply_low_precision_attention(model, backend)
        assert sqnr(want, run(model)) > 35
