"""Models of transformers and diffusers, compiled: one graph, RoPE fused wherever it is, and the eager numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lpattn

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*txt_seq_lens"),
    # Inductor says so of the untouched models, too.
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators"),
]

TEXT = {
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


def text(family, model="Model", config="Config", **options):
    def build(dtype=torch.float32):
        made = getattr(transformers, family + config)(**TEXT | options)
        ids = torch.randint(5, 99, (2, 24))
        net = getattr(transformers, family + model)(made).to(dtype)
        return net, lambda net: net(input_ids=ids, use_cache=False).last_hidden_state

    return build


def modernbert():
    special = {"cls_token_id": 3, "sep_token_id": 4, "local_attention": 8}
    config = transformers.ModernBertConfig(**TEXT | special)
    ids, mask = torch.randint(5, 99, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    mask[1, 17:] = 0
    return transformers.ModernBertModel(config), lambda net: net(ids, attention_mask=mask).last_hidden_state[:, :17]


def diffusion(cls, inputs, **options):
    def build():
        return getattr(diffusers, cls)(**options), lambda net: net(**inputs(), return_dict=False)[0]

    return build


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


FLUX = diffusion(
    "FluxTransformer2DModel",
    lambda: {
        "hidden_states": draw(2, 16, 8),
        "encoder_hidden_states": draw(2, 8, 32),
        "pooled_projections": draw(2, 32),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(8, 3),
    },
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
WAN = diffusion(
    "WanTransformer3DModel",
    lambda: {
        "hidden_states": draw(1, 4, 2, 8, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": draw(1, 6, 16),
    },
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=1,
    rope_max_seq_len=32,
)
QWEN_IMAGE = diffusion(
    "QwenImageTransformer2DModel",
    lambda: {
        "hidden_states": draw(1, 16, 16),
        "encoder_hidden_states": draw(1, 7, 16),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, 4, 4)],
    },
    patch_size=2,
    in_channels=16,
    out_channels=4,
    num_layers=1,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=16,
    axes_dims_rope=(8, 4, 4),
)
HUNYUAN = diffusion(
    "HunyuanVideoTransformer3DModel",
    lambda: {
        "hidden_states": draw(1, 4, 1, 4, 4),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": draw(1, 6, 16),
        "pooled_projections": draw(1, 8),
        "encoder_attention_mask": torch.ones(1, 6),
        "guidance": torch.tensor([5.0]),
    },
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=10,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    patch_size=1,
    text_embed_dim=16,
    pooled_projection_dim=8,
    rope_axes_dim=(2, 4, 4),
)
LTX = diffusion(
    "LTXVideoTransformer3DModel",
    lambda: {
        "hidden_states": draw(1, 18, 4),
        "encoder_hidden_states": draw(1, 6, 16),
        "timestep": torch.tensor([5]),
        "encoder_attention_mask": torch.ones(1, 6),
        "num_frames": 2,
        "height": 3,
        "width": 3,
        "rope_interpolation_scale": (5.0, 300.0, 300.0),
    },
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=16,
    num_layers=1,
    caption_channels=16,
)


class MetaAttention(nn.Module):
    """Attention as in Meta's Llama: complex numbers, kv heads repeated by hand, heads in front of positions."""

    def __init__(self):
        super().__init__()
        self.wq, self.wo = nn.Linear(64, 64), nn.Linear(64, 64)
        self.wk, self.wv = nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x, freqs):
        batch, length, _ = x.shape
        q, k, v = (w(x).view(batch, length, -1, 16) for w in (self.wq, self.wk, self.wv))

        def rotate(t):
            t_ = torch.view_as_complex(t.float().reshape(*t.shape[:-1], -1, 2))
            return torch.view_as_real(t_ * freqs.view(1, length, 1, 8)).flatten(3).type_as(t)

        def repeat(t):
            return t[:, :, :, None].expand(-1, -1, -1, 2, -1).reshape(batch, length, 4, 16)

        q, k, v = rotate(q), repeat(rotate(k)), repeat(v)
        out = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


def meta():
    angle = torch.arange(24.0)[:, None] * 10000.0 ** -(torch.arange(8.0) / 8)
    freqs = torch.polar(torch.ones_like(angle), angle)
    return MetaAttention(), lambda net: net(draw(2, 24, 64), freqs)


# By name: how it is made, rotated calls, all calls, kv heads handed over, pairs of neighbours, rotated lanes.
CASES = {
    "llama": (text("Llama"), 2, 2, 2, False, 16),
    "qwen2": (text("Qwen2"), 2, 2, 2, False, 16),
    "qwen3": (text("Qwen3", head_dim=16), 2, 2, 2, False, 16),
    "mistral": (text("Mistral", sliding_window=8), 2, 2, 2, False, 16),
    "gemma3": (
        text("Gemma3", "TextModel", "TextConfig", head_dim=16, sliding_window=8),
        2,
        2,
        2,
        False,
        16,
    ),
    "olmo2": (text("Olmo2"), 2, 2, 2, False, 16),
    "phi3": (text("Phi3"), 2, 2, 2, False, 16),
    "phi3_partial": (text("Phi3", partial_rotary_factor=0.5), 2, 2, 2, False, 8),
    "gpt_neox": (text("GPTNeoX", rotary_pct=0.25), 2, 2, 4, False, 4),
    "glm4": (text("Glm4", head_dim=16, partial_rotary_factor=0.5), 2, 2, 2, True, 8),
    "cohere": (text("Cohere"), 2, 2, 2, True, 16),
    "modernbert": (modernbert, 2, 2, 4, False, 16),
    "flux": (FLUX, 2, 2, 4, True, 16),
    "wan": (WAN, 1, 2, 2, True, 12),
    "qwen_image": (QWEN_IMAGE, 1, 1, 3, True, 16),
    "hunyuan_video": (HUNYUAN, 2, 3, 2, True, 10),
    "ltx": (LTX, 1, 2, 2, True, 8),
    "meta": (meta, 1, 1, 2, True, 16),
}


