"""Registration, importing, probing and deciding: what a backend says, before any kernel runs."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lpattn.backend import PROTOCOL_VERSION
from lpattn.registry import registry, validate_backend
from lpattn.testing.grid import declared_calls, typical_call
from lpattn.testing.outcome import NotApplicable, check, require
from lpattn.testing.subject import Subject
from lpattn.types import HadamardMode, MaskKind, Reason

SLOWEST_DECISION = 1e-3
"""Seconds that supports() and rank() may take together, in the best of some runs."""

_LENGTHS_OF_ONE_CLASS = (1024, 1025, 1100, 1279)
"""Between two quarters of an octave: lpattn decides once for all of them."""


@check
def registration(subject: Subject) -> None:
    """The backend is registered under its name, and its data is of the types that the protocol names."""
    backend, capabilities = subject.backend, subject.capabilities
    source = registry.source(subject.name)
    require(source is not None, f"{subject.name} has no source")
    assert source is not None
    if source.kind != "built-in":
        validate_backend(backend, source)
    version = backend.protocol_version
    require(version == PROTOCOL_VERSION, f"protocol_version {version}; this lpattn speaks {PROTOCOL_VERSION}")
    require(isinstance(backend.version, str), f"version must be a string; got {backend.version!r}")
    for flag in ("automatic", "exact", "exact_lengths"):
        value = getattr(backend, flag)
        require(isinstance(value, bool), f"{flag} must be True or False; got {value!r}")
    floats = [d for d in capabilities.dtypes if isinstance(d, torch.dtype) and d.is_floating_point]
    require(floats and len(floats) == len(capabilities.dtypes), f"dtypes must be floating point: {capabilities.dtypes}")
    require(MaskKind.NONE in capabilities.masks, "masks must contain MaskKind.NONE: calls without a mask")
    require(HadamardMode.NONE in capabilities.hadamard, "hadamard must contain HadamardMode.NONE: no rotation")
    require(
        set(capabilities.masks) <= set(MaskKind) and set(capabilities.hadamard) <= set(HadamardMode),
        f"masks and hadamard must hold members of MaskKind and HadamardMode; got {capabilities.masks} and "
        f"{capabilities.hadamard}",
    )
    dims = capabilities.head_dims
    require(dims is None or (dims and all(isinstance(d, int) and d > 0 for d in dims)), f"head_dims: {dims}")
    if capabilities.architectures is not None:
        low, high = capabilities.architectures
        require(low <= high, f"architectures must be (lowest, highest); got {low} to {high}")


_IMPORT = """
import json, sys, time, traceback
import torch
touched = []
def trap(owner, name):
    real = getattr(owner, name, None)
    if real is None:
        return
    def traced(*args, **kwargs):
        touched.append("".join(traceback.format_stack(limit=6)[:-1]) + "    -> " + name)
        return real(*args, **kwargs)
    setattr(owner, name, traced)
