"""fp8_triton and int8_triton over what they declare: cases drawn from the axes of their capabilities.

Each call goes through the backend, from plain tensors. It is held to plain PyTorch on the operands that the call was
quantized to, tightly, and to exact attention, with a floor.
"""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from lpattn.backends.triton import Int8TritonBackend, TritonBackend
from lpattn.calls import build_call
from lpattn.rope import rotate
from lpattn.types import HadamardMode, MaskKind, Rope

BACKENDS = {backend.name: backend for backend in (TritonBackend(), Int8TritonBackend())}
# In the interpreter, which takes a second for most of them; on a GPU, for each of which it compiles; marked slow.
FEW, MANY, SLOW = 20, 100, 1000


class Case(NamedTuple):
    name: str
    dtype: torch.dtype
    lengths: tuple[int, int]
    dims: tuple[int, int]
    heads: tuple[int, int]
    mask: str
    hadamard: HadamardMode
    rope: str
    lse: bool
    strides: str


def axes(name: str) -> list[list[Any]]:
    """The values of every axis, from the capabilities."""
    capabilities = BACKENDS[name].capabilities
    dims = [d for d in (16, 24, 64, 80, 128, 200, 256) if d in capabilities.head_dims]
    masks = [
        "none",
        *(["causal"] if capabilities.causal else []),
        *(["padding", "per query", "per head", "blocks"] if MaskKind.BOOL in capabilities.masks else []),
        *(["bias", "bias and holes"] if MaskKind.ADDITIVE in capabilities.masks else []),
    ]
    return [
        [name],
        sorted(capabilities.dtypes, key=str),
        [(1, 1), (7, 63), (64, 64), (65, 129), (130, 70), (33, 200)],
        [(d, e) for d in dims for e in ((d, 64) if capabilities.head_dim_v_differs else (d,))],
        [(1, 1), (2, 2)] + ([(4, 2), (3, 1)] if capabilities.gqa else []),
        masks,
        sorted(capabilities.hadamard),
        ["none", *(["half", "interleaved", "partial"] if capabilities.rope else [])],
        [False, *([True] if capabilities.lse else [])],
        ["contiguous", "transposed", "sliced"],
    ]


def cases(number: int) -> list[Case]:
    """So many of each backend, always the same ones, each value of each axis among them."""
    generator = random.Random(0)
    found = []
    for name in BACKENDS:
        values = axes(name)
        for index in range(number):
            # Each axis goes through its values in turn, in an order of its own.
            found.append(Case(*(v[index % len(v)] if index < len(v) else generator.choice(v) for v in values)))
            for axis in values:
                generator.shuffle(axis)
    return found


