"""The operators that compiled graphs contain: schema, fake, autograd, dynamic shapes, and no silent detaching."""

import dataclasses

import pytest
import torch

import lpattn
from lpattn import UnsupportedCallError, ops
from lpattn.ledger import Ledger
from lpattn.settings import Settings
from lpattn.types import Provenance

EXACT = Settings("bf16_reference", provenance=Provenance.MODEL)
FAKE = Settings("fake", provenance=Provenance.MODEL)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

SDPA_CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "dim_v": {"dim_v": 5},
    "dim_v_rectangular": {"dim_v": 12, "kv_len": 7, "is_causal": True},
    "grouped": {"kv_heads": 2, "scale": 0.3},
    "single_head_of_keys": {"kv_heads": 1, "dim_v": 3, "q_len": 1},
    "transposed": {"transposed": True, "dim_v": 5},
    "bool_mask": {"mask": torch.rand(2, 1, 6, 9) > 0.3, "kv_len": 9},
    "float_mask": {"mask": torch.randn(6, 9), "kv_len": 9, "kv_heads": 2},
    "expanded_mask": {"mask": (torch.rand(2, 1, 1, 9) > 0.3).expand(2, 1, 6, 9), "kv_len": 9},
    "half": {"dtype": torch.bfloat16, "dim_v": 5},
}


def sdpa_args(
    settings,
    *,
    q_len=6,
    kv_len=6,
    heads=4,
    kv_heads=4,
    dim=8,
    dim_v=8,
    mask=None,
    is_causal=False,
    scale=None,
    transposed=False,
    dtype=torch.float32,
    layer=None,
):
    def tensor(h, s, d):
        if transposed:
            return torch.randn(2, s, h, d, dtype=dtype).transpose(1, 2)
        return torch.randn(2, h, s, d, dtype=dtype)

    q, k, v = tensor(heads, q_len, dim), tensor(kv_heads, kv_len, dim), tensor(kv_heads, kv_len, dim_v)
    return q, k, v, mask, 0.0, is_causal, scale, layer, settings.text


def rope_args(settings, *, own_tables=False, interleaved=False, rotary_dim=6, transposed=False, **options):
    q, k, v, *rest = sdpa_args(settings, **options)
    if transposed:
        q, k, v = (x.contiguous().transpose(1, 2) for x in (q, k, v))
    else:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    tables = [torch.randn(1, q.shape[1], 1, rotary_dim) for _ in range(2)]
    tables += [torch.randn(2, k.shape[1], 1, rotary_dim) if own_tables else None for _ in range(2)]
    return q, k, v, *tables, interleaved, *rest


ROPE_CASES = {
    "half_split": {"dim_v": 5},
    "interleaved": {"interleaved": True, "rotary_dim": 8},
    "own_tables": {"own_tables": True, "kv_len": 9, "kv_heads": 2, "dim_v": 5},
    "transposed": {"transposed": True, "dim_v": 12, "is_causal": True},
    "mask": {"mask": torch.randn(2, 1, 1, 6), "kv_heads": 1},
    "expanded_mask": {"mask": torch.randn(2, 1, 1, 6).expand(2, 4, 6, 6)},
}


@pytest.mark.parametrize("settings", [EXACT, FAKE], ids=["exact", "fake"])
@pytest.mark.parametrize("case", SDPA_CASES)
@pytest.mark.parametrize("operator", [ops.sdpa, ops.sdpa_lse])
def test_opcheck_of_sdpa(add_backend, operator, case, settings):
    add_backend()
    args = sdpa_args(settings, **SDPA_CASES[case])
    torch.library.opcheck(operator, args, test_utils=CHECKS)


@pytest.mark.parametrize("case", ROPE_CASES)
@pytest.mark.parametrize("operator", [ops.rope_sdpa, ops.rope_sdpa_lse])
def test_opcheck_of_rope_sdpa(add_backend, operator, case):
    add_backend(fused_rope=True)
    torch.library.opcheck(operator, rope_args(FAKE, **ROPE_CASES[case]), test_utils=CHECKS)
    torch.library.opcheck(operator, rope_args(EXACT, **ROPE_CASES[case]), test_utils=CHECKS[::2])


EMPTY = [{"q_len": 0}, {"kv_len": 0, "dim_v": 5}, {"kv_len": 0, "kv_heads": 2}]


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("operator", [ops.sdpa, ops.sdpa_lse])
def test_opcheck_of_empty_inputs(operator, case):
    torch.library.opcheck(operator, sdpa_args(EXACT, **case), test_utils=CHECKS[::2])


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("operator", [ops.rope_sdpa, ops.rope_sdpa_lse])
def test_opcheck_of_empty_inputs_with_rope(operator, case):
    torch.library.opcheck(operator, rope_args(EXACT, own_tables=True, **case), test_utils=CHECKS[::2])


