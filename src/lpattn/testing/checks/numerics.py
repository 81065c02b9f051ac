"""The output and the log-sum-exp against exact attention, on data that finds bugs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from lpattn.testing.budget import (
    FEW_LANES,
    LSE_BIAS,
    LSE_OF_COUNTS,
    lse_limit,
    require_close,
    require_lse,
    require_unbiased,
)
from lpattn.testing.exact import worst_row_sqnr
from lpattn.testing.inputs import KINDS, Problem, level
from lpattn.testing.outcome import NotApplicable, check, require
from lpattn.testing.subject import ONE_OF_EACH_KIND, Subject


@check
def accuracy(subject: Subject) -> str:
    """Every dtype and head_dim, every kind of data, large and small values in every dtype, within both budgets."""
    problems: list[tuple[str, Problem]] = []
    for causal in subject.causal_kinds:
        problems += [("normal", subject.problem(dtype=dtype, causal=causal)) for dtype in subject.dtypes]
        problems += [("normal", subject.problem(head_dim=dim, causal=causal)) for dim in subject.head_dims]
        problems += [(kind, subject.problem(kind, causal=causal)) for kind in KINDS if kind != "normal"]
        # What overflows or vanishes without a scale does so in one dtype, and in another it does not.
        problems += [
            (kind, subject.problem(kind, dtype=dtype, causal=causal))
            for kind in ("large_values", "small_values")
            for dtype in subject.dtypes
            if dtype != subject.dtype
        ]
    taken = subject.accepted(problem for _, problem in problems)
    measured: dict[str, float] = {}
    for kind, problem in problems:
        if problem in taken:
            quality = require_close(subject, problem, subject.run(problem), kind)
            measured[kind] = min(quality, measured.get(kind, math.inf))
    return ", ".join(f"{kind} {quality:.1f} dB" for kind, quality in measured.items())


@check
def scales_are_exact(subject: Subject) -> str:
    """Output and softmax are neither too large nor too small in any dtype and head_dim, to half a per cent."""
    # Many elements: the more there are, the less of the rounding is left.
    length = subject.fitting(256)
    problems = [subject.problem(kind, length=length) for kind in ("normal", "biased")]
    usual = len(subject.accepted(problems))
    # Twice as many: values with few bits of their own lie half-way between two of the format more often.
    dtypes = [dtype for dtype in subject.dtypes if dtype != subject.dtype]
    problems += [subject.problem(length=length, dtype=dtype, batch=4) for dtype in dtypes]
    # Rounding errors of few lanes have a direction: they move the largest logits most.
    dims = [dim for dim in subject.head_dims if dim >= FEW_LANES and dim != subject.head_dim]
    problems += [subject.problem(length=length, head_dim=dim, batch=max(2, 128 // dim)) for dim in dims]
    found = []
    for problem in subject.accepted(problems):
        outputs = {"": subject.run(problem)}
        if subject.capabilities.lse and not subject.refusal(problem, return_lse=True):
            outputs["with lse"] = subject.run_with_lse(problem)[0]
        found.append(require_unbiased(subject, problem, outputs))
    return "; ".join(found[:usual])


_BALANCE = 0.02
"""How far the balance of one large and many small weights may be off; v is about 1 and -1."""


@check
def small_weights_count(subject: Subject) -> str:
    """Many weights of 1/4096 balance one of a half: none underflow, the large one is not clipped, the sum is theirs."""
    many = subject.problem("peak_and_tails", q_len=16, kv_len=4096, num_heads=8, groups=1, num_kv_heads=8)
    (problem,) = subject.accepted([many])
    exact, _ = problem.exact()
    off = float((subject.run(problem).double() - exact).mean())
    designed = 0.0
    if subject.emulate is not None and abs(off) > _BALANCE:
        designed = float((subject.emulate(problem)[0].double() - exact).mean())
    low, high = min(0.0, designed) - _BALANCE, max(0.0, designed) + _BALANCE
    require(
        low <= off <= high and abs(designed) <= 2 * _BALANCE,
        f"{problem}: the output is off by {off:+.4f} on the average, where one large and many small weights balance; "
        f"the tolerance is {_BALANCE}{f', of the recipe {designed:+.4f}' if designed else ''}. Small weights "
        "underflow, the large one is clipped, or the row sum counts other weights than the product",
    )
    return f"balance {off:+.4f}"


@check
def weights_sum_to_one(subject: Subject) -> str:
    """With a v of ones the output is 1, whatever the weights; with a constant v it is that constant."""
    worst = 0.0
    for kind in ("normal", "sharp", "soft", "peak_and_tails"):
        for causal in subject.causal_kinds:
            problem = subject.problem(kind, length=subject.fitting(200), causal=causal)
            ones = problem.changed(value=torch.ones_like(problem.value), label=f"{kind}, v of ones")
            for one in subject.accepted([ones]):
                off = float((subject.run(one).double() - 1).abs().max())
                worst = max(worst, off)
                # e4m3 rounds P by up to 2^-4; where the row sum counts P before that, many small weights are needed
                # for it to cancel, and rows with few visible keys have few.
                limit = 1e-2 if subject.backend.exact else 0.07
                require(off <= limit, f"{one}: the output is off 1 by {off:.4f}; the limit is {limit:g}")
    return f"at most {worst:.4f} off"


@check
def keys_are_read_in_order(subject: Subject) -> None:
    """Rows that attend to one key return that key's value: each key, the first and the last among them."""
    lengths = dict.fromkeys((33, 129, subject.fitting(33), subject.fitting(129)))
    for problem in subject.accepted(subject.problem("last_key", length=length) for length in lengths):
        # Row i attends to key i + 7, modulo the length.
        keys = problem.key.repeat_interleave(problem.query.shape[1] // problem.key.shape[1], 1)
        strength = 10.0 / problem.query.shape[-1] ** 0.5
        turned = problem.changed(query=keys.roll(-7, 2) * strength, label="each row attends to one key of its own")
        exact, _ = turned.exact()
        row = worst_row_sqnr(exact, subject.run(turned))
        require(row >= 10.0, f"{turned}: some row has {row:.1f} dB, as if it had read another key; needs 10 dB")


_GROUPED = ((8, 4), (8, 2), (8, 1), (12, 4), (24, 8), (10, 2), (15, 3), (16, 2))
"""(heads, KV heads). Powers of two hide mistakes, and so does a single KV head."""


@check
def kv_heads_are_grouped(subject: Subject) -> None:
    """Query head h reads KV head h // group: groups of 2, 3, 4, 5 and 8, up to 24 heads, and one KV head for all."""
    if not subject.capabilities.gqa:
        raise NotApplicable("declares no GQA")
    length = subject.fitting(48)
    problems = [
        subject.problem(groups=1, num_heads=heads, num_kv_heads=kv_heads, length=length) for heads, kv_heads in _GROUPED
    ]
    for problem in subject.accepted(problems):
        heads, kv_heads = problem.query.shape[1], problem.key.shape[1]
        # Around zero: the smaller the numbers are, the further apart they stay when they are rounded.
        middle = (kv_heads - 1) / 2
        numbers = (torch.arange(kv_heads, device=problem.value.device) - middle)[None, :, None, None]
        numbered = problem.changed(value=torch.ones_like(problem.value) * numbers.to(problem.value.dtype))
        read = subject.run(numbered).double().mean((0, 2, 3)) + middle
        expected = torch.arange(heads, device=read.device) // (heads // kv_heads)
        require(
            bool(((read - expected).abs() < 0.4).all()),
            f"{numbered}: query heads read the KV heads {[round(float(x), 2) for x in read]}; "
            f"they must read {expected.tolist()}",
        )
        require_close(subject, problem, subject.run(problem))


@check
def causal_is_top_left(subject: Subject) -> str:
    """Query i sees keys 0..i and no other, also where q_len and kv_len differ, and past several tiles."""
    if not subject.capabilities.causal:
        raise NotApplicable("declares no causal calls")
    shapes: list[dict[str, Any]] = [{"length": 96}, {"length": 129}]
    # Several tiles, whatever their size, and the tail of one.
    for length, heads in ((515, 4), (1100, 2)):
        sizes = {"batch": 1, "num_heads": heads, "num_kv_heads": heads // 2 if subject.capabilities.gqa else heads}
        shapes += [{"length": n, **sizes} for n in dict.fromkeys((length, subject.fitting(length)))]
    if subject.capabilities.causal_rectangular:
        shapes += [{"q_len": q_len, "kv_len": kv_len} for q_len, kv_len in ((48, 96), (96, 48), (1, 65), (65, 1))]
    problems = [
        (kind, subject.problem(kind, **shape, causal=True))
        for shape in shapes
        for kind in ("last_key", "past_the_last_key", "normal")
    ]
    taken = subject.accepted(problem for _, problem in problems)
    for kind, problem in problems:
        if problem in taken:
            require_close(subject, problem, subject.run(problem), kind)
            _require_counts(subject, problem)
    return f"{len(taken)} calls"


def _require_counts(subject: Subject, problem: Problem) -> None:
    """With a q of zeros, row i is the mean of the values that it sees: v counts the keys."""
    kv_len = problem.key.shape[2]
    visible_from = (torch.arange(kv_len, device=problem.value.device) >= kv_len // 2)[None, None, :, None]
    counting = problem.changed(
        query=torch.zeros_like(problem.query),
        value=visible_from.to(problem.value.dtype).expand_as(problem.value).contiguous(),
        label="uniform weights over the visible keys",
    )
    exact, _ = counting.exact()
    off = (subject.run(counting).double() - exact).abs()
    # A key too many or too few moves row i by at least exact * (1 - exact) / i, and e4m3's v of ones is exact.
    limit = 0.03
    require(
        float(off.max()) <= limit,
        f"{counting}: row {int(off.amax((0, 1, 3)).argmax())} is off by {float(off.max()):.3f} (limit {limit}): "
        "it does not see exactly the keys 0..i",
    )


@check
def scale_is_applied(subject: Subject) -> str:
    """``scale`` is the factor on q.k: given, small, 0 (uniform weights), negative, and large; with hidden keys too.

    Some of PyTorch's own kernels hide keys in front of the scale, and show them where it is 0 or negative.
    """
    problems = [subject.problem(scale=scale) for scale in (0.02, 0.5, 0.0, -0.1)]
    taken = subject.accepted(problems)
    # What hides keys by a large negative number in front of the scale shows them where that is 0, or turns the number.
    hidden = [problem for scale in (0.5, 0.0, -0.1) for problem in _with_hidden_keys(subject, scale)]
    hidden = [problem for problem in hidden if not subject.refusal(problem)]
    for problem in taken + hidden:
        require_close(subject, problem, subject.run(problem), "sharp")
        if problem.scale not in (0.0, problem.query.shape[-1] ** -0.5):
            # In a different way than another scale would.
            exact, _ = problem.exact()
            default, _ = problem.changed(scale=None).exact()
            out = subject.run(problem).double()
            require(
                (out - exact).square().sum() < (out - default).square().sum(),
                f"{problem}: the output is nearer to that of the default scale",
            )
    return f"scales {', '.join(f'{problem.scale:g}' for problem in taken)}; {len(hidden)} calls with hidden keys"


def _with_hidden_keys(subject: Subject, scale: float) -> Iterator[Problem]:
    if subject.capabilities.causal:
        yield subject.problem(scale=scale, causal=True)
    yield from subject.masked(only=ONE_OF_EACH_KIND, scale=scale, q_len=48, kv_len=80)


@check
def head_dim_v_may_differ(subject: Subject) -> None:
    """A head_dim of v that is smaller or larger than that of q and k."""
    if not subject.capabilities.head_dim_v_differs:
        raise NotApplicable("declares head_dim_v equal to head_dim")
    dim = subject.head_dim
    for problem in subject.accepted(subject.problem(head_dim_v=d) for d in (max(dim // 2, 1), dim + 8, 3 * dim)):
        require_close(subject, problem, subject.run(problem))


@check
def lse_is_natural(subject: Subject) -> str:
    """The log-sum-exp: natural logarithm, float32 [B, H, q_len], of scaled logits, beside an unchanged output."""
    worst = 0.0
    for kind, problem in _with_lse(subject):
        out, lse = subject.run_with_lse(problem)
        worst = max(worst, require_lse(subject, problem, out, lse, lse_limit(subject, kind)))
        bias = float((lse.double() - problem.exact()[1]).mean())
        require(abs(bias) <= LSE_BIAS, f"{problem}: lse is off by {bias:+.3g} on the average (limit {LSE_BIAS:g})")
        require_close(subject, problem, out, kind)
    return f"at most {worst:.3g} off"


def _with_lse(subject: Subject) -> Iterator[tuple[str, Problem]]:
    if not subject.capabilities.lse:
        raise NotApplicable("declares no lse")
    # The constant of "biased" is invisible in the output and must come back in lse.
    for causal in subject.causal_kinds:
        for kind in ("normal", "biased", "sharp"):
            problems = [subject.problem(kind, causal=causal), subject.problem(kind, causal=causal, scale=0.05)]
            yield from ((kind, problem) for problem in subject.accepted(problems, return_lse=True))


@check
def lse_of_exact_logits(subject: Subject) -> str:
    """With logits of zero, the log-sum-exp is the logarithm of the number of visible keys, to 1e-3."""
    if not subject.capabilities.lse:
        raise NotApplicable("declares no lse")
    worst = 0.0
    for causal in subject.causal_kinds:
        problems = [level(subject.problem("biased", length=length, causal=causal)) for length in (1, 64, 65, 127)]
        for problem in subject.accepted(problems, return_lse=True):
            worst = max(worst, require_lse(subject, problem, *subject.run_with_lse(problem), LSE_OF_COUNTS))
    return f"at most {worst:.1e} off"
