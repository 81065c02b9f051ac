"""The portable kernel beside plain PyTorch on the same operands: interpreted, or on the GPU where there is one.

`make test-gpu` runs this folder too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lpattn.quantize import round_e4m3

BLOCK = 128


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # The interpreter computes with numpy, which says what inf and NaN lead to.
            item.add_marker(pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"))
            if torch.cuda.is_available():
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned(poison: list[int]) -> None:
    """In every test here."""


def natural_order(value: torch.Tensor) -> torch.Tensor:
    """V as it is stored for e4m3, [B, Hkv, blocks, D_v, 128], as [B, Hkv, blocks * 128, D_v], keys in order."""
    order = [16 * g + 8 * b + 2 * c + e for g in range(8) for c in range(4) for b in range(2) for e in range(2)]
    unpermuted = torch.zeros(value.shape, dtype=torch.float64)
    unpermuted[..., order] = value.cpu().double()
    return unpermuted.transpose(3, 4).flatten(2, 3)


def visible(q_len: int, kv_len: int, band: Any, queries: int, keys: int) -> torch.Tensor:
    """Bool [q_len, kv_len] of a band; ``queries`` and ``keys`` are how many there are."""
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]
    offset = keys - queries if band.from_end else 0
    seen = j < keys
    if band.after is not None:
        seen = seen & (j <= i + offset + band.after)
    if band.before is not None:
        seen = seen & (j >= i + offset - band.before)
    return seen.expand(q_len, kv_len)


def emulated(
    quantized: Any,
    shape: Any,
    band: Any,
    mask: torch.Tensor | None = None,
    q_counts: list[int] | None = None,
    p_scale: float = 256.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel computes, in float64 but for P: the same tiles in the same order, P rounded the same way.

    Returns:
        (output [B, q_len, H, D_v], lse [B, H, q_len]) in float64.
    """
    e4m3 = quantized.query.dtype == torch.float8_e4m3fn
    batch, heads, q_len, _ = quantized.query.shape
    kv_heads, kv_len = quantized.key.shape[1], quantized.kv_len
    q = quantized.query.cpu().double() * quantized.q_scale.cpu().double()[..., None]
    k = quantized.key.cpu().double() * quantized.k_scale.cpu().double().repeat_interleave(BLOCK, 2)[..., None]
    v = natural_order(quantized.value) if e4m3 else quantized.value.cpu().double()
    v = v * quantized.v_scale.cpu().double().repeat_interleave(BLOCK, 2)[..., None]
    constant = quantized.v_constant.cpu().double()
    out = torch.zeros(batch, heads, q_len, constant.shape[2], dtype=torch.float64)
    lse = torch.full((batch, heads, q_len), -torch.inf, dtype=torch.float64)
    bias = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if mask is not None:
        bias = mask.cpu().double() if mask.is_floating_point() else torch.where(mask.cpu(), 0.0, -torch.inf).double()
    bias = bias.expand(batch, heads, q_len, kv_len) * math.log2(math.e)
    for b in range(batch):
        length = kv_len if quantized.key_counts is None else int(quantized.key_counts[b])
        queries = q_len if q_counts is None else q_counts[b]
        rows = -(-q_len // shape.queries) * shape.queries
        of_band = visible(rows, kv_len, band, queries, length)
        for h in range(heads):
            group = h // (heads // kv_heads)
            for first in range(0, queries, shape.queries):
                i = slice(first, min(first + shape.queries, queries))
                whole, part = [], []
                for start in range(0, length, shape.keys):
                    j = slice(start, start + shape.keys)
                    tile = bias[b, h, i, j].masked_fill(~of_band[i, j], -torch.inf)
                    if (tile == -torch.inf).all():
                        continue
                    full = start + shape.keys <= length and bool(of_band[first : first + shape.queries, j].all())
                    (whole if full and not tile.any() else part).append((start, tile))
                output = torch.zeros(i.stop - i.start, v.shape[3], dtype=torch.float64)
                total = torch.zeros(i.stop - i.start, 1, dtype=torch.float64)
                most = torch.full_like(total, -torch.inf)
                for start, tile in whole + part:
                    j = slice(start, min(start + shape.keys, kv_len))
                    logits = q[b, h, i] @ k[b, group, j].mT + tile[:, : j.stop - start]
                    logits = logits.masked_fill(tile[:, : j.stop - start] == -torch.inf, -torch.inf)
                    new = torch.maximum(most, logits.amax(1, keepdim=True))
                    shift = new.masked_fill(new == -torch.inf, 0.0)
                    p = torch.exp2(logits - shift).float() * p_scale
                    p = round_e4m3(p).double() if e4m3 else p.half().double()
                    alpha = torch.exp2(most - shift)
                    total, output = total * alpha + p.sum(1, keepdim=True), output * alpha + p @ v[b, group, j]
                    most = new
                seen = total != 0
                padded = torch.nn.functional.pad(output, (0, constant.shape[2] - output.shape[1]))
                out[b, h, i] = torch.where(seen, padded / total + constant[b, group], 0.0)
                shift = 0.0 if quantized.lse_shift is None else quantized.lse_shift[b, h, i].cpu().double()
                found = (most + (total / p_scale).log2())[:, 0] + shift
                lse[b, h, i] = torch.where(seen[:, 0], found * math.log(2), -torch.inf)
    return out.transpose(1, 2), lse


class Kernel:
    """The kernel on this machine."""

    def __init__(self) -> None:
        pytest.importorskip("triton", reason="triton, in which the kernels are written, is not installed")
        from lpattn.kernels import attention, mask_tiles, shapes
        from lpattn.quantize import fused
        from lpattn.quantize.fused.launcher import INTERPRETED

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.interpreted = INTERPRETED
        self.attention, self.mask_tiles, self.shapes, self.fused = attention, mask_tiles, shapes, fused
        self.Band, self.TileShape = attention.Band, shapes.TileShape

    def shape(self, dim: int, precision: Any = None, mask: torch.Tensor | None = None) -> Any:
        capability = None if self.interpreted else torch.cuda.get_device_capability()
        lanes = max(32, 1 << (dim - 1).bit_length())
        int8 = precision is self.fused.Precision.INT8_F16
        bias_bits = 8 * mask.element_size() if mask is not None and mask.is_floating_point() else 0
        return self.shapes.tile_shape(capability, lanes, int8=int8, bias_bits=bias_bits)

    def normal(self, *size: int) -> torch.Tensor:
        """Normal float32 values, the same ones on every device."""
        return torch.randn(size).to(self.device)

    def make(
        self,
        batch: int = 1,
        heads: int = 2,
        kv_heads: int = 1,
        q_len: int = 40,
        kv_len: int = 150,
        dim: int = 32,
        dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> list[torch.Tensor]:
        """q, k and v [B, H, S, D]: normal, k and v with a mean, v of another size in every head."""
        generator = torch.Generator().manual_seed(seed)

        def one(heads: int, tokens: int, lanes: int, mean: float) -> torch.Tensor:
            x = torch.randn(batch, heads, tokens, lanes, generator=generator)
            return x + mean * torch.randn(batch, heads, 1, lanes, generator=generator)

        q, k = one(heads, q_len, dim, 0.0), one(kv_heads, kv_len, dim, 2.0)
        v = one(kv_heads, kv_len, dim_v or dim, 1.0) * 3.0 ** torch.arange(kv_heads).view(1, -1, 1, 1)
        return [x.to(dtype).to(self.device) for x in (q, k, v)]

    def check(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        band: Any = None,
        mask: torch.Tensor | None = None,
        used: torch.Tensor | None = None,
        q_counts: list[int] | None = None,
        shape: Any = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Quantize and attend, hold output and lse to the emulation, and return (output, lse, operands).

        ``used`` [B, kv_len] packs the keys.
        """
        batch, heads, q_len, dim = q.shape
        band = band or self.Band()
        shape = shape or self.shape(max(dim, v.shape[3]), options.get("precision"), mask)
        scale = dim**-0.5 if scale is None else scale
        options.setdefault("qk_max", 14.0)
        tiles = None
        if mask is not None:
            mask = mask.to(self.device)
            four = mask[(None,) * (4 - mask.dim())]
            tiles = self.mask_tiles.list_mask_tiles(four, k.shape[2], shape.queries, shape.keys)
            options["used"] = tiles.used_by(k.shape[1], heads).expand(batch, -1, -1)
        if used is not None:
            options["keys"] = self.fused.used_keys(used.to(self.device)[:, None, None], batch, k.shape[2])
        quantized = self.fused.quantize_per_block(
            q, k, v, factor=scale * math.log2(math.e), with_lse_shift=True, **options
        )
        counts = None if q_counts is None else torch.tensor(q_counts, dtype=torch.int32, device=self.device)
        out, lse = self.attention.attend(
            quantized, shape, q.dtype, band=band, mask=tiles, q_counts=counts, return_lse=True
        )
        assert out.shape == (batch, q_len, heads, v.shape[3])
        assert out.dtype == q.dtype
        assert out.is_contiguous()
        self.compare(out, lse, quantized, shape, band, None if mask is None else four, q_counts)
        return out.transpose(1, 2), lse, quantized

    def compare(
        self, out: torch.Tensor, lse: Any, quantized: Any, shape: Any, band: Any, mask: Any, q_counts: Any
    ) -> None:
        """Hold an output to the emulation: as near as float32 sums and an exp2 that is one step off can be."""
        from lpattn.quantize import hadamard_transform
        from lpattn.types import HadamardMode

        want, want_lse = emulated(quantized, shape, band, mask, q_counts)
        if quantized.hadamard is not HadamardMode.NONE:
            want = hadamard_transform(want)
        want = want[..., : quantized.dim_v]
        narrow = self.lost_in_sums(quantized)
        if quantized.query.dtype == torch.float8_e4m3fn and not shape.sum_by_product:
            narrow += 2.0**-10  # of weights, in float16
        for b, count in enumerate(q_counts or [out.shape[1]] * out.shape[0]):
            if count == 0:
                continue
            largest = torch.finfo(out.dtype).max
            got, wanted = out[b, :count].cpu().double(), want[b, :count].clamp(-largest, largest)
            assert torch.equal(got.isnan(), wanted.isnan())
            nothing = (want_lse[b, :, :count] == -torch.inf).T
            assert not got[nothing].any()
            error = (got - wanted).nan_to_num(0.0)
            # A weight that is rounded the other way is off by 2^-4 of itself; few are.
            typical = wanted.nan_to_num(0.0).square().mean().sqrt()
            rounding = torch.finfo(out.dtype).eps * wanted.abs().nan_to_num(0.0)
            assert error.square().mean().sqrt() <= (2e-3 + narrow) * typical + rounding.max()
            assert (error.abs() <= (2e-2 + 8 * narrow) * typical + rounding).all()
            if lse is None:
                continue
            got_lse, wanted_lse = lse[b, :, :count].cpu().double(), want_lse[b, :, :count]
            assert torch.equal(got_lse.isnan(), wanted_lse.isnan())
            assert torch.equal(got_lse == -torch.inf, wanted_lse == -torch.inf)
            finite = wanted_lse.isfinite()
            off = ((got_lse - wanted_lse)[finite].abs() - 1e-6 * wanted_lse[finite].abs()).clamp_min(0.0)
            # A large weight may be rounded the other way: float32 and float64 see ties differently.
            assert (off > 1e-4 + narrow).sum() <= 1 + off.numel() // 50
            assert (off <= 1e-2 + narrow).all()

    @staticmethod
    def lost_in_sums(quantized: Any) -> float:
        """What a logit may lose where Hopper adds up products of e4m3; 0 elsewhere.

        Its tensor cores keep about 14 bits (DeepSeek-V3, arXiv:2412.19437, 3.3.2).
        """
        query, key = quantized.query, quantized.key
        if not query.is_cuda or query.dtype != torch.float8_e4m3fn or torch.cuda.get_device_capability()[0] != 9:
            return 0.0
        norms = query.float().norm(dim=-1) * quantized.q_scale, key.float().norm(dim=-1).unflatten(2, (-1, BLOCK))
        reach = norms[0].nan_to_num(0, 0, 0).max() * (norms[1] * quantized.k_scale[..., None]).nan_to_num(0, 0, 0).max()
        return float(reach) * math.log(2) * 16 * 2.0**-13


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    return Kernel()
