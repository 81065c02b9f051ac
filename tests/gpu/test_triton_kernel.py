"""fp8_triton on a GPU: the Hopper kernel beside its emulation, and whole calls beside exact attention."""

from __future__ import annotations

import math

import pytest
import torch

import lpattn
from lpattn.rope import rotate
from lpattn.types import HadamardMode

pytestmark = pytest.mark.gpu

LOG2E = math.log2(math.e)


@pytest.fixture(autouse=True)
def backend() -> str:
    """The backend's name; skips where this machine cannot run it."""
    (info,) = [i for i in lpattn.available_backends("cuda") if i.name == "fp8_triton"]
    if not info.available:
        pytest.skip(f"fp8_triton: {'; '.join(map(str, info.reasons))}")
    return "fp8_triton"


def quantized(q, k, v, **options):
    from lpattn.kernels.hopper.launch import QK_MAX
    from lpattn.quantize.fused import quantize_per_block

    return quantize_per_block(q, k, v, factor=q.shape[-1] ** -0.5 * LOG2E, qk_max=QK_MAX, **options)


def attend(backend, q, k, v, **options):
    return lpattn.low_precision_sdpa(q, k, v, enable_gqa=True, backend=backend, **options)


# The kernel beside its emulation

SHAPES = [
    # batch, heads, kv_heads, q_len, kv_len, head_dim, causal
    (1, 2, 1, 300, 300, 128, False),
    (2, 4, 2, 512, 640, 128, True),
    (2, 4, 2, 700, 513, 128, True),
    (1, 2, 2, 1, 1, 128, False),
    (1, 3, 1, 127, 129, 128, True),
    (1, 2, 1, 300, 300, 64, False),
    (2, 4, 2, 700, 700, 64, True),
    (2, 4, 1, 333, 1111, 64, True),
    (1, 2, 1, 300, 300, 256, False),
    (2, 4, 2, 700, 700, 256, True),
    (1, 2, 1, 300, 300, 96, False),
    (1, 2, 1, 300, 300, 80, True),
    (1, 2, 2, 200, 300, 112, True),
    (1, 2, 2, 200, 300, 72, True),
    (1, 2, 2, 200, 300, 40, False),
    (1, 2, 1, 200, 300, 16, False),
    (1, 2, 1, 200, 300, 192, True),
]


CASES = [("step", shape) for shape in SHAPES]
CASES += [(exponential, SHAPES[i]) for exponential in ("linear", "ex2") for i in (1, 6, 8)]


@pytest.mark.parametrize(("exponential", "shape"), CASES)
def test_the_kernel_is_its_emulation(tools, exponential, shape) -> None:
    from lpattn.kernels.hopper import emulation
    from lpattn.kernels.hopper.launch import EXPONENTIALS, attend

    batch, heads, kv_heads, q_len, kv_len, dim, causal = shape
    q, k, v = tools.make(batch, heads, kv_heads, q_len, kv_len, dim)
    found = quantized(q, k + 1, v + 1, with_lse_shift=True)
    expected, expected_lse = emulation.emulate(found, kind=EXPONENTIALS[exponential], causal=causal)
    results = []
    for _ in range(2):
        tools.poison_all()
        options = {"causal": causal, "return_lse": True, "exponential": exponential}
        results.append(attend(found, torch.float32, **options))
    (out, lse), (again, lse_again) = results
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    # A product in another order moves a float16 score by its last place, and with it a code of P now and then.
    assert tools.sqnr(expected, out.transpose(1, 2)) > 40.0
    error = (out.transpose(1, 2).double() - expected).abs().max()
    assert float(error) < 0.12 * float(v.double().abs().max() + 1)
    assert float((lse - expected_lse).abs().max()) < 0.05


@pytest.mark.parametrize("mode", ["qkv", "v_only"])
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 128, 192, 256])
def test_with_a_transform_the_kernel_is_its_emulation(tools, dim, mode) -> None:
    from lpattn.kernels.hopper import emulation
    from lpattn.kernels.hopper.launch import EXPONENTIALS, attend, tiles_of

    q, k, v = tools.make(2, 4, 2, 333, 555, dim)
    mask = visible("few rows", 333, 555)
    for listed in (False, True):
        tiles = tiles_of(mask, 555, dim) if listed else None
        used = tiles.used_by(2, 4).expand(2, -1, -1) if listed else None
        found = quantized(q, k + 1, v + 1, used=used, hadamard=HadamardMode(mode))
        expected, _ = emulation.emulate(found, kind=EXPONENTIALS["step"], mask=mask if listed else None)
        tools.poison_all()
        out, _ = attend(found, torch.float32, mask=tiles)
        assert tools.sqnr(expected, out.transpose(1, 2)) > (25.0 if listed else 40.0)
        if listed:
            assert (out.transpose(1, 2)[~mask.any(-1).expand(2, 4, 333)] == 0.0).all()


