"""RMS norms of q and k in front of a rotation, and what is nearly one: fused where proven, the right numbers always."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpattn

B, H, HKV, S, D = 2, 4, 2, 12, 16
EPS = 1e-5


def rotate(x, cos, sin):
    turned = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Normalizes q and k, rotates them, and attends. ``also`` is given the normalized k and v, and gives v."""

    def __init__(self, q, k=None, also=lambda k, v: v):
        super().__init__()
        self.q, self.k, self.also = q, k or q, also

    def forward(self, q, k, v, cos, sin, *weights):
        q, k = self.q(q, weights[0]), self.k(k, weights[1])
        v = self.also(k, v)
        return F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, enable_gqa=True)


def make(length=S, dtype=torch.float32):
    """q, k, v [B, H, S, D] with tokens of different size, cos, sin, and a weight for each of q and k."""
    size = torch.logspace(-0.5, 0.5, length)[:, None]
    qkv = [(torch.randn(B, h, length, D) * size).to(dtype) for h in (H, HKV, HKV)]
    angle = torch.arange(length)[:, None] * 10.0 ** -(torch.arange(D // 2) / (D // 2))
    angle = torch.cat((angle, angle), -1)
    return [*qkv, angle.cos(), angle.sin(), *(1.5 + 0.5 * torch.randn(2, D)).to(dtype).unbind()]


def inverse(x, eps=EPS, dim=-1):
    return torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps)


# Ways to write it


def function(x, w):
    return F.rms_norm(x, (D,), w, EPS)


def llama(x, w):
    wide = x.float()
    return w * (wide * inverse(wide)).to(x.dtype)


def gemma(x, w):
    wide = x.float()
    return (wide * inverse(wide) * (1.0 + w.float())).type_as(x)


def powers(x, w):
    return x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w


def divided(x, w):
    return x / torch.sqrt(EPS + (x * x).mean(-1, keepdim=True)) * w


def reciprocal(x, w):
    return x * (x.square().mean(-1, keepdim=True) + EPS).sqrt().reciprocal() * w


def one_over(x, w):
    return x * (1.0 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)) * w


def unweighted(x, w):
    return x * inverse(x)