for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "get_device_capability",
             "get_device_properties", "get_device_name", "synchronize"):
    trap(torch.cuda, name)
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    trap(torch._C, name)
import importlib, lpattn
start = time.perf_counter()
module = importlib.import_module(sys.argv[1])
backends = module.lpattn_backends() if hasattr(module, "lpattn_backends") else []
result = {"touched": touched, "seconds": time.perf_counter() - start, "names": [b.name for b in backends]}
print("\\n" + json.dumps(result))
"""


@check
def import_is_pure(subject: Subject) -> str:
    """Importing the module and asking its hook, in a new process, prints nothing and makes no call to CUDA."""
    module = type(subject.backend).__module__
    source = registry.source(subject.name)
    if source is not None and source.kind == "plugin":
        points = [p for p in importlib.metadata.entry_points(group="lpattn") if p.name == source.entry_point]
        module = points[0].module if points else module
    if module == "__main__" or importlib.util.find_spec(module) is None:
        raise NotApplicable(f"module {module} cannot be imported in a new process")
    # The path of this process, and none of its options that change how modules are imported.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _IMPORT, module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    require(done.returncode == 0, f"importing {module} failed:\n{done.stderr[-2000:]}")
    *printed, last = done.stdout.strip().splitlines()
    found = json.loads(last)
    require(
        not found["touched"],
        f"importing {module} calls CUDA, which belongs into probe():\n{''.join(found['touched'][:1])}",
    )
    require(not any(line.strip() for line in printed), f"importing {module} prints: {printed[:3]}")
    return f"{module} in {found['seconds']:.2f} s"


@check
def probe(subject: Subject) -> str:
    """The probe answers for every device, also for ones that this machine lacks: reasons, never an exception."""
    backend = subject.backend
    devices = [*subject.probed, torch.device("cpu"), torch.device("cuda:99"), torch.device("meta")]
    for device in dict.fromkeys(devices):
        answer = _settled(backend.probe, device, f"probe({device})")
        taken = subject.capabilities.device_types
        if taken is not None and device.type not in taken:
            require(answer, f"probe({device}) is empty, but device_types has only {', '.join(sorted(taken))}")
    runs_on = [str(d) for d, reasons in subject.probed.items() if not reasons]
    return f"runs on {', '.join(runs_on)}" if runs_on else "runs on no device of this machine"


@check
def decisions(subject: Subject) -> str:
    """supports(), rank() and detours() are functions of the call: the same answer twice, hashable, and fast."""
    backend = subject.backend
    for call in declared_calls(subject.capabilities):
        _settled(backend.supports, call, f"supports({call.describe()})")
        _settled(backend.detours, call, f"detours({call.describe()})")
        ranks = [backend.rank(call), backend.rank(dataclasses.replace(call))]
        require(
            all(isinstance(r, (int, float)) and math.isfinite(r) and r >= 0.0 for r in ranks) and ranks[0] == ranks[1],
            f"rank({call.describe()}) must be one finite number, 0 or more; got {ranks}",
        )
    call = typical_call(subject.capabilities)
    if not backend.exact_lengths:
        codes = {}
        for length in _LENGTHS_OF_ONE_CLASS:
            long = dataclasses.replace(call, q_len=length, kv_len=length)
            codes[length] = tuple(reason.code for reason in backend.supports(long))
        require(
            len(set(codes.values())) == 1,
            f"supports() depends on the exact length, {codes}: set exact_lengths = True, since decisions are "
            "remembered per class of lengths",
        )
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        backend.supports(call)
        backend.rank(call)
        backend.detours(call)
        best = min(best, time.perf_counter() - start)
    require(best < SLOWEST_DECISION, f"supports() and rank() take {best * 1e3:.2f} ms; the limit is 1 ms")
    return f"{best * 1e6:.0f} us"


def _settled(ask: Callable[[Any], Sequence[Reason]], about: Any, who: str) -> Sequence[Reason]:
    """What a backend answers: reasons and never an exception, hashable, and the same ones to an equal question."""
    answers = []
    for question in (about, copy.copy(about)):
        try:
            answers.append(ask(question))
        except Exception as error:
            require(False, f"{who} raised {type(error).__name__}: {error}; it must return a Reason")
    for answer in answers:
        _require_reasons(answer, who)
        hash(tuple(answer))
    require(answers[0] == answers[1], f"{who} gave two answers: {answers[0]} and {answers[1]}")
    return answers[0]


def _require_reasons(answer: object, who: str) -> None:
    require(
        isinstance(answer, (list, tuple)) and all(isinstance(reason, Reason) for reason in answer),
        f"{who} must return a list of lpattn.Reason; got {answer!r}",
    )
    assert isinstance(answer, (list, tuple))
    for reason in answer:
        require(
            reason.code and reason.code.isidentifier() and reason.code == reason.code.lower(),
            f"{who}: a reason's code must be a lower-case identifier; got {reason.code!r}",
        )
        require(
            reason.message.strip() and "\n" not in reason.message + reason.remedy,
            f"{who}: a reason's message must be one line that is not empty; got {reason.message!r}",
        )
