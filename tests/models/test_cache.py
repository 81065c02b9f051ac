"""Keys that are kept between calls: static and dynamic caches, second prompts, generate."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

PROMPT, ROOM = 13, 64


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


def mistral():
    """Its cache keeps no more than the window."""
    return transformers.MistralModel(transformers.MistralConfig(**SIZES, sliding_window=8))


def in_pieces(make_model, make_cache, pieces, *, padded=False, judged=0):
    """A model run piece by piece over one cache.

    Args:
        make_model: takes nothing.
        make_cache: takes the model's configuration.
        pieces: number of tokens in each forward.
        padded: 6 of the tokens of the second sequence are padding on the left.
        judged: from which piece on the hidden states are answers: errors in one decode step drown in those of a prompt.
    """

    def build():
        model = make_model()
        ids = torch.randint(5, 99, (2, sum(pieces)))
        mask = torch.ones_like(ids)
        if padded:
            mask[1, :6] = 0

        def run(model):
            cache, start, answers = make_cache(model.config), 0, []
            for index, length in enumerate(pieces):
                stop = start + length
                out = model(
                    input_ids=ids[:, start:stop],
                    attention_mask=mask[:, :stop] if padded else None,
                    position_ids=torch.arange(start, stop)[None],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                if index >= judged:
                    answers.append(out[mask[:, start:stop].bool()])
                start = stop
            return tuple(answers)

        return model, run

    return build


def static(config):
    return transformers.StaticCache(config=config, max_cache_len=ROOM)


def dynamic(config):
    return transformers.DynamicCache(config=config)


def case(bug, make_cache, pieces, *, model=llama, qk=1.3, **options):
    build = in_pieces(model, make_cache, pieces, **options)
    attention = "LlamaAttention" if model is llama else "MistralAttention"
    return {"build": build, "bug": bug, "attention": attention, "qk": qk, "vo": 2.0}


DECODE = (PROMPT, 1, 1, 1)
CASES = {
    # Padding makes the mask of the prompt [B, 1, q_len, max_cache_len] instead of a causal call without one.
    "static-prompt": case("mask_dropped", static, (PROMPT,), padded=True, qk=1.0),
    "static-prompt-offset": case("mask_offset", static, (PROMPT,), padded=True),
    "static-prompt-batch": case("first_batch_mask", static, (PROMPT,), padded=True),
    "static-decode": case("mask_dropped", static, DECODE, judged=1, qk=1.0),
    "static-decode-top-left": case("top_left", static, DECODE, judged=1),
    "static-decode-padded": case("first_batch_mask", static, DECODE, padded=True, judged=1),
    "static-second-prompt": case("mask_dropped", static, (PROMPT, 9), judged=1, qk=1.0),
    "static-second-prompt-offset": case("mask_offset", static, (PROMPT, 9), judged=1),
    "static-second-prompt-top-left": case("top_left", static, (PROMPT, 9), judged=1),
    "dynamic-decode": case("top_left", dynamic, DECODE, judged=1),
    "dynamic-decode-padded": case("mask_dropped", dynamic, DECODE, padded=True, judged=1),
    "dynamic-second-prompt": case("mask_dropped", dynamic, (PROMPT, 9), judged=1),
    "dynamic-second-prompt-top-left": case("top_left", dynamic, (PROMPT, 9), judged=1),
    "window-prompt": case("causal", dynamic, (PROMPT,), model=mistral),
    "window-decode": case("top_left", dynamic, DECODE, model=mistral, judged=1),
    "window-second-prompt": case("causal", dynamic, (PROMPT, 12), model=mistral, judged=1),
    "window-static-decode": case("mask_dropped", static, (5, 1, 1), model=mistral, judged=1, qk=1.0),
    "window-static-second-prompt": case("mask_offset", static, (PROMPT, 12), model=mistral, judged=1),
}


def test_reference_is_the_untouched_model(subject):
    subject.check_reference()


def test_low_precision_keeps_the_answer(subject, fp8_emulated):
    subject.check_low_precision(fp8_emulated)


def test_planted_bug_is_noticed(subject):
    subject.check_bug()
