"""Packed sequences, where they are declared: each on its own, with windows, and nothing behind the last one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import lpattn
from lpattn.errors import UnsupportedCallError
from lpattn.testing.budget import LSE_TOLERANCE, ROW_ALLOWANCE, floor_for
from lpattn.testing.exact import exact_attention, sqnr, worst_row_sqnr
from lpattn.testing.outcome import CheckFailed, NotApplicable, check, require
from lpattn.testing.subject import Subject

_Q_LENGTHS = (33, 1, 0, 130, 5)
_K_LENGTHS = (65, 130, 7, 70, 0)
"""Of the sequences: some have no query, no key, or more queries than keys."""

_BEHIND = 9
"""Tokens behind the last sequence: NaN, and no part of anything."""

_WINDOWS = ((-1, -1), (-1, 0), (16, 0), (8, 4))


@dataclass(frozen=True, eq=False)
class _Packed:
    """A call of packed sequences: q, k, v [T, H, D], where sequences start on the device, and what a query sees."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    starts_q: torch.Tensor
    starts_k: torch.Tensor
    window: tuple[int, int]

    def __str__(self) -> str:
        return f"sequences of {_Q_LENGTHS} queries and {_K_LENGTHS} keys, window {self.window}"

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [T_q, H, D_v], lse [T_q, H]) in float64: zeros and -inf where no key is seen."""
        output = self.value.new_zeros(*self.query.shape[:2], self.value.shape[2], dtype=torch.float64)
        lse = torch.full_like(output[..., 0], -torch.inf)
        left, right = (n if n >= 0 else 10**6 for n in self.window)
        for index, (q_len, kv_len) in enumerate(zip(_Q_LENGTHS, _K_LENGTHS, strict=True)):
            rows = slice(sum(_Q_LENGTHS[:index]), sum(_Q_LENGTHS[: index + 1]))
            keys = slice(sum(_K_LENGTHS[:index]), sum(_K_LENGTHS[: index + 1]))
            # Positions count from the end.
            position = torch.arange(q_len, device=lse.device)[:, None] + kv_len - q_len
            ahead = torch.arange(kv_len, device=lse.device) - position
            q, k, v = (x.transpose(0, 1)[None] for x in (self.query[rows], self.key[keys], self.value[keys]))
            found, of_rows = exact_attention(q, k, v, (ahead <= right) & (ahead >= -left))
            output[rows], lse[rows] = found[0].transpose(0, 1), of_rows[0].T
        return output, lse


def _make(subject: Subject, device: torch.device, window: tuple[int, int]) -> _Packed:
    sizes, generator = subject.sizes(), torch.Generator().manual_seed(4)

    def packed(lengths: tuple[int, ...], heads: int, lanes: int) -> torch.Tensor:
        x = torch.randn(sum(lengths) + _BEHIND, heads, lanes, generator=generator)
        x[sum(lengths) :] = torch.nan
        return x.to(device, subject.dtype)

    def starts(lengths: tuple[int, ...]) -> torch.Tensor:
        ends = torch.tensor((0, *lengths)).cumsum(0)
        return ends.to(device, torch.int32)

    q = packed(_Q_LENGTHS, sizes.num_heads, sizes.head_dim)
    k = packed(_K_LENGTHS, sizes.num_kv_heads, sizes.head_dim)
    v = packed(_K_LENGTHS, sizes.num_kv_heads, sizes.head_dim_v)
    return _Packed(q, k, v, starts(_Q_LENGTHS), starts(_K_LENGTHS), window)


def _run(subject: Subject, call: _Packed, return_lse: bool = False) -> Any:
    """What ``low_precision_varlen_sdpa`` returns; strict.

    Raises:
        UnsupportedCallError: the backend declines the call.
        CheckFailed: it raised something else.
    """
    lengths = max(_Q_LENGTHS), max(_K_LENGTHS)
    tensors = (call.query, call.key, call.value, call.starts_q, call.starts_k)
    try:
        return lpattn.low_precision_varlen_sdpa(
            *tensors,
            *lengths,
            window_size=call.window,
            backend=subject.name,
            on_unsupported="raise",
            return_lse=return_lse,
        )
    except UnsupportedCallError:
        raise
    except Exception as error:
        raise CheckFailed(f"{call}: raised {type(error).__name__}: {error}") from error


def require_packed_refused(subject: Subject, device: torch.device) -> None:
    """Fail unless packed sequences are refused, as what the backend does not take."""
    call = _make(subject, device, (-1, -1))
    try:
        _run(subject, call)
    except UnsupportedCallError as error:
        codes = [reason.code for reason in error.reasons.get(subject.name, ())]
        require("varlen" in codes, f"{call}: refused for {codes}, and not for 'varlen'")
    else:
        require(False, f"{call}: varlen is not declared, and yet it ran")


@check
def packed_sequences(subject: Subject) -> str:
    """varlen_attention: sequences apart, windows aligned at the end, empty sequences, NaN behind the last one."""
    device = subject.device
    if not subject.capabilities.varlen:
        raise NotApplicable("declares no packed sequences")
    measured, declined = [], ""
    for window in _WINDOWS:
        call = _make(subject, device, window)
        try:
            out = _run(subject, call)
        except UnsupportedCallError as error:
            declined = str(error.reasons.get(subject.name, [error])[0])
            continue
        measured.append(_require_right(subject, call, out))
        if subject.capabilities.lse:
            out, lse = _run(subject, call, return_lse=True)
            _require_right(subject, call, out)
            _require_lse(subject, call, lse)
        _require_apart(subject, call)
    if not measured:
        raise NotApplicable(f"declines all such calls: {declined}")
    return f"{len(measured)} windows, at least {min(measured):.1f} dB"


def _require_right(subject: Subject, call: _Packed, out: torch.Tensor) -> float:
    exact, lse = call.exact()
    nothing = lse == -torch.inf
    require(bool(out.isfinite().all()), f"{call}: the output is not finite")
    # Where a query sees few keys, it is as exact as the rounding of their values.
    floor = floor_for(subject, "sharp", out.dtype)
    quality, row = sqnr(exact[~nothing], out[~nothing]), worst_row_sqnr(exact[~nothing], out[~nothing])
    require(quality >= floor, f"{call}: {quality:.1f} dB against exact attention; the floor is {floor:.1f} dB")
    limit = floor - ROW_ALLOWANCE
    require(row >= limit, f"{call}: the worst row has {row:.1f} dB; the floor for rows is {limit:.1f} dB")
    require(not out[nothing].any(), f"{call}: rows that see no key, or are in no sequence, must be 0")
    return quality


def _require_lse(subject: Subject, call: _Packed, lse: torch.Tensor) -> None:
    _, exact = call.exact()
    nothing = exact == -torch.inf
    require(torch.equal(lse == -torch.inf, nothing), f"{call}: lse must be -inf for rows without keys, and no others")
    limit = 1e-2 if subject.backend.exact else LSE_TOLERANCE
    off = float((lse.double() - exact)[~nothing].abs().max())
    require(off <= limit, f"{call}: lse is off by {off:.3g} (limit {limit:g})")


def _require_apart(subject: Subject, call: _Packed) -> None:
    """A NaN in the first sequence leaves the others alone."""
    key = call.key.clone()
    key[0] = torch.nan
    spoiled = _Packed(call.query, key, call.value, call.starts_q, call.starts_k, call.window)
    others = _run(subject, spoiled)[_Q_LENGTHS[0] :]
    require(bool(others.isfinite().all()), f"{call}: a NaN in the first sequence reaches others")