def test_a_thousand_runs_are_bitwise_equal(tools) -> None:
    from lpattn.kernels.hopper.launch import attend

    q, k, v = tools.make(1, 8, 2, 1000, 1000, 128)
    found = quantized(q, k, v)
    first, _ = attend(found, torch.bfloat16, causal=True)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        out, _ = attend(found, torch.bfloat16, causal=True)
        different += (out != first).any()
    assert int(different) == 0


@pytest.mark.parametrize("size", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("dim", [64, 128])
def test_logits_of_any_size(tools, size, dim) -> None:
    from lpattn.kernels.hopper import emulation
    from lpattn.kernels.hopper.launch import EXPONENTIALS, attend

    q, k, v = tools.make(1, 2, 2, 256, 2048, dim)
    found = quantized(q * size, k, v)
    expected, _ = emulation.emulate(found, kind=EXPONENTIALS["step"])
    out, _ = attend(found, torch.float32)
    assert out.isfinite().all()
    assert tools.sqnr(expected, out.transpose(1, 2)) > (25.0 if size < 256 else 18.0)


def test_v_of_ones_gives_one(backend, tools) -> None:
    q, k, _ = tools.make(1, 2, 2, 300, 5000, 128)
    out = attend(backend, q * 2, k, torch.ones_like(k))
    assert float((out.float() - 1).abs().max()) < 0.01


# Whole calls beside exact attention


# At head_dim 128 torchao's FP8 has 25.4, 18.6 and 13.3 dB, with Hadamard 25.4, 27.2 and 13.3. By chance, normal data
# has 24.9 to 26.5, and outliers 2 dB more or less. A transform of 64 lanes spreads an outlier over half as many.
@pytest.mark.parametrize(
    ("kind", "hadamard", "floors"),
    [
        ("randn", "none", (24.5, 24.5, 24.5)),
        ("outliers", "none", (15.5, 17.0, 17.0)),
        ("bias", "none", (45.0, 45.0, 45.0)),
        ("randn", "qkv", (24.5, 24.5, 24.5)),
        ("outliers", "qkv", (21.5, 24.5, 24.5)),
        ("bias", "qkv", (45.0, 45.0, 45.0)),
    ],
)
@pytest.mark.parametrize(("index", "dim"), list(enumerate((64, 128, 256))))
def test_kinds_of_data_at_16k(backend, tools, kind, hadamard, floors, index, dim, record_property) -> None:
    q, k, v = tools.data(kind, 8, 16384, dim)
    out = attend(backend, q, k, v, hadamard=hadamard)
    rows = tools.some_rows(16384)
    found = tools.sqnr(tools.exact_rows(q, k, v, rows, False, dim**-0.5)[0], out[:, :, rows])
    record_property("sqnr_db", found)
    print(f"{kind}, hadamard {hadamard}, head_dim {dim}: {found:.2f} dB")
    assert found >= floors[index]


def test_a_bias_at_128k(backend, tools) -> None:
    q, k, v = tools.data("bias", 2, 131072)
    out = attend(backend, q, k, v)
    rows = tools.some_rows(131072, 16)
    found = tools.sqnr(tools.exact_rows(q, k, v, rows, False, 128**-0.5)[0], out[:, :, rows])
    print(f"bias at 128k: {found:.2f} dB")
    assert found >= 45.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_calls_of_every_dtype(backend, tools, dtype, causal) -> None:
    q, k, v = tools.make(2, 4, 2, 333, 333, 128, dtype)
    tools.poison_all()
    out, lse = attend(backend, q, k, v, is_causal=causal, return_lse=True)
    rows = torch.arange(333, device="cuda")
    expected, expected_lse = tools.exact_rows(q, k, v, rows, causal, 128**-0.5)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    assert tools.sqnr(expected, out) > 23.0
    assert float((lse - expected_lse).abs().max()) < 0.3


def visible(kind: str, q_len: int, kv_len: int) -> torch.Tensor:
    """A bool mask of two batch entries and four heads, or one that broadcasts to them."""
    i, j = torch.arange(q_len, device="cuda")[:, None], torch.arange(kv_len, device="cuda")
    holes = torch.rand(2, 4, q_len, kv_len, device="cuda") < 0.5
    return {
        "window": ((j <= i) & (j > i - 200))[None, None],
        "blocks": (i // 150 == j // 100)[None, None],
        "holes": holes,
        "one head's": holes[:, :1],
        "few rows": (holes & (i > 170) & (j > 140) & (i < 300))[:1],
        "per head": holes[:1, :, :1],
        "all": torch.ones_like(holes[:1, :1]),
        "nothing": torch.zeros_like(holes[:1, :1]),
    }[kind]


MASKS = ["window", "blocks", "holes", "one head's", "few rows", "per head", "all", "nothing"]


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("kind", MASKS)
def test_with_a_mask_the_kernel_is_its_emulation(tools, kind, dim) -> None:
    from lpattn.kernels.hopper import emulation
    from lpattn.kernels.hopper.launch import EXPONENTIALS, attend, tiles_of

    q, k, v = tools.make(2, 4, 2, 333, 555, dim)
    mask = visible(kind, 333, 555)
    tools.poison_all()
    tiles = tiles_of(mask, 555, dim)
    found = quantized(q, k + 1, v + 1, used=tiles.used_by(2, 4).expand(2, -1, -1), with_lse_shift=True)
    expected, expected_lse = emulation.emulate(found, kind=EXPONENTIALS["step"], mask=mask)
    results = []
    for _ in range(2):
        tools.poison_all()
        results.append(attend(found, torch.float32, mask=tiles, return_lse=True, exponential="step"))
    (out, lse), (again, lse_again) = results
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    sees = mask.any(-1).expand(2, 4, 333)
    assert (out.transpose(1, 2)[~sees] == 0.0).all()
    assert (lse[~sees] == -math.inf).all()
    if sees.any():
        # Key tiles come in another order than in the emulation, so that P is rounded from other references.
        assert tools.sqnr(expected, out.transpose(1, 2)) > 25.0
        assert float((lse - expected_lse)[sees].abs().max()) < 0.06


@pytest.mark.parametrize("kind", ["window", "holes", "few rows"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.float16, {"return_lse": True}),
        (torch.bfloat16, {"hadamard": "qkv"}),
        (torch.float16, {"hadamard": "v_only", "return_lse": True}),
    ],
)
@pytest.mark.parametrize("dim", [80, 128])
def test_masks(backend, tools, kind, dtype, options, dim) -> None:
    q, k, v = (x.to(dtype) for x in tools.make(2, 4, 2, 333, 555, dim))
    mask = visible(kind, 333, 555)
    unused = ~mask.any(2)[:, :1, :, None]
    if mask.shape[1] == 1:
        # What nobody sees counts in nothing.
        k, v = (x.masked_fill(unused, torch.nan) for x in (k, v))
    out = attend(backend, q, k, v, attn_mask=mask, **options)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.nan_to_num().double() for x in (q, k, v)), mask, enable_gqa=True
    ).nan_to_num()
    if "return_lse" in options:
        out, lse = out
        logits = (q.double() @ k.nan_to_num().double().repeat_interleave(2, 1).mT) * dim**-0.5
        expected = logits.masked_fill(~mask, -torch.inf).logsumexp(-1)
        sees = expected > -torch.inf
        assert torch.equal(sees, lse > -torch.inf)
        assert float((lse - expected)[sees].abs().max()) < 0.3
    assert tools.sqnr(exact, out) > 22.0


