"""fp8_fa3 on the GPU: its kernel against the same recipe in plain PyTorch, the whole of it against exact attention."""

from __future__ import annotations

import math

import pytest
import torch

import lpattn
from lpattn.types import AttentionBackend

pytestmark = pytest.mark.gpu

HEAD_DIMS = [64, 96, 128, 192, 256]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_the_kernel_computes_its_recipe_at_every_head_dim(fa3, tools, dim, causal) -> None:
    q, k, v = tools.make(2, 4, 4, 384, 384, dim)
    tools.compare(fa3, q, k, v, causal, dim**-0.5).check()


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 127, 128, 129, 223, 224, 225, 511, 513, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_tile_edges(fa3, tools, length, causal) -> None:
    q, k, v = tools.make(1, 2, 2, length, length, 128)
    tools.compare(fa3, q, k, v, causal, 128**-0.5).check()


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 300), (300, 1), (65, 513), (513, 65), (129, 7), (1, 1)])
def test_queries_and_keys_of_different_lengths(fa3, tools, q_len, kv_len) -> None:
    q, k, v = tools.make(2, 2, 2, q_len, kv_len, 64)
    tools.compare(fa3, q, k, v, False, 0.125).check()


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (8, 1), (6, 3), (1, 1), (12, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(fa3, tools, heads, kv_heads, causal) -> None:
    q, k, v = tools.make(2, heads, kv_heads, 200, 200, 128)
    # Groups of different magnitudes: a descale taken from the wrong group shows.
    k = k * torch.logspace(-1, 1, kv_heads, device="cuda").to(k.dtype)[:, None, None]
    v = v * torch.logspace(1, -2, kv_heads, device="cuda").to(v.dtype)[:, None, None]
    q = q * torch.linspace(0.5, 2.0, heads, device="cuda").to(q.dtype)[:, None, None]
    tools.compare(fa3, q, k, v, causal, 128**-0.5).check()


@pytest.mark.parametrize("std", [0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("causal", [False, True])
def test_logits_of_every_width(fa3, tools, std, causal) -> None:
    q, k, v = tools.make(1, 4, 4, 513, 513, 128)
    tools.compare(fa3, q, k, v, causal, std * 128**-0.5).check()


@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-45, 1.0, 1e-3])
@pytest.mark.parametrize("causal", [False, True])
def test_scales(fa3, tools, scale, causal) -> None:
    q, k, v = tools.make(2, 2, 2, 300, 300, 64)
    tools.compare(fa3, q, k, v, causal, scale).check()


def ones(q, k, v):
    return q, k, torch.ones_like(v)


def one_hot_rows(q, k, v):
    # Query i looks at one key with all its weight.
    target = torch.randperm(k.shape[2], device=q.device)[torch.arange(q.shape[2], device=q.device) % k.shape[2]]
    return 4 * k[:, :, target], k, v


def sink(q, k, v):
    k = k.clone()
    k[:, :, 0] = 0.5 * q.mean(2)
    k[:, :, 0, 0] = 12.0
    q = q.clone()
    q[..., 0] = 10.0
    return q, k, v


def needle_at_the_end(q, k, v):
    k, q = k.clone(), q.clone()
    k[:, :, :, 0], q[..., 0] = 0.0, 10.0
    k[:, :, -1, 0] = 12.0
    return q, k, v


def outliers(q, k, v):
    return tuple(torch.where(torch.rand_like(x) < 1e-3, 10 * torch.randn_like(x), x) for x in (q, k, v))


def outlier_channels(q, k, v):
    boost = torch.ones(q.shape[-1], device=q.device, dtype=q.dtype)
    boost[::17] = 8.0
    return q * boost, k * boost, v * boost


def saturating(q, k, v):
    return q.sign(), k.sign(), v.sign()


def tiny(q, k, v):
    return q * 1e-6, k * 1e-6, v * 1e-6


def zeros(q, k, v):
    return torch.zeros_like(q), torch.zeros_like(k), v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [129, 512])
@pytest.mark.parametrize(
    "change",
    [ones, one_hot_rows, sink, needle_at_the_end, outliers, outlier_channels, saturating, tiny, zeros],
    ids=lambda f: f.__name__,
)
def test_adversarial_inputs(fa3, tools, change, length, causal) -> None:
    q, k, v = change(*tools.make(1, 2, 2, length, length, 128))
    tools.compare(fa3, q, k, v, causal, 128**-0.5).check()


