"""Which of the Triton kernels runs a call, what is refused, and what nobody measured is not promised."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lpattn.backends.triton import Int8TritonBackend, TritonBackend, kernels
from lpattn.backends.triton.kernels import HopperKernel, PortableKernel, detours, kernel_for
from lpattn.dispatch import explain_call
from lpattn.registry import registry
from lpattn.settings import Settings
from lpattn.types import AttentionCall, CausalKind, HadamardMode, MaskKind, Reason, Varlen


def call(capability=(9, 0), **changes) -> AttentionCall:
    plain = AttentionCall(1, 32, 32, 16384, 16384, 128, 128, torch.bfloat16, "cuda", capability=capability)
    return dataclasses.replace(plain, softmax_scale=128**-0.5, **changes)


DENSE = {"mask": MaskKind.BOOL, "mask_shape": (1, 1, 16384, 16384)}
PADDING = {"mask": MaskKind.BOOL, "mask_shape": (1, 1, 1, 16384)}


def dense(q_len: int, kv_len: int) -> dict[str, object]:
    return {**DENSE, "q_len": q_len, "kv_len": kv_len, "mask_shape": (1, 1, q_len, kv_len)}


@pytest.fixture
def gluon(monkeypatch):
    """Has a Triton with Gluon for Hopper, or none, whatever is installed."""

    def set_to(there: bool) -> None:
        found = [] if there else [Reason("gluon", "none")]
        monkeypatch.setattr(kernels.hopper, "reasons_against_triton", lambda: found)
        kernel_for.cache_clear()

    set_to(True)
    yield set_to
    kernel_for.cache_clear()


@pytest.mark.parametrize(
    ("changes", "hopper"),
    [
        ({}, True),
        ({"causal": CausalKind.TOP_LEFT}, True),
        (PADDING, True),
        (DENSE, True),
        (dense(2**18, 2**18), True),
        (dense(2**18, 2**18 + 1), False),
        # Words of a query fill a tile of 128 keys.
        ({**dense(2**28, 129), "num_heads": 1, "num_kv_heads": 1}, True),
        ({**dense(2**28 + 1, 129), "num_heads": 1, "num_kv_heads": 1}, False),
        # One row for all queries.
        ({**dense(2**20, 2**20), "mask_shape": (1, 32, 1, 2**20)}, True),
        ({**PADDING, "q_len": 2**18, "kv_len": 2**18, "num_heads": 1, "num_kv_heads": 1}, True),
        ({"mask": MaskKind.ADDITIVE, "mask_shape": (1, 1, 1, 16384)}, False),
        ({"head_dim": 60, "head_dim_v": 60}, False),
        ({"head_dim_v": 64}, False),
        ({"hadamard": HadamardMode.QKV}, True),
        ({"hadamard": HadamardMode.QKV, **DENSE}, True),
        ({"hadamard": HadamardMode.QKV, **PADDING}, True),
        ({"hadamard": HadamardMode.QKV, "head_dim": 80, "head_dim_v": 80}, True),
    ],
)
def test_the_hopper_kernel_runs_what_it_can(gluon, changes, hopper) -> None:
    assert isinstance(kernel_for(call(**changes), int8=False), HopperKernel) is hopper
    assert isinstance(kernel_for(call(**changes), int8=True), PortableKernel)
    assert (detours(call(**changes), int8=False) == []) is hopper
    assert detours(call(**changes), int8=True) == []
    assert detours(call((8, 9), **changes), int8=False) == []
    gluon(False)
    assert isinstance(kernel_for(call(**changes), int8=False), PortableKernel)
    assert detours(call(**changes), int8=False)[-1].code == "gluon"


@pytest.mark.parametrize(
    ("capability", "int8"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((10, 0), False), ((12, 0), False)]
)
def test_the_recipe_is_what_the_tensor_cores_have(gluon, capability, int8) -> None:
    found = kernel_for(call(capability), int8=False)
    assert isinstance(found, PortableKernel)
    assert found._int8 is int8
    assert kernel_for(call(capability), int8=True)._int8


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, []),
        (DENSE, []),
        ({"mask": MaskKind.ADDITIVE, "mask_shape": (1, 32, 1, 16384), "head_dim_v": 16}, []),
        ({"causal": CausalKind.TOP_LEFT, "q_len": 7}, []),
        ({"varlen": Varlen((-1, 0))}, []),
        ({"head_dim": 257, "head_dim_v": 320}, ["head_dim", "head_dim_v"]),
        ({"dropout": True, "requires_grad": True}, ["requires_grad", "dropout"]),
        ({"dtype": torch.float64}, ["dtype"]),
        ({"kv_len": 0}, ["empty"]),
        ({"softmax_scale": math.inf}, ["scale"]),
        ({"softmax_scale": math.nan}, ["scale"]),
        ({"softmax_scale": 3e38}, ["scale"]),
        ({"capability": (7, 5)}, ["architecture"]),
    ],
)
@pytest.mark.parametrize("backend", [TritonBackend(), Int8TritonBackend()], ids=lambda b: b.name)
def test_reasons(backend, changes, codes) -> None:
    assert [reason.code for reason in backend.supports(dataclasses.replace(call(), **changes))] == codes


def test_a_head_dim_that_is_too_large_is_named_with_the_limit() -> None:
    (reason, _) = TritonBackend().supports(call(head_dim=512, head_dim_v=512))
    assert reason.message == "head_dim 512: has kernels for 256 at most"


def test_what_nobody_measured_is_not_promised(gluon, monkeypatch) -> None:
    monkeypatch.setattr("lpattn.backends.triton.measured_speedup", lambda name, call: 1.5)
    backend = TritonBackend()
    assert backend.rank(call()) == backend.rank(call(**PADDING)) == 1.5
    assert backend.rank(call(**DENSE)) == 1.5
    assert backend.rank(call(varlen=Varlen())) == 0.0
    additive = {"mask": MaskKind.ADDITIVE, "mask_shape": (1, 1, 16384, 16384)}
    assert backend.rank(call(**additive)) == 1.5
    assert backend.rank(call(head_dim_v=64)) == backend.rank(call(head_dim_v=64, **additive)) == 0.0
    # Elsewhere, it is the portable kernel that is measured.
    assert backend.rank(call((8, 9))) == 1.5
    assert Int8TritonBackend().rank(call()) == 1.5


def test_the_remedy_of_an_additive_mask_is_seen_where_lpattn_chooses(gluon, monkeypatch) -> None:
    monkeypatch.setattr(registry, "probe", lambda name, device: () if name == "fp8_triton" else (Reason("absent", ""),))
    additive = call(mask=MaskKind.ADDITIVE, mask_shape=(1, 1, 1, 16384), head_dim=96, head_dim_v=96)
    reason = explain_call(additive, Settings()).reasons["fp8_triton"][0]
    assert reason.code == "not_measured"
    assert "additive attn_mask: the Hopper kernel takes bool masks" in reason.message
    assert "if it only hides keys, pass it as bool" in reason.remedy
