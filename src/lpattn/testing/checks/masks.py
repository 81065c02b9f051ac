"""attn_mask: every declared kind and every broadcast, rows without keys, and keys that nobody sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lpattn.testing.budget import RIGHT_ROW, as_wrong_as_pytorch, lse_limit, require_close, require_lse
from lpattn.testing.exact import worst_row_sqnr
from lpattn.testing.inputs import Problem, level
from lpattn.testing.outcome import NotApplicable, check, require
from lpattn.testing.subject import ONE_OF_EACH_KIND, Subject
from lpattn.types import MaskKind

_LENGTHS: dict[str, Any] = {"q_len": 48, "kv_len": 80}


def _applies(subject: Subject) -> None:
    if subject.capabilities.masks == {MaskKind.NONE} and not subject.capabilities.key_padding:
        raise NotApplicable("declares no masks")


@check
def masks_are_honoured(subject: Subject) -> str:
    """Every declared kind of mask, broadcast over batch, heads and queries, expanded, strided, in every dtype."""
    _applies(subject)
    seen = 0
    for kind in ("normal", "last_key"):
        for problem in subject.accepted(subject.masked(kind, **_LENGTHS)):
            mask = problem.attn_mask
            assert mask is not None
            require_close(subject, problem, subject.run(problem))
            full = mask.expand(*problem.query.shape[:3], problem.key.shape[2])
            variants = [problem.changed(attn_mask=full, label=f"{problem.label}, expanded")]
            wide = torch.stack((full, torch.zeros_like(full)), -1).flatten(-2)
            strided = problem.changed(attn_mask=wide[..., ::2], label=f"{problem.label}, strided")
            variants += [strided] if not subject.refusal(strided) else []
            for variant in variants:
                require_close(subject, variant, subject.run(variant))
            seen += 1
    for problem in _of_other_dtypes(subject):
        require_close(subject, problem, subject.run(problem))
        seen += 1
    return f"{seen} masks"


def _of_every_dtype(subject: Subject) -> Iterator[tuple[Problem, torch.dtype]]:
    """Inputs of every declared dtype, with additive masks of that dtype and in float32, whose dtype comes along."""
    for dtype in subject.dtypes:
        for mask_dtype in dict.fromkeys((dtype, torch.float32)):
            for problem in subject.masked(dtype=dtype, mask_dtype=mask_dtype, only=ONE_OF_EACH_KIND, **_LENGTHS):
                yield problem, mask_dtype


def _of_other_dtypes(subject: Subject) -> Iterator[Problem]:
    """Those of :func:`_of_every_dtype` that are not tried elsewhere, with bool masks once for a dtype."""
    for problem, mask_dtype in _of_every_dtype(subject):
        assert problem.attn_mask is not None
        dtype = problem.query.dtype
        repeated = problem.attn_mask.dtype == torch.bool and mask_dtype != dtype
        usual = dtype == mask_dtype == subject.dtype
        if repeated or usual or subject.refusal(problem):
            continue
        yield problem


@check
def rows_without_keys(subject: Subject) -> str:
    """A row that attends to nothing is 0, its lse is -inf; a row of large negative biases is no such row."""
    _applies(subject)
    problems = [*_with_empty_rows(subject), *_with_biased_rows(subject)]
    with_lse = subject.capabilities.lse
    taken = subject.accepted(problems, return_lse=with_lse)
    for problem in taken:
        out, lse = subject.run_with_lse(problem) if with_lse else (subject.run(problem), None)
        exact, exact_lse = problem.exact()
        nothing = exact_lse == -torch.inf
        require(bool((out[nothing] == 0).all()), f"{problem}: rows that attend to nothing must be 0")
        if _BIASED in problem.label:
            row = worst_row_sqnr(*(x[:, :, _ROW : _ROW + 1] for x in (exact, out)))
            require(
                row >= RIGHT_ROW or as_wrong_as_pytorch(problem, out),
                f"{problem}: the row has {row:.1f} dB, and needs {RIGHT_ROW:g}. A negative number is a bias, however "
                "large, and a row of it attends to all keys; only -inf hides a key",
            )
        require_close(subject, problem, out)
        if lse is not None:
            require_lse(subject, problem, out, lse, lse_limit(subject, "normal"))
    return f"{len(taken)} masks"


_ROW = 5
"""The row that is hidden."""

_BIASED = "a row of "


def _with_empty_rows(subject: Subject) -> Iterator[Problem]:
    for problem in subject.masked(**_LENGTHS):
        mask = problem.attn_mask
        assert mask is not None
        if mask.dim() == 4 and mask.shape[0] == 2 and mask.dtype == torch.bool:
            mask = mask.clone()
            mask[1] = False  # a batch entry of padding alone
            if mask.shape[2] > 1:
                mask[0, :, _ROW] = False
            yield problem.changed(attn_mask=mask, label=f"{problem.label}, rows without keys")
        elif bool(torch.isinf(mask).any()):
            mask = mask.clone()
            mask[0, :, _ROW] = -torch.inf
            yield problem.changed(attn_mask=mask, label=f"{problem.label}, row of -inf")


def _with_biased_rows(subject: Subject) -> Iterator[Problem]:
    """Masks as models build them, with a large negative number for what is hidden: the whole of a row, one of -inf."""
    for problem, mask_dtype in _of_every_dtype(subject):
        assert problem.attn_mask is not None
        if problem.attn_mask.dtype == torch.bool:
            continue
        lowest, hidden = torch.finfo(mask_dtype).min, problem.attn_mask == -torch.inf
        # Beside -10000 float32 has few bits for logits: they are 0 there.
        for text, number, of in (
            ("the lowest number", lowest, problem),
            ("half of the lowest", lowest / 2, problem),
            ("-10000", -1e4, level(problem)),
        ):
            mask = torch.zeros_like(problem.attn_mask).masked_fill(hidden, number)
            mask[:, :, _ROW] = number
            mask[:, :, _ROW + 1] = -torch.inf
            label = f"{_BIASED}{text} of {str(mask_dtype)[6:]}, one of -inf"
            yield of.changed(attn_mask=mask, label=label)


@check
def hidden_keys_have_no_influence(subject: Subject) -> str:
    """Keys that no row sees enter no scale and no mean: huge values there leave the output as it is."""
    _applies(subject)
    problems = []
    for problem in subject.masked(**_LENGTHS):
        mask = problem.attn_mask
        assert mask is not None
        if mask.dtype != torch.bool:
            continue
        full = mask.expand(*problem.query.shape[:3], problem.key.shape[2])
        hidden = ~full.any((1, 2))[:, None, :, None]  # [B, 1, kv_len, 1]
        if not bool(hidden.any()):
            continue
        key = torch.where(hidden, 900.0, problem.key)
        value = torch.where(hidden, -900.0, problem.value)
        problems.append((problem, problem.changed(key=key, value=value)))
    taken = subject.accepted(problem for problem, _ in problems)
    for plain, filled in problems:
        if plain not in taken:
            continue
        filled = filled.changed(label=f"{plain.label}, hidden keys of 900")
        require_close(subject, filled, subject.run(filled))
    return f"{len(taken)} masks"
