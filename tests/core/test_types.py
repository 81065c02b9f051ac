"""The vocabulary: frozen, hashable, and worded as errors and reports print it."""

import copy
import dataclasses
import pickle

import pytest
import torch

import lpattn
from lpattn import AttentionBackend, AttentionCall, CausalKind, HadamardMode, MaskKind, Provenance, Reason, Rope

OTHER_VALUES = {
    "batch": 3,
    "num_heads": 8,
    "num_kv_heads": 2,
    "q_len": 65,
    "kv_len": 65,
    "head_dim": 64,
    "head_dim_v": 64,
    "dtype": torch.float16,
    "device_type": "cuda",
    "device_index": 1,
    "capability": (9, 0),
    "softmax_scale": 1.0,
    "mask": MaskKind.BOOL,
    "mask_shape": (1, 1, 64, 64),
    "causal": CausalKind.TOP_LEFT,
    "dropout": True,
    "hadamard": HadamardMode.QKV,
    "return_lse": True,
    "rope": Rope(False, 32),
    "varlen": lpattn.Varlen((-1, 0)),
    "contiguous_last_dim": False,
    "requires_grad": True,
}


def test_every_field_of_a_call_counts_in_equality_and_hash(make_call):
    call = make_call()
    assert call == make_call()
    assert hash(call) == hash(make_call())
    assert set(OTHER_VALUES) == {field.name for field in dataclasses.fields(AttentionCall)}
    calls = {call, *(make_call(**{name: value}) for name, value in OTHER_VALUES.items())}
    assert len(calls) == 1 + len(OTHER_VALUES)


@pytest.mark.parametrize("value", [AttentionCall, Reason, Rope, lpattn.Varlen, lpattn.Choice, lpattn.Capabilities])
def test_the_data_is_frozen(value, make_call):
    examples = {
        AttentionCall: make_call(),
        Reason: Reason("code", "message"),
        Rope: Rope(True, 8),
        lpattn.Varlen: lpattn.Varlen(),
        lpattn.Choice: lpattn.Choice("fake", Provenance.MODEL),
        lpattn.Capabilities: lpattn.Capabilities(dtypes=frozenset({torch.float16})),
    }
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(examples[value], field, None)


def test_describe_is_worded_as_in_the_design(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    call = AttentionCall(
        batch=2,
        num_heads=16,
        num_kv_heads=16,
        q_len=1024,
        kv_len=1024,
        head_dim=80,
        head_dim_v=80,
        dtype=torch.bfloat16,
        device_type="cuda",
        capability=(9, 0),
        softmax_scale=80**-0.5,
        causal=CausalKind.TOP_LEFT,
    )
    text = "q [2, 16, 1024, 80] bfloat16 on cuda:0 (NVIDIA H200, sm_90), causal, mask none"
    assert call.describe() == text
    assert dataclasses.replace(call, capability=(8, 0)).describe_device() == "cuda:0 (sm_80)"


PLAIN = "q [2, 4, 64, 32] bfloat16 on cpu, not causal, mask none"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, PLAIN),
        ({"kv_len": 77}, "q [2, 4, 64, 32] bfloat16 on cpu, kv_len 77, not causal, mask none"),
        ({"num_kv_heads": 2}, "q [2, 4, 64, 32] bfloat16 on cpu, num_kv_heads 2, not causal, mask none"),
        ({"head_dim_v": 16}, "q [2, 4, 64, 32] bfloat16 on cpu, head_dim_v 16, not causal, mask none"),
        (
            {"mask": MaskKind.BOOL, "mask_shape": (2, 1, 1, 64)},
            "q [2, 4, 64, 32] bfloat16 on cpu, not causal, mask bool [2, 1, 1, 64]",
        ),
        (
            {"mask": MaskKind.ADDITIVE, "mask_shape": (1, 1, 64, 64)},
            "q [2, 4, 64, 32] bfloat16 on cpu, not causal, mask additive [1, 1, 64, 64]",
        ),
        ({"softmax_scale": 0.0}, f"{PLAIN}, scale 0"),
        ({"softmax_scale": 0.25}, f"{PLAIN}, scale 0.25"),
        ({"dropout": True}, f"{PLAIN}, dropout"),
        ({"hadamard": HadamardMode.V_ONLY}, f"{PLAIN}, hadamard v_only"),
        ({"return_lse": True}, f"{PLAIN}, with lse"),
        ({"requires_grad": True}, f"{PLAIN}, requires grad"),
        ({"rope": Rope(False, 16)}, f"{PLAIN}, rope half-split on 16 lanes"),
        ({"rope": Rope(True, 32)}, f"{PLAIN}, rope interleaved on 32 lanes"),
    ],
)
def test_describe_names_what_is_out_of_the_ordinary(make_call, fields, text):
    assert make_call(**fields).describe() == text


