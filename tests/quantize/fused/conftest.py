"""The fused quantization beside plain PyTorch: in Triton's interpreter, or on the GPU where there is one.

`make test-gpu` runs this folder too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lpattn.norm import normalize_both
from lpattn.quantize import E4M3_MAX, hadamard_transform, round_e4m3
from lpattn.rope import rotate
from lpattn.types import HadamardMode, Norm

HEADROOM = 16.0
# So many tokens of a head are looked at, at least; all of v, if there are many keys. Where that is not all, there is
# headroom.
FEW = 256
EXACT_FROM = 8192
# The smallest scales of q, k and v.
FLOORS = (2.0**-56, 2.0**-56, 2.0**-126)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # The interpreter computes with numpy, which says what inf and NaN lead to.
            item.add_marker(pytest.mark.filterwarnings("ignore:.* encountered( in|$):RuntimeWarning"))
            if torch.cuda.is_available():
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def poisoned(poison: list[int]) -> None:
    """In every test here."""


def steps_between(data: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """How many e4m3 values two tensors are apart; 0 and -0 are one. A NaN is far from all else."""

    def place(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bits = x.contiguous().view(torch.uint8).to(torch.int32)
        magnitude = bits & 0x7F
        return magnitude, torch.where(bits > 0x7F, -magnitude, magnitude)

    (magnitude, place_of_data), (_, place_of_want) = place(data), place(want)
    nan = magnitude == 0x7F
    apart = (place_of_data - place_of_want).abs() + 1000 * nan
    return torch.where(want.isnan(), torch.where(nan, 0, 1000), apart)


def power_of_two_above(x: float) -> float:
    """The smallest that is not below x."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(1.0, exponent - (mantissa == 0.5))


def largest_finite(x: torch.Tensor) -> float:
    return float(torch.where(x.isfinite(), x.abs(), 0.0).max()) if x.numel() else 0.0


def operands(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hadamard: HadamardMode, rope: Any, norm: Norm | None = None
) -> list[torch.Tensor]:
    """What is smoothed, scaled and rounded, in plain PyTorch: float32 [B, H or Hkv, S, D] on the CPU."""
    dtype = q.dtype
    q, k, v = (x.cpu().float() for x in (q, k, v))
    if norm is not None:
        tensors = (None if t is None else t.cpu().float() for t in norm.tensors)
        both = normalize_both(q.transpose(1, 2), k.transpose(1, 2), Norm(norm.eps_q, norm.eps_k, *tensors))
        q, k = (x.transpose(1, 2) for x in both)
    if rope is not None:
        cos, sin, cos_k, sin_k = (x.cpu().float() for x in (rope.cos, rope.sin, rope.cos_k, rope.sin_k))
        q = rotate(q.transpose(1, 2), cos, sin, rope.interleaved).transpose(1, 2)
        k = rotate(k.transpose(1, 2), cos_k, sin_k, rope.interleaved).transpose(1, 2)
    if hadamard is HadamardMode.QKV:
        q, k = (hadamard_transform(x.to(dtype).float()) for x in (q, k))
    if hadamard is not HadamardMode.NONE:
        v = hadamard_transform(v.to(dtype).float())
    return [q, k, v]


def check_constant(x: torch.Tensor, constant: torch.Tensor, whole: bool, always: bool) -> None:
    """That of a head whose used tokens are x [n, D]: the mean, if the sample is the whole; or nothing, if it may be."""
    assert constant.isfinite().all()
    if len(x) == 0:
        assert not constant.any()
    elif whole and (always or constant.any()):
        mean = torch.where(x.isfinite(), x, 0.0).double().mean(0)
        limit = 2e-6 * largest_finite(x) + len(x) * 2.0**-149
        assert (constant - mean).abs().max() <= limit


