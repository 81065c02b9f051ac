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
    ids = torch.randint(5, 99, (2, 40))
    mask = torch.full((2, 1, 40, 40), torch.finfo(torch.float32).min).triu(1)
    mask[:, :, :, ::4] -= 3.0  # a bias that hides nothing
    mask[1, :, 10:30, :5] = torch.finfo(torch.float32).min
    return llama(), lambda model: model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def qwen3():
    return plain(transformers.Qwen3Model(transformers.Qwen3Config(**SIZES, head_dim=32)))


def mistral_window():
    config = transformers.MistralConfig(**SIZES, sliding_window=8, head_dim=16)
    return plain(transformers.MistralModel(config), 64)


def gemma3():
    config = transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=12,
    )
    return plain(transformers.Gemma3TextModel(config), 64)


def case(build, bug, **options):
    return {"build": build, "bug": bug, **{"qk": 1.3, **options}}


CASES = {
    "llama": case(llama_plain, "not_causal", attention="LlamaAttention"),
    "llama-heads": case(llama_plain, "heads_tiled", attention="LlamaAttention"),
    "llama-bf16": case(llama_plain, "not_causal", attention="LlamaAttention", dtype=torch.bfloat16),
    "llama-left-padding": case(llama_left_padding, "causal", attention="LlamaAttention"),
    "llama-left-padding-batch": case(llama_left_padding, "first_batch_mask", attention="LlamaAttention"),
    "llama-packed": case(llama_packed, "causal", attention="LlamaAttention"),
    "llama-prefix": case(llama_prefix, "causal", attention="LlamaAttention"),
    "llama-additive": case(llama_additive, "causal", attention="LlamaAttention"),
    "llama-additive-bias": case(llama_additive, "bias_dropped", attention="LlamaAttention"),
    "qwen3": case(qwen3, "not_causal", attention="Qwen3Attention"),
    "qwen3-heads": case(qwen3, "heads_tiled", attention="Qwen3Attention"),
    "mistral-window": case(mistral_window, "causal", attention="MistralAttention"),
    "gemma3-window": case(gemma3, "causal", qk=1.1, attention="Gemma3Attention"),
    "gemma3-scale": case(gemma3, "default_scale", qk=1.1, attention="Gemma3Attention"),
}


def test_reference_is_the_untouched_model(subject):
    subject.check_reference()


def test_low_precision_keeps_the_answer(subject, fp8_emulated):
    subject.check_low_precision(fp8_emulated)


def test_planted_bug_is_noticed(subject):
    subject.check_bug()
