"""What memory holds and how it is laid out must not matter: strides, neighbours, scratch, earlier calls, threads."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lpattn.testing.budget import require_close, require_same_quality
from lpattn.testing.exact import sqnr
from lpattn.testing.inputs import LAYOUTS, Problem
from lpattn.testing.outcome import check, require
from lpattn.testing.subject import Subject

SAME = 45.0
"""dB at which two results count as the same: sums in another order move a few values to the next of their format."""


def _same(subject: Subject, label: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    quality = sqnr(expected, found)
    require(quality >= SAME, f"{label}: the output differs from that of plain tensors ({quality:.1f} dB)")


def _kinds(subject: Subject) -> list[Problem]:
    return subject.accepted(
        subject.problem(length=subject.fitting(100), causal=causal) for causal in subject.causal_kinds
    )


@check
def outputs(subject: Subject) -> None:
    """Shape, dtype and memory of the output and of lse are those of the contract; the output shares no memory."""
    for dtype in subject.dtypes:
        (problem,) = subject.accepted([subject.problem(dtype=dtype, length=subject.fitting(50))])
        _require_contract(subject, problem)
        # The output is v itself, which must not be what the caller gets: as many heads, so that nothing is repeated.
        single = subject.problem(dtype=dtype, length=1, groups=1)
        if not subject.refusal(single):
            require_close(subject, single, _require_contract(subject, single), "sharp")


def _require_contract(subject: Subject, problem: Problem) -> torch.Tensor:
    """Hold the output of a call to the contract; returns a copy of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a call that runs says nothing
        out = subject.run(problem)
    shape = (*problem.query.shape[:3], problem.value.shape[3])
    require(out.shape == shape, f"{problem}: the output is {list(out.shape)}, and must be {list(shape)}")
    require(out.dtype == problem.query.dtype, f"{problem}: the output is {out.dtype}")
    require(out.device == problem.query.device, f"{problem}: the output is on {out.device}")
    require(not out.requires_grad, f"{problem}: the output requires grad")
    # As the backend returns it: the public functions copy what is not in their layout.
    inputs = {"q": problem.query, "k": problem.key, "v": problem.value}
    before = [x.untyped_storage().data_ptr() for x in inputs.values()]
    require(out.untyped_storage().data_ptr() not in before, f"{problem}: the output shares memory with an input")
    require(out.transpose(1, 2).is_contiguous(), f"{problem}: the output is not in [B, S, H, D] memory")
    found, held = out.clone(), {name: x.clone() for name, x in inputs.items()}
    out.fill_(7.0)
    for name, x in inputs.items():
        require(torch.equal(x, held[name]), f"{problem}: writing to the output changes {name}")
    if subject.capabilities.lse and not subject.refusal(problem, return_lse=True):
        beside, lse = subject.run_with_lse(problem)
        require(lse.shape == shape[:3] and lse.dtype == torch.float32, f"{problem}: lse {lse.shape} {lse.dtype}")
        # A backend may take another way where it has to return the log-sum-exp too.
        if sqnr(found, beside) < SAME:
            require(
                not subject.backend.exact, f"{problem}, with lse: the output differs ({sqnr(found, beside):.1f} dB)"
            )
            require_close(subject, problem, beside)
            require_same_quality(problem, found, beside, "with lse")
    return found


@check
def inputs_are_not_written_to(subject: Subject) -> None:
    """q, k, v and the mask hold after the call what they held before."""
    problems = _kinds(subject)
    for _, mask in subject.masks(subject.sizes(length=subject.fitting(100))):
        masked = subject.problem("biased", length=subject.fitting(100), attn_mask=mask)
        problems += [masked] if not subject.refusal(masked) else []
    for dtype in subject.dtypes:
        beside = subject.masked("biased", dtype=dtype, mask_dtype=torch.float32, only=("additive with -inf",))
        problems += [problem for problem in beside if not subject.refusal(problem)]
    for plain in _kinds(subject):
        # What is copied to be contiguous may be written to; what is not copied may not.
        problems += [problem for problem in map(plain.laid_out, LAYOUTS) if not subject.refusal(problem)]
    for problem in problems:
        named = {"query": problem.query, "key": problem.key, "value": problem.value, "attn_mask": problem.attn_mask}
        tensors = {name: x for name, x in named.items() if x is not None}
        before = {name: (x.clone(), x._version) for name, x in tensors.items()}
        subject.run(problem)
        for name, x in tensors.items():
            copy, version = before[name]
            require(torch.equal(x, copy), f"{problem}: the call changed {name}")
            require(x._version == version, f"{problem}: the call wrote to {name}")


