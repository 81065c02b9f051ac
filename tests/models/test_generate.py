"""generate() on applied models, and models whose attention cannot be reached."""

import pytest
import torch

import lpattn

transformers = pytest.importorskip("transformers")

NEW_TOKENS = 6
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=128,
        **TOKENS,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


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
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **TOKENS,
    )
    return transformers.BartForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0, **TOKENS
    )
    return transformers.T5ForConditionalGeneration(config)


# name: model, cache, gains of q and k and of v and o, the planted bug
CASES = {
    "llama-dynamic": (llama, "dynamic", 1.3, 1.5, "mask_dropped"),
    "llama-static": (llama, "static", 1.3, 1.5, "mask_dropped"),
    "bart": (bart, "dynamic", 1.5, 1.5, "mask_dropped"),
    "t5": (t5, "dynamic", 0.6, 1.2, "mask_dropped"),
}


@pytest.fixture(scope="module", params=list(CASES))
def generating(request, sharpen, counted):
    """A model, how it generates, its untouched answer, the number of SDPA calls, and the planted bug."""
    build, cache, qk, vo, bug = CASES[request.param]
    torch.manual_seed(0)
    model = sharpen(build(), qk=qk, vo=vo).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    ids, mask = torch.randint(5, 99, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    if model.config.is_encoder_decoder:
        mask[0, 14:] = mask[1, 9:] = 0
    else:
        mask[0, :10] = mask[1, :15] = 0

    def generate(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            no_repeat_ngram_size=1,  # tiny models repeat themselves, and then tokens would tell nothing
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences, torch.stack(out.logits, 1)  # [B, S], [B, new tokens, vocabulary]

    with torch.no_grad(), counted() as calls:
        tokens, logits = generate(model)
    assert len(calls) >= 2 * NEW_TOKENS
    assert tokens[:, -NEW_TOKENS:].unique().numel() > NEW_TOKENS
    yield model, generate, (tokens, logits), len(calls), bug
    lpattn.remove_low_precision_attention(model)


def run(model, generate, backend):
    lpattn.apply_low_precision_attention(model, backend)
    with torch.no_grad():
        answer = generate(model)
    return answer, lpattn.attention_report(model)


def comparable(want, got):
    """Logits of the steps that had the same tokens in front of them, of all sequences."""
    same = (want[0] == got[0])[:, -NEW_TOKENS:].long().cumprod(1).bool()
    same = torch.cat([torch.ones(len(same), 1, dtype=torch.bool), same[:, :-1]], 1)
    return want[1][same], got[1][same]


def test_tokens_are_those_of_the_untouched_model(generating):
    model, generate, want, calls, _ = generating
    got, report = run(model, generate, "bf16_reference")
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    assert sum(layer.exact["requested"] for layer in report.values()) == calls
    assert all(layer.low == {} for layer in report.values())


def test_low_precision_keeps_the_logits(generating, fp8_emulated, sqnr):
    """Until the tokens part, which a near tie may cause."""
    model, generate, want, calls, _ = generating
    got, report = run(model, generate, fp8_emulated)
    pairs = comparable(want, got)
    assert len(pairs[0]) >= NEW_TOKENS
    assert sqnr(*pairs) >= 20
    assert sum(layer.low[fp8_emulated] for layer in report.values()) == calls
    assert all(layer.exact == {} for layer in report.values())


def test_planted_bug_is_noticed(generating, planted, sqnr):
    model, generate, want, _, bug = generating
    with planted(bug) as backend:
        got, _ = run(model, generate, backend)
        lpattn.remove_low_precision_attention(model)
    assert sqnr(*comparable(want, got)) < 15


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_eager_attention_is_not_passed_over_in_silence(method, fp8_emulated):
    """Models loaded with attn_implementation="eager" do not call SDPA: zero calls, and a warning with the remedy."""
    torch.manual_seed(0)
    model = llama(attn_implementation="eager").eval()
    ids = torch.randint(5, 99, (1, 8))

    def call():
        with torch.no_grad():
            return model(ids).logits if method == "forward" else model.generate(ids, max_new_tokens=2, do_sample=False)

    want = call()
    lpattn.apply_low_precision_attention(model, fp8_emulated)
    with pytest.warns(lpattn.LpattnWarning, match="attn_implementation='sdpa'"):
        got = call()
    assert torch.equal(got, want)
    assert len(lpattn.attention_report(model)) == 0
    call()  # said once: a second warning would be an error here
