"""Inputs that no attention could take: refused with the value, the limit and, where there is one, the remedy."""

import math

import pytest
import torch

import lpattn
from lpattn import InvalidArgumentError


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


Q = x(2, 4, 6, 8)
HINT = "\nIf your tensors are [B, S, H, D], pass x.transpose(1, 2)"
SCALE = "scale must be a finite number, or None for 1/sqrt(head_dim); got "

SDPA = {
    "query_type": (([1.0], Q, Q), {}, "query must be a torch.Tensor; got list"),
    "key_type": ((Q, None, Q), {}, "key must be a torch.Tensor; got NoneType"),
    "value_type": ((Q, Q, 3), {}, "value must be a torch.Tensor; got int"),
    "mask_type": ((Q, Q, Q), {"attn_mask": True}, "attn_mask must be a torch.Tensor; got bool"),
    "mask_and_causal": (
        (Q, Q, Q),
        {"attn_mask": x(6, 6), "is_causal": True},
        "attn_mask and is_causal=True contradict each other; pass one, or fold the causal part into the mask",
    ),
    "dropout_high": ((Q, Q, Q), {"dropout_p": 1.5}, "dropout_p must lie in [0, 1]; got 1.5"),
    "dropout_low": ((Q, Q, Q), {"dropout_p": -0.1}, "dropout_p must lie in [0, 1]; got -0.1"),
    "dropout_nan": ((Q, Q, Q), {"dropout_p": float("nan")}, "dropout_p must lie in [0, 1]; got nan"),
    "scale_nan": ((Q, Q, Q), {"scale": math.nan}, SCALE + "nan (float)"),
    "scale_inf": ((Q, Q, Q), {"scale": -math.inf}, SCALE + "-inf (float)"),
    "scale_bool": ((Q, Q, Q), {"scale": True}, SCALE + "True (bool)"),
    "scale_huge": ((Q, Q, Q), {"scale": 10**400}, SCALE + f"{10**400} (int)"),
    "dtypes": (
        (Q, Q.half(), Q),
        {},
        "q, k, v must have one dtype; got torch.float32, torch.float16, torch.float32",
    ),
    "integers": ((Q.long(),) * 3, {}, "q, k, v must be floating point; got torch.int64"),
    "complex": ((Q.to(torch.complex64),) * 3, {}, "q, k, v must be floating point; got torch.complex64"),
    "devices": (
        (Q, Q, x(2, 4, 6, 8, device="meta")),
        {},
        "q, k, v must be on one device; got cpu, cpu, meta",
    ),
    "batch": ((Q, x(3, 4, 6, 8), Q), {}, "q, k, v must have one batch size; got 2, 3, 2"),
    "head_dim": ((Q, x(2, 4, 6, 9), Q), {}, "q and k must have one head_dim; got 8 and 9"),
    "head_dim_of_one_head": ((Q, x(2, 1, 6, 9), x(2, 1, 6, 8)), {}, "q and k must have one head_dim; got 8 and 9"),
    "kv_len": (
        (Q, x(2, 4, 7, 8), Q),
        {},
        "k and v must have the same heads and length; got [H, S] = [4, 7] and [4, 6]",
    ),
    "kv_heads": (
        (Q, x(2, 2, 6, 8), x(2, 4, 6, 8)),
        {},
        "k and v must have the same heads and length; got [H, S] = [2, 6] and [4, 6]" + HINT,
    ),
    "groups": (
        (x(2, 4, 5, 8), x(2, 3, 7, 8), x(2, 3, 7, 8)),
        {},
        "num_heads must be a multiple of num_kv_heads; got 4 and 3",
    ),
    "layout": (
        (x(2, 10, 4, 8), x(2, 7, 4, 8), x(2, 7, 4, 8)),
        {},
        "num_heads must be a multiple of num_kv_heads; got 10 and 7" + HINT,
    ),
    "mask_device": ((Q, Q, Q), {"attn_mask": x(6, 6, device="meta")}, "attn_mask must be on cpu as q is; got meta"),
    "mask_dtype": (
        (Q, Q, Q),
        {"attn_mask": x(6, 6, dtype=torch.int64)},
        "attn_mask must be bool, float32 or of q's dtype, torch.float32; got torch.int64",
    ),
    "mask_shape": (
        (Q, Q, Q),
        {"attn_mask": x(2, 6)},
        "attn_mask [2, 6] must broadcast to [B, H, q_len, kv_len] = [2, 4, 6, 6]",
    ),
    "mask_batch": (
        (Q, Q, Q),
        {"attn_mask": x(3, 1, 6, 6)},
        "attn_mask [3, 1, 6, 6] must broadcast to [B, H, q_len, kv_len] = [2, 4, 6, 6]",
    ),
    "dimensions": ((x(8), x(6, 8), x(6, 8)), {}, "q, k, v must be [B, H, S, D]; got [8], [6, 8], [6, 8]"),
}