def without_eps(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * w


def heads_last(x, w):
    return function(x.transpose(1, 2).contiguous(), w).transpose(1, 2)


def of_rows(x, w):
    rows = x.reshape(-1, D)
    return (rows * torch.rsqrt(rows.pow(2).mean(1) + EPS).unsqueeze(1) * w.view(1, D)).view(x.shape)


def other_eps(x, w):
    return x * inverse(x, 0.3) * w


def plain(x, w):
    return x


FUSED = {
    name: (form,)
    for name, form in {
        "function": function,
        "llama": llama,
        "gemma": gemma,
        "powers": powers,
        "divided": divided,
        "reciprocal": reciprocal,
        "one_over": one_over,
        "unweighted": unweighted,
        "without_eps": without_eps,
        "heads_last": heads_last,
        "of_rows": of_rows,
    }.items()
} | {"each_its_own": (llama, other_eps)}


# Over all heads of a token. w: [H * D].


def as_tokens(x):
    return x.transpose(1, 2).flatten(2)


def as_heads(x):
    return x.unflatten(2, (-1, D)).transpose(1, 2)


def over_heads(x, w):
    x = as_tokens(x)
    return as_heads(F.rms_norm(x, x.shape[-1:], w, EPS))


def over_heads_in_float32(x, w):
    wide = as_tokens(x).float()
    return as_heads((w * (wide * inverse(wide))).to(x.dtype))


def over_heads_divided(x, w):
    x = as_tokens(x)
    return as_heads(x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w)


def over_heads_by_rows(x, w):
    rows = as_tokens(x).flatten(0, 1)
    return as_heads((rows * torch.rsqrt(rows.pow(2).mean(1) + EPS).unsqueeze(1) * w).unflatten(0, (B, -1)))


def over_heads_unweighted(x, w):
    return as_heads(unweighted(as_tokens(x), w))


def over_heads_and_lanes_at_once(x, w):
    x = x.transpose(1, 2)
    return F.rms_norm(x, x.shape[2:], w.view(x.shape[2:]), EPS).transpose(1, 2)


def over_heads_of_what_is_apart(x, w):
    """Scaled where heads are apart, by what is of all of them."""
    return x.transpose(1, 2).transpose(1, 2) * inverse(as_tokens(x)).unsqueeze(1) * w.view(-1, 1, D)


def over_heads_apart(x, w):
    """Weighted when heads are apart."""
    return over_heads_unweighted(x, w) * w.view(-1, 1, D)


OVER_HEADS = {
    form.__name__: form
    for form in (
        over_heads,
        over_heads_in_float32,
        over_heads_divided,
        over_heads_by_rows,
        over_heads_unweighted,
        over_heads_and_lanes_at_once,
        over_heads_of_what_is_apart,
        over_heads_apart,
    )
}


@pytest.fixture
def attend(spy, compiled, reasons):
    """``attend(model, *inputs)``: eager and compiled outputs, and what the report says of the norm."""

    def run(model, *inputs, dynamic=False):
        want = model(*inputs)
        lpattn.apply_low_precision_attention(model, "bf16_reference")
        under = compiled(model, dynamic=None if dynamic else False)
        for number, tensor in enumerate(inputs[:5] if dynamic else ()):
            torch._dynamo.mark_dynamic(tensor, 2 if number < 3 else 0)
        got = under(*inputs)
        (norm,) = reasons(model, "norm").values()
        assert (spy.norms[0] is not None) == (norm or "").startswith("fused")
        if spy.norms[0] is not None:
            spy.skewed = True
            assert not torch.allclose(under(*inputs), want, rtol=1e-2, atol=1e-2), "these numbers would not show a bug"
            del spy.norms[1:]
        return want, got, norm

    return run


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FUSED)
def test_fused(name, dynamic, attend, spy):
    want, got, norm = attend(Attention(*FUSED[name]), *make(), dynamic=dynamic)
    assert norm == "fused"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    (taken,) = spy.norms
    eps = {"without_eps": (0.0, 0.0), "each_its_own": (EPS, 0.3)}.get(name, (EPS, EPS))
    assert (taken.eps_q, taken.eps_k) == pytest.approx(eps)
    assert (taken.weight_q is None) == (name == "unweighted")


def make_over_heads(length=S, dtype=torch.float32):
    """As :func:`make`, with a weight for each lane of all heads."""
    return [*make(length, dtype)[:5], *((1.5 + 0.5 * torch.randn(h * D)).to(dtype) for h in (H, HKV))]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", OVER_HEADS)
def test_over_all_heads(name, dynamic, attend, spy):
    want, got, norm = attend(Attention(OVER_HEADS[name]), *make_over_heads(), dynamic=dynamic)
    assert norm == "fused"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    (taken,) = spy.norms
    assert (taken.eps_q, taken.eps_k) == (None, None)
    assert [tuple(t.shape) for t in (taken.rstd_q, taken.rstd_k)] == [(B, S), (B, S)]
    if name == "over_heads_unweighted":
        assert (taken.weight_q, taken.weight_k) == (None, None)
    else:
        assert [tuple(w.shape) for w in (taken.weight_q, taken.weight_k)] == [(H, D), (HKV, D)]


def test_over_the_only_head_of_k(attend, spy):
    """A norm over one head is one over all of them."""

    class OneKey(Attention):
        def forward(self, q, k, v, *rest):
            return super().forward(q, k[:, :1].contiguous(), v[:, :1].contiguous(), *rest)

    *given, _ = make_over_heads()
    want, got, norm = attend(OneKey(over_heads), *given, 1.5 + 0.5 * torch.randn(D))
    assert norm == "fused"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert spy.norms[0].rstd_k.shape == (B, S)


