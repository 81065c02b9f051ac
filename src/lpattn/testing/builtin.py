"""The suites of the backends that lpattn ships: what each one's recipe is in plain PyTorch, and what it fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch

from lpattn.quantize import FA3_PER_HEAD, PER_BLOCK_F16, Exponential, Recipe, emulated_attention
from lpattn.testing.inputs import Problem
from lpattn.testing.suite import BackendTests
from lpattn.types import AttentionBackend


class ReferenceTests(BackendTests):
    """Exact attention: the budget is that of the dtype."""

    backend = AttentionBackend.BF16_REFERENCE.value


class FA3Tests(BackendTests):
    """FlashAttention-3 in FP8: a scale per head, k and v smoothed by constants from a sample of the tokens."""

    backend = AttentionBackend.FP8_FA3.value

    def emulate(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """The recipe of the backend, on all tokens."""
        return _emulated(problem, FA3_PER_HEAD)


class TritonTests(BackendTests):
    """lpattn's own kernels: a scale per query token and per 128 keys, k and v smoothed as in :class:`FA3Tests`.

    On sm_90, calls that the Hopper kernel runs have its exponential.
    """

    backend = AttentionBackend.FP8_TRITON.value
    exponential: ClassVar[Exponential] = Exponential.STEP

    def emulate(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """The recipe of the backend, on all tokens."""
        device = problem.query.device
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
            return _emulated(problem, PER_BLOCK_F16)
        return _emulated(problem, dataclasses.replace(PER_BLOCK_F16, exponential=self.exponential))


class FastTritonTests(TritonTests):
    """``fp8_triton`` with a coarser exponential."""

    backend = "fp8_triton_fast"
    exponential = Exponential.LINEAR


class Int8TritonTests(BackendTests):
    """q and k in INT8, v and P in float16: more bits, a higher floor."""

    backend = "int8_triton"
    floor_db = 30.0
    # The largest channel sets the steps of all: ten times as large, it takes 20 dB from the others.
    allowances: ClassVar[Mapping[str, float]] = {"outlier_channels": 20.0}


def _emulated(problem: Problem, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    return emulated_attention(
        problem.query.float(),
        problem.key.float(),
        problem.value.float(),
        recipe=dataclasses.replace(recipe, hadamard=problem.hadamard),
        attn_mask=problem.attn_mask,
        is_causal=problem.is_causal,
        softmax_scale=problem.scale,
        return_lse=True,
    )


SUITES = MappingProxyType(
    {suite.backend: suite for suite in (ReferenceTests, FA3Tests, TritonTests, FastTritonTests, Int8TritonTests)}
)
"""Suites by the name of the backend; every other backend is held to :class:`BackendTests` as it is."""
