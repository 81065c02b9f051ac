"""What a pass over a mask finds: which key tiles are seen, and for the Hopper kernel the mask as bits."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton, in which the pass is written, is not installed")

from lpattn.kernels.mask_tiles import list_mask_tiles


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def unpacked(words: torch.Tensor, kv_len: int) -> torch.Tensor:
    """Bool [..., kv_len] of words, as MaskTiles.words describes them."""
    found = (words[..., None] >> torch.arange(32) & 1).bool().flatten(-2)
    assert not found[..., kv_len:].any()
    return found[..., :kv_len]


@pytest.mark.parametrize("shape", [(1, 1, 70, 200), (2, 1, 200, 65), (1, 3, 1, 130), (2, 2, 129, 128), (1, 1, 5, 7)])
@pytest.mark.parametrize(("queries", "keys"), [(128, 128), (192, 128), (128, 64)])
def test_words_and_lists(shape, queries, keys, device, poison) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[..., :64] = True
    mask[:, :, : min(shape[2], 100), 128:] = False
    kv_len = shape[3]
    found = list_mask_tiles(mask.to(device), kv_len, queries, keys, with_words=True)
    assert torch.equal(unpacked(found.words.cpu(), kv_len), mask)
    assert torch.equal(found.used.cpu(), mask.any(2))
    for b, h, tile in itertools.product(*map(range, found.counts.shape[:3])):
        rows = mask[b, h, tile * queries : (tile + 1) * queries]
        whole, part = [], []
        for number, columns in enumerate(rows.split(keys, -1)):
            exists = columns.shape[-1] == keys
            if exists and columns.all():
                whole.append(number)
            elif columns.any():
                part.append(number)
        of_whole, of_part = found.counts[b, h, tile].tolist()
        assert found.lists[b, h, tile, 0, :of_whole].tolist() == whole
        assert found.lists[b, h, tile, 1, :of_part].tolist() == part


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_rows_of_the_next_tile_count_in_that_one_only(device, dtype) -> None:
    seen = torch.zeros(1, 1, 250, 256, dtype=torch.bool)
    seen[..., :192, :128] = True
    seen[..., 192:, 128:] = True
    mask = seen if dtype is torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    found = list_mask_tiles(mask.to(device), 256, 192, 128)
    assert found.counts[0, 0].tolist() == [[1, 0], [1, 0]]
    assert found.lists[0, 0, :, 0, 0].tolist() == [0, 1]


def test_more_tiles_than_are_listed_at_a_time(device) -> None:
    mask = torch.zeros(1, 1, 4, 64 * 300, dtype=torch.bool)
    tiles = mask.view(1, 1, 4, 300, 64)
    tiles[:, :, :, 1::3] = True
    tiles[:, :, 2, 2::3] = True
    found = list_mask_tiles(mask.to(device), mask.shape[3], 128, 64)
    assert found.counts[0, 0, 0].tolist() == [100, 100]
    assert found.lists[0, 0, 0, :, :100].tolist() == [list(range(1, 300, 3)), list(range(2, 300, 3))]


def test_words_of_a_mask_that_broadcasts_or_is_strided(device) -> None:
    mask = torch.rand(130, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    views = [mask.T[None, None], (torch.zeros(70, 260, dtype=torch.bool)[:, ::2] | mask.T)[None, None]]
    for view in views:
        found = list_mask_tiles(view.to(device), 130, 192, 128, with_words=True)
        assert torch.equal(unpacked(found.words.cpu(), 130), mask.T[None, None])
    column = mask.T[None, None, :, :1]
    found = list_mask_tiles(column.to(device), 130, 192, 128, with_words=True)
    assert torch.equal(unpacked(found.words.cpu(), 130), column.expand(1, 1, 70, 130))
