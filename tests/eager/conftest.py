"""Small models, and backends that leave a mark, so that a test sees which of them ran."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as by_name

import lpattn


class Attention(nn.Module):
    """Self-attention on 4 heads of 8; the SDPA call is looked up on F or was imported by name."""

    def __init__(self, imported: bool = False):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.imported = imported

    def forward(self, x, is_causal=True):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        sdpa = by_name if self.imported else F.scaled_dot_product_attention
        return self.out(sdpa(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Model(nn.Module):
    def __init__(self, depth: int = 3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class MarkedBackend(lpattn.Backend):
    """Exact attention times a factor: wrong on purpose, so that its use shows in the numbers. Runs anywhere."""

    capabilities = lpattn.Capabilities(
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
        head_dim_v_differs=True,
        masks=frozenset(lpattn.MaskKind),
        causal_rectangular=True,
        hadamard=frozenset(lpattn.HadamardMode),
    )
    automatic = False

    def __init__(self, name: str, factor: float):
        self.name = name
        self.factor = factor
        self.calls: list[lpattn.AttentionCall] = []

    def probe(self, device):
        return []

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        self.calls.append(call)
        causal = call.causal is lpattn.CausalKind.TOP_LEFT
        gqa = call.num_heads != call.num_kv_heads
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=causal, scale=call.softmax_scale, enable_gqa=gqa
        )
        return out * self.factor


@pytest.fixture
def classes():
    class Namespace:
        pass

    namespace = Namespace()
    namespace.Attention, namespace.Block, namespace.Model = Attention, Block, Model
    namespace.MarkedBackend = MarkedBackend
    return namespace


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def x():
    return torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def marked():
    """Backend "marked": twice the exact result."""
    backend = MarkedBackend("marked", 2.0)
    lpattn.register_backend(backend)
    return backend


@pytest.fixture
def other():
    """Backend "other": minus the exact result."""
    backend = MarkedBackend("other", -1.0)
    lpattn.register_backend(backend)
    return backend


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
