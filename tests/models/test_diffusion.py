"""Diffusion transformers: joint attention over text and image, rotary embeddings, cross-attention to padded text."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")


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
    return model, lambda model: model(**{name: x.to(model.dtype) for name, x in inputs.items()}).sample


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 8, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([300.0, 700.0]),
    }
    return model, lambda model: model(**inputs).sample


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(2, 12, 32),
        "timestep": torch.tensor([300, 700]),
    }
    return model, lambda model: model(**inputs).sample


def text_mask(length, *real):
    return torch.arange(length) < torch.tensor(real)[:, None]


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=32,
    )
    inputs = {
        "hidden_states": torch.randn(2, 32, 8),
        "encoder_hidden_states": torch.randn(2, 24, 32),
        "encoder_attention_mask": text_mask(24, 24, 3).long(),
        "timestep": torch.tensor([300, 700]),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }
    return model, lambda model: model(**inputs).sample


def hunyuan():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=None,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 1, 4, 4),
        "timestep": torch.tensor([300, 700]),
        "encoder_hidden_states": torch.randn(2, 24, 32),
        "encoder_attention_mask": text_mask(24, 24, 3).long(),
        "pooled_projections": torch.randn(2, 32),
    }
    return model, lambda model: model(**inputs).sample


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=64,
        caption_channels=32,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
        norm_num_groups=4,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 24, 32),
        "encoder_attention_mask": text_mask(24, 24, 3).long(),
        "timestep": torch.tensor([300, 700]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, lambda model: model(**inputs).sample


CASES = {
    "flux": {"build": flux, "bug": "causal", "attention": "FluxAttention", "vo": 4.0},
    "flux-bf16": {"build": flux, "bug": "causal", "attention": "FluxAttention", "vo": 4.0, "dtype": torch.bfloat16},
    "sd3": {"build": sd3, "bug": "causal", "attention": "Attention", "vo": 3.0},
    "wan": {"build": wan, "bug": "causal", "attention": "WanAttention"},
    "ltx": {"build": ltx, "bug": "mask_dropped", "attention": "LTXAttention"},
    "hunyuan": {"build": hunyuan, "bug": "mask_dropped", "attention": "Attention", "vo": 4.0},
    "pixart": {"build": pixart, "bug": "mask_dropped", "attention": "Attention", "vo": 4.0},
}


def test_reference_is_the_untouched_model(subject):
    subject.check_reference()


def test_low_precision_keeps_the_answer(subject, fp8_emulated):
    subject.check_low_precision(fp8_emulated)


def test_planted_bug_is_noticed(subject):
    subject.check_bug()