def draw(case: Case, device: str) -> tuple[list[torch.Tensor], torch.Tensor | None, list[torch.Tensor] | None]:
    """q, k and v [B, H, S, D], the mask, and RoPE tables."""
    generator = torch.Generator().manual_seed(0)
    (q_len, kv_len), (dim, dim_v), (heads, kv_heads) = case.lengths, case.dims, case.heads

    def one(heads: int, length: int, lanes: int, mean: float) -> torch.Tensor:
        x = torch.randn(2, length, heads, lanes, generator=generator) + mean * torch.randn(lanes, generator=generator)
        x = x.to(case.dtype).to(device)
        if case.strides == "sliced":
            return F.pad(x, (8, 3), value=torch.nan)[..., 8 : 8 + lanes].transpose(1, 2)
        return x.transpose(1, 2) if case.strides == "transposed" else x.transpose(1, 2).contiguous()

    tensors = [one(heads, q_len, dim, 0), one(kv_heads, kv_len, dim, 1), one(kv_heads, kv_len, dim_v, 1)]
    tables = None
    if case.rope != "none":
        lanes = max(dim // 4 * 2, 2) if case.rope == "partial" else dim
        angles = [torch.randn(1, n, 1, lanes, generator=generator) for n in (q_len, kv_len)]
        tables = [turn(x).to(device) for x in angles for turn in (torch.cos, torch.sin)]
    some = torch.rand(2, heads, q_len, kv_len, generator=generator)
    mask = {
        "padding": some[:, :1, :1] < 0.7,
        "per query": some[:1, :1] < 0.5,
        "per head": some < 0.5,
        "blocks": (torch.arange(q_len)[:, None] // 64 == torch.arange(kv_len) // 64)[None, None],
        "bias": torch.randn(1, heads, 1, kv_len, generator=generator).to(case.dtype),
        "bias and holes": torch.where(some < 0.5, some, -torch.inf).to(case.dtype),
    }.get(case.mask)
    return tensors, None if mask is None else mask.to(device), tables


def run(kernel: Any, monkeypatch: pytest.MonkeyPatch, sqnr: Any, case: Case) -> None:
    backend = BACKENDS[case.name]
    (q, k, v), mask, tables = draw(case, kernel.device)
    causal = case.mask == "causal"
    rope = None if tables is None else Rope(case.rope == "interleaved", tables[0].shape[-1])
    call = build_call(q, k, v, mask, 0.0, causal, None, case.hadamard, case.lse, rope)
    assert [r.code for r in backend.supports(call)] == ([] if kernel.device == "cuda" else ["device"])

    recorded: list[Any] = []
    attend = kernel.attention.attend

    def recording(quantized: Any, shape: Any, dtype: torch.dtype, **options: Any) -> Any:
        recorded.append((quantized, shape, attend(quantized, shape, dtype, **options)))
        return recorded[-1][2]

    monkeypatch.setattr(kernel.attention, "attend", recording)
    if tables is None:
        result = backend.attention(q, k, v, call, mask)
    else:
        cos, sin, cos_k, sin_k = tables
        bshd = [x.transpose(1, 2) for x in (q, k, v)]
        result = backend.rope_attention(*bshd, cos, sin, call, mask, cos_k=cos_k, sin_k=sin_k)
        interleaved = case.rope == "interleaved"
        q, k = (
            rotate(x.transpose(1, 2).double(), cos.double(), sin.double(), interleaved).transpose(1, 2)
            for x, cos, sin in ((q, cos, sin), (k, cos_k, sin_k))
        )
    out, lse = result if case.lse else (result, None)
    assert (out.shape, out.dtype) == ((2, case.heads[0], case.lengths[0], case.dims[1]), case.dtype)
    assert (lse is not None) is case.lse
    for quantized, shape, (raw, _) in recorded:
        band = kernel.Band(after=0) if causal else kernel.Band()
        left = None if mask is None or quantized.key_counts is not None else mask
        kernel.compare(raw, lse, quantized, shape, band, left, None)
        assert torch.equal(raw.transpose(1, 2), out)
        if case.mask == "padding":
            assert torch.equal(quantized.key_counts.cpu().long(), mask.sum((1, 2, 3)).cpu())
    q, k, v = (x.double() for x in (q, k, v))
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    exact = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    assert out.isfinite().all()
    assert sqnr(out, exact.nan_to_num(0.0)) > (33.0 if case.name == "int8_triton" else 20.0)


def runs_here(kernel: Any, case: Case) -> bool:
    # The interpreter takes bits of bfloat16 for integers where it multiplies matrices.
    return not (kernel.interpreted and case.dtype == torch.bfloat16 and case.hadamard is not HadamardMode.NONE)


@pytest.mark.parametrize("case", cases(MANY if torch.cuda.is_available() else FEW), ids=lambda c: "-".join(map(str, c)))
def test_a_case_from_the_grid(kernel, monkeypatch, sqnr, case) -> None:
    if not runs_here(kernel, case):
        case = case._replace(dtype=torch.float16)
    run(kernel, monkeypatch, sqnr, case)


@pytest.mark.slow
@pytest.mark.gpu
def test_many_cases_from_the_grid(kernel, monkeypatch, sqnr) -> None:
    for case in itertools.islice(cases(SLOW), MANY, None):
        with monkeypatch.context() as patch:
            run(kernel, patch, sqnr, case)


@pytest.mark.parametrize("name", BACKENDS)
def test_keys_that_no_query_sees_count_in_no_scale(kernel, sqnr, name) -> None:
    """Causal, with fewer queries than keys: what lies behind the last query is cut off."""
    q, k, v = kernel.make(heads=2, kv_heads=2, q_len=40, kv_len=60)
    k[:, :, 40:], v[:, :, 40:] = 1e4, -1e4
    call = build_call(q, k, v, None, 0.0, True, None, HadamardMode.NONE, False, None)
    out = BACKENDS[name].attention(q, k, v, call, None)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert sqnr(out, exact) > 20.0


@pytest.mark.parametrize("name", BACKENDS)
def test_keys_that_one_head_of_a_group_sees_are_used(kernel, sqnr, name) -> None:
    """Its heads share a scale and a constant, to which the first head would contribute half of the keys only."""
    q, k, v = kernel.make(heads=2, kv_heads=1, q_len=40, kv_len=100)
    mask = torch.zeros(1, 2, 1, 100, dtype=torch.bool, device=kernel.device).expand(1, 2, 40, 100).clone()
    mask[:, 0, :, :50] = mask[:, 1, :, 50:] = True
    call = build_call(q, k, v, mask, 0.0, False, None, HadamardMode.NONE, False, None)
    out = BACKENDS[name].attention(q, k, v, call, mask)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, enable_gqa=True)
    assert sqnr(out[:, 1], exact[:, 1]) > 20.0