# bfloat16 at every head_dim that can be transformed; the other dtypes at one each, since every one is compiled apart.
@pytest.mark.parametrize(
    ("hadamard", "dim", "dtype"),
    [
        ("qkv", 64, torch.bfloat16),
        ("qkv", 128, torch.bfloat16),
        ("qkv", 256, torch.bfloat16),
        ("qkv", 128, torch.float32),
        ("v_only", 64, torch.float16),
        ("v_only", 128, torch.bfloat16),
        ("v_only", 256, torch.float32),
    ],
)
@pytest.mark.parametrize(
    "change", [lambda *qkv: qkv, outliers, outlier_channels], ids=["normal", "outliers", "channels"]
)
def test_hadamard_modes(fa3, tools, change, hadamard, dim, dtype) -> None:
    q, k, v = change(*tools.make(1, 4, 2, 300, 300, dim, dtype))
    for causal in (False, True):
        tools.compare(fa3, q, k, v, causal, dim**-0.5, hadamard).check()


def test_a_constant_v_comes_back_exactly(fa3, tools) -> None:
    for length in (1, 300, 8192):
        q, k, v = tools.make(1, 2, 2, length, length, 128)
        constant = torch.randn(1, 2, 1, 128, device="cuda").bfloat16()
        out = lpattn.low_precision_sdpa(q, k, constant.expand_as(v), backend=fa3, return_lse=True)[0]
        # The mean of equal numbers, divided before they are added up, is off by float32's rounding of the sum.
        assert (out - constant).abs().max() <= 2**-7 * constant.abs().max()


def test_zero_values_and_constants_are_not_nan(fa3, tools) -> None:
    q, k, v = tools.make(1, 2, 2, 300, 300, 64)
    for causal in (False, True):
        zero = lpattn.low_precision_sdpa(q, k, torch.zeros_like(v), is_causal=causal, backend=fa3)
        assert not zero.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(fa3, tools, dtype) -> None:
    q, k, v = tools.make(2, 2, 2, 300, 300, 128, dtype)
    out = lpattn.low_precision_sdpa(q, k, v, backend=fa3)
    assert out.dtype == dtype
    tools.compare(fa3, q, k, v, False, 128**-0.5).check()


def test_float16_at_the_end_of_its_range(fa3, tools) -> None:
    q, k, v = tools.make(1, 2, 2, 64, 64, 64, torch.float16)
    out = lpattn.low_precision_sdpa(q, k, torch.full_like(v, 65504.0), backend=fa3)
    assert out.isfinite().all()
    assert (out / 65504 - 1).abs().max() < 0.03


