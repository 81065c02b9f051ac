"""torch.compile, torch.library, streams and CUDA graphs."""

from __future__ import annotations

import warnings
from typing import Any

import torch

import lpattn
from lpattn import ops
from lpattn.settings import make_settings
from lpattn.testing.checks.memory import SAME
from lpattn.testing.exact import sqnr
from lpattn.testing.inputs import Problem
from lpattn.testing.outcome import CheckFailed, check, require
from lpattn.testing.subject import Subject
from lpattn.types import Provenance

_OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@check
def fakes(subject: Subject) -> None:
    """torch.library.opcheck: what lpattn's operators promise about shapes, strides and inputs holds with it."""
    dim = subject.head_dim
    dim_v = dim + 8 if subject.capabilities.head_dim_v_differs else dim
    problem = subject.problem(length=subject.fitting(40), head_dim_v=dim_v)
    (problem,) = subject.accepted([problem.changed(key=problem.key.transpose(0, 1).clone().transpose(0, 1))])
    settings = make_settings(subject.name, None, None, Provenance.ARGUMENT).text
    arguments = (problem.query, problem.key, problem.value, None, 0.0, False, None, None, settings)
    operators = [ops.sdpa] + ([ops.sdpa_lse] if subject.capabilities.lse else [])
    for operator in operators:
        try:
            torch.library.opcheck(operator, arguments, test_utils=_OPCHECKS)
        except Exception as error:
            raise CheckFailed(f"opcheck of {operator} on {problem}: {error}") from error


@check
def strict_compile(subject: Subject) -> None:
    """torch.compile(fullgraph=True) gives what eager mode gives, for a second length too."""
    compiler = "inductor" if subject.device.type == "cuda" else "aot_eager"

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return lpattn.low_precision_sdpa(query * 1.0, key, value, enable_gqa=True, backend=subject.name) * 2.0

    problems = subject.accepted(subject.problem(length=length) for length in (subject.fitting(48), subject.fitting(80)))
    torch.compiler.reset()
    try:
        compiled = torch.compile(attend, fullgraph=True, backend=compiler)
        for problem in problems:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler
                try:
                    found = compiled(problem.query, problem.key, problem.value)
                except Exception as error:
                    raise CheckFailed(f"{problem}: torch.compile raised {type(error).__name__}: {error}") from error
            quality = sqnr(subject.run(problem) * 2.0, found)
            require(quality >= SAME, f"{problem}: the compiled result differs from the eager one ({quality:.1f} dB)")
    finally:
        torch.compiler.reset()


@check
def other_streams(subject: Subject) -> None:
    """On a stream other than the default one, kernels run there: they wait for what was queued before."""
    device = subject.gpu
    (problem,) = subject.accepted([subject.problem(length=512)])
    expected = subject.run(problem)
    stream = torch.cuda.Stream(device)
    late = {name: torch.zeros_like(getattr(problem, name)) for name in ("query", "key", "value")}
    delayed = problem.changed(**late)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the inputs are filled long after the call was made
        for name, tensor in late.items():
            tensor.copy_(getattr(problem, name))
        found = subject.run(delayed)
    torch.cuda.synchronize(device)
    quality = sqnr(expected, found)
    require(quality >= SAME, f"{problem}: on another stream, the result differs ({quality:.1f} dB)")


@check
def cuda_graphs(subject: Subject) -> None:
    """A captured call replays on new values, far larger and far smaller ones, with what eager mode gives for them."""
    device = subject.gpu
    for problem in subject.accepted(subject.problem(length=256, causal=causal) for causal in subject.causal_kinds):
        replays = [problem, *_of_other_sizes(subject, problem), problem]
        expected = [subject.run(values) for values in replays]
        graph, found = _captured(subject, problem, device)
        for values, reference in zip(replays, expected, strict=True):
            for name in ("query", "key", "value"):
                getattr(graph[1], name).copy_(getattr(values, name))
            graph[0].replay()
            torch.cuda.synchronize(device)
            quality = sqnr(reference, found)
            require(quality >= SAME, f"{values}: the replayed graph gives another result ({quality:.1f} dB)")


def _of_other_sizes(subject: Subject, problem: Problem) -> list[Problem]:
    """Problems of the same shape: scales and amaxes that were taken at the capture clip some and flush others.

    Logits stay as they are: q grows where k shrinks.
    """
    length, causal, far = problem.query.shape[2], problem.is_causal, 64.0
    other, per_head = (
        subject.problem(kind, length=length, causal=causal, seed=3) for kind in ("normal", "heads_of_different_scale")
    )

    def sized(q: float, k: float, v: float, label: str) -> Problem:
        return other.changed(query=other.query * q, key=other.key * k, value=other.value * v, label=label)

    return [
        sized(1 / far, far, far, "k and v 64 times as large, q as small"),
        sized(far, 1 / far, 1 / far, "k and v 64 times as small, q as large"),
        per_head,
    ]


def _captured(
    subject: Subject, problem: Problem, device: torch.device
) -> tuple[tuple[torch.cuda.CUDAGraph, Problem], torch.Tensor]:
    copies = {name: getattr(problem, name).clone() for name in ("query", "key", "value")}
    static = problem.changed(**copies)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        for _ in range(3):
            subject.run(static)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = subject.run(static)
    except Exception as error:
        raise CheckFailed(f"{problem}: capturing a CUDA graph raised {type(error).__name__}: {error}") from error
    return (graph, static), out
