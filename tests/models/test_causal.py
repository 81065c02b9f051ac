"""Causal language models: grouped kv heads, padding on the left, packed sequences, masks of one's own, windows."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama():
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES))


def plain(model, length=48):
    ids = torch.randint(5, 99, (2, length))
    return model, lambda model: model(input_ids=ids, use_cache=False).last_hidden_state


def llama_plain():
    return plain(llama())


def llama_left_padding():
    ids, lengths = torch.randint(5, 99, (3, 40)), torch.tensor([40, 17, 5])
    mask = (torch.arange(40) >= 40 - lengths[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def run(model):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return out.last_hidden_state[mask.bool()]

    return llama(), run


def llama_packed():
    """Three sequences in one row, told apart by nothing but positions that start again."""
    ids = torch.randint(5, 99, (1, 60))
    positions = torch.cat([torch.arange(n) for n in (25, 9, 26)])[None]
    return llama(), lambda model: model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state


def llama_prefix():
    """A mask [B, 1, q, kv] of one's own: the prompt sees itself in both directions."""
    ids = torch.randint(5, 99, (2, 40))
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    mask[0, :, :20, :20] = True
    mask[1, :, :33, :33] = True
    return llama(), lambda model: model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def llama_additive():
    """The same in the additive form that older code passes."""
    model, run = llama_prefix()
    ids = torch.randint(5, 99, (2, 40))
    mask = torch.full((2, 1, 40, 40), torch.finfo(torch.float32).min).triu(1)
    mask[:, :, :, 3] += -1.5  # a bias that is no mask
    mask[1, :, 10:30, :5] = torch.finfo(torch.float32).min
    return model, lambda model: model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def qwen3():
    return plain(transformers.Qwen3Model(transformers.Qwen3Config(**SIZES, head_dim=32)))


def mistral_window():
    config = transformers.MistralConfig(**SIZES, sliding_window=8, head_dim=16)
    return plain(transformers.MistralModel(config), 64)


def gemma3():
    config = transformers.Gemma3TextConfig(
        **SIZES, head_dim=32, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
    )
    return plain(transformers.Gemma3TextModel(config), 64)


CASES = {
    "llama": {"build": llama_plain, "bug": "not_causal", "attention": "LlamaAttention"},
    "llama-heads": {"build": llama_plain, "bug": "heads_tiled", "attention": "LlamaAttention"},
    "llama-bf16": {"build": llama_plain, "bug": "not_causal", "attention": "LlamaAttention", "dtype": torch.bfloat16},
    "llama-left-padding": {"build": llama_left_padding, "bug": "causal", "attention": "LlamaAttention"},
    "llama-left-padding-batch": {"build": llama_left_padding, "bug": "first_batch_mask", "attention": "LlamaAttention"},
    "llama-packed": {"build": llama_packed, "bug": "causal", "attention": "LlamaAttention"},
    "llama-prefix": {"build": llama_prefix, "bug": "causal", "attention": "LlamaAttention"},
    "llama-additive": {"build": llama_additive, "bug": "causal", "attention": "LlamaAttention"},
    "qwen3": {"build": qwen3, "bug": "not_causal", "attention": "Qwen3Attention"},
    "qwen3-heads": {"build": qwen3, "bug": "heads_tiled", "attention": "Qwen3Attention"},
    "mistral-window": {"build": mistral_window, "bug": "causal", "attention": "MistralAttention"},
    "gemma3-window": {"build": gemma3, "bug": "causal", "attention": "Gemma3Attention"},
    "gemma3-scale": {"build": gemma3, "bug": "default_scale", "attention": "Gemma3Attention"},
}


def test_reference_is_the_untouched_model(subject):
    subject.check_reference()


def test_low_precision_keeps_the_answer(subject, fp8_emulated):
    subject.check_low_precision(fp8_emulated)


def test_planted_bug_is_noticed(subject):
    subject.check_bug()