def test_views_are_read_in_place(backend, tools) -> None:
    q, k, v = tools.make(2, 4, 4, 300, 300, 64)
    want = attend(backend, q, k, v)
    packed = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    assert torch.equal(attend(backend, *views), want)


def test_key_padding(backend, tools) -> None:
    q, k, v = tools.make(3, 4, 2, 200, 700, 128)
    used = torch.rand(3, 700, device="cuda") > 0.3
    used[2] = False
    used[2, 650:] = True
    dirty_k, dirty_v = (x.masked_fill(~used[:, None, :, None], torch.nan) for x in (k, v))
    out, lse = attend(backend, q, dirty_k, dirty_v, attn_mask=used[:, None, None], return_lse=True)
    expected, expected_lse = tools.exact_rows(q, k, v, torch.arange(200, device="cuda"), False, 128**-0.5, used)
    assert tools.sqnr(expected, out) > 23.0
    assert float((lse - expected_lse).abs().max()) < 0.3


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(backend, tools, interleaved) -> None:
    q, k, v = (x.transpose(1, 2) for x in tools.make(1, 4, 2, 300, 300, 128))
    angle = torch.arange(300, device="cuda")[:, None] * 0.02 ** torch.linspace(0, 1, 64, device="cuda")
    table = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    cos, sin = table.cos()[None, :, None], table.sin()[None, :, None]
    out = lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, interleaved=interleaved, backend=backend)
    turned = [rotate(x.double(), cos.double(), sin.double(), interleaved).transpose(1, 2) for x in (q, k)]
    rows = torch.arange(300, device="cuda")
    expected, _ = tools.exact_rows(*turned, v.transpose(1, 2), rows, False, 128**-0.5)
    assert tools.sqnr(expected, out) > 23.0


def test_a_captured_graph(backend, tools) -> None:
    q, k, v = tools.make(1, 4, 2, 500, 500, 128)
    attend(backend, q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(backend, q, k, v)
    q.normal_()
    graph.replay()
    assert torch.equal(out, attend(backend, q, k, v))


def test_a_second_stream(backend, tools) -> None:
    q, k, v = tools.make(1, 4, 2, 500, 500, 128)
    want = attend(backend, q, k, v)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = attend(backend, q, k, v)
    stream.synchronize()
    assert torch.equal(out, want)


def test_many_elements(backend) -> None:
    # The output has more than 2^31 elements.
    q = torch.randn(1, 1, 1, 128, device="cuda", dtype=torch.bfloat16).expand(1, 130, 2**17, 128)
    k = torch.randn(1, 1, 256, 128, device="cuda", dtype=torch.bfloat16).expand(1, 130, 256, 128)
    out = attend(backend, q, k, k)
    assert torch.equal(out[:, -1, -1], out[:, 0, 0])
    assert out[:, -1, -1].isfinite().all()