@pytest.mark.parametrize("causal", [False, True])
def test_strides_make_no_difference(fa3, tools, causal) -> None:
    q, k, v = tools.make(2, 4, 2, 130, 130, 64)

    def sliced(x: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, dim = x.shape
        room = torch.full((batch, tokens + 5, heads, 2 * dim + 1), torch.nan, device=x.device, dtype=x.dtype)
        view = room[:, 3:-2, :, 1 : dim + 1].transpose(1, 2)
        view.copy_(x)
        return view

    def every_other(x: torch.Tensor) -> torch.Tensor:
        room = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, device=x.device, dtype=x.dtype)
        room[..., ::2] = x
        return room[..., ::2]

    want = lpattn.low_precision_sdpa(q, k, v, is_causal=causal, backend=fa3)
    for layout in (sliced, every_other, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        got = lpattn.low_precision_sdpa(*map(layout, (q, k, v)), is_causal=causal, backend=fa3)
        assert torch.equal(want, got)
        assert got.transpose(1, 2).is_contiguous()


def test_two_runs_are_bitwise_equal(fa3, tools) -> None:
    q, k, v = tools.make(2, 8, 2, 1024, 1024, 128)
    for causal in (False, True):
        first = lpattn.low_precision_sdpa(q, k, v, is_causal=causal, backend=fa3, return_lse=True)
        for _ in range(5):
            tools.poison(q)
            again = lpattn.low_precision_sdpa(q, k, v, is_causal=causal, backend=fa3, return_lse=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# What is not finite


def spoiled(tools, q, k, v, causal):
    rows = torch.arange(q.shape[2], device="cuda")
    return tools.exact_rows(q, k, v, rows, causal, q.shape[-1] ** -0.5)


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_nan_stays_where_exact_attention_has_one(fa3, tools, which, causal, dtype) -> None:
    tensors = dict(zip("qkv", tools.make(2, 4, 2, 300, 300, 128, dtype), strict=True))
    tensors[which][1, 1, 170, 9] = torch.nan
    q, k, v = tensors.values()
    out, lse = lpattn.low_precision_sdpa(q, k, v, is_causal=causal, enable_gqa=True, backend=fa3, return_lse=True)
    expected, expected_lse = spoiled(tools, q, k, v, causal)
    assert not (out.isnan() & ~expected.isnan()).any(), "NaN where exact attention has none"
    assert torch.equal(lse.isnan(), expected_lse.isnan())
    if which != "v" or not causal:
        assert torch.equal(out.isnan(), expected.isnan())
    assert not out.isinf().any()
    clean = ~expected.isnan()
    assert tools.sqnr(expected[clean], out[clean]) > 22


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_inf_costs_no_other_row_or_head(fa3, tools, which, value) -> None:
    tensors = dict(zip("qkv", tools.make(2, 4, 2, 300, 300, 128), strict=True))
    want = lpattn.low_precision_sdpa(*tensors.values(), enable_gqa=True, backend=fa3)
    tensors[which][1, 1, 170, 9] = value
    got = lpattn.low_precision_sdpa(*tensors.values(), enable_gqa=True, backend=fa3)
    touched = torch.zeros(got.shape, dtype=torch.bool, device="cuda")
    if which == "q":
        touched[1, 1, 170] = True
    elif which == "k":
        touched[1, 2:] = True
    else:
        touched[1, 2:, :, 9] = True
    assert got[touched].isnan().all()
    assert got[~touched].isfinite().all()
    assert tools.sqnr(want[~touched], got[~touched]) > 22


# What it declines


def test_it_declines_dense_masks_and_rectangular_causal_calls(fa3, tools) -> None:
    q, k, v = tools.make(1, 2, 2, 64, 128, 64)
    dense = torch.ones(64, 128, dtype=torch.bool, device="cuda")
    additive = torch.zeros(1, 1, 1, 128, dtype=q.dtype, device="cuda")
    for options in ({"attn_mask": dense}, {"attn_mask": additive}, {"is_causal": True}):
        with pytest.raises(lpattn.UnsupportedCallError, match="fp8_fa3"):
            lpattn.low_precision_sdpa(q, k, v, **options, backend=fa3)
        with pytest.warns(lpattn.LpattnWarning, match="exactly"), lpattn.low_precision_attention():
            out = lpattn.low_precision_sdpa(q, k, v, **options, backend=fa3, on_unsupported="fallback")
        assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, **options))


def test_it_declines_transforms_of_other_head_dims(fa3, tools) -> None:
    for dim in (96, 192):
        q, k, v = tools.make(1, 2, 2, 64, 64, dim)
        with pytest.raises(lpattn.UnsupportedCallError, match=f"hadamard qkv with head_dim {dim}: transforms powers"):
            lpattn.low_precision_sdpa(q, k, v, backend=fa3, hadamard="qkv")


def test_it_names_the_head_dims_of_the_wheel(fa3, tools) -> None:
    q, k, v = tools.make(1, 2, 2, 64, 64, 80)
    with pytest.raises(lpattn.UnsupportedCallError, match="head_dim 80: this wheel has kernels for 64, 96, 128"):
        lpattn.low_precision_sdpa(q, k, v, backend=AttentionBackend.FP8_FA3)


def test_the_probe_names_the_wheel(fa3) -> None:
    (info,) = [i for i in lpattn.available_backends("cuda") if i.name == fa3]
    assert info.available
    assert info.version.startswith(("fa3-fwd", "flash-attn-3"))
    (on_cpu,) = [i for i in lpattn.available_backends("cpu") if i.name == fa3]
    assert [r.code for r in on_cpu.reasons] == ["device"]


# How it is launched


