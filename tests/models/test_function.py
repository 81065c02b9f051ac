"""low_precision_sdpa itself, called as models call SDPA, against the plain formula in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpattn

B, H, S, D = 2, 4, 40, 32
LENGTHS = (1, 7, 63, 64, 65, 127, 128, 129)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(batch=B, heads=H, kv_heads=None, q_len=S, kv_len=None, dim=D, dim_v=None, sharpness=1.5):
    """q, k, v whose logits have a standard deviation of sharpness squared, so that a wrong weight shows."""
    kv_heads, kv_len = kv_heads or heads, q_len if kv_len is None else kv_len
    q = randn(batch, heads, q_len, dim, seed=1) * sharpness
    k = randn(batch, kv_heads, kv_len, dim, seed=2) * sharpness
    return q, k, randn(batch, kv_heads, kv_len, dim_v or dim, seed=3)


def exact(q, k, v, attn_mask=None, is_causal=False, scale=None):
    """Row by row what the documentation of SDPA says, in float64; 0 where a row attends to nothing."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        logits = q[b, h] @ k[b, h // group].T * scale
        if attn_mask is not None:
            mask = attn_mask.expand(*q.shape[:3], k.shape[2])[b, h]
            bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
            logits = logits + bias.double()
        if is_causal:
            logits = logits.masked_fill(~torch.ones(logits.shape, dtype=torch.bool).tril(), -math.inf)
        some = logits.isfinite().any(1)
        out[b, h, some] = logits[some].softmax(-1) @ v[b, h // group]
    return out


@pytest.fixture
def check(fp8_emulated, planted, sqnr):
    """``check(q, k, v, bug=..., **options)``: both backends against the formula, and the planted bug far from it."""

    def run(q, k, v, bug=None, **options):
        formula = {name: value for name, value in options.items() if name != "enable_gqa"}
        want = exact(q, k, v, **formula)
        for backend, floor in (("bf16_reference", 100), (fp8_emulated, 20)):
            got = lpattn.low_precision_sdpa(q, k, v, backend=backend, **options)
            assert got.shape == want.shape
            assert got.dtype == q.dtype
            assert got.transpose(1, 2).is_contiguous(), "the memory of the output is not [B, S, H, D]"
            score = sqnr(want, got)
            assert score >= floor, f"{backend}: {score:.1f} dB"
            # A query that sees one key gets its value, which smoothing makes exact: it is the mean that is subtracted.
            one_key = k.shape[2] == 1 or (options.get("is_causal") and q.shape[2] == 1)
            assert backend != fp8_emulated or one_key or score < 100, "low precision did not run"
        for name, holds in (("none", lambda score: score >= 100), (bug, lambda score: score < 15)):
            if name is not None:
                with planted(name) as backend:
                    score = sqnr(want, lpattn.low_precision_sdpa(q, k, v, backend=backend, **options))
                assert holds(score), f"planted bug {name}: {score:.1f} dB"

    return run


@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 9), (9, 5), (1, 7), (7, 1), (64, 128), (128, 64), (63, 65)])
def test_causal_is_top_left_aligned(q_len, kv_len, check):
    check(*qkv(q_len=q_len, kv_len=kv_len), is_causal=True, bug="bottom_right")


class CrossCausal(nn.Module):
    """A module whose causal queries and keys differ in number, as a prompt against a fuller cache."""

    def __init__(self, kv_len):
        super().__init__()
        self.kv_len = kv_len
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        q, k, v = self.q_proj(x[:, : 64 - self.kv_len]), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.view(len(x), -1, 4, 16).transpose(1, 2) for t in (q, k[:, : self.kv_len], v[:, : self.kv_len]))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kv_len", [40, 24])
def test_causal_is_top_left_aligned_in_a_module(kv_len, make_subject, fp8_emulated):
    x = randn(2, 64, 64)
    subject = make_subject(
        lambda: (nn.Sequential(CrossCausal(kv_len)), lambda model: model(x)), "bottom_right", "CrossCausal"
    )
    subject.check_reference()
    subject.check_low_precision(fp8_emulated)
    subject.check_bug()