@pytest.mark.parametrize("case", SDPA_CASES)
def test_operators_compute_what_the_function_computes(add_backend, in_bshd, case):
    add_backend()
    args = sdpa_args(FAKE, **SDPA_CASES[case])
    q, k, v, mask, _, is_causal, scale, *_ = args
    expected, expected_lse = lpattn.low_precision_sdpa(
        q, k, v, mask, is_causal=is_causal, scale=scale, backend="fake", return_lse=True
    )
    out, lse = ops.sdpa_lse(*args)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert in_bshd(out)
    torch.testing.assert_close(ops.sdpa(*args), expected)


@pytest.mark.parametrize("case", ROPE_CASES)
def test_rope_operators_compute_what_the_function_computes(add_backend, in_bshd, case):
    fake = add_backend(fused_rope=True)
    args = rope_args(FAKE, **ROPE_CASES[case])
    q, k, v, cos, sin, cos_k, sin_k, interleaved, mask, _, is_causal, scale, *_ = args
    options = {"cos_k": cos_k, "sin_k": sin_k, "interleaved": interleaved}
    expected, expected_lse = lpattn.low_precision_rope_sdpa(
        q, k, v, cos, sin, mask, is_causal=is_causal, scale=scale, **options, backend="fake", return_lse=True
    )
    out, lse = ops.rope_sdpa_lse(*args)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert in_bshd(out)
    torch.testing.assert_close(ops.rope_sdpa(*args), expected)
    assert fake.calls[0] == fake.calls[1]
    assert fake.calls[2] == dataclasses.replace(fake.calls[0], return_lse=False)


# Gradients

OPERATORS = {
    "sdpa": (ops.sdpa, sdpa_args),
    "sdpa_lse": (ops.sdpa_lse, sdpa_args),
    "rope_sdpa": (ops.rope_sdpa, rope_args),
    "rope_sdpa_lse": (ops.rope_sdpa_lse, rope_args),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("which", range(3))
def test_backward_raises_and_nothing_is_detached(add_backend, name, which):
    add_backend()
    operator, make = OPERATORS[name]
    args = make(FAKE)
    args[which].requires_grad_()
    result = operator(*args)
    for out in result if isinstance(result, tuple) else (result,):
        assert out.requires_grad
        with pytest.raises(NotImplementedError, match=r"no backward pass; run them under torch\.no_grad\(\)"):
            out.sum().backward(retain_graph=True)
    with torch.no_grad():
        result = operator(*args)
    assert not any(out.requires_grad for out in (result if isinstance(result, tuple) else (result,)))


def test_a_mask_that_requires_grad_is_not_detached(add_backend):
    args = sdpa_args(EXACT, mask=torch.randn(6, 6, requires_grad=True))
    out = ops.sdpa(*args)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        out.sum().backward()


# What travels in the graph


@pytest.mark.parametrize("name", OPERATORS)
def test_the_layer_is_found_by_its_tensor(add_backend, name):
    add_backend()
    operator, make = OPERATORS[name]
    ledger = Ledger()
    tag = torch.tensor(ledger.id)
    for _ in range(3):
        operator(*make(FAKE, layer=tag))
    assert ledger.low == {"fake": 3}
    assert ledger.provenance is Provenance.MODEL
    del ledger
    operator(*make(FAKE, layer=tag))


@pytest.mark.parametrize("operator", [ops.sdpa, ops.sdpa_lse])
def test_why_rope_was_not_fused_reaches_the_report(operator):
    ledger = Ledger()
    tag = torch.tensor(ledger.id)
    torch.library.opcheck(operator, (*sdpa_args(EXACT, layer=tag, dim_v=5), "lanes differ"), test_utils=CHECKS[::2])
    operator(*sdpa_args(EXACT, layer=tag), "lanes differ")
    assert ledger.rope == "lanes differ"
    operator(*sdpa_args(EXACT, layer=tag))
    assert ledger.rope is not None
    assert ledger.rope.startswith("not looked for")


def test_exact_calls_are_counted_by_an_operator():
    ledger = Ledger()
    torch.library.opcheck(
        ops.count_exact,
        (torch.tensor(ledger.id), "need_weights", "computes its weights"),
        test_utils=("test_schema", "test_faketensor"),
    )
    ledger.clear()
    ops.count_exact(torch.tensor(ledger.id), "need_weights", "computes its weights")
    assert ledger.exact == {"need_weights": 1}
    assert ledger.details["need_weights"].message == "computes its weights"


@pytest.mark.parametrize("name", OPERATORS)
def test_the_settings_are_read_when_the_operator_runs(add_backend, name):
    operator, make = OPERATORS[name]
    one, two = add_backend("one"), add_backend("two", head_dims=frozenset({64}))
    operator(*make(Settings("one")))
    with pytest.raises(UnsupportedCallError, match="head_dim 8"):
        operator(*make(Settings("two")))
    assert (len(one.calls), len(two.calls)) == (1, 0)
