"""Backends that tests make up, a registry that holds only these, and the plain formula in float64."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import types

import pytest
import torch
import torch.nn.functional as F

import lpattn
from lpattn import AttentionCall, Capabilities, CausalKind, HadamardMode, MaskKind
from lpattn.registry import registry

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
EVERYTHING = {
    "dtypes": FLOATS,
    "head_dim_v_differs": True,
    "masks": frozenset(MaskKind),
    "causal_rectangular": True,
    "lse": True,
    "dropout": True,
    "hadamard": frozenset(HadamardMode),
}


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def plain_attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
    """(output, lse) in float64 by the formula; rows that attend to nothing give 0 and -inf."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.mT * scale
    if is_causal:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        scores = scores.masked_fill(columns > rows, -torch.inf)
    if attn_mask is not None:
        hidden = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else None
        scores = hidden if hidden is not None else scores + attn_mask.double()
    lse = scores.logsumexp(-1)
    weights = torch.where(lse[..., None] == -torch.inf, 0.0, (scores - lse[..., None]).exp())
    return weights @ v, lse


class FakeBackend(lpattn.Backend):
    """Computes by the plain formula, without gradients unless it says otherwise, and writes down what it was asked."""

    def __init__(self, name="fake", *, rank=2.0, device=(), supports=None, automatic=True, exact_lengths=False, **data):
        self.name = name
        self.capabilities = Capabilities(**{**EVERYTHING, **data})
        self.automatic = automatic
        self.exact_lengths = exact_lengths
        self._rank, self._device, self._supports = rank, device, supports
        self.calls: list[AttentionCall] = []
        self.seen: list[types.SimpleNamespace] = []
        self.asked: list[AttentionCall] = []
        self.probed: list[torch.device] = []

    def probe(self, device):
        self.probed.append(device)
        if isinstance(self._device, Exception):
            raise self._device
        return list(self._device)

    def supports(self, call):
        self.asked.append(call)
        return super().supports(call) + (self._supports(call) if self._supports else [])

    def rank(self, call):
        return self._rank(call) if callable(self._rank) else self._rank

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        self.calls.append(call)
        autocast = torch.is_autocast_enabled(query.device.type)
        self.seen.append(
            types.SimpleNamespace(q=query, k=key, v=value, mask=attn_mask, dropout=dropout_p, autocast=autocast)
        )
        tensors = [query, key, value, attn_mask]
        if not self.capabilities.backward:
            tensors = [t if t is None else t.detach() for t in tensors]
        causal = call.causal is CausalKind.TOP_LEFT
        out, lse = plain_attention(*tensors, is_causal=causal, scale=call.softmax_scale)
        out = out.to(query.dtype)
        return (out, lse.float()) if call.return_lse else out


class FakeRopeBackend(FakeBackend):
    """Also rotates, by the lane-wise formula."""

    def __init__(self, name="fake", **options):
        super().__init__(name, **{"rope": True, **options})
        self.tables: list[tuple[torch.Tensor | None, ...]] = []
        self.norms: list[lpattn.Norm | None] = []

    def rope_attention(
        self, query, key, value, cos, sin, call, attn_mask=None, dropout_p=0.0, cos_k=None, sin_k=None, **norm
    ):
        self.tables.append((cos, sin, cos_k, sin_k))
        self.norms.append(norm.get("norm"))
        if norm:
            of = norm["norm"]
            assert self.capabilities.takes_norm(of.over_heads)
            if of.rstd_q is None:
                query, key = plain_norm(query, of.eps_q, of.weight_q), plain_norm(key, of.eps_k, of.weight_k)
            else:
                query, key = plain_scaling(query, of.rstd_q, of.weight_q), plain_scaling(key, of.rstd_k, of.weight_k)
        pairs = call.rope.interleaved
        q = plain_rotation(query, cos, sin, pairs)
        k = plain_rotation(key, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, pairs)
        tensors = [t.to(value.dtype).transpose(1, 2) for t in (q, k, value)]
        return self.attention(*tensors, call, attn_mask, dropout_p)


def plain_norm(x, eps, weight=None):
    """Each row over its root mean square, row by row in float64; x is [..., D]. An eps of None leaves x as it is."""
    x = x.double()
    if eps is None:
        return x
    rows = [row / (sum(v * v for v in row.tolist()) / len(row) + eps) ** 0.5 for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).reshape(x.shape) * (1.0 if weight is None else weight.double())


def plain_scaling(x, rstd, weight=None):
    """Each token times its number, token by token in float64; x is [B, S, H, D]."""
    tokens = [token.double() * number for token, number in zip(x.flatten(0, 1), rstd.flatten().tolist(), strict=True)]
    return torch.stack(tokens).reshape(x.shape) * (1.0 if weight is None else weight.double())


def plain_rotation(x, cos, sin, interleaved):
    """out[d] = x[d]*cos[d] + rot(x)[d]*sin[d], lane by lane in float64; x is [B, S, H, D]."""
    x = x.double()
    rotary_dim = cos.shape[-1]
    full = (*x.shape[:3], rotary_dim)
    cos, sin = cos.double().expand(full), sin.double().expand(full)
    out = x.clone()
    half = rotary_dim // 2
    for lane in range(rotary_dim):
        if interleaved:
            partner, sign = (lane + 1, -1.0) if lane % 2 == 0 else (lane - 1, 1.0)
        else:
            partner, sign = (lane + half, -1.0) if lane < half else (lane - half, 1.0)
        out[..., lane] = x[..., lane] * cos[..., lane] + sign * x[..., partner] * sin[..., lane]
    return out


