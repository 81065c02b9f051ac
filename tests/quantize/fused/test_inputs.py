"""Inputs in any memory layout: only what belongs to them is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lpattn.types import HadamardMode

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
LAYOUTS = ["bhsd", "bshd", "sliced", "unaligned", "every_other_lane", "lanes_first", "one_head", "one_token"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(fused, layout) -> None:
    dtype = (F16, BF16, F32)[LAYOUTS.index(layout) % 3]
    batch, heads = (2, 1) if layout in ("bshd", "unaligned", "one_token") else (1, 2)
    made = fused.make(batch=batch, heads=heads, kv_heads=heads, q_len=3, kv_len=5, dtype=dtype)
    fused.check(*(fused.laid_out(x, layout) for x in made))


@pytest.mark.parametrize("layouts", [("bshd", "lanes_first", "bhsd"), ("one_head", "sliced", "bshd")])
def test_the_inputs_may_differ_in_layout(fused, layouts) -> None:
    made = fused.make(heads=4, kv_heads=2, q_len=3, kv_len=66, dim=40)
    fused.check(*(fused.laid_out(x, layout) for x, layout in zip(made, layouts, strict=True)))


def test_q_k_and_v_that_are_one_tensor(fused) -> None:
    packed = torch.randn(2, 9, 3, 2, 32, dtype=BF16, device=fused.device)
    fused.check(*(packed[:, :, i].transpose(1, 2) for i in range(3)))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_entries_that_lie_2_to_the_31_elements_apart(fused, axis, turned) -> None:
    """Only what is read of such memory is there."""
    made = fused.make(batch=2, heads=2, kv_heads=2, q_len=3, kv_len=5, dim=32)
    strides = [2**31, 5 * 32] if axis == 0 else [5 * 32, 2**31]
    memory = torch.empty(2**31 + 2 * 5 * 32, dtype=BF16, device=fused.device)
    far = []
    for i, x in enumerate(made):
        view = memory.as_strided(x.shape, (*strides, 32, 1)) if i == 1 else x
        far.append(view.copy_(x))
    tables = fused.tables(1, 3, 1, 32, 5, 1)
    fused.check(*far, rope=fused.rotation(*made[:2], tables) if turned else None)


# Shrinking what failed would take minutes.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    q_len=st.integers(1, 70),
    kv_len=st.integers(1, 70),
    dim=st.sampled_from([16, 32, 40, 64]),
    dtype=st.sampled_from([F16, BF16, F32]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    factor=st.sampled_from([1.0, -1.0, 0.3]),
    turned=st.sampled_from([None, False, True]),
    hadamard=st.sampled_from(HadamardMode),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_combination(
    fused, batch, kv_heads, group, q_len, kv_len, dim, dtype, layouts, factor, turned, hadamard, padded, seed
) -> None:
    made = fused.make(group * kv_heads, kv_heads, q_len, kv_len, dim, dtype, batch, seed)
    q, k, v = (fused.laid_out(x, layout) for x, layout in zip(made, layouts, strict=True))
    options = {}
    if turned is not None:
        length = max(q_len, kv_len)
        cos, sin = torch.randn(2, length, 1, 16, generator=torch.Generator().manual_seed(seed)).to(fused.device)
        options["rope"] = fused.rotation(q, k, (cos[:q_len], sin[:q_len], cos[:kv_len], sin[:kv_len]), turned)
    if dim in (32, 64) and dtype in fused.hadamard_dtypes:
        options["hadamard"] = hadamard
    if padded:
        options["used"] = torch.rand(batch, kv_len, generator=torch.Generator().manual_seed(seed)) < 0.6
    fused.check(q, k, v, factor=factor, with_lse_shift=True, **options)


def test_tables_of_several_dtypes_become_one(fused) -> None:
    q, k, v = fused.make(heads=4, kv_heads=2, q_len=5, kv_len=5, dim=32)
    tables = [torch.randn(5, 1, 32, dtype=dtype, device=fused.device) for dtype in (F32, F32, BF16, BF16)]
    from lpattn.quantize.fused import rotation_of

    rope = rotation_of(q, k, tables, False)
    assert {table.dtype for table in (rope.cos, rope.sin, rope.cos_k, rope.sin_k)} == {F32}
    assert rope.cos_k.stride(2) == 0  # not written out for each head
    alike = rotation_of(q, k, [table.float() for table in tables], False)
    found, expected = (fused.quantize_per_head(q, k, v, rope=one) for one in (rope, alike))
    assert torch.equal(found.key.float(), expected.key.float())