def test_what_tokens_are_multiplied_with_may_be_needed_for_something_else(attend, spy):
    class Also(nn.Module):
        def forward(self, q, k, v, cos, sin, of_q, of_k):
            flat = as_tokens(q)
            rstd = inverse(flat)
            q, k = as_heads(flat * rstd * of_q), over_heads(k, of_k)
            out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, enable_gqa=True)
            return out * rstd.unsqueeze(1)

    want, got, norm = attend(Also(), *make_over_heads())
    assert norm == "fused"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_a_root_in_float16_has_a_reciprocal(spy, compiled):
    """The reciprocal of what is divided by is beyond float16."""

    def divided(x, w):
        x = as_tokens(x)
        return as_heads(x / (x.float().pow(2).mean(-1, keepdim=True) + 1e-14).sqrt().to(x.dtype) * w)

    q, k, *rest = make_over_heads(dtype=torch.float16)
    inputs = (1e-5 * q, 1e-5 * k, *(x.half() for x in rest))
    model = Attention(divided)
    want = model(*inputs)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    got = compiled(model)(*inputs)
    assert spy.norms[0].rstd_q.isfinite().all()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("k", "reason"),
    [
        (plain, "q is normalized over all heads, and k is not"),
        (lambda x, w: function(x, w[:D]), "fused in k; q is normalized over all heads, and k is not"),
        (over_heads_unweighted, "the norm over all heads of q has a weight, and that of k has none"),
    ],
    ids=["none", "of_a_head", "unweighted"],
)
def test_norms_over_all_heads_go_together(k, reason, attend):
    want, got, norm = attend(Attention(over_heads, k), *make_over_heads())
    assert norm == reason
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", [function, llama, gemma], ids=lambda form: form.__name__)
def test_in_low_precision_it_is_rounded_less(form, attend, spy):
    inputs = make(dtype=torch.bfloat16)
    exact = Attention(form)(*(x.float() for x in inputs))
    want, got, norm = attend(Attention(form), *inputs)
    assert norm == "fused"
    assert spy.shapes[0] == ((B, S, H, D), (B, S, HKV, D))
    error, budget = ((x.float() - exact).square().mean().sqrt() for x in (got, want))
    assert error < 1.2 * budget


def test_one_of_two(attend, spy):
    want, got, norm = attend(Attention(function, plain), *make())
    assert norm == "fused in q"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert spy.norms[0].eps_k is None


@pytest.mark.parametrize(("form", "line"), [(function, "a norm into 1"), (plain, "a norm into 0")])
def test_the_line_of_a_graph_counts_norms(form, line, attend, caplog):
    with caplog.at_level(logging.DEBUG, logger="lpattn.compile"):
        attend(Attention(form), *make())
    lines = [record.message for record in caplog.records if record.name.startswith("lpattn.compile")]
    assert lines == [f"RoPE fused into 1 of 1 attention calls, {line}"]


def test_none_is_not_spoken_of(attend):
    want, got, norm = attend(Attention(plain), *make())
    assert norm is None
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_what_the_rest_of_the_model_needs_stays(attend, spy):
    """Keys that are normalized for something else, too: the norm of q is fused, and that of k is not."""
    want, got, norm = attend(Attention(function, also=lambda k, v: v + k), *make())
    assert norm.startswith("fused in q; k: ")
    assert norm.endswith(" is needed for something else, too")
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert spy.norms[0].eps_k is None


def test_ten_lengths_are_one_graph(spy, compiled):
    plain_model, model = Attention(gemma), Attention(gemma)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    under = compiled(model)
    for length in range(20, 30):
        inputs = make(length)
        for number, tensor in enumerate(inputs[:5]):
            torch._dynamo.mark_dynamic(tensor, 2 if number < 3 else 0)
        torch.testing.assert_close(under(*inputs), plain_model(*inputs), rtol=2e-5, atol=2e-5)
    assert len(under.graphs) == 1
    assert len([norm for norm in spy.norms if norm is not None]) == 10


