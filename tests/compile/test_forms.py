"""Ways to write a rotation, and what is nearly one: fused where it is proven, and the right numbers in any case."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpattn
from lpattn.compile import sizes

B, H, HKV, S, D = 2, 4, 2, 12, 16


class Attention(nn.Module):
    """Applies functions to q, k, v [B, H, S, D], then attends."""

    def __init__(self, q, k=None, v=None, **options):
        super().__init__()
        self.functions = (q, k or q, v or (lambda t, *_: t))
        self.options = {"enable_gqa": True, **options}

    def forward(self, q, k, v, *tables):
        q, k, v = (function(t, *tables) for function, t in zip(self.functions, (q, k, v), strict=True))
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def qkv(kv_heads=HKV, length=S, dim=D, dtype=torch.float32):
    return [torch.randn(B, h, length, dim, dtype=dtype) * 1.5 for h in (H, kv_heads, kv_heads)]


def angles(lanes=D // 2, batch=1, length=S):
    """[batch, 1, S, lanes]"""
    positions = torch.arange(length)[None] + 3 * torch.arange(batch)[:, None]
    return positions[:, None, :, None] * 10.0 ** -(torch.arange(lanes) / lanes)


def twice(x):
    return torch.cat((x, x), -1)


def pairwise(x):
    return x.repeat_interleave(2, -1)


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def half_split(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def chunked(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def signs_in_the_table(x, cos, sin):
    first, second = sin.chunk(2, -1)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * torch.cat((-first, second), -1)


def halves_apart(x, cos, sin):
    first, second = x.chunk(2, -1)
    cos, sin = cos[..., : D // 2], sin[..., : D // 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def interleaved(x, cos, sin):
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cos + torch.stack((-second, first), -1).flatten(3) * sin


def stacked(x, cos, sin):
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 0::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


def written(x, cos, sin):
    out = torch.empty_like(x)
    first, second = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = first * cos[..., 0::2] - second * sin[..., 1::2]
    out[..., 1::2] = first * sin[..., 1::2] + second * cos[..., 0::2]
    return out


def complex_numbers(x, cos, sin):
    freqs = torch.complex(cos[..., 0::2], sin[..., 0::2])
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * freqs
    return torch.view_as_real(turned).flatten(3)


def in_float32(x, cos, sin):
    return half_split(x.float(), cos.float(), sin.float()).to(x.dtype)


def scaled_after(x, cos, sin):
    return half_split(x, cos, sin) * 0.5


def turned_back(x, cos, sin):
    return half_split(x, cos, -sin)


def partly(x, cos, sin):
    lanes = 6
    return torch.cat((half_split(x[..., :lanes], cos[..., :lanes], sin[..., :lanes]), x[..., lanes:]), -1)


def partly_in_place(x, cos, sin):
    out = x.clone()
    out[..., :8] = interleaved(x[..., :8], cos[..., :8], sin[..., :8])
    return out


def repeated(rotate, tiled=False):
    """Rotated, then each kv head H // HKV times."""

    def run(x, *tables):
        x = rotate(x, *tables)
        batch, heads, length, dim = x.shape
        groups = H // heads
        if tiled:
            return x.repeat(1, groups, 1, 1)
        return x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(batch, H, length, dim)

    return run


def plain(x, *_):
    return x


HALVES, PAIRS = twice(angles()), pairwise(angles())
PER_SEQUENCE = twice(angles(batch=B))