@pytest.fixture(autouse=True)
def bare_registry(clean_slate):
    """Only the reference is registered: what is installed on the machine must not change what these tests see."""
    registry.backends()
    fields = ("_backends", "_sources", "_conflicts", "_failures", "_probes")
    before = {field: getattr(registry, field) for field in fields}
    name = "bf16_reference"
    registry._backends = {name: before["_backends"][name]}
    registry._sources = {name: before["_sources"][name]}
    registry._conflicts, registry._failures, registry._probes = {}, [], {}
    registry.generation += 1
    yield
    for field, value in before.items():
        setattr(registry, field, value)
    registry.generation += 1


@pytest.fixture
def make_backend():
    """Make a FakeBackend without registering it."""

    def make(name="fake", *, fused_rope=False, **options):
        return (FakeRopeBackend if fused_rope else FakeBackend)(name, **options)

    return make


@pytest.fixture
def add_backend(make_backend):
    """Make a FakeBackend and register it."""

    def add(name="fake", **options):
        backend = make_backend(name, **options)
        lpattn.register_backend(backend)
        return backend

    return add


@pytest.fixture
def plain():
    return plain_attention


@pytest.fixture
def normal():
    return plain_norm


@pytest.fixture
def scaled():
    return plain_scaling


@pytest.fixture
def rotation():
    return plain_rotation


@pytest.fixture
def make_call():
    """An AttentionCall that a FakeBackend can run, with fields replaced."""
    base = AttentionCall(2, 4, 4, 64, 64, 32, 32, torch.bfloat16, "cpu", softmax_scale=32**-0.5)
    return lambda **fields: dataclasses.replace(base, **fields)


@pytest.fixture
def qkv():
    """Random q, k, v in [B, H, S, D]."""

    def make(batch=2, heads=4, q_len=6, kv_len=None, dim=8, dim_v=None, kv_heads=None, dtype=torch.float32):
        kv_len, kv_heads = q_len if kv_len is None else kv_len, kv_heads or heads
        return (
            torch.randn(batch, heads, q_len, dim, dtype=dtype),
            torch.randn(batch, kv_heads, kv_len, dim, dtype=dtype),
            torch.randn(batch, kv_heads, kv_len, dim_v or dim, dtype=dtype),
        )

    torch.manual_seed(0)
    return make


@pytest.fixture
def in_bshd():
    """Whether the memory of a [B, H, S, D] tensor is [B, S, H, D]-contiguous."""
    return lambda out: out.transpose(1, 2).is_contiguous()


class _Attention(torch.nn.Module):
    """Attends to x; with ``options`` through lpattn's own function, as a call with arguments does."""

    def __init__(self):
        super().__init__()
        self.options = {}

    def forward(self, x):
        if self.options:
            return lpattn.low_precision_sdpa(x, x, x, **self.options)
        return F.scaled_dot_product_attention(x, x, x)


class _Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = _Attention()

    def forward(self, x):
        return self.attn(x)


@pytest.fixture
def make_model():
    """A model with one attention, ``model.attn``; its x is [B, H, S, D]."""
    return _Model


@pytest.fixture
def plugin():
    """What an entry point may load: an object that implements the hook."""

    def make(*backends, error=None):
        @lpattn.hookimpl
        def lpattn_backends():
            if error is not None:
                raise error
            return list(backends)

        return types.SimpleNamespace(lpattn_backends=lpattn_backends)

    return make


@pytest.fixture
def install(monkeypatch):
    """Pretend that plugins are installed: ``(entry point name, distribution, plugin or function that loads one)``."""

    def pretend(*installed):
        entry_points = []
        for name, distribution, plugin in installed:
            load = plugin if callable(plugin) else (lambda plugin=plugin: plugin)
            dist = types.SimpleNamespace(name=distribution, version="1.0")
            entry_points.append(types.SimpleNamespace(name=name, dist=dist, load=load))

        def entry_points_of(*, group):
            return entry_points if group == "lpattn" else []

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points_of)

    return pretend


@pytest.fixture
def agree(add_backend, in_bshd):
    """Run a call on a backend and compare with SDPA: values, dtype, memory, and inputs left alone."""
    fake = add_backend()

    def check(backend, q, k, v, attn_mask=None, **options):
        tensors = [t for t in (q, k, v, attn_mask) if t is not None]
        copies, versions = [t.clone() for t in tensors], [t._version for t in tensors]
        gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask, **{**options, **gqa})
        before = len(fake.calls)
        out = lpattn.low_precision_sdpa(q, k, v, attn_mask, **options, backend=backend)
        assert len(fake.calls) - before == (backend == "fake")
        assert (out.shape, out.dtype, out.device) == (expected.shape, expected.dtype, expected.device)
        torch.testing.assert_close(out, expected, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])
        assert in_bshd(out)
        assert [t._version for t in tensors] == versions
        assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))
        return out

    check.fake, check.tolerance = fake, TOLERANCE
    return check
