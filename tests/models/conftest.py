"""What the tests of real models share: models whose attention matters, planted bugs, and the comparison itself.

A subject is a tiny model of a real library with a way to run it. Its weights are scaled so that attention decides the
output: with default-initialised weights a BERT that ignores its mask still scores 52 dB, and no test would notice.
"""

import math
import re
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpattn

FLOOR = 20.0  # dB that low precision keeps
CEILING = 15.0  # dB that a planted bug may reach at most: far enough below the floor to be told apart from it


def _sqnr(want, got) -> float:
    """Signal to noise ratio in dB, over all tensors of a run together; infinite where they are equal."""
    want, got = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (want, got))
    assert [x.shape for x in want] == [x.shape for x in got]
    want, got = (torch.cat([x.double().flatten() for x in xs]) for xs in (want, got))
    assert want.isfinite().all()
    noise = (want - got).square().sum()
    if not noise.isfinite():
        return -math.inf
    return math.inf if noise == 0 else 10 * math.log10(want.square().sum() / noise)


def _attend(query, key, value, call, allowed=None, bias=None, tiled=False, scale=None):
    """The plain formula in float32 or wider; the tests of the function compare it with SDPA's float64."""
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = call.num_heads // call.num_kv_heads
    spread = (lambda x: x.repeat(1, groups, 1, 1)) if tiled else (lambda x: x.repeat_interleave(groups, 1))
    scores = query.to(wide) @ spread(key).to(wide).mT * (call.softmax_scale if scale is None else scale)
    if bias is not None:
        scores = scores + bias.to(wide)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ spread(value).to(wide)).to(query.dtype)


def _split(call, mask):
    """What a call means, as (allowed, bias)."""
    causal = None
    if call.causal is lpattn.CausalKind.TOP_LEFT:
        causal = _lower(call)
    if mask is None:
        return causal, None
    if mask.dtype == torch.bool:
        return (mask if causal is None else mask & causal), None
    return causal, mask


def _lower(call, diagonal=0):
    return torch.ones(call.q_len, call.kv_len, dtype=torch.bool).tril(diagonal)


def _none(q, k, v, call, mask):
    """No bug: what the others are made of. It must score as exact attention does, or their scores mean nothing."""
    allowed, bias = _split(call, mask)
    return _attend(q, k, v, call, allowed, bias)


def _mask_dropped(q, k, v, call, mask):
    allowed, _ = _split(call, None)
    return _attend(q, k, v, call, allowed)


def _causal(q, k, v, call, mask):
    """Whatever was asked for, causal: what becomes of a mask that is taken for a causal one."""
    return _attend(q, k, v, call, _lower(call, call.kv_len - call.q_len if call.q_len <= call.kv_len else 0))


def _not_causal(q, k, v, call, mask):
    return _attend(q, k, v, call, *_split(call, mask)) if mask is not None else _attend(q, k, v, call)


def _bottom_right(q, k, v, call, mask):
    """FlashAttention's alignment of a causal call."""
    if call.causal is lpattn.CausalKind.NONE:
        return _none(q, k, v, call, mask)
    return _attend(q, k, v, call, _lower(call, call.kv_len - call.q_len))


def _top_left(q, k, v, call, mask):
    """The mask of a call with a cache replaced by SDPA's own causal one, which does not know how full the cache is."""
    return _attend(q, k, v, call, _lower(call))


def _mask_offset(q, k, v, call, mask):
    """The mask is read with the queries' positions at the end of the cache instead of where they are."""
    allowed, bias = _split(call, mask)
    if mask is None or call.q_len == call.kv_len:
        return _none(q, k, v, call, mask)
    shift = call.kv_len - call.q_len
    allowed = None if allowed is None else allowed.roll(shift, -1)
    return _attend(q, k, v, call, allowed, None if bias is None else bias.roll(shift, -1))


def _bias_dropped(q, k, v, call, mask):
    """An additive mask taken for what it hides; its finite values are lost."""
    allowed, bias = _split(call, mask)
    if bias is not None:
        hidden = bias > -1e4
        allowed = hidden if allowed is None else hidden & allowed
    return _attend(q, k, v, call, allowed)


def _first_batch_mask(q, k, v, call, mask):
    return _none(q, k, v, call, None if mask is None else mask[:1])


def _first_head_mask(q, k, v, call, mask):
    return _none(q, k, v, call, None if mask is None else mask[:, :1])


def _first_query_mask(q, k, v, call, mask):
    return _none(q, k, v, call, None if mask is None else mask[:, :, :1])