@pytest.mark.parametrize("dim", [40, 72, 80, 88, 96, 112, 192, 256])
def test_head_dims(dim, check):
    check(*qkv(dim=dim, q_len=33, kv_len=70), bug="causal")


@pytest.mark.parametrize(("dim", "dim_v"), [(32, 16), (16, 64), (40, 72), (64, 1), (192, 128)])
def test_value_has_its_own_head_dim(dim, dim_v, check):
    check(*qkv(dim=dim, dim_v=dim_v, q_len=33, kv_len=70), bug="causal")


@pytest.mark.parametrize("enable_gqa", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (16, 2), (8, 1), (1, 1), (6, 3)])
def test_grouped_heads(heads, kv_heads, enable_gqa, check):
    bug = "heads_tiled" if 1 < kv_heads < heads else "not_causal"
    check(*qkv(heads=heads, kv_heads=kv_heads), is_causal=True, enable_gqa=enable_gqa, bug=bug)


@pytest.mark.parametrize("scale", [0.0, 0.5, 0.02, -0.2])
def test_scale(scale, check):
    check(*qkv(), scale=scale, bug="default_scale")


@pytest.mark.parametrize(("q_len", "kv_len"), list(itertools.product(LENGTHS, LENGTHS)))
def test_lengths(q_len, kv_len, check):
    """A needle in the last key: a kernel that loses the tail of the last block shows at once."""
    q, k, v = qkv(batch=1, heads=2, q_len=q_len, kv_len=kv_len, sharpness=1.0)
    direction = F.normalize(randn(D, seed=4), dim=0)
    q = q + 4 * direction
    k[:, :, -1] = 8 * direction
    v[:, :, -1] += 4
    check(q, k, v, bug="short_keys" if kv_len > 1 and kv_len % 16 else None)
    if q_len == kv_len > 1:
        check(q, k, v, is_causal=True, bug="not_causal")


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 8, 8), (2, 0, 8), (2, 8, 0), (2, 0, 0)])
def test_empty_sequences_are_those_of_sdpa(batch, q_len, kv_len, fp8_emulated):
    q, k, v = qkv(batch=batch, q_len=q_len, kv_len=kv_len)
    want = F.scaled_dot_product_attention(q, k, v)
    for backend in ("bf16_reference", fp8_emulated):
        got = lpattn.low_precision_sdpa(q, k, v, backend=backend)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def some(*shape, seed=5):
    """A bool mask in which every row attends to something, whatever it is broadcast to."""
    mask = randn(*shape, seed=seed) > 0.3
    mask[..., 0] = True
    return mask


# The shape of the mask, and the planted bug that its varying dimension catches.
MASKS = {
    "key-padding": ((B, 1, 1, S), "first_batch_mask"),
    "batch-and-query": ((B, 1, S, S), "first_batch_mask"),
    "head": ((1, H, S, S), "first_head_mask"),
    "batch-and-head": ((B, H, 1, S), "first_head_mask"),
    "everything": ((B, H, S, S), "first_query_mask"),
    "two-dimensional": ((S, S), "first_query_mask"),
    "one-row": ((1, S), "mask_dropped"),
    "three-dimensional": ((H, S, S), "first_head_mask"),
    "one-mask": ((1, 1, S, S), "first_query_mask"),
}


@pytest.mark.parametrize("kind", ["bool", "minus-inf", "finfo-min", "bias"])
@pytest.mark.parametrize("name", list(MASKS))
def test_masks_broadcast(name, kind, check):
    shape, bug = MASKS[name]
    mask = some(*shape)
    if kind == "bias":
        mask = 3 * randn(*shape, seed=6)
    elif kind != "bool":
        low = -math.inf if kind == "minus-inf" else torch.finfo(torch.float32).min
        mask = torch.zeros(shape).masked_fill(~mask, low)
    check(*qkv(), attn_mask=mask, bug=bug)