# Calls of which the norm of q and k is fused, too. What the report says where there is one that is not.
NORMED = {"qwen3": 2, "gemma3": 2, "flux": 1, "olmo2": 2, "wan": 1, "ltx": 1}
NOT_NORMED = {
    "flux": "puts streams of tokens together that are normalized apart",
    "qwen_image": "streams of tokens are normalized and rotated apart",
    "hunyuan_video": "streams of tokens are normalized and rotated apart",
}


@pytest.mark.parametrize("name", CASES)
def test_rope_is_fused(name, spy, compiled, sharpen, reasons):
    build, fused, calls, kv_heads, interleaved, rotary_dim = CASES[name]
    model, run = build()
    sharpen(model)
    want = run(model)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    under = compiled(model)
    torch.testing.assert_close(run(under), want, rtol=2e-5, atol=2e-5)
    assert len(under.graphs) == 1
    assert (len(spy.fused), spy.plain) == (fused, calls - fused)
    assert sorted(reasons(model).values()).count("fused") == fused
    assert len(reasons(model)) == calls
    for call in spy.fused:
        assert (call.num_kv_heads, call.rope) == (kv_heads, lpattn.Rope(interleaved, rotary_dim))
    norms = list(reasons(model, "norm").values())
    assert norms.count("fused") == sum(norm is not None for norm in spy.norms) == NORMED.get(name, 0)
    others = {norm for norm in norms if norm not in ("fused", None)}
    assert bool(others) == (name in NOT_NORMED)
    assert all(NOT_NORMED[name] in other for other in others)
    if name in NORMED:
        spy.skewed = True
        assert not torch.allclose(run(under), want, rtol=1e-2, atol=1e-2)
        spy.skewed = False
    # A rotation that went the other way would show in these numbers.
    spy.turned = True
    assert not torch.allclose(run(under), want, rtol=1e-2, atol=1e-2)


def test_sizes_that_are_asked_for_are_no_other_use(spy, compiled, sharpen, reasons):
    """With dynamic shapes Wan asks for sizes of what it normalizes."""
    model, _ = WAN()
    sharpen(model)
    inputs = {
        "hidden_states": draw(2, 4, 2, 8, 8),
        "timestep": torch.tensor([5, 7]),
        "encoder_hidden_states": draw(2, 6, 16),
    }
    want = model(**inputs).sample
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    torch.testing.assert_close(compiled(model, dynamic=True)(**inputs).sample, want, rtol=2e-5, atol=2e-5)
    assert list(reasons(model, "norm").values()).count("fused") == 1


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3"])
def test_rotations_in_low_precision_are_fused(family, spy, compiled, sharpen):
    """In bfloat16 the untouched model rounds after every product, the fused rotation once."""
    names = ("TextModel", "TextConfig") if family == "Gemma3" else ("Model", "Config")
    options = {} if family == "Llama" else {"head_dim": 16}
    model, run = text(family, *names, **options)(torch.bfloat16)
    sharpen(model)
    want = run(model.float())
    model.bfloat16()
    plain = run(model)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    got = run(compiled(model))
    assert len(spy.fused) == 2
    assert all((norm is not None) == (family != "Llama") for norm in spy.norms)
    error, budget = ((x.float() - want).square().mean().sqrt() for x in (got, plain))
    assert error < 1.5 * budget


def test_encoders_without_rope_say_so(spy, compiled, reasons):
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    model, ids = transformers.BertModel(config).eval(), torch.randint(5, 99, (2, 24))
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    compiled(model)(ids)
    assert (len(spy.fused), spy.plain) == (0, 1)
    (reason,) = reasons(model).values()
    assert reason.startswith("q: no rotation lies between addmm")


def test_cached_keys_are_attended_to_as_they_are(spy, compiled, sharpen, reasons):
    """The keys of earlier steps come rotated: a second step must not rotate them again."""
    model, _ = text("Llama")()
    sharpen(model)
    ids = torch.randint(5, 99, (1, 24))
    want = model(input_ids=ids, use_cache=False).last_hidden_state[:, 16:]
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    under = compiled(model, dynamic=False)
    cache = model(input_ids=ids[:, :16], use_cache=True).past_key_values
    spy.clear()
    got = under(input_ids=ids[:, 16:], past_key_values=cache, use_cache=True).last_hidden_state
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert not spy.fused
    assert all("which puts rows together, is needed for something else" in why for why in reasons(model).values())