def test_a_backend_without_a_norm_leaves_it_to_the_compiler(attend, spy, monkeypatch):
    from dataclasses import replace

    from lpattn.backends.reference import ReferenceBackend

    monkeypatch.setattr(ReferenceBackend, "capabilities", replace(ReferenceBackend.capabilities, norm=False))
    want, got, norm = attend(Attention(function), *make())
    assert norm == "q: bf16_reference has no fused norm; k: bf16_reference has no fused norm"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert len(spy.fused) == 1


def test_a_backend_without_a_norm_over_all_heads_leaves_the_rotation_too(attend, spy, monkeypatch):
    from dataclasses import replace

    from lpattn.backends.reference import ReferenceBackend

    monkeypatch.setattr(ReferenceBackend, "capabilities", replace(ReferenceBackend.capabilities, norm_over_heads=False))
    model, inputs = Attention(over_heads), make_over_heads()
    want = model(*inputs)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    torch.testing.assert_close(torch.compile(model)(*inputs), want, rtol=2e-5, atol=2e-5)
    (layer,) = lpattn.attention_report(model).values()
    assert layer.rope == "q: bf16_reference has no fused norm over all heads: the compiler rotates where it normalizes"
    assert layer.norm is None
    assert (spy.fused, spy.plain) == ([], 1)


def plain(x, w):
    return x


@pytest.mark.parametrize(("q", "k"), [(plain, plain), (function, function), (plain, function)])
@pytest.mark.parametrize("rope_from", [S, S + 1])
def test_a_short_rotation_without_a_norm_stays_with_the_compiler(attend, spy, monkeypatch, q, k, rope_from):
    from dataclasses import replace

    from lpattn.backends.reference import ReferenceBackend

    monkeypatch.setattr(ReferenceBackend, "capabilities", replace(ReferenceBackend.capabilities, rope_from=rope_from))
    model, inputs = Attention(q, k), make()
    want = model(*inputs)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    torch.testing.assert_close(torch.compile(model)(*inputs), want, rtol=2e-5, atol=2e-5)
    (layer,) = lpattn.attention_report(model).values()
    if q is k is plain and rope_from > S:
        assert layer.rope == "q_len 12: bf16_reference is faster at a rotation without a norm from 13 queries on"
        assert (spy.fused, spy.plain) == ([], 1)
    else:
        assert layer.rope == "fused"
        assert len(spy.fused) == 1


# What must not be fused as a norm. By name: the function, and what the report must say; None where
# it does not matter whether something is fused, only the numbers do.


def over_tokens(x, w):
    return x * inverse(x, dim=2) * w


def over_heads_and_lanes(x, w):
    return x * inverse(x, dim=(1, 3)) * w


def over_heads_with_one_weight(x, w):
    return over_heads_unweighted(x, w) * w


def over_two_heads(x, w):
    pairs = x.transpose(1, 2).unflatten(2, (-1, 2)).flatten(3)
    return (pairs * inverse(pairs)).unflatten(3, (2, D)).flatten(2, 3).transpose(1, 2) * w


def over_heads_of_the_next_token(x, w):
    flat = as_tokens(x)
    return as_heads(flat * inverse(torch.cat((flat[:, 1:], flat[:, :1]), 1)))


def over_heads_tokens_first(x, w):
    """Right, but what tokens are multiplied with is [S, B]."""
    flat = as_tokens(x).transpose(0, 1)
    return as_heads((flat * inverse(flat).contiguous()).transpose(0, 1))


def rounded_and_squares_not(x, w):
    return x.bfloat16().float() * inverse(x) * w


def whole_weights(x, w):
    return unweighted(x, w) * (10 * w).to(torch.int64)


