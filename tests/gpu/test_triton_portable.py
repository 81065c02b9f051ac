"""The portable kernel on a GPU, at lengths that the interpreter cannot do: both recipes, whatever a backend would run.

``tests/kernels`` holds it to plain PyTorch value by value, and runs on the GPU too.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import lpattn
from lpattn.calls import build_call
from lpattn.types import HadamardMode

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["fp8", "int8"])
def recipe(request) -> str:
    """The recipe; skips where this machine has none of these kernels."""
    (info,) = [i for i in lpattn.available_backends("cuda") if i.name == "int8_triton"]
    if not info.available:
        pytest.skip(f"int8_triton: {'; '.join(map(str, info.reasons))}")
    if request.param == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs sm_89")
    return request.param


def attend(recipe, q, k, v, mask=None, is_causal=False, hadamard="none", return_lse=False):
    """[B, H, S, D], or with the log-sum-exp, by the portable kernel whatever the backend would choose."""
    from lpattn.backends.triton.kernels import PortableKernel

    mask = mask if mask is None else mask[(None,) * (4 - mask.dim())]
    call = build_call(q, k, v, mask, 0.0, is_causal, None, HadamardMode(hadamard), return_lse)
    out, lse = PortableKernel(recipe == "int8").attend(q, k, v, call, mask, None)
    return (out.transpose(1, 2), lse) if return_lse else out.transpose(1, 2)


@pytest.mark.parametrize(
    ("kind", "hadamard", "floors"),
    [
        ("randn", "none", {"fp8": 25.0, "int8": 35.0}),
        # By chance, outliers have 2 dB more or less.
        ("outliers", "none", {"fp8": 17.0, "int8": 25.0}),
        ("bias", "none", {"fp8": 45.0, "int8": 52.0}),
        ("randn", "qkv", {"fp8": 25.0, "int8": 35.0}),
        ("outliers", "qkv", {"fp8": 24.5, "int8": 35.0}),
    ],
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_kinds_of_data_at_16k(recipe, tools, kind, hadamard, floors, dim, record_property) -> None:
    q, k, v = tools.data(kind, 4, 16384, dim)
    rows = tools.some_rows(16384)
    out = attend(recipe, q, k, v, hadamard=hadamard)
    found = tools.sqnr(tools.exact_rows(q, k, v, rows, False, dim**-0.5)[0], out[:, :, rows])
    record_property("sqnr_db", found)
    print(f"{recipe}, {kind}, hadamard {hadamard}, head_dim {dim}: {found:.2f} dB")
    assert found >= floors[recipe] - (0.5 if dim == 64 else 0.0)


@pytest.mark.parametrize(("length", "heads"), [(131072, 2), (200000, 1)])
def test_very_long_rows(recipe, tools, length, heads) -> None:
    q, k, v = tools.data("bias", heads, length)
    rows = tools.some_rows(length, 16)
    out = attend(recipe, q[:, :, rows], k, v)
    found = tools.sqnr(tools.exact_rows(q, k, v, rows, False, 128**-0.5)[0], out)
    print(f"{recipe}, bias at {length}: {found:.2f} dB")
    assert found >= 45.0


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kind", ["causal", "padding", "window", "blocks", "bias", "holes"])
def test_masks_at_4k(recipe, tools, kind, dim) -> None:
    q, k, v = tools.make(2, 4, 2, 4000, 4000, dim)
    i, j = torch.arange(4000, device="cuda")[:, None], torch.arange(4000, device="cuda")
    mask = {
        "causal": None,
        "padding": (j < torch.tensor([4000, 2500], device="cuda")[:, None])[:, None, None],
        "window": (j <= i) & (j > i - 1024),
        "blocks": i // 500 == j // 500,
        "bias": torch.randn(1, 4, 4000, 4000, device="cuda", dtype=torch.bfloat16),
        "holes": torch.rand(2, 1, 4000, 4000, device="cuda") < 0.5,
    }[kind]
    tools.poison_all()
    out, lse = attend(recipe, q, k, v, mask, kind == "causal", return_lse=True)
    again, lse_again = attend(recipe, q, k, v, mask, kind == "causal", return_lse=True)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    exact_mask = mask.float() if kind == "bias" else mask
    exact = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), exact_mask, is_causal=kind == "causal", enable_gqa=True
    )
    # Rows that see few keys have little to average over.
    assert tools.sqnr(exact, out) > {"fp8": 22.0, "int8": 33.0}[recipe]
    assert lse.isfinite().all()


def test_views_are_read_in_place(recipe, tools) -> None:
    q, k, v = tools.make(2, 4, 4, 300, 300, 80)
    want = attend(recipe, q, k, v)
    packed = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()
    assert torch.equal(attend(recipe, *(packed[:, :, i].transpose(1, 2) for i in range(3))), want)
    wide = [F.pad(x, (5, 3), value=math.nan)[..., 5:85] for x in (q, k, v)]
    assert torch.equal(attend(recipe, *wide), want)


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_a_captured_graph(recipe, tools, kind) -> None:
    q, k, v = tools.make(1, 4, 2, 700, 700, 128)
    mask = None
    if kind == "window":
        mask = torch.ones(700, 700, dtype=torch.bool, device="cuda").tril().triu(-200)
    attend(recipe, q, k, v, mask, kind == "causal")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(recipe, q, k, v, mask, kind == "causal")
    q.normal_()
    if mask is not None:
        mask[:, 300:] = False  # the tiles are listed anew
        mask[:, 0] = True
    graph.replay()
    assert torch.equal(out, attend(recipe, q, k, v, mask, kind == "causal"))


def test_a_hundred_runs_are_bitwise_equal(recipe, tools) -> None:
    q, k, v = tools.make(1, 8, 2, 1000, 1000, 128)
    mask = torch.rand(1000, 1000, device="cuda") < 0.9
    first = attend(recipe, q, k, v, mask)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        different += (attend(recipe, q, k, v, mask) != first).any()
    assert int(different) == 0


def test_many_elements(recipe) -> None:
    # The output has more than 2^31 elements, and the mask more than 2^32 bytes.
    q = torch.randn(1, 1, 1, 128, device="cuda", dtype=torch.bfloat16).expand(1, 130, 2**17, 128)
    k = torch.randn(1, 1, 256, 128, device="cuda", dtype=torch.bfloat16).expand(1, 130, 256, 128)
    out = attend(recipe, q, k, k)
    assert torch.equal(out[:, -1, -1], out[:, 0, 0])
    del out
    mask = torch.ones(1, 130, 2**17, 256, dtype=torch.bool, device="cuda")
    mask[..., 200:] = False
    masked = attend(recipe, q, k, k, mask)
    assert torch.equal(masked[:, -1, -1], masked[:, 0, 0])
    assert masked[:, -1, -1].isfinite().all()


def test_nan_and_inf_stay_in_their_rows(recipe, tools) -> None:
    for which in range(3):
        for bad in (math.nan, math.inf):
            tensors = list(tools.make(2, 4, 4, 500, 500, 128))
            tensors[which][1, 2, 300, 5] = bad
            spoiled = attend(recipe, *tensors, is_causal=True).isnan().any(-1)
            assert spoiled[1, 2].any()
            assert not spoiled[0].any()
            assert not spoiled[1, [0, 1, 3]].any()
            assert not spoiled[1, 2, :256].any()
            if which == 0:
                assert spoiled[1, 2].nonzero().flatten().tolist() == [300]
