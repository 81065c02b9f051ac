"""The suites of the backends that lpattn ships: what each one's recipe is in plain PyTorch, and what it fails."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import torch

from lpattn.quantize import FA3_PER_HEAD, PER_BLOCK_F16, Recipe, emulated_attention
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
    """lpattn's own kernels: a scale per query token and per 128 keys, k and v smoothed as in :class:`FA3Tests`."""

    backend = AttentionBackend.FP8_TRITON.value

    def emulate(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """The recipe of the backend, on all tokens."""
        return _emulated(problem, PER_BLOCK_F16)


class FastTritonTests(BackendTests):
    """``fp8_triton`` with a coarser exponential: no recipe in plain PyTorch has it, so the floor is its budget."""

    backend = "fp8_triton_fast"


class Int8TritonTests(BackendTests):
    """q and k in INT8, v and P in float16: more bits, a higher floor."""

    backend = "int8_triton"
    floor_db = 30.0


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
