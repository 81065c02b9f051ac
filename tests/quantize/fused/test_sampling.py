"""Which tokens are looked at, and that host and device agree on how many."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton, in which the passes are written, is not installed")
tl = pytest.importorskip("triton.language")
layout = pytest.importorskip("lpattn.quantize.fused.layout")


@triton.jit
def count_parts(lengths, parts, found, least: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    length = tl.load(lengths + at)
    size = layout.part_size(length, least, tl.load(parts + at))
    tl.store(found + at, tl.cdiv(layout.sample_size(length, least), size))


@pytest.mark.parametrize("most", [1, 2, 16, 64])
@pytest.mark.parametrize("least", [layout.FEW, layout.ALL])
def test_host_and_device_agree_on_the_number_of_parts(fused, least, most) -> None:
    near = [n + d for n in (0, 128, 256, 4096, 6144, 8192, 65536, 2**20) for d in range(-2, 3)]
    lengths = torch.tensor([n for n in [*near, *range(1, 200_000, 97), 2**24] if n > 0][:2048], dtype=torch.int32)
    wanted = torch.tensor([layout.parts(n, least.value, most) for n in lengths.tolist()], dtype=torch.int32)
    assert wanted.max() == (most if least is layout.ALL else min(most, 32))
    found = torch.empty_like(lengths).to(fused.device)
    count_parts[(1,)](lengths.to(fused.device), wanted.to(fused.device), found, least, len(lengths))
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("length", [257, 300, 490])
def test_the_sample_has_a_token_of_every_stratum(fused, length) -> None:
    sampled = fused.sampled(length)
    assert len(sampled) == 256
    assert sampled[0] == 0
    steps = torch.tensor([*sampled, length]).diff()
    assert steps.max() <= -(-2 * length // 256)
    assert steps.unique().numel() > 1
