"""Capabilities are data; these are the reasons that the data becomes."""

import dataclasses

import pytest
import torch

from lpattn import Capabilities, CausalKind, HadamardMode, MaskKind, Reason

ALL_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
PERMISSIVE = Capabilities(
    dtypes=ALL_FLOATS,
    head_dim_v_differs=True,
    masks=frozenset(MaskKind),
    causal_rectangular=True,
    lse=True,
    dropout=True,
    hadamard=frozenset(HadamardMode),
    backward=True,
)

TABLE = [
    (
        {"backward": False},
        {"requires_grad": True},
        Reason(
            "requires_grad",
            "inputs require grad: has no backward pass",
            "wrap the forward in torch.no_grad() or torch.inference_mode()",
        ),
    ),
    ({"device_types": {"cuda", "xpu"}}, {}, Reason("device", "device cpu: runs on cuda, xpu")),
    (
        {"architectures": ((9, 0), (9, 0))},
        {"device_type": "cuda", "capability": (8, 6)},
        Reason("architecture", "architecture sm_86: has kernels for sm_90"),
    ),
    (
        {"architectures": ((9, 0), (10, 3))},
        {"device_type": "cuda", "capability": (12, 0)},
        Reason("architecture", "architecture sm_120: has kernels for sm_90 to sm_103"),
    ),
    (
        {"dtypes": {torch.float16, torch.bfloat16}},
        {"dtype": torch.float64},
        Reason("dtype", "dtype float64: takes bfloat16, float16"),
    ),
    (
        {"head_dims": {256, 32, 64}},
        {"head_dim": 80, "head_dim_v": 80},
        Reason("head_dim", "head_dim 80: has kernels for 32, 64, 256"),
    ),
    (
        {"head_dim_v_differs": False},
        {"head_dim_v": 16},
        Reason("head_dim_v", "head_dim_v 16: must equal head_dim, which is 32"),
    ),
    (
        {"masks": {MaskKind.NONE}},
        {"mask": MaskKind.BOOL, "mask_shape": (2, 1, 1, 64)},
        Reason("mask", "bool attn_mask [2, 1, 1, 64]: takes no attn_mask"),
    ),
    (
        {"masks": {MaskKind.NONE, MaskKind.BOOL}},
        {"mask": MaskKind.ADDITIVE, "mask_shape": (1, 4, 64, 64)},
        Reason("mask", "additive attn_mask [1, 4, 64, 64]: takes bool masks"),
    ),
    (
        {"masks": {MaskKind.NONE}, "key_padding": True},
        {"mask": MaskKind.BOOL, "mask_shape": (2, 1, 64, 64)},
        Reason(
            "mask",
            "bool attn_mask [2, 1, 64, 64]: takes key-padding masks only, bool [B, 1, 1, kv_len]",
            "if it hides the same keys from all heads and queries, pass it as bool [B, 1, 1, kv_len]",
        ),
    ),
    (
        {"masks": {MaskKind.NONE}, "key_padding": True},
        {"mask": MaskKind.ADDITIVE, "mask_shape": (2, 1, 1, 64)},
        Reason(
            "mask",
            "additive attn_mask [2, 1, 1, 64]: takes key-padding masks only, bool [B, 1, 1, kv_len]",
            "if it hides the same keys from all heads and queries, pass it as bool [B, 1, 1, kv_len]",
        ),
    ),
    (
        {"masks": {MaskKind.NONE, MaskKind.ADDITIVE}, "key_padding": True},
        {"mask": MaskKind.BOOL, "mask_shape": (1, 4, 1, 64)},
        Reason(
            "mask",
            "bool attn_mask [1, 4, 1, 64]: takes additive masks and key-padding masks, bool [B, 1, 1, kv_len]",
            "if it hides the same keys from all heads and queries, pass it as bool [B, 1, 1, kv_len]",
        ),
    ),
    (
        {"masks": {MaskKind.NONE, MaskKind.BOOL}, "key_padding": True},
        {"mask": MaskKind.ADDITIVE, "mask_shape": (2, 1, 1, 64)},
        Reason("mask", "additive attn_mask [2, 1, 1, 64]: takes bool masks"),
    ),
    ({"causal": False}, {"causal": CausalKind.TOP_LEFT}, Reason("causal", "causal: has no causal kernel")),
    (
        {"causal_rectangular": False},
        {"causal": CausalKind.TOP_LEFT, "q_len": 5},
        Reason(
            "causal_alignment",
            "causal with q_len 5 and kv_len 64: its causal mask is SDPA's (top-left) only where they are equal",
        ),
    ),
    ({"gqa": False}, {"num_kv_heads": 2}, Reason("gqa", "num_kv_heads 2: must equal num_heads, which is 4")),
    ({"lse": False}, {"return_lse": True}, Reason("lse", "return_lse: does not return the log-sum-exp")),
    (
        {"dropout": False},
        {"dropout": True},
        Reason("dropout", "dropout_p > 0: has no dropout", "set dropout_p=0.0, or model.eval()"),
    ),
    (
        {"hadamard": {HadamardMode.NONE, HadamardMode.V_ONLY}},
        {"hadamard": HadamardMode.QKV},
        Reason("hadamard", "hadamard qkv: offers none, v_only"),
    ),
    (
        {"strided_last_dim": False},
        {"contiguous_last_dim": False},
        Reason("layout", "last dimension of q, k or v has a stride other than 1", "pass contiguous tensors"),
    ),
]


def restrict(data):
    data = {name: frozenset(value) if isinstance(value, set) else value for name, value in data.items()}
    return dataclasses.replace(PERMISSIVE, **data)