def check_descale(
    x: torch.Tensor, smoothed: torch.Tensor, constant: torch.Tensor, descale: float, floor: float, whole: bool
) -> None:
    """That of a group whose used tokens are x [..., n, D], and with the constant subtracted ``smoothed``."""
    bound = (largest_finite(x) + largest_finite(constant)) / E4M3_MAX
    # Where it is next to a power of two, float32 may say either.
    least, most = (power_of_two_above(max(bound * (1 + e), floor)) for e in (-1e-6, 1e-6))
    assert power_of_two_above(descale) == descale
    assert descale >= power_of_two_above(max(largest_finite(smoothed) / E4M3_MAX, floor))
    if whole:
        assert descale in (least, most)
    else:
        assert descale <= HEADROOM * most


class Fused:
    """The passes on this machine, and what they are compared with."""

    power_of_two_above = staticmethod(power_of_two_above)
    operands = staticmethod(operands)
    largest_finite = staticmethod(largest_finite)

    def __init__(self) -> None:
        pytest.importorskip("triton", reason="triton, in which the passes are written, is not installed")
        from lpattn.quantize import fused
        from lpattn.quantize.fused.launcher import INTERPRETED

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.interpreted = INTERPRETED
        if self.interpreted is not (self.device == "cpu"):
            pytest.fail(
                f"Triton {'interprets' if self.interpreted else 'compiles'} kernels, and the device is {self.device}: "
                "without a GPU, TRITON_INTERPRET=1 must be set before triton is imported, as tests/conftest.py does"
            )
        self.Keys, self.Rotation = fused.Keys, fused.Rotation
        self.quantize_per_head, self.restore_output, self.used_keys = (
            fused.quantize_per_head,
            fused.restore_output,
            fused.used_keys,
        )
        # The interpreter takes bits of bfloat16 for integers where it multiplies matrices.
        self.hadamard_dtypes = (torch.float16, torch.float32) + (() if self.interpreted else (torch.bfloat16,))
        self.sampled = functools.cache(self._sampled)

    def make(
        self,
        heads: int = 1,
        kv_heads: int = 1,
        q_len: int = 65,
        kv_len: int = 65,
        dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        batch: int = 1,
        seed: int = 0,
    ) -> list[torch.Tensor]:
        """q, k and v [B, H, S, D], contiguous: normal, each head of another size, k and v with a mean."""
        generator = torch.Generator().manual_seed(seed)

        def one(heads: int, tokens: int, mean: float) -> torch.Tensor:
            x = torch.randn(batch, heads, tokens, dim, generator=generator)
            x += mean * torch.randn(batch, heads, 1, dim, generator=generator)
            sizes = 3.0 ** (torch.arange(batch * heads) % 7 - 3.0)
            return (x * sizes.view(batch, heads, 1, 1)).to(dtype).to(self.device)

        return [one(heads, q_len, 0.0), one(kv_heads, kv_len, 3.0), one(kv_heads, kv_len, 1.0)]

    def laid_out(self, x: torch.Tensor, layout: str) -> torch.Tensor:
        """x as a view of a larger tensor that otherwise holds NaN and huge values.

        With "one_head" or "one_token", all heads, or all tokens of a head, are the first one of x.
        """
        batch, heads, tokens, dim = x.shape
        # One before, two after the batch entries, heads and tokens.
        b, h, s = batch + 3, heads + 3, tokens + 3
        cut, lanes = [slice(1, 1 + batch), slice(1, 1 + heads), slice(1, 1 + tokens)], slice(None)
        shape, order = (b, s, h, dim), (0, 2, 1, 3)
        if layout == "bhsd":
            shape, order = (b, h, s, dim), (0, 1, 2, 3)
        elif layout == "sliced":
            shape, lanes = (b, s, h, dim + 24), slice(8, 8 + dim)
        elif layout == "unaligned":
            shape, lanes = (b, s, h, dim + 5), slice(3, 3 + dim)
        elif layout == "every_other_lane":
            shape, lanes = (b, s, h, 2 * dim), slice(0, 2 * dim, 2)
        elif layout == "lanes_first":
            shape, order = (b, h, dim, s), (0, 1, 3, 2)
        elif layout == "one_head":
            shape, cut[1] = (b, s, 3, dim), slice(1, 2)
        elif layout == "one_token":
            shape, cut[2] = (b, 3, h, dim), slice(1, 2)
        else:
            assert layout == "bshd"
        memory = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
        memory.view(-1)[::2] = 6e4
        view = memory.permute(order)[tuple(cut)][..., lanes]
        view.copy_(x[:, : view.shape[1], : view.shape[2]])
        return view.expand_as(x)

    def norm_over_heads(self, q: torch.Tensor, k: torch.Tensor, *dtypes: torch.dtype) -> Norm:
        """With numbers that differ between tokens, and weights of these dtypes, if any, between heads and lanes."""
        generator = torch.Generator().manual_seed(7)
        made = [
            (1 + torch.randn(x.shape[1], x.shape[3], generator=generator)).to(dtype).to(self.device)
            for x, dtype in zip((q, k), dtypes, strict=False)
        ]
        rstd = [0.5 + torch.rand(x.shape[0], x.shape[2], generator=generator).to(self.device) for x in (q, k)]
        return Norm(None, None, *(made or (None, None)), *rstd)

    def rotation(
        self, q: torch.Tensor, k: torch.Tensor, tables: Sequence[torch.Tensor], interleaved: bool = False
    ) -> Any:
        """A ``Rotation`` of (cos, sin) or (cos, sin, cos_k, sin_k), broadcast as the backend does it."""
        cos, sin, cos_k, sin_k = tables if len(tables) == 4 else (*tables, *tables)
        of_q, of_k = ((x.shape[0], x.shape[2], x.shape[1], cos.shape[-1]) for x in (q, k))
        return self.Rotation(cos.expand(of_q), sin.expand(of_q), cos_k.expand(of_k), sin_k.expand(of_k), interleaved)

    def tables(self, batch: int, q_len: int, heads: int, dim: int, kv_len: int, kv_heads: int) -> list[torch.Tensor]:
        """cos and sin of q, then of k, as a caller has them: [B, S, H, D], all different."""
        sizes = [(q_len, heads)] * 2 + [(kv_len, kv_heads)] * 2
        return [torch.randn(batch, n, h, dim, device=self.device) for n, h in sizes]

    def keys(self, used: torch.Tensor) -> Any:
        """The list of the keys of a mask [B, kv_len], with what must not be read behind them."""
        indices = torch.full(used.shape, -(2**30), dtype=torch.int32)
        for row, of_row in zip(used, indices, strict=True):
            of_row[: int(row.sum())] = row.nonzero().flatten()
        return self.Keys(indices.to(self.device), used.sum(1, dtype=torch.int32).to(self.device))

    def check(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        factor: float = 1.0,
        hadamard: HadamardMode = HadamardMode.NONE,
        rope: Any = None,
        norm: Norm | None = None,
        used: torch.Tensor | None = None,
        with_lse_shift: bool = False,
    ) -> Any:
        """Run ``quantize_per_head``, hold every value of it to plain PyTorch, and return it.

        The constants are the mean of all tokens where all are sampled; other samples are for the caller to know. The
        descales lie between what the values need and what the sample and the headroom can lead to. Given those two,
        the data are exact; or, where sums in float32 may differ, a few of them are one step off.
        """
        keys = None if used is None else self.keys(used)
        found = self.quantize_per_head(
            q, k, v, factor=factor, hadamard=hadamard, rope=rope, norm=norm, keys=keys, with_lse_shift=with_lse_shift
        )
        wanted = operands(q, k, v, hadamard, rope, norm)
        batch, heads, q_len, dim = q.shape
        kv_heads, kv_len = k.shape[1:3]
        group = heads // kv_heads
        counts = [kv_len] * batch
        if used is not None:
            counts = used.sum(1).tolist()
            for x in wanted[1:]:
                for b, count in enumerate(counts):
                    x[b] = torch.cat((x[b][:, used[b]], torch.zeros(kv_heads, kv_len - count, dim)), 1)
        constants = [torch.zeros(batch, kv_heads, dim)]
        for constant in found.constants:
            assert constant.shape[:2] == (batch, kv_heads)
            assert not constant[..., dim:].any()
            constants.append(constant.cpu()[..., :dim])

        exact = norm is None and hadamard is HadamardMode.NONE and (rope is None or self.interpreted)
        wanted[0] = wanted[0] * factor
        outputs = ((found.query, found.q_descale), (found.key, found.k_descale), (found.value, found.v_descale))
        for which, (x, constant, (data, descale)) in enumerate(zip(wanted, constants, outputs, strict=True)):
            assert (descale.dtype, tuple(descale.shape)) == (torch.float32, (batch, kv_heads))
            assert (data.dtype, data.shape) == (torch.float8_e4m3fn, x.transpose(1, 2).shape)
            assert data.transpose(1, 2).is_contiguous()
            x = x.unflatten(1, (kv_heads, -1))
            smoothed = x - constant[:, :, None, None]
            want = round_e4m3(smoothed / descale.cpu()[:, :, None, None, None])
            for b, count in enumerate(counts if which else [q_len] * batch):
                want[b, :, :, count:] = 0.0  # where the mean was subtracted
                for h in range(kv_heads):
                    tokens, rest = x[b, h, :, :count], smoothed[b, h, :, :count]
                    whole = count <= FEW or (which == 2 and kv_len >= EXACT_FROM)
                    if which:
                        check_constant(tokens[0], constant[b, h], whole, which == 1)
                    check_descale(tokens, rest, constant[b, h], float(descale[b, h]), FLOORS[which], whole)
            off = steps_between(data.cpu().transpose(1, 2), want.flatten(1, 2))
            assert off.max() <= (0 if exact else 1), f"{(off > exact).sum()} elements of {'qkv'[which]} are wrong"
            assert (off > 0).sum() <= off.numel() // 400

        if not with_lse_shift:
            assert found.lse_shift is None
            return found
        rotated, of_k = wanted[0].double(), constants[1].double().repeat_interleave(group, 1)[..., None]
        limit = 1e-6 * (rotated.abs() @ of_k.abs()).nan_to_num(posinf=0.0)[..., 0]
        if not exact and hadamard is HadamardMode.QKV:
            # The transform takes rotated values rounded to the dtype of q: one of them may be rounded the other way.
            reach = rotated.nan_to_num(posinf=0.0, neginf=0.0).norm(dim=3) * of_k.norm(dim=2)
            limit += torch.finfo(q.dtype).eps * reach
        assert (found.lse_shift.dtype, found.lse_shift.shape) == (torch.float32, q.shape[:3])
        shift, want = found.lse_shift.cpu(), (rotated @ of_k)[..., 0]
        assert torch.equal(shift.isfinite(), want.isfinite())
        assert ((shift - want).abs() <= limit)[want.isfinite()].all()
        return found

    def _sampled(self, length: int) -> tuple[int, ...]:
        """Which of so many tokens of k (or q) are sampled: every one leaves a bit of its own in the mean."""
        tokens, channels = torch.arange(length), 31
        assert length <= 16 * channels
        k = torch.zeros(1, 1, length, channels + 1)
        k[0, 0, tokens, tokens % channels] = 2.0 ** (tokens // channels)
        k[0, 0, 0, channels] = 1.0  # token 0 is always sampled: its mean is one by the number of tokens
        k = k.to(self.device)
        mean = self.quantize_per_head(k[:, :, :1], k, k).constants[0][0, 0]
        sums = (mean / mean[channels]).round().to(torch.int64).tolist()
        return tuple(t for t in range(length) if sums[t % channels] >> (t // channels) & 1)


@pytest.fixture(scope="session")
def fused() -> Fused:
    return Fused()


@pytest.fixture
def take_heads(fused: Fused, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Called with a number, programs that rotate take up to so many heads, however few programs are left."""
    from lpattn.quantize.fused import blocks, heads, turning

    def take(most: int) -> None:
        monkeypatch.setattr(turning, "_MOST_HEADS", most)
        monkeypatch.setattr(turning, "multiprocessors", lambda device: 1)
        forget()

    def forget() -> None:
        heads._plan.cache_clear()
        blocks._plan.cache_clear()

    yield take
    forget()