def _heads_tiled(q, k, v, call, mask):
    """kv heads repeated as [0, 1, 0, 1] instead of [0, 0, 1, 1]."""
    return _attend(q, k, v, call, *_split(call, mask), tiled=True)


def _default_scale(q, k, v, call, mask):
    return _attend(q, k, v, call, *_split(call, mask), scale=call.head_dim**-0.5)


def _short_keys(q, k, v, call, mask):
    """The keys past the last full block of 16 are never read."""
    allowed, bias = _split(call, mask)
    read = torch.arange(call.kv_len) < max(call.kv_len // 16 * 16, 1)
    return _attend(q, k, v, call, read.expand(call.q_len, -1) if allowed is None else allowed & read, bias)


def _contiguous(q, k, v, call, mask):
    """Strides are ignored: memory is read as if it were [B, H, S, D]-contiguous."""

    def misread(x):
        flat = x.as_strided((x.untyped_storage().size() // x.element_size() - x.storage_offset(),), (1,))
        return flat[: x.numel()].view(x.shape) if flat.numel() >= x.numel() else x

    return _none(misread(q), misread(k), misread(v), call, mask)


BUGS = {
    f"planted_{bug.__name__.removeprefix('_')}": bug
    for bug in (
        _none,
        _mask_dropped,
        _causal,
        _not_causal,
        _bottom_right,
        _top_left,
        _mask_offset,
        _bias_dropped,
        _first_batch_mask,
        _first_head_mask,
        _first_query_mask,
        _heads_tiled,
        _default_scale,
        _short_keys,
        _contiguous,
    )
}


class Planted(lpattn.Backend):
    """Exact attention with one bug. It claims to run everything."""

    automatic = False
    capabilities = lpattn.Capabilities(
        dtypes=frozenset({torch.bfloat16, torch.float32, torch.float64}),
        head_dim_v_differs=True,
        masks=frozenset(lpattn.MaskKind),
        causal_rectangular=True,
    )

    def __init__(self, name):
        self.name = name

    def probe(self, device):
        return []

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        return BUGS[self.name](query, key, value, call, attn_mask)


@contextmanager
def _planted(bug):
    """Registers the planted bug (its name without "planted_") as a backend; gives the backend's name."""
    name = f"planted_{bug}"
    lpattn.register_backend(Planted(name))
    try:
        yield name
    finally:
        lpattn.unregister_backend(name)


_QUERY_KEY = re.compile(r"(^|[._])(add_)?(q|k|query|key)(_proj|_lin)?$")
_VALUE_OUT = re.compile(
    r"(^|[._])((add_)?(v|value)(_proj|_lin)?|o_proj|out_lin|out_proj|to_out\.0|to_add_out|Wo|o|attention\.output\.dense)$"
)
_NORMS = re.compile(r"(^|[._])(q_norm|k_norm|norm_q|norm_k|norm_added_q|norm_added_k|q_layernorm|k_layernorm)$")


def _sharpen(model, qk=1.5, vo=1.5):
    """Redraws the projections of attention so that it is peaked, and so that its output outweighs the residual stream.

    Args:
        model: a model of transformers or diffusers; changed in place.
        qk: standard deviation of the elements of q and k for inputs of unit variance; logits get about its square.
        vo: gain of the value and output projections.
    """
    generator = torch.Generator().manual_seed(1)
    touched = 0

    def draw(weight, gain):
        nonlocal touched
        touched += 1
        weight.copy_(torch.randn(weight.shape, generator=generator) * gain / math.sqrt(weight.shape[1]))

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("Wqkv"):
                for part, gain in zip(module.weight.chunk(3), (qk, qk, vo), strict=True):
                    draw(part, gain)
            elif isinstance(module, nn.Linear) and _QUERY_KEY.search(name):
                draw(module.weight, qk)
            elif isinstance(module, nn.Linear) and _VALUE_OUT.search(name):
                draw(module.weight, vo)
            elif _NORMS.search(name) and getattr(module, "weight", None) is not None:
                module.weight.mul_(qk)
            elif isinstance(module, nn.MultiheadAttention):
                for part, gain in zip(module.in_proj_weight.chunk(3), (qk, qk, vo), strict=True):
                    draw(part, gain)
    assert touched >= 3, f"no projections found in {type(model).__name__}: {[n for n, _ in model.named_modules()]}"
    return model


@contextmanager
def _counted():
    """Counts calls of SDPA as a bystander sees them; for models that lpattn is not applied to."""
    original, calls = F.scaled_dot_product_attention, []

    def counting(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    F.scaled_dot_product_attention = counting
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = original


class Subject:
    """One model, run one way, with what it answers untouched.

    Attributes:
        model, run: ``run(model)`` gives a tensor or several: what the model answers where its inputs are real.
        bug: the planted bug that this case is there to catch.
        attention: class name of the modules that attend.
        want, calls: the untouched answer, and the number of SDPA calls that it took.
    """

    def __init__(self, build, bug, attention, calls=None, dtype=torch.float32, **gains):
        torch.manual_seed(0)
        self.model, self.run = build()
        self.model = _sharpen(self.model, **gains).eval()
        if dtype != torch.float32:
            self.model.to(dtype)
        self.bug, self.attention = bug, attention
        with torch.no_grad(), _counted() as counted:
            self.want = self.run(self.model)
        # The fused operators of torch.nn attend without calling SDPA: then the test says how often.
        self.calls = len(counted) if calls is None else calls
        assert self.calls > 0
        self.layers = {n for n, m in self.model.named_modules() if type(m).__name__ == attention}
        assert self.layers

    def under(self, backend):
        """Apply a backend, run, remove: the answer and the report."""
        lpattn.apply_low_precision_attention(self.model, backend)
        try:
            with torch.no_grad():
                got = self.run(self.model)
            return got, lpattn.attention_report(self.model)
        finally:
            lpattn.remove_low_precision_attention(self.model)

    def check_reference(self):
        """Exact attention through lpattn is the untouched model, and all calls are accounted for, layer by layer."""
        got, report = self.under("bf16_reference")
        torch.testing.assert_close(got, self.want)
        assert set(report) == self.layers
        assert all(layer.low == {} and set(layer.exact) == {"requested"} for layer in report.values())
        assert sum(layer.exact["requested"] for layer in report.values()) == self.calls
        with torch.no_grad():
            torch.testing.assert_close(self.run(self.model), self.want, rtol=0, atol=0, msg="not removed")

    def check_low_precision(self, backend):
        """Low precision keeps the answer, and really ran: every call, in every layer."""
        got, report = self.under(backend)
        assert set(report) == self.layers
        assert all(set(layer.low) == {backend} and layer.exact == {} for layer in report.values()), str(report)
        assert sum(layer.low[backend] for layer in report.values()) == self.calls
        score = _sqnr(self.want, got)
        assert score != math.inf, "nothing changed: low precision did not run"
        assert score >= FLOOR, f"{score:.1f} dB"
        return score

    def check_bug(self, bug=None):
        """The planted bug scores far below low precision, so that this case would notice it; its formula does not."""
        with _planted("none") as name:
            score = _sqnr(self.want, self.under(name)[0])
            assert score >= 35, f"not the bug but the formula that it is planted in scores {score:.1f} dB"
        with _planted(bug or self.bug) as name:
            score = _sqnr(self.want, self.under(name)[0])
        assert score < CEILING, f"{score:.1f} dB: this case does not notice {bug or self.bug}"
        return score


@pytest.fixture(scope="module")
def make_subject():
    """``Subject``, for tests that need one of their own."""
    return Subject


@pytest.fixture(scope="module")
def subject(request):
    """The subject of a case in the module's ``CASES``: one after the other, each built once."""
    return Subject(**request.module.CASES[request.param])


def pytest_generate_tests(metafunc):
    if "subject" in metafunc.fixturenames:
        metafunc.parametrize("subject", list(metafunc.module.CASES), indirect=True, scope="module")


@pytest.fixture(scope="session")
def sqnr():
    """``sqnr(want, got)`` in dB."""
    return _sqnr


@pytest.fixture(scope="session")
def sharpen():
    """``sharpen(model, qk, vo)``: scales the weights until attention matters."""
    return _sharpen


@pytest.fixture(scope="session")
def planted():
    """``with planted("causal") as backend``: exact attention with that bug."""
    return _planted


@pytest.fixture(scope="session")
def counted():
    """``with counted() as calls``: the SDPA calls of untouched models."""
    return _counted


@pytest.fixture(scope="session")
def fp8_emulated():
    """The name of the backend that emulates FP8 on any device, registered if its plugin is not installed."""
    name = "fp8_emulated"
    if any(backend.name == name for backend in lpattn.available_backends("cpu")):
        yield name
        return
    plugin = pytest.importorskip("lpattn_emulated", reason="the plugin lpattn-emulated is not installed")
    lpattn.register_backend(plugin.EmulatedBackend())
    try:
        yield name
    finally:
        lpattn.unregister_backend(name)