@pytest.mark.parametrize("function", [lpattn.low_precision_sdpa, lpattn.explain])
@pytest.mark.parametrize("case", SDPA)
def test_inputs_of_sdpa(function, case):
    args, options, text = SDPA[case]
    with pytest.raises(InvalidArgumentError) as caught:
        function(*args, **options)
    assert str(caught.value) == text
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("wrong", "good"),
    [
        ({"is_causal": 1}, {"is_causal": True}),
        ({"scale": "1.0"}, {"scale": 1.0}),
        ({"scale": True}, {"scale": 1.0}),
        ({"dropout_p": 2.0}, {}),
    ],
)
def test_a_good_call_before_does_not_let_a_wrong_one_pass(wrong, good):
    for _ in range(2):
        lpattn.low_precision_sdpa(Q, Q, Q, backend="bf16_reference", **good)
        with pytest.raises(InvalidArgumentError):
            lpattn.low_precision_sdpa(Q, Q, Q, backend="bf16_reference", **wrong)


def test_what_a_model_may_pass_to_sdpa_may_not_be_passed_to_the_function(qkv):
    class Both(torch.nn.Module):
        def forward(self, q, k, v, mask):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, 0.0, True)
            return lpattn.low_precision_sdpa(q, k, v, mask, 0.0, True)

    model = lpattn.apply_low_precision_attention(Both(), "bf16_reference")
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match="contradict each other"):
            model(*qkv(), torch.ones(6, 6, dtype=torch.bool))


QR = x(2, 6, 4, 8)
COS = x(1, 6, 1, 8)
AXIS = "\n[S, rotary_dim] and [B, S, rotary_dim] tables need an axis for heads: cos.unsqueeze(-2)"