@pytest.mark.parametrize(("data", "fields", "reason"), TABLE, ids=[row[2].code for row in TABLE])
def test_each_limit_gives_its_reason_and_no_other(make_call, data, fields, reason):
    assert restrict(data).reasons_against(make_call(**fields)) == [reason]
    assert PERMISSIVE.reasons_against(make_call(**fields)) == []
    if fields:
        assert restrict(data).reasons_against(make_call()) == []


ALL_BUT_CAUSAL = (
    "requires_grad device architecture dtype head_dim head_dim_v mask causal_alignment gqa lse dropout hadamard layout"
)


def test_every_code_has_its_row():
    assert {row[2].code for row in TABLE} == {"causal", *ALL_BUT_CAUSAL.split()}


def test_all_reasons_are_given_at_once(make_call):
    none_of_it = Capabilities(
        dtypes=frozenset({torch.float16}),
        device_types=frozenset({"xpu"}),
        architectures=((9, 0), (9, 0)),
        head_dims=frozenset({64}),
        masks=frozenset({MaskKind.NONE}),
        gqa=False,
        strided_last_dim=False,
    )
    call = make_call(
        device_type="cuda",
        capability=(8, 0),
        head_dim_v=16,
        num_kv_heads=1,
        q_len=3,
        mask=MaskKind.ADDITIVE,
        mask_shape=(1, 1, 3, 64),
        causal=CausalKind.TOP_LEFT,
        return_lse=True,
        dropout=True,
        hadamard=HadamardMode.QKV,
        contiguous_last_dim=False,
        requires_grad=True,
    )
    expected = ALL_BUT_CAUSAL
    assert [r.code for r in none_of_it.reasons_against(call)] == expected.split()
    without_causal = dataclasses.replace(none_of_it, causal=False)
    assert [r.code for r in without_causal.reasons_against(call)] == expected.replace("_alignment", "").split()


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_the_range_of_architectures_includes_both_ends(make_call, capability):
    data = restrict({"architectures": ((8, 9), (10, 0))})
    assert data.reasons_against(make_call(device_type="cuda", capability=capability)) == []


@pytest.mark.parametrize("capability", [(8, 8), (10, 1)])
def test_the_range_of_architectures_ends(make_call, capability):
    data = restrict({"architectures": ((8, 9), (10, 0))})
    assert [r.code for r in data.reasons_against(make_call(device_type="cuda", capability=capability))] == [
        "architecture"
    ]


@pytest.mark.parametrize(
    ("device", "devices", "codes"),
    [
        ("cpu", [], ["device"]),
        ("cuda", [], ["device"]),
        ("cuda:1", [(9, 0)], ["device"]),
        ("cuda", [(9, 0)], []),
        ("cuda:1", [(8, 0), (9, 0)], []),
        ("cuda:1", [(9, 0), (8, 0)], ["architecture"]),
    ],
)
def test_a_device_is_judged_without_a_call(monkeypatch, device, devices, codes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: devices[device.index or 0])
    data = restrict({"device_types": {"cuda"}, "architectures": ((9, 0), (9, 0))})
    reasons = data.reasons_against_device(torch.device(device))
    assert [reason.code for reason in reasons] == codes
    named = {"architecture": "architecture sm_80: has kernels for sm_90", "device": device}
    assert all(named[reason.code] in reason.message for reason in reasons)


def test_a_device_without_limits_is_one_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert PERMISSIVE.reasons_against_device(torch.device("cpu")) == []
    assert [r.code for r in PERMISSIVE.reasons_against_device(torch.device("cuda"))] == ["device"]


def test_architectures_say_nothing_about_other_devices(make_call):
    assert restrict({"architectures": ((9, 0), (9, 0))}).reasons_against(make_call()) == []


def test_square_causal_calls_need_no_rectangular_kernel(make_call):
    call = make_call(causal=CausalKind.TOP_LEFT)
    assert restrict({"causal_rectangular": False}).reasons_against(call) == []


@pytest.mark.parametrize("shape", [(2, 1, 1, 64), (1, 1, 1, 64), (2, 1, 1, 1)])
@pytest.mark.parametrize("masks", [{MaskKind.NONE}, {MaskKind.NONE, MaskKind.ADDITIVE}])
def test_key_padding_is_what_it_takes_of_the_bool_masks(make_call, shape, masks):
    call = make_call(mask=MaskKind.BOOL, mask_shape=shape)
    assert restrict({"masks": masks, "key_padding": True}).reasons_against(call) == []
    assert [r.code for r in restrict({"masks": masks}).reasons_against(call)] == ["mask"]


def test_key_padding_takes_nothing_away(make_call):
    call = make_call(mask=MaskKind.BOOL, mask_shape=(2, 4, 64, 64))
    assert restrict({"masks": {MaskKind.NONE, MaskKind.BOOL}, "key_padding": True}).reasons_against(call) == []


def test_what_capabilities_promise_by_default(make_call):
    default = Capabilities(dtypes=ALL_FLOATS)
    assert default.reasons_against(make_call(causal=CausalKind.TOP_LEFT, num_kv_heads=1)) == []
    call = make_call(
        head_dim_v=16,
        mask=MaskKind.BOOL,
        mask_shape=(1, 1, 1, 64),
        q_len=5,
        causal=CausalKind.TOP_LEFT,
        return_lse=True,
        dropout=True,
        hadamard=HadamardMode.V_ONLY,
        requires_grad=True,
    )
    expected = ["requires_grad", "head_dim_v", "mask", "causal_alignment", "lse", "dropout", "hadamard"]
    assert [r.code for r in default.reasons_against(call)] == expected