# By name: functions for q, k, v; angles; what the call says of the rotation; kv heads.
FUSED = {
    "half_split": ((half_split,), HALVES, (False, D), HKV),
    "chunked": ((chunked,), HALVES, (False, D), HKV),
    "halves_apart": ((halves_apart,), HALVES, (False, D), HKV),
    "per_sequence": ((half_split,), PER_SEQUENCE, (False, D), HKV),
    "per_head": ((half_split,), HALVES + torch.zeros(1, HKV, 1, 1), (False, D), HKV),
    "interleaved": ((interleaved,), PAIRS, (True, D), HKV),
    "stacked": ((stacked,), PAIRS, (True, D), HKV),
    "written": ((written,), PAIRS, (True, D), HKV),
    "complex": ((complex_numbers,), PAIRS, (True, D), HKV),
    "in_float32": ((in_float32,), HALVES, (False, D), HKV),
    "scaled_after": ((scaled_after,), HALVES, (False, D), HKV),
    "turned_back": ((turned_back,), HALVES, (False, D), HKV),
    "partly": ((partly,), twice(angles(3)), (False, 6), HKV),
    "partly_in_place": ((partly_in_place,), pairwise(angles(4)), (True, 8), HKV),
    "repeated": ((half_split, repeated(half_split), repeated(plain)), HALVES, (False, D), HKV),
    "repeated_first": (
        (half_split, lambda x, *t: half_split(repeated(plain)(x), *t), repeated(plain)),
        HALVES,
        (False, D),
        HKV,
    ),
    # These are no rotations by one angle, but a pair of lanes goes to the same pair of lanes all the same.
    "halves_differ": ((half_split,), torch.cat((angles(), angles().flip(-1)), -1), (False, D), HKV),
}


@pytest.fixture
def attend(spy, compiled, reasons):
    """``attend(model, *inputs)``: eager and compiled outputs, and what the report says."""

    def run(model, *inputs, turned_tells=True, dynamic=False):
        want = model(*inputs)
        lpattn.apply_low_precision_attention(model, "bf16_reference")
        under = compiled(model, dynamic=None if dynamic else False)
        for tensor in inputs if dynamic else ():
            torch._dynamo.mark_dynamic(tensor, 2)
        got = under(*inputs)
        (rope,) = reasons(model).values()
        if spy.fused and turned_tells:
            calls = len(spy.fused)
            spy.turned = True
            assert not torch.allclose(under(*inputs), want, rtol=1e-2, atol=1e-2), "these numbers would not show a bug"
            spy.turned = False
            del spy.fused[calls:]
        return want, got, rope

    return run


DYNAMIC = ["half_split", "written", "complex", "partly", "repeated"]
LENGTHS = [(name, False) for name in FUSED] + [(name, True) for name in DYNAMIC]


@pytest.mark.parametrize(("name", "dynamic"), LENGTHS, ids=[f"{n}-dynamic" if d else n for n, d in LENGTHS])
def test_fused(name, dynamic, attend, spy):
    functions, angle, (is_interleaved, lanes), kv_heads = FUSED[name]
    q, k, v = qkv()
    if name == "per_head":
        q = q[:, :HKV]
    want, got, rope = attend(Attention(*functions), q, k, v, angle.cos(), angle.sin(), dynamic=dynamic)
    assert rope == "fused"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    (call,) = spy.fused
    assert call.rope == lpattn.Rope(is_interleaved, lanes)
    assert call.num_kv_heads == kv_heads


def test_keys_with_positions_of_their_own(attend, spy):
    angle, other = HALVES, twice(angles() + 5.0)
    k = lambda x, cos, sin, cos_k, sin_k: half_split(x, cos_k, sin_k)  # noqa: E731
    q = lambda x, cos, sin, *_: half_split(x, cos, sin)  # noqa: E731
    want, got, rope = attend(Attention(q, k), *qkv(), angle.cos(), angle.sin(), other.cos(), other.sin())
    assert rope == "fused"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    (_, _, cos_k), *_ = spy.tables
    torch.testing.assert_close(cos_k.squeeze(), other.cos().squeeze())


