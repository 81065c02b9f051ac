"""Lengths at the edges of tiles, empty calls, values that overflow, divide by zero or are NaN."""

from __future__ import annotations

import torch

from lpattn.testing.budget import floor_for, require_close
from lpattn.testing.exact import sqnr, worst_row_sqnr
from lpattn.testing.outcome import check, require
from lpattn.testing.subject import Subject


@check
def lengths_at_the_edges(subject: Subject) -> str:
    """Lengths of 1 and around 64 and 128, for queries and keys apart, one head, one batch entry."""
    lengths = (1, 2, 7, 63, 64, 65, 127, 128, 129)
    problems = [subject.problem(length=length, causal=causal) for length in lengths for causal in subject.causal_kinds]
    problems += [subject.problem(q_len=q, kv_len=k) for q, k in ((1, 129), (65, 7), (7, 65), (128, 1), (130, 300))]
    problems += [subject.problem(groups=1, batch=b, num_heads=h, num_kv_heads=h) for b, h in ((1, 1), (3, 1), (1, 3))]
    taken = subject.accepted(problems)
    for problem in taken:
        # With one or two keys, a row is as exact as the rounding of its values.
        require_close(subject, problem, subject.run(problem), "sharp")
    return f"{len(taken)} of {len(problems)} calls"


@check
def empty_calls(subject: Subject) -> None:
    """Empty batches, no queries and no keys give what exact attention gives: zeros, or nothing."""
    subject.device  # noqa: B018 - says why, where there is none
    for problem in (subject.problem(batch=0), subject.problem(q_len=0), subject.problem(kv_len=0)):
        out = subject.run(problem)
        require(not out.any(), f"{problem}: the output of an empty call must be zeros")


@check
def unusual_values_stay_finite(subject: Subject) -> None:
    """Zeros, constants, one token beside zeros and huge logits give finite outputs where exact attention does."""
    plain = subject.problem(length=subject.fitting(70))
    zeros = torch.zeros_like
    problems = [
        plain.changed(query=zeros(plain.query), label="q of zeros"),
        plain.changed(key=zeros(plain.key), label="k of zeros"),
        plain.changed(value=zeros(plain.value), label="v of zeros"),
        plain.changed(key=torch.ones_like(plain.key) * 3, label="k constant"),
        plain.changed(value=torch.ones_like(plain.value) * -7, label="v constant"),
        plain.changed(query=_with_zero_channel(plain.query), key=_with_zero_channel(plain.key)),
        plain.changed(value=_with_zero_channel(plain.value), label="v with a channel of zeros"),
        plain.changed(query=_with_zero_head(plain.query), label="q with a head of zeros"),
        plain.changed(key=_with_zero_head(plain.key), label="k with a head of zeros"),
        plain.changed(value=_with_zero_head(plain.value), label="v with a head of zeros"),
    ]
    # Whoever knows some of the tokens only by others may have divided by the magnitude of these.
    of_q, of_kv = subject.problem(q_len=600, kv_len=5), subject.problem(q_len=5, kv_len=600)
    problems += [
        of_q.changed(query=_with_one_token(of_q.query), label="one query not zero"),
        of_kv.changed(key=_with_one_token(of_kv.key), label="one key not zero"),
        of_kv.changed(value=_with_one_token(100 * of_kv.value), label="one value not zero"),
    ]
    # Sums in float16 end at 65504: who computes in it may do so for inputs of that dtype alone.
    for dtype in subject.dtypes:
        other = subject.problem(length=subject.fitting(70), dtype=dtype)
        problems.append(other.changed(query=other.query * 300, key=other.key * 20, label=_HUGE))
    for problem in subject.accepted(problems):
        out = subject.run(problem)
        require(bool(out.isfinite().all()), f"{problem}: the output is not finite")
        if problem.label != _HUGE and problem.value.any():
            exact, _ = problem.exact()
            quality = worst_row_sqnr(exact, out)
            floor = floor_for(subject, "sharp", out.dtype) - 6
            require(quality >= floor, f"{problem}: the worst row has {quality:.1f} dB; the floor is {floor:.1f} dB")


_HUGE = "huge logits"


def _with_zero_channel(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[..., -1] = 0
    return x


def _with_zero_head(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 0] = 0
    return x


def _with_one_token(x: torch.Tensor) -> torch.Tensor:
    """One in every head, each elsewhere."""
    kept = torch.zeros_like(x)
    for h in range(x.shape[1]):
        token = 300 + 37 * h
        kept[:, h, token] = x[:, h, token]
    return kept


@check
def batch_entries_are_apart(subject: Subject) -> str:
    """Values 300 times as large in one batch entry leave the accuracy of the other as it is."""
    plain = subject.problem()
    large = plain.changed(label="batch entry 1 times 300")
    for name in ("query", "key", "value"):
        tensor = getattr(plain, name).clone()
        tensor[1] *= 300
        large = large.changed(**{name: tensor})
    (problem,) = subject.accepted([large])
    exact, out = problem.exact()[0][0], subject.run(problem)[0]
    quality, floor = sqnr(exact, out), floor_for(subject, "normal", out.dtype)
    require(quality >= floor, f"{problem}: batch entry 0 has {quality:.1f} dB; the floor is {floor:.1f} dB")
    return f"{quality:.1f} dB"


@check
def nan_stays_where_it_is(subject: Subject) -> None:
    """A NaN spoils the rows, heads and batch entries that exact attention spoils: all of them, and no other."""
    plain = subject.problem(length=subject.fitting(70))
    for name in ("query", "key", "value"):
        tensor = getattr(plain, name).clone()
        tensor[0, 0, 3, -1] = torch.nan
        poisoned = plain.changed(**{name: tensor}, label=f"NaN in {name}[0, 0, 3, -1]")
        for problem in subject.accepted([poisoned]):
            exact, _ = problem.exact()
            out = subject.run(problem)
            allowed, spoiled = exact.isnan().any(-1), out.isnan().any(-1)
            require(
                not bool((spoiled & ~allowed).any()),
                f"{problem}: {int((spoiled & ~allowed).sum())} rows became NaN that exact attention leaves alone, the "
                f"first is [batch, head, row] {(spoiled & ~allowed).nonzero()[:1].tolist()}",
            )
            require(
                bool(spoiled[allowed].all()),
                f"{problem}: {int((allowed & ~spoiled).sum())} rows that exact attention makes NaN came out as numbers",
            )
