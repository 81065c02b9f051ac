"""attn_mask: every declared kind and every broadcast, rows without keys, and keys that nobody sees."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lpattn.testing.budget import require_close
from lpattn.testing.inputs import Problem
from lpattn.testing.outcome import NotApplicable, check, require
from lpattn.testing.subject import Subject
from lpattn.types import MaskKind


def _masked(subject: Subject, kind: str = "normal") -> Iterator[Problem]:
    chosen = subject.sizes(q_len=48, kv_len=80)
    for text, mask in subject.masks(chosen):
        problem = subject.problem(kind, attn_mask=mask, q_len=48, kv_len=80)
        cast = problem.attn_mask if mask.dtype == torch.bool else mask.to(problem.query)
        yield problem.changed(attn_mask=cast, label=f"{problem.label}, {text}")


def _applies(subject: Subject) -> None:
    if subject.capabilities.masks == {MaskKind.NONE} and not subject.capabilities.key_padding:
        raise NotApplicable("declares no masks")


@check
def masks_are_honoured(subject: Subject) -> str:
    """Every declared kind of mask, broadcast over batch, heads and queries, also expanded and strided."""
    _applies(subject)
    seen = 0
    for kind in ("normal", "last_key"):
        for problem in subject.accepted(_masked(subject, kind)):
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
    return f"{seen} masks"


@check
def rows_without_keys(subject: Subject) -> str:
    """A row that attends to nothing is 0, its lse is -inf, and its neighbours do not notice."""
    _applies(subject)
    problems = []
    for problem in _masked(subject):
        mask = problem.attn_mask
        assert mask is not None
        if mask.dim() == 4 and mask.shape[0] == 2 and mask.dtype == torch.bool:
            mask = mask.clone()
            mask[1] = False  # a batch entry of padding alone
            if mask.shape[2] > 1:
                mask[0, :, 5] = False
            problems.append(problem.changed(attn_mask=mask, label=f"{problem.label}, rows without keys"))
        elif bool(torch.isinf(mask).any()):
            mask = mask.clone()
            mask[0, :, 5] = -torch.inf
            problems.append(problem.changed(attn_mask=mask, label=f"{problem.label}, row of -inf"))
    with_lse = subject.capabilities.lse
    taken = subject.accepted(problems, return_lse=with_lse)
    for problem in taken:
        out, lse = subject.run_with_lse(problem) if with_lse else (subject.run(problem), None)
        _, exact_lse = problem.exact()
        nothing = exact_lse == -torch.inf
        require(bool((out[nothing] == 0).all()), f"{problem}: rows that attend to nothing must be 0")
        require_close(subject, problem, out)
        if lse is not None:
            require(bool((lse[nothing] == -torch.inf).all()), f"{problem}: lse of rows without keys must be -inf")
            require(bool(lse[~nothing].isfinite().all()), f"{problem}: lse of rows with keys must be finite")
    return f"{len(taken)} masks"


@check
def hidden_keys_have_no_influence(subject: Subject) -> str:
    """Keys that no row sees enter no scale and no mean: huge values there leave the output as it is."""
    _applies(subject)
    problems = []
    for problem in _masked(subject):
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