def test_more_keys_than_queries(attend, spy):
    long = twice(angles(length=S + 5))
    q = lambda x, cos, sin: half_split(x, cos[:, :, 5:], sin[:, :, 5:])  # noqa: E731
    (q_in, *_), (_, k_in, v_in) = qkv(), qkv(length=S + 5)
    want, got, rope = attend(Attention(q, half_split), q_in, k_in, v_in, long.cos(), long.sin())
    assert rope == "fused"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_streams(dynamic, attend, spy):
    """Text and image tokens rotated by tables of their own, a stream that is not rotated, and [B, S, H, D] memory."""
    first, second = twice(angles(length=5)), twice(angles(length=4) + 2.0)

    def streams(x, cos, sin, cos_2, sin_2):
        x = x.transpose(1, 2)
        text, both = cos.shape[2], cos.shape[2] + cos_2.shape[2]
        a, b, c = x[:, :text], x[:, text:both], x[:, both:]
        table = [t.transpose(1, 2) for t in (cos, sin, cos_2, sin_2)]
        return torch.cat((half_split(a, *table[:2]), half_split(b, *table[2:]), c), 1).transpose(1, 2)

    tables = (first.cos(), first.sin(), second.cos(), second.sin())
    want, got, rope = attend(Attention(streams), *qkv(), *tables, dynamic=dynamic)
    assert rope == "fused"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    (call,) = spy.fused
    assert call.num_kv_heads == HKV