def test_a_call_without_head_dim_can_be_described(make_call):
    call = make_call(head_dim=0, head_dim_v=0, softmax_scale=1.0)
    assert call.describe() == "q [2, 4, 64, 0] bfloat16 on cpu, not causal, mask none"


@pytest.mark.parametrize(
    ("mask", "shape", "expected"),
    [
        (MaskKind.BOOL, (2, 1, 1, 64), True),
        (MaskKind.BOOL, (1, 1, 1, 64), True),
        (MaskKind.BOOL, (1, 1, 1, 1), True),
        (MaskKind.BOOL, (2, 4, 1, 64), False),
        (MaskKind.BOOL, (2, 1, 64, 64), False),
        (MaskKind.BOOL, (2, 1, 0, 64), False),
        (MaskKind.BOOL, None, False),
        (MaskKind.ADDITIVE, (2, 1, 1, 64), False),
        (MaskKind.NONE, None, False),
    ],
)
def test_key_padding_is_a_bool_mask_without_heads_and_queries(make_call, mask, shape, expected):
    assert make_call(mask=mask, mask_shape=shape).key_padding is expected


def test_the_hash_of_a_call_stays_in_its_process(make_call):
    call = make_call()
    assert hash(call) == hash(make_call())
    # As hashes of strings are, another process' is another one.
    object.__setattr__(call, "_hash", hash(call) + 1)
    for copied in (pickle.loads(pickle.dumps(call)), copy.deepcopy(call), dataclasses.replace(call)):
        assert copied == call
        assert hash(copied) == hash(make_call())


def test_device_of_a_call(make_call):
    assert make_call().device == torch.device("cpu")
    assert make_call(device_type="cuda", device_index=3).device == torch.device("cuda", 3)


def test_reason_prints_its_remedy():
    assert str(Reason("head_dim", "head_dim 80: no")) == "head_dim 80: no"
    assert str(Reason("dropout", "dropout_p > 0", "model.eval()")) == "dropout_p > 0 (model.eval())"


@pytest.mark.parametrize("kind", [AttentionBackend, HadamardMode, MaskKind, CausalKind, Provenance])
def test_enums_are_the_strings_that_they_print(kind):
    for member in kind:
        assert member == str(member) == f"{member}" == member.value
        assert kind(member.value) is member
        assert pickle.loads(pickle.dumps(member)) is member


def test_the_names_that_the_design_fixes():
    assert {b.name: b.value for b in AttentionBackend} == {
        "FP8_FA3": "fp8_fa3",
        "FP8_TRITON": "fp8_triton",
        "BF16_REFERENCE": "bf16_reference",
    }
    assert {m.name: m.value for m in HadamardMode} == {"NONE": "none", "QKV": "qkv", "V_ONLY": "v_only"}


@pytest.mark.parametrize(
    "name", ["bf16_reference", "BF16_Reference", " BF16_REFERENCE ", AttentionBackend.BF16_REFERENCE]
)
def test_backends_are_named_in_any_case(qkv, name, make_model):
    q, k, v = qkv()
    lpattn.low_precision_sdpa(q, k, v, backend=name)
    with lpattn.low_precision_attention(name):
        pass
    model = lpattn.apply_low_precision_attention(make_model(), name)
    model(q)
    assert lpattn.attention_report(model)["attn"].exact == {"requested": 1}


@pytest.mark.parametrize("mode", ["v_only", "V_Only", "V_ONLY", HadamardMode.V_ONLY])
def test_hadamard_modes_are_named_in_any_case(qkv, add_backend, mode):
    fake = add_backend()
    lpattn.low_precision_sdpa(*qkv(), backend="fake", hadamard=mode)
    assert fake.calls[0].hadamard is HadamardMode.V_ONLY


@pytest.mark.parametrize("policy", ["fallback", "Fallback", "FALLBACK"])
def test_on_unsupported_is_named_in_any_case(qkv, add_backend, policy):
    add_backend(head_dims=frozenset({64}))
    with pytest.warns(lpattn.LpattnWarning, match="head_dim 8"):
        lpattn.low_precision_sdpa(*qkv(), backend="FAKE", on_unsupported=policy)