class Call:
    """One call with all that can be asked for, on tensors that stay where they are."""

    def __init__(self, tools, hadamard: str = "none", masked: bool = False, rope: bool = False) -> None:
        q, k, v = tools.make(2, 4, 2, 512, 512, 128)
        self.inputs = [x.transpose(1, 2) for x in (q, k, v)]
        self.options = {"hadamard": hadamard, "return_lse": True, "backend": "fp8_fa3"}
        if masked:
            self.options["attn_mask"] = torch.rand(2, 1, 1, 512, device="cuda") < 0.5
        self.tables = [torch.randn(512, 1, 128, device="cuda") for _ in range(2)] if rope else None

    def __call__(self):
        if self.tables is None:
            q, k, v = (x.transpose(1, 2) for x in self.inputs)
            return lpattn.low_precision_sdpa(q, k, v, enable_gqa=True, **self.options)
        return lpattn.low_precision_rope_sdpa(*self.inputs, *self.tables, enable_gqa=True, **self.options)


CALLS = [{}, {"masked": True}, {"rope": True}, {"masked": True, "hadamard": "qkv"}]
calls = pytest.mark.parametrize("kind", CALLS, ids=["plain", "masked", "rope", "masked and transformed"])


@calls
def test_it_runs_on_the_current_stream(fa3, tools, kind) -> None:
    call = Call(tools, **kind)
    want = call()
    before = [x.clone() for x in call.inputs]
    for x in call.inputs:
        x.fill_(torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whatever ran on the default stream would be done before this
        for x, old in zip(call.inputs, before, strict=True):
            x.copy_(old)
        got = call()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2,
    reason="needs two GPUs: tensors on one that is not the current one",
)
def test_it_runs_on_the_device_of_its_tensors(fa3, tools) -> None:
    call = Call(tools, masked=True)
    want = call()
    call.inputs = [x.to("cuda:1") for x in call.inputs]
    call.options["attn_mask"] = call.options["attn_mask"].to("cuda:1")
    got = call()
    torch.cuda.synchronize("cuda:1")
    assert all(a.device == b.device and torch.equal(a, b.to(a.device)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_it_can_be_captured_in_a_cuda_graph(fa3, tools, causal) -> None:
    call = Call(tools)
    call.options["is_causal"] = causal
    graph, captured = capture(call)
    for seed in range(3):
        torch.manual_seed(seed)
        for x in call.inputs:
            x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))


def test_a_captured_mask_may_change(fa3, tools) -> None:
    call = Call(tools, masked=True)
    mask = call.options["attn_mask"]
    graph, captured = capture(call)
    at = torch.arange(512, device="cuda")
    for used in (at >= 0, at < 100, at >= 411, at % 5 == 0, at == 77, at < 0):
        mask[0] = used
        mask[1] = ~used
        graph.replay()
        got = [x.clone() for x in captured]
        assert all(torch.equal(a, b) for a, b in zip(got, call(), strict=True))
        assert not got[0].isnan().any()
        assert (got[1] == -torch.inf).any() == (not mask.any(-1).all())


def capture(run):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


@calls
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_it_does_not_wait_for_the_device(fa3, tools, kind) -> None:
    call = Call(tools, **kind)
    call()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("masked", [False, True])
def test_no_length_compiles_a_kernel(fa3, tools, masked) -> None:
    from lpattn.quantize.fused import launcher

    def run(length: int) -> int:
        q, k, v = tools.make(1, 2, 1, length, length, 128)
        mask = torch.rand(1, 1, 1, length, device="cuda") < 0.5 if masked else None
        lpattn.low_precision_sdpa(q, k, v, attn_mask=mask, enable_gqa=True, backend=fa3, return_lse=True)
        return len(launcher._compiled)

    run(1000)
    before = run(1001)
    for length in (
        257,
        264,
        299,
        384,
        500,
        511,
        513,
        640,
        777,
        999,
        1024,
        1536,
        2047,
        2304,
        3001,
        3333,
        4096,
        4097,
        5000,
        6143,
    ):
        assert run(length) == before, f"length {length} compiled a kernel"
    # Below and above, one per power of two of sampled parts.
    for length in (1, 2, 63, 128, 129, 8192, 12345, 20000, 40000, 65536, 80000):
        run(length)
    assert len(launcher._compiled) <= before + 6