def test_mask_over_whole_rows(check):
    """[B, H, q_len, 1]: a query attends to everything or to nothing."""
    check(*qkv(), attn_mask=randn(B, H, S, 1) > 0, bug="mask_dropped")


@pytest.mark.parametrize("kind", ["bool", "minus-inf"])
def test_fully_masked_rows(kind, check):
    """They are zeros, as in SDPA of the installed torch, and disturb no other row."""
    mask = some(B, 1, S, S)
    mask[0, :, ::3] = False
    mask[1] = False
    q, k, v = qkv()
    mask = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    want = F.scaled_dot_product_attention(q, k, v, mask)
    assert want[1].count_nonzero() == 0
    check(q, k, v, attn_mask=mask, bug="mask_dropped")


def test_masked_keys_may_hold_anything_finite(fp8_emulated):
    """Padding is in no scale and in no mean: low precision answers the same, to the bit, whatever stands in it."""
    q, k, v = qkv()
    mask = (torch.arange(S) < torch.tensor([30, 9])[:, None])[:, None, None]
    want = lpattn.low_precision_sdpa(q, k, v, mask, backend=fp8_emulated)
    hidden = ~mask.mT
    k, v = k.masked_fill(hidden, 1e9), v.masked_fill(hidden, -1e9)
    torch.testing.assert_close(lpattn.low_precision_sdpa(q, k, v, mask, backend=fp8_emulated), want, rtol=0, atol=0)


def bshd(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def fused(x):
    """A part of a fused projection [B, S, 3, H, D]."""
    return torch.stack([-x, x, 2 * x]).permute(1, 3, 0, 2, 4).contiguous()[:, :, 1].transpose(1, 2)


def every_second(x):
    return torch.stack([x, -x], -1).flatten(-2)[..., ::2]


def columns_first(x):
    return x.mT.contiguous().mT


def inside(x):
    """A window of something longer in every direction."""
    padded = F.pad(x, (3, 5, 2, 9, 1, 2), value=7.0)
    return padded[:, 1 : 1 + x.shape[1], 2 : 2 + x.shape[2], 3 : 3 + x.shape[3]]


@pytest.mark.parametrize("layout", [bshd, fused, every_second, columns_first, inside], ids=lambda f: f.__name__)
def test_layouts(layout, check):
    q, k, v = (layout(x) for x in qkv())
    assert not q.is_contiguous()
    assert torch.equal(q, qkv()[0])
    check(q, k, v, bug="contiguous")
    check(q, k, v, is_causal=True, bug="not_causal")


def test_expanded_inputs(check):
    """Strides of 0 over batch and heads."""
    q, k, v = qkv()
    check(q, k[:1, :1].expand(B, H, -1, -1), v[:1, :1].expand(B, H, -1, -1), bug="causal")


def test_strided_masks(check):
    mask = some(S, B, S, H).permute(1, 3, 2, 0)
    mask[..., 0] = True
    check(*qkv(), attn_mask=mask, bug="mask_dropped")
    check(*qkv(), attn_mask=some(S, 2 * S)[:, ::2].expand(B, H, S, S), bug="mask_dropped")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, fp8_emulated, sqnr):
    q, k, v = (x.to(dtype) for x in qkv(kv_heads=2))
    mask = some(B, 1, S, S)
    want = exact(q, k, v, mask)
    got = lpattn.low_precision_sdpa(q, k, v, mask, backend="bf16_reference")
    assert got.dtype == dtype
    assert sqnr(want, got) >= 40
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), rtol=0, atol=0)
    got = lpattn.low_precision_sdpa(q, k, v, mask, backend=fp8_emulated)
    assert got.dtype == dtype
    assert sqnr(want, got) >= 20