ROPE = {
    "query_rank": ((x(6, 4, 8), QR, QR, COS, COS), {}, "query must be a [B, S, H, D] tensor; got [6, 4, 8]"),
    "key_type": ((QR, None, QR, COS, COS), {}, "key must be a [B, S, H, D] tensor; got NoneType"),
    "value_rank": ((QR, QR, x(2, 6, 4), COS, COS), {}, "value must be a [B, S, H, D] tensor; got [2, 6, 4]"),
    "one_of_two": ((QR, QR, QR, COS, COS), {"cos_k": COS}, "cos_k and sin_k go together; got only one of them"),
    "the_other": ((QR, QR, QR, COS, COS), {"sin_k": COS}, "cos_k and sin_k go together; got only one of them"),
    "odd": (
        (QR, QR, QR, x(1, 6, 1, 5), x(1, 6, 1, 5)),
        {},
        "rotary_dim, the last dimension of cos, must be even and at most head_dim 8; got 5",
    ),
    "wide": (
        (QR, QR, QR, x(1, 6, 1, 10), x(1, 6, 1, 10)),
        {},
        "rotary_dim, the last dimension of cos, must be even and at most head_dim 8; got 10",
    ),
    "none": (
        (QR, QR, QR, x(1, 6, 1, 0), x(1, 6, 1, 0)),
        {},
        "rotary_dim, the last dimension of cos, must be even and at most head_dim 8; got 0",
    ),
    "scalar": (
        (QR, QR, QR, x(), x()),
        {},
        "rotary_dim, the last dimension of cos, must be even and at most head_dim 8; got 0",
    ),
    "device": (
        (QR, QR, QR, COS, x(1, 6, 1, 8, device="meta")),
        {},
        "sin must be on cpu as q and k are; got meta",
    ),
    "nested": (
        (torch.nested.nested_tensor([x(5, 4, 8), x(6, 4, 8)], layout=torch.jagged), QR, QR, COS, COS),
        {},
        "query is a nested tensor; a rotation takes plain [B, S, H, D] tensors",
    ),
    "complex": (
        (QR, QR, QR, COS, COS),
        {"cos_k": COS, "sin_k": COS.to(torch.complex64)},
        "sin_k must be float16, bfloat16, float32 or float64, a number for each lane; got torch.complex64",
    ),
    "integers": (
        (QR, QR, QR, COS.long(), COS),
        {},
        "cos must be float16, bfloat16, float32 or float64, a number for each lane; got torch.int64",
    ),
    "float8": (
        (QR, QR, QR, COS, COS.to(torch.float8_e4m3fn)),
        {},
        "sin must be float16, bfloat16, float32 or float64, a number for each lane; got torch.float8_e4m3fn",
    ),
    "interleaved": (
        (QR, QR, QR, COS, COS),
        {"interleaved": "yes"},
        "interleaved must be True or False; got 'yes' (str)",
    ),
    "no_head_axis": (
        (QR, QR, QR, x(6, 8), x(6, 8)),
        {},
        "cos [6, 8] must broadcast to [B, S, H, rotary_dim] = [2, 6, 4, 8]" + AXIS,
    ),
    "no_head_axis_in_a_batch": (
        (QR, QR, QR, x(2, 6, 8), x(2, 6, 8)),
        {},
        "cos [2, 6, 8] must broadcast to [B, S, H, rotary_dim] = [2, 6, 4, 8]" + AXIS,
    ),
    "as_many_positions_as_heads": (
        (x(2, 4, 4, 8), x(2, 4, 4, 8), x(2, 4, 4, 8), x(4, 8), x(4, 8)),
        {},
        "cos [4, 8] must broadcast to [B, S, H, rotary_dim] = [2, 4, 4, 8]" + AXIS,
    ),
    "length": (
        (QR, QR, QR, COS, x(1, 7, 1, 8)),
        {},
        "sin [1, 7, 1, 8] must broadcast to [B, S, H, rotary_dim] = [2, 6, 4, 8]" + AXIS,
    ),
    "widths_differ": (
        (QR, QR, QR, COS, x(1, 6, 1, 4)),
        {},
        "sin [1, 6, 1, 4] must broadcast to [B, S, H, rotary_dim] = [2, 6, 4, 8]" + AXIS,
    ),
    "length_of_the_keys": (
        (QR, x(2, 9, 4, 8), x(2, 9, 4, 8), COS, COS),
        {},
        "cos (for the keys) [1, 6, 1, 8] must broadcast to [B, S, H, rotary_dim] = [2, 9, 4, 8]" + AXIS,
    ),
    "cos_k": (
        (QR, QR, QR, COS, COS),
        {"cos_k": x(1, 5, 1, 8), "sin_k": COS},
        "cos_k [1, 5, 1, 8] must broadcast to [B, S, H, rotary_dim] = [2, 6, 4, 8]" + AXIS,
    ),
    "sin_k": (
        (QR, QR, QR, COS, COS),
        {"cos_k": COS, "sin_k": x(1, 6, 1, 4)},
        "sin_k [1, 6, 1, 4] must broadcast to [B, S, H, rotary_dim] = [2, 6, 4, 8]" + AXIS,
    ),
    "as_sdpa": (
        (QR, QR, QR, COS, COS),
        {"attn_mask": x(5, 6)},
        "attn_mask [5, 6] must broadcast to [B, H, q_len, kv_len] = [2, 4, 6, 6]",
    ),
}


@pytest.mark.parametrize("case", ROPE)
def test_inputs_of_rope_sdpa(case):
    args, options, text = ROPE[case]
    with pytest.raises(InvalidArgumentError) as caught:
        lpattn.low_precision_rope_sdpa(*args, **options)
    assert str(caught.value) == text


def test_positions_never_pass_for_heads():
    q, cos = x(1, 4, 4, 8), x(1, 4, 8)
    with pytest.raises(InvalidArgumentError, match="need an axis for heads"):
        lpattn.low_precision_rope_sdpa(q, q, q, cos, cos, backend="bf16_reference")


@pytest.mark.parametrize("name", ["cos", "sin", "cos_k", "sin_k"])
def test_tables_must_be_tensors(name):
    tables = {"cos": COS, "sin": COS, "cos_k": COS, "sin_k": COS, name: 1.0}
    with pytest.raises(InvalidArgumentError, match=rf"^{name} must be .*float"):
        lpattn.low_precision_rope_sdpa(QR, QR, QR, **tables)


@pytest.mark.parametrize(("option", "value"), [("dropout_p", "0.1"), ("scale", "0.1"), ("scale", [1.0])])
def test_numbers_must_be_numbers(option, value):
    with pytest.raises(InvalidArgumentError, match=option):
        lpattn.low_precision_sdpa(Q, Q, Q, **{option: value}, backend="bf16_reference")