@check
def layouts(subject: Subject) -> str:
    """Transposed, sliced, expanded, offset and strided q, k and v give what contiguous ones give."""
    seen = 0
    for plain in _kinds(subject):
        expected = subject.run(plain)
        for problem in map(plain.laid_out, LAYOUTS):
            if subject.refusal(problem):
                require(
                    not subject.capabilities.strided_last_dim or problem.query.stride(3) == 1,
                    f"{problem}: refused, though strided_last_dim is declared: {subject.refusal(problem)[0]}",
                )
                continue
            _same(subject, str(problem), expected, subject.run(problem))
            seen += 1
        if not bool(plain.key.shape[1] == 1):
            one = plain.changed(key=plain.key[:, :1].expand_as(plain.key), label="k of one expanded head")
            copied = one.changed(key=one.key.contiguous())
            _same(subject, str(one), subject.run(copied), subject.run(one))
    return f"{seen} layouts"


@check
def memory_past_the_end(subject: Subject) -> None:
    """NaN behind the last token, lane and head is not read."""
    for plain in _kinds(subject):
        expected = subject.run(plain)
        q, k, v = (_surrounded(x) for x in (plain.query, plain.key, plain.value))
        problem = plain.changed(query=q, key=k, value=v, label="NaN around q, k and v")
        if subject.refusal(problem):
            continue
        _same(subject, str(problem), expected, subject.run(problem))


def _surrounded(x: torch.Tensor) -> torch.Tensor:
    batch, heads, length, dim = x.shape
    # Whole tiles of tokens: what a kernel reads beyond a length that does not fill its last tile.
    wide = x.new_full((batch, heads + 1, length + 160, dim + 16), torch.nan)
    wide[:, :heads, 16 : 16 + length, :dim] = x
    return wide[:, :heads, 16 : 16 + length, :dim]


_DETERMINISTIC: Any = torch.utils.deterministic  # its one attribute is a property that type checkers do not see


@contextmanager
def _poisoned_scratch(device: torch.device) -> Iterator[None]:
    """Memory from torch.empty holds NaN (and the largest integer) instead of zeros or what was there before."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _DETERMINISTIC.fill_uninitialized_memory,
    )
    if device.type == "cuda":
        # Also what kernels take past PyTorch: all cached blocks of the allocator hold NaN bytes.
        stale = [torch.full((2**size,), 0xFF, dtype=torch.uint8, device=device) for size in (20, 20, 22, 24, 26)]
        torch.cuda.synchronize(device)
        del stale
    torch.use_deterministic_algorithms(True, warn_only=True)
    _DETERMINISTIC.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _DETERMINISTIC.fill_uninitialized_memory = before[2]


@check
def scratch_memory(subject: Subject) -> None:
    """Nothing depends on what torch.empty returns: with NaN in it the output is the same."""
    problems = _kinds(subject) + subject.accepted(
        [subject.problem(length=subject.fitting(33)), subject.problem(q_len=130, kv_len=7)]
    )
    for problem in problems:
        expected = subject.run(problem)
        with _poisoned_scratch(problem.query.device):
            found = subject.run(problem)
        _same(subject, f"{problem}, NaN in scratch memory", expected, found)


@check
def repeated_calls(subject: Subject) -> None:
    """The same call gives the same bits, also after calls of the same and of other shapes with other values."""
    for problem in _kinds(subject):
        _require_kept(subject, problem)
        first = subject.run(problem)
        again = subject.run(problem)
        require(torch.equal(first, again), f"{problem}: two runs differ, by up to {_largest(first, again):.3g}")
        # What is cached per shape must not be what belongs to the values.
        other = subject.problem("outlier_channels", length=subject.fitting(100), causal=problem.is_causal, seed=5)
        subject.run(other)
        subject.run(subject.problem(length=subject.fitting(37), causal=problem.is_causal, seed=6))
        after = subject.run(problem)
        require(torch.equal(first, after), f"{problem}: another call in between changed the result")
        fresh = subject.run(other.changed(query=other.query.clone()))
        require(torch.equal(subject.run(other), fresh), f"{other}: equal inputs in other memory give another result")


def _require_kept(subject: Subject, problem: Problem) -> None:
    """Hold that a result stays what it is when the next call is made: no buffer of a backend is handed out twice."""
    other = problem.changed(query=problem.query.flip(2), value=-problem.value)
    for return_lse in (False, True):
        if return_lse and (not subject.capabilities.lse or subject.refusal(problem, return_lse=True)):
            continue
        found = subject.call(problem, return_lse=True) if return_lse else (subject.call(problem),)
        copies = [x.clone() for x in found]
        subject.call(other, return_lse=return_lse)
        for name, x, copy in zip(("output", "lse"), found, copies, strict=False):
            require(torch.equal(x, copy), f"{problem}: the next call changes the {name} of this one")


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


@check
def threads(subject: Subject) -> None:
    """Calls from several threads at once give what they give one after the other."""
    problems = subject.accepted(subject.problem(length=subject.fitting(90), seed=seed) for seed in range(4))
    expected = [subject.run(problem) for problem in problems]
    failures: list[str] = []
    barrier = threading.Barrier(len(problems))

    def work(index: int) -> None:
        try:
            barrier.wait()
            for _ in range(5):
                found = subject.run(problems[index])
                _same(subject, f"{problems[index]}, thread {index} of {len(problems)}", expected[index], found)
        except Exception as error:
            failures.append(str(error))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    require(not failures, "; ".join(failures[:1]))
