"""Fused rotation, Hadamard modes, dropout and gradients, where they are declared."""

from __future__ import annotations

from typing import Any

import torch

import lpattn
from lpattn.norm import normalize_both
from lpattn.rope import rotate_heads_first
from lpattn.testing.budget import LSE_TOLERANCE, floor_for, require_close
from lpattn.testing.exact import sqnr
from lpattn.testing.inputs import Problem
from lpattn.testing.outcome import CheckFailed, NotApplicable, check, require
from lpattn.testing.subject import Subject
from lpattn.types import HadamardMode, Norm


@check
def fused_rotation(subject: Subject) -> str:
    """rope_attention: half-split and interleaved, all lanes and some, tables per batch entry, own tables for keys."""
    if not subject.capabilities.rope:
        raise NotApplicable("declares no fused rotation")
    (plain,) = subject.accepted([subject.problem(length=subject.fitting(60), head_dim=_even_head_dim(subject))])
    generator = torch.Generator().manual_seed(2)
    dim, seen = plain.query.shape[3], 0
    for interleaved in (False, True):
        # A rotation turns pairs of lanes.
        for rotary_dim in dict.fromkeys((dim, max(dim // 4 * 2, 2))):
            for own_tables in (False, True):
                for causal in subject.causal_kinds:
                    # Neither equal halves nor cos^2 + sin^2 = 1: what a kernel assumes of them shows.
                    names = ("cos", "sin", "cos_k", "sin_k") if own_tables else ("cos", "sin")
                    tables = {
                        n: torch.randn(2, plain.query.shape[2], 1, rotary_dim, generator=generator) for n in names
                    }
                    tables = {name: t.to(plain.query) for name, t in tables.items()}
                    problem = plain.changed(is_causal=causal)
                    _require_rotation(subject, problem, tables, interleaved)
                    seen += 1
    return f"{seen} rotations"


@check
def fused_norm(subject: Subject) -> str:
    """rope_attention with a norm: of q and k or of one of them, with weights and without, each with its own eps.

    Where that is declared, also with one over all heads of a token, whose reciprocals are given.
    """
    if not (subject.capabilities.rope and subject.capabilities.norm):
        raise NotApplicable("declares no fused norm")
    (plain,) = subject.accepted([subject.problem(length=subject.fitting(60), head_dim=_even_head_dim(subject))])
    generator = torch.Generator().manual_seed(3)
    length, dim = plain.query.shape[2:]
    tables = {name: torch.randn(1, length, 1, dim, generator=generator).to(plain.query) for name in ("cos", "sin")}
    # Tokens of different sizes: a norm of anything but each of them shows.
    size = torch.logspace(-0.3, 0.3, length, device=plain.query.device)[:, None]
    plain = plain.changed(query=(plain.query * size).to(plain.query), key=(plain.key / size).to(plain.key))
    of_q, of_k = ((1 + torch.randn(dim, generator=generator) / 2).to(plain.query) for _ in range(2))
    norms = [Norm(1e-6, 0.5, of_q, of_k), Norm(0.5, None, of_q), Norm(None, 1e-6, None, of_k), Norm(0.5, 1e-6)]
    if subject.capabilities.norm_over_heads:
        both = (plain.query, plain.key)
        rstd = [x.float().square().mean((1, 3)).rsqrt() for x in both]
        of_heads = [(1 + torch.randn(x.shape[1], dim, generator=generator) / 2).to(x) for x in both]
        norms += [Norm(None, None, *of_heads, *rstd), Norm(rstd_q=rstd[0], rstd_k=rstd[1])]
    for interleaved in (False, True):
        for norm in norms:
            _require_rotation(subject, plain, tables, interleaved, norm)
    return f"{2 * len(norms)} norms"


def _even_head_dim(subject: Subject) -> int:
    dims = [dim for dim in (subject.head_dim, *subject.head_dims) if dim % 2 == 0]
    if not dims:
        raise NotApplicable(f"declares odd head_dims alone, {subject.head_dims}, and a rotation turns pairs of lanes")
    return dims[0]


def _require_rotation(
    subject: Subject,
    problem: Problem,
    tables: dict[str, torch.Tensor],
    interleaved: bool,
    norm: Norm | None = None,
) -> None:
    q, k, v = (x.transpose(1, 2) for x in (problem.query, problem.key, problem.value))
    label = f"{'interleaved' if interleaved else 'half-split'} rotation of {tables['cos'].shape[-1]} lanes"
    label += ", own tables for the keys" if "cos_k" in tables else ""
    if norm is not None:
        over = " over all heads" if norm.over_heads else ""
        label = f"norm {norm.said.removeprefix('fused').strip() or 'in q and k'}{over}, {label}"
    options: dict[str, Any] = {"is_causal": problem.is_causal, "interleaved": interleaved, "backend": subject.name}
    options.update(tables, norm=norm, enable_gqa=True, on_unsupported="raise")
    try:
        out = lpattn.low_precision_rope_sdpa(q, k, v, **options)
    except Exception as error:
        raise CheckFailed(f"{label}: raised {type(error).__name__}: {error}") from error
    # In float64 the reference rounds nothing that a fused rotation would not have to.
    turned = {name: t.double() for name, t in tables.items()}
    cos_k, sin_k = turned.get("cos_k"), turned.get("sin_k")
    q, k = normalize_both(q.double(), k.double(), norm)
    rotated = rotate_heads_first(q, k, turned["cos"], turned["sin"], cos_k, sin_k, interleaved)
    reference = problem.changed(query=rotated[0], key=rotated[1], value=problem.value.double(), label=label)
    require_close(subject, reference, out, "sharp")


@check
def hadamard(subject: Subject) -> str:
    """Every declared rotation changes the rounding and not the meaning; lse stays what it is."""
    modes = sorted(subject.capabilities.hadamard - {HadamardMode.NONE})
    if not modes:
        raise NotApplicable("declares no Hadamard mode")
    measured = {}
    dims = [dim for dim in subject.head_dims if dim >= 32][:2] or subject.head_dims[:1]
    for mode in modes:
        problems = [
            (kind, subject.problem(kind, hadamard=mode, causal=causal, head_dim=dim))
            for kind in ("normal", "outlier_channels", "biased", "last_key")
            for causal in subject.causal_kinds
            for dim in dims
        ]
        taken = subject.accepted(problem for _, problem in problems)
        for kind, problem in problems:
            if problem in taken:
                out = subject.run(problem)
                quality = require_close(subject, problem, out, kind)
                measured[f"{mode}, {kind.replace('_', ' ')}"] = quality
                if subject.capabilities.lse and kind == "biased":
                    _, lse = subject.run_with_lse(problem)
                    off = float((lse.double() - problem.exact()[1]).abs().max())
                    require(off <= LSE_TOLERANCE, f"{problem}: lse is off by {off:.3g} (limit {LSE_TOLERANCE:g})")
    return ", ".join(f"{name} {quality:.1f} dB" for name, quality in measured.items())


@check
def dropout(subject: Subject) -> None:
    """dropout_p: weights are dropped at random and the others grow, so that the mean stays; 0 drops nothing."""
    if not subject.capabilities.dropout:
        raise NotApplicable("declares no dropout")
    plain = subject.problem("soft", length=256)
    ones = plain.changed(value=torch.ones_like(plain.value), label="v of ones, dropout_p=0.5")
    for problem in subject.accepted([ones]):
        first, second = (subject.call(problem, dropout_p=0.5) for _ in range(2))
        require(not torch.equal(first, second), f"{problem}: two calls dropped the same weights")
        mean = float(first.double().mean())
        require(abs(mean - 1) < 0.1, f"{problem}: the mean is {mean:.3f}; dropout keeps it at 1")
        kept = subject.call(problem, dropout_p=0.0)
        require(sqnr(torch.ones_like(kept), kept) > 30, f"{problem}: dropout_p=0 dropped something")


@check
def gradients(subject: Subject) -> None:
    """Gradients of q, k and v are those of exact attention."""
    if not subject.capabilities.backward:
        raise NotApplicable("declares no backward pass")
    for plain in subject.accepted(
        subject.problem(length=subject.fitting(40), causal=causal) for causal in subject.causal_kinds
    ):
        names = ("query", "key", "value")
        leaves = {name: getattr(plain, name).clone().requires_grad_() for name in names}
        wide = {name: getattr(plain, name).double().requires_grad_() for name in names}
        out = subject.run(plain.changed(**leaves))
        weight = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
        (out * weight.to(out)).sum().backward()
        (plain.changed(**wide).exact()[0] * weight.double()).sum().backward()
        floor = floor_for(subject, "sharp", out.dtype) - 6
        for name in names:
            grad = leaves[name].grad
            require(grad is not None, f"{plain}: no gradient reached {name}")
            assert grad is not None
            quality = sqnr(wide[name].grad, grad)
            require(quality >= floor, f"{plain}: the gradient of {name} has {quality:.1f} dB; the floor is {floor:.1f}")
