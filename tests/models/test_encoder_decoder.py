"""Encoder-decoder models: bidirectional, causal and cross-attention in one model, and T5's position bias."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

LENGTHS = (40, 17)


def padded():
    """Token ids and attention_mask [2, 40], the second sequence filled up behind its 17 tokens."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return torch.randint(5, 99, mask.shape), mask


def translate(model):
    ids, mask = padded()
    targets, target_mask = torch.randint(5, 99, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    target_mask[0, 15:] = 0

    def run(model):
        out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=targets, decoder_attention_mask=target_mask)
        return out.last_hidden_state[target_mask.bool()], out.encoder_last_hidden_state[mask.bool()]

    return model, run


def bart():
    config = transformers.BartConfig(
        vocab_size=99,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=96,
    )
    return translate(transformers.BartModel(config))


def t5():
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, relative_attention_num_buckets=8
    )
    model = transformers.T5Model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_(std=2.0)
    return translate(model)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=99,
        num_mel_bins=16,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=40,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    features, targets = torch.randn(2, 16, 80), torch.randint(5, 99, (2, 24))

    def run(model):
        out = model(input_features=features, decoder_input_ids=targets)
        return out.last_hidden_state, out.encoder_last_hidden_state

    return transformers.WhisperModel(config), run


CASES = {
    "bart": {"build": bart, "bug": "mask_dropped", "attention": "BartAttention", "qk": 1.2},
    "bart-causal": {"build": bart, "bug": "causal", "attention": "BartAttention", "qk": 1.2},
    "t5-padding": {"build": t5, "bug": "mask_dropped", "attention": "T5Attention", "qk": 0.5},
    "t5-bias": {"build": t5, "bug": "bias_dropped", "attention": "T5Attention", "qk": 0.5},
    "t5-bias-head": {"build": t5, "bug": "first_head_mask", "attention": "T5Attention", "qk": 0.5},
    "t5-scale": {"build": t5, "bug": "default_scale", "attention": "T5Attention", "qk": 0.7},
    "whisper": {"build": whisper, "bug": "not_causal", "attention": "WhisperAttention", "qk": 2.0, "vo": 1.0},
    "whisper-causal": {"build": whisper, "bug": "causal", "attention": "WhisperAttention", "qk": 2.0, "vo": 1.0},
}


def test_reference_is_the_untouched_model(subject):
    subject.check_reference()


def test_low_precision_keeps_the_answer(subject, fp8_emulated):
    subject.check_low_precision(fp8_emulated)


def test_planted_bug_is_noticed(subject):
    subject.check_bug()