def test_heads_with_tables_of_their_own(attend, spy):
    """As LTX-Video: rotated while heads and lanes are still one dimension."""
    angle = torch.randn(1, S, H * D // 2).repeat_interleave(2, -1)

    class Flat(nn.Module):
        def forward(self, q, k, v, cos, sin):
            q, k = (interleaved(x[:, :, None], cos[:, :, None], sin[:, :, None]).squeeze(2) for x in (q, k))
            q, k, v = (x.unflatten(2, (H, D)).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = (torch.randn(B, S, H * D) for _ in range(3))
    want, got, rope = attend(Flat(), q, k, v, angle.cos(), angle.sin())
    assert rope == "fused"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    (cos, _, _), *_ = spy.tables
    assert tuple(cos.shape) == (1, S, H, D)


def test_the_log_sum_exp_too(spy, compiled):
    def attend(q, k, v, cos, sin):
        q, k = half_split(q, cos, sin), half_split(k, cos, sin)
        return lpattn.low_precision_sdpa(q, k, v, backend="bf16_reference", return_lse=True)

    inputs = (*qkv(), HALVES.cos(), HALVES.sin())
    want = attend(*inputs)
    spy.clear()
    torch.testing.assert_close(compiled(attend)(*inputs), want)
    assert len(spy.fused) == 1


def test_heads_of_v_may_be_wider(attend, spy):
    q, k, _ = qkv()
    want, got, rope = attend(Attention(half_split), q, k, torch.randn(B, HKV, S, 24), HALVES.cos(), HALVES.sin())
    assert rope == "fused"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


# What must not be fused


def cut_at_a_quarter(x, cos, sin):
    quarter = D // 4
    return x * cos + torch.cat((-x[..., quarter:], x[..., :quarter]), -1) * sin


def reversed_lanes(x, cos, sin):
    return x * cos + x.flip(-1) * sin


def next_row(x, cos, sin):
    return x * cos + rotate_half(torch.cat((x[:, :, 1:], x[:, :, :1]), 2)) * sin


def last_lanes(x, cos, sin):
    return torch.cat((x[..., :8], half_split(x[..., 8:], cos[..., :8], sin[..., :8])), -1)


def last_row_differs(x, cos, sin):
    out = half_split(x, cos, sin)
    return torch.cat((out[:, :, :-1], x[:, :, -1:].flip(1)), 2)


def one_row_is_another(x, cos, sin):
    out = half_split(x, cos, sin)
    return torch.cat((out[:, :, :7], out[:, :, 6:7], out[:, :, 8:]), 2)


def next_head(x, cos, sin):
    return half_split(torch.cat((x[:, 1:], x[:, :1]), 1), cos, sin)


def shifted(x, cos, sin):
    return half_split(x, cos, sin) + 0.5


def bias_added(x, cos, sin):
    return half_split(x, cos, sin) + cos


def three_lanes(x, cos, sin):
    return half_split(x, cos, sin) + 0.1 * torch.cat((x[..., 1:], x[..., :1]), -1)


def product(x, cos, sin):
    return half_split(x, cos, sin) * x


def normalized_after(x, cos, sin):
    return F.rms_norm(half_split(x, cos, sin) + 0.3 * x, (D,))


def wrong_lane_of_the_table(x, cos, sin):
    return half_split(x, cos.flip(-1).cumsum(-1)[..., torch.tensor([*range(8), *range(15, 7, -1)])], sin)


def twice_rotated(x, cos, sin):
    return half_split(half_split(x, cos, sin), cos, sin)


def other_angle_in_the_write(x, cos, sin):
    out = torch.empty_like(x)
    first, second = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = first * cos[..., 0::2] - second * sin[..., 0::2]
    out[..., 1::2] = first * sin[..., 0::2] + second * (cos[..., 0::2] * 0.3)
    return out


def swapped_lanes_in_the_write(x, cos, sin):
    out = torch.empty_like(x)
    first, second = x[..., 0::2], x[..., 1::2]
    out[..., 1::2] = first * cos[..., 0::2] - second * sin[..., 0::2]
    out[..., 0::2] = first * sin[..., 0::2] + second * cos[..., 0::2]
    return out


def turned_by_a_number(x, cos, sin):
    turned = torch.view_as_complex(complex_numbers(x, cos, sin).unflatten(-1, (-1, 2))) * 1j
    return torch.view_as_real(turned).flatten(3)


def unwritten_lanes(x, cos, sin):
    out = torch.zeros_like(x)
    out[..., 0::2] = x[..., 0::2] * cos[..., 0::2] - x[..., 1::2] * sin[..., 0::2]
    return out


def rounded(x, cos, sin):
    return half_split(x, cos, sin).half().float()


def rounded_first(x, cos, sin):
    return half_split(x.bfloat16().float(), cos, sin)


def times(number, dtype):
    """Rotated, times a tensor of that dtype, which is full of the number."""
    return lambda x, cos, sin: half_split(x, cos, sin) * torch.full((D,), number, dtype=dtype)


# By name: functions, and what the reason must name (None: whether it is fused does not matter, only the numbers do).
NEAR = {
    "k_interleaved": ((half_split, interleaved), "q is rotated half-split, k interleaved"),
    "q_interleaved": ((interleaved, half_split), "q is rotated interleaved, k half-split"),
    "cut_at_a_quarter": ((cut_at_a_quarter,), "is paired with lane"),
    "reversed_lanes": ((reversed_lanes,), "q: "),
    "tiled_heads": ((half_split, repeated(half_split, True), repeated(plain, True)), "repeated one after another"),
    "only_q": ((half_split, plain), "k: no rotation lies between arg"),
    "next_row": ((next_row,), "q: elements of other rows or heads are mixed in"),
    "last_lanes": ((last_lanes,), "q: lane 0 is not rotated, lane 15 is"),
    "last_row_differs": ((last_row_differs,), "q: "),
    "one_row_is_another": ((one_row_is_another,), "q: "),
    "next_head": ((next_head,), None),
    "rounded": ((rounded,), "casts to torch.float16, which does not hold what torch.float32 does"),
    "rounded_first": ((rounded_first,), "fused"),
    "times_whole": ((times(2.7, torch.int64),), None),
    "times_true": ((times(2.7, torch.bool),), None),
    "times_rounded": ((times(1.7, torch.float16),), None),
    "shifted": ((shifted,), "adds the number 0.5"),
    "bias_added": ((bias_added,), "does not depend on what is rotated"),
    "three_lanes": ((three_lanes,), "more than two products"),
    "product": ((product,), "q: "),
    "normalized_after": ((normalized_after,), "q: "),
    "lanes_of_the_table": ((wrong_lane_of_the_table,), None),
    "twice_rotated": ((twice_rotated,), None),
    "other_angle": ((other_angle_in_the_write,), None),
    "swapped_lanes": ((swapped_lanes_in_the_write,), None),
    "turned_by_a_number": ((turned_by_a_number,), "multiplies by the number 1j"),
    "unwritten_lanes": ((unwritten_lanes,), "q: "),
    "other_widths": ((half_split, lambda x, *t: partly(x, *t)), "lanes of k are rotated"),
    "v_repeated_otherwise": (
        (half_split, repeated(half_split), repeated(plain, True)),
        "k: each of its heads is repeated 2 times, and v's are not",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_rotations_are_right(name, attend, as_compiled, spy):
    functions, expected = NEAR[name]
    inputs = (*qkv(), HALVES.cos(), HALVES.sin())
    eager, got, rope = attend(Attention(*functions), *inputs, turned_tells=False)
    want, as_written = as_compiled(Attention(*functions), inputs, eager)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    if expected is not None and as_written:
        assert expected in rope
        assert bool(spy.fused) == (rope == "fused")


def test_a_cast_to_what_is_as_fine_and_not_as_large(attend, spy):
    """65504 is the largest float16; in bfloat16 there are larger ones."""

    def through_half(x, cos, sin):
        return half_split(x.half(), cos.half(), sin.half()).to(x.dtype) * 1e-5

    q, k, v = qkv(dtype=torch.bfloat16)
    want, got, rope = attend(
        Attention(through_half), 4e4 * q, 4e4 * k, v, HALVES.cos(), HALVES.sin(), turned_tells=False
    )
    assert rope != "fused"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_streams_of_q_and_k_of_other_lengths(attend, spy):
    """The first ones are alike and are rotated alike; what follows is not."""

    def first_rows(x, cos, sin):
        n = cos.shape[2]
        return torch.cat((half_split(x[:, :, :n], cos, sin), x[:, :, n:]), 2)

    table = twice(angles(length=5))
    (q, _, _), (_, k, v) = qkv(length=12), qkv(length=14)
    want, got, _ = attend(Attention(first_rows), q, k, v, table.cos(), table.sin())
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", [20, slice(100, 164)], ids=["one row", "some rows"])
def test_a_write_to_rows_of_one_head_is_seen(tokens, attend, spy):
    """There are more rows than the proof looks at."""

    def written(x, cos, sin):
        out = half_split(x, cos, sin).clone()
        out[:, 3, tokens] = x[:, 3, tokens]
        return out

    q, k, v = torch.randn(3, 2, 6, 300, D)
    angles = torch.arange(300)[:, None] * 10.0 ** -(torch.arange(D) % (D // 2))
    want, got, rope = attend(Attention(written, half_split), q, k, v, angles.cos(), angles.sin(), turned_tells=False)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert rope.startswith("q: ")
    assert not spy.fused


def require_same_at(lengths, under, plain_model, mark):
    """Hold a compiled model to an untouched one at several lengths, which are marked as dynamic."""
    for length in lengths:
        angle = twice(angles(length=length))
        inputs = (*qkv(length=length), angle.cos(), angle.sin())
        for tensor in inputs:
            mark(tensor, 2)
        torch.testing.assert_close(under(*inputs), plain_model(*inputs), rtol=2e-5, atol=2e-5)


def test_what_holds_at_one_length_only(spy, compiled):
    """Six rows are rotated, which are all of them at first, and not later."""

    def first_rows(x, cos, sin):
        return torch.cat((half_split(x[:, :, :6], cos[:, :, :6], sin[:, :, :6]), x[:, :, 6:]), 2)

    plain_model, model = Attention(first_rows), Attention(first_rows)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    under = compiled(model)
    require_same_at((6, 9), under, plain_model, torch._dynamo.maybe_mark_dynamic)


def rows_from(y, start):
    y[:, :, :5] = y[:, :, start : start + 5].clone()


def at_other_remainders(y):
    rows_from(y, y.shape[2] % 20)


def at_other_quotients(y):
    rows_from(y, y.shape[2] - y.shape[2] // 20 * 20)


def when_longer(y):
    rows_from(y, torch.sym_max(y.shape[2] - 45, 0))


def when_shorter(y):
    rows_from(y, torch.sym_max(40 - y.shape[2], 0))


def in_between(y):
    rows_from(y, torch.sym_max(torch.sym_min(y.shape[2] - 45, 60 - y.shape[2]), 0))


WRITES = [at_other_remainders, at_other_quotients, when_longer, when_shorter, in_between]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_changes_nothing_at_the_first_length(write, spy, compiled, reasons):
    def written(x, cos, sin):
        out = half_split(x, cos, sin).clone()
        write(out)
        return out

    plain_model, model = Attention(written, half_split), Attention(written, half_split)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    under = compiled(model)
    require_same_at((40, 33, 51), under, plain_model, torch._dynamo.mark_dynamic)
    assert len(under.graphs) == 1
    assert "mixed in" in reasons(model)[""]


def test_too_many_bends_are_refused(spy, compiled, reasons, monkeypatch):
    def written(x, cos, sin):
        out = half_split(x, cos, sin).clone()
        in_between(out)
        return out

    monkeypatch.setattr(sizes, "_MOST", 5)
    plain_model, model = Attention(written, half_split), Attention(written, half_split)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    require_same_at((40, 51), compiled(model), plain_model, torch._dynamo.mark_dynamic)
    assert reasons(model)[""].startswith("sizes bend at too many lengths: Max(0, Min(60 - s")
    assert not spy.fused


def test_a_length_in_front_of_bounds_is_fused(spy, compiled, reasons):
    """The graph holds for lengths up to 30 only, and for even ones: the proof takes no others."""

    def even(x, cos, sin):
        assert x.shape[2] < 30
        return half_split(x.unflatten(2, (x.shape[2] // 2, 2)).flatten(2, 3), cos, sin)

    model = Attention(even)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    under = compiled(model)
    require_same_at((20, 26), under, Attention(even), torch._dynamo.maybe_mark_dynamic)
    assert len(under.graphs) == 1
    assert len(spy.fused) == 2


@pytest.mark.parametrize("number", [lambda x: x.shape[2] * 0.1, lambda x: x.shape[2]], ids=["float", "int"])
def test_a_length_as_a_factor(number, attend, spy):
    scaled = lambda x, cos, sin: half_split(x, cos, sin) * number(x)  # noqa: E731
    want, got, rope = attend(Attention(scaled, half_split), *qkv(), HALVES.cos(), HALVES.sin(), dynamic=True)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert "multiplies by " in rope


def test_a_symbolic_head_dim_is_named(spy, compiled, reasons):
    model, inputs = Attention(half_split), (*qkv(), HALVES.cos(), HALVES.sin())
    want = model(*inputs)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    torch.testing.assert_close(compiled(model, dynamic=True)(*inputs), want, rtol=2e-5, atol=2e-5)
    (rope,) = reasons(model).values()
    assert rope.startswith("head_dim is s")
    assert rope.endswith(", which is no constant of the graph")
    assert not spy.fused


def test_ten_lengths_are_one_graph(spy, compiled):
    functions = (half_split, repeated(half_split), repeated(plain))
    plain_model, model = Attention(*functions), Attention(*functions)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    under = compiled(model)
    for length in range(20, 30):
        angle = twice(angles(length=length))
        inputs = (*qkv(length=length), angle.cos(), angle.sin())
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 2)
        torch.testing.assert_close(under(*inputs), plain_model(*inputs), rtol=2e-5, atol=2e-5)
    assert len(under.graphs) == 1
    assert len(spy.fused) == 10