def over_half_the_lanes(x, w):
    return x * inverse(x[..., : D // 2]) * w


def halves_apart(x, w):
    halves = x.unflatten(-1, (2, D // 2))
    return (halves * inverse(halves)).flatten(-2) * w


def layer_norm(x, w):
    return F.layer_norm(x, (D,), w, None, EPS)


def with_a_bias(x, w):
    return function(x, w) + w


def mean_subtracted(x, w):
    x = x - x.mean(-1, keepdim=True)
    return x * inverse(x) * w


def eps_is_a_tensor(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[0].abs()) * w


def eps_of_every_lane(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + torch.full((D,), EPS)) * w


def weight_of_tokens(x, w):
    return unweighted(x, w) * (torch.arange(1.0, x.shape[2] + 1)[:, None] * w)


def weight_of_heads(x, w):
    return unweighted(x, w) * (torch.arange(1.0, x.shape[1] + 1)[:, None, None] * w)


def weight_of_halves(x, w):
    return (unweighted(x, w).unflatten(-1, (2, D // 2)) * w[: D // 2]).flatten(-2)


def one_weight(x, w):
    return unweighted(x, w) * w[3]


def two_weights(x, w):
    return function(x, w) * w


def scaled(x, w):
    return 2.0 * function(x, w)


def row_of_another(x, w):
    return x * inverse(torch.cat((x[:, :, 1:], x[:, :, :1]), 2)) * w


def rows_reversed(x, w):
    return x * inverse(x.flip(2)) * w


def head_of_another(x, w):
    return x * inverse(torch.cat((x[:, 1:], x[:, :1]), 1)) * w


def lanes_swapped_before_the_weight(x, w):
    x = unweighted(x, w)
    return torch.cat((x[..., D // 2 :], x[..., : D // 2]), -1) * w


def last_row_is_not(x, w):
    return torch.cat((function(x, w)[:, :, :-1], x[:, :, -1:]), 2)


def square_root_forgotten(x, w):
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).reciprocal() * w


def root_itself(x, w):
    return x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def of_magnitudes(x, w):
    return x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + EPS) * w


def of_cubes(x, w):
    return x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS) * w


def sum_of_squares(x, w):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * w


def product_of_two(x, w):
    return x * (1.0 + w) * inverse(x) * w


def gated(x, w):
    return function(x, w) * x


def weight_of_its_own(x, w):
    return unweighted(x, w) * x.mean((0, 1, 2))


def doubled_eps(x, w):
    return x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), torch.ones(()), alpha=EPS)) * w


def doubled_mean(x, w):
    return x * torch.rsqrt(torch.add(torch.full((), 0.1), x.pow(2).mean(-1, keepdim=True), alpha=2.0)) * w


def whole_eps(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + torch.full((1,), 2.7, dtype=torch.int64)) * w


def negative_eps(x, w):
    return x * inverse(x, -1e-4) * w


def of_twice_as_much(x, w):
    return x * inverse(2.0 * x) * w


NEAR = {
    "over_tokens": (over_tokens, "is the mean over dimensions [2] of 4, not over the last ones"),
    "over_heads_and_lanes": (over_heads_and_lanes, "is the mean over dimensions [1, 3]"),
    "over_heads_with_one_weight": (over_heads_with_one_weight, "is no weight of a lane"),
    "over_two_heads": (over_two_heads, "is normalized over 32 elements; a head has 16, all heads 64"),
    "over_heads_of_the_next_token": (over_heads_of_the_next_token, "by the root mean square of another"),
    "over_heads_tokens_first": (over_heads_tokens_first, "lies in another order than tokens of q and k do"),
    "rounded_and_squares_not": (rounded_and_squares_not, "is no view of"),
    "whole_weights": (whole_weights, "is torch.int64"),
    "over_half_the_lanes": (over_half_the_lanes, "is normalized over 8 elements; a head has 16"),
    "halves_apart": (halves_apart, "is normalized over 8 elements; a head has 16"),
    "layer_norm": (layer_norm, "is no mean of squares"),
    "with_a_bias": (with_a_bias, "is no product of a tensor and its scale"),
    "mean_subtracted": (mean_subtracted, None),
    "eps_is_a_tensor": (eps_is_a_tensor, "no number for eps"),
    "eps_of_every_lane": (eps_of_every_lane, "is broadcast under the root"),
    "weight_of_tokens": (weight_of_tokens, "is no weight of a lane"),
    "weight_of_heads": (weight_of_heads, "is no weight of a lane"),
    "weight_of_halves": (weight_of_halves, "is no weight of a lane"),
    "one_weight": (one_weight, "is no weight of a lane"),
    "two_weights": (two_weights, "multiplies by a second weight"),
    "scaled": (scaled, "scales by 2.0"),
    "row_of_another": (row_of_another, "by the root mean square of another"),
    "rows_reversed": (rows_reversed, "is no view of"),
    "head_of_another": (head_of_another, "by the root mean square of another"),
    "lanes_swapped_before_the_weight": (lanes_swapped_before_the_weight, None),
    "last_row_is_not": (last_row_is_not, "q: "),
    "square_root_forgotten": (square_root_forgotten, None),
    "root_itself": (root_itself, "q: "),
    "of_magnitudes": (of_magnitudes, "is no square"),
    "of_cubes": (of_cubes, "is no square"),
    "sum_of_squares": (sum_of_squares, "is no mean of squares"),
    "product_of_two": (product_of_two, "is no view of"),
    "gated": (gated, "depends on what is normalized"),
    "weight_of_its_own": (weight_of_its_own, "depends on what is normalized"),
    "doubled_eps": (doubled_eps, None),
    "doubled_mean": (doubled_mean, "adds 2.0 times the mean of squares"),
    "whole_eps": (whole_eps, None),
    "of_twice_as_much": (of_twice_as_much, "is no view of"),
    "negative_eps": (negative_eps, "-0.0001 is added under the root"),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_norms_are_right(name, attend, as_compiled, spy):
    form, expected = NEAR[name]
    inputs = make()
    eager, got, norm = attend(Attention(form), *inputs)
    want, as_written = as_compiled(Attention(form), inputs, eager)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)
    if expected is not None and as_written:
        assert expected in norm
        assert spy.norms == [None]
        assert len(spy.fused) == 1, "the rotation is fused all the same"


def test_weights_of_other_heads(attend, spy):
    """Each lane has its own, and heads have those of each other."""

    def halves_of_heads(x, w):
        pairs = unweighted(as_tokens(x), w).unflatten(2, (2, -1, D)).transpose(2, 3) * w.view(-1, 2, D)
        return as_heads(pairs.transpose(2, 3).flatten(2))

    want, got, norm = attend(Attention(halves_of_heads, over_heads), *make_over_heads())
    assert "is no weight of a lane" in norm
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_as_many_weights_as_lanes_but_one_per_token(attend, spy):
    want, got, norm = attend(Attention(lambda x, w: unweighted(x, w) * w[:, None]), *make(length=D))
    assert "is no weight of a lane" in norm
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_of_another_tensor(attend, spy):
    """Queries that are divided by the size of the keys."""

    class Crossed(nn.Module):
        def forward(self, q, k, v, cos, sin, *weights):
            q, k = q * inverse(k.repeat(1, 2, 1, 1)), k * inverse(q[:, :HKV])
            return F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, enable_gqa=True)

    want, got, norm = attend(Crossed(), *make())
    assert norm.startswith("q: ")
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_what_holds_at_one_length_only(spy, compiled):
    """Six rows are normalized, which are all of them at first, and not later."""

    def first_rows(x, w):
        return torch.cat((function(x[:, :, :6], w), x[:, :, 6:]), 2)

    plain_model, model = Attention(first_rows), Attention(first_rows)
    lpattn.apply_low_precision_attention(model, "bf16_reference")
    under = compiled(model)
    for length in (6, 9):
        inputs = make(length)
        for number, tensor in enumerate(inputs[:5]):
            torch._dynamo.maybe_mark_dynamic(tensor, 2 if number < 3 else 0)
        torch.testing.assert_close(under(*inputs), plain_model(*inputs), rtol=2e-5, atol=2e-5)
