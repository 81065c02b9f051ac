"""What is remembered of a call is never used for another one, and what it leaves out is looked at each time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as with_settings
from hypothesis import strategies as st

import lpattn
from lpattn import HadamardMode, Reason, plan
from lpattn.calls import needs_grad
from lpattn.execute import in_bshd_memory
from lpattn.settings import OnUnsupported, Settings
from lpattn.types import Provenance, Rope

LAYOUTS = ("bhsd", "bshd", "every other", "expanded")
MASKS = (None, "dense", "padding", "expanded", "additive", "additive with grad", "three dimensions")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other":
        return torch.stack((x, x), dim=4).flatten(3)[..., ::2]
    return x[:, :1].expand_as(x) if layout == "expanded" else x


def mask_of(kind: str, batch: int, q_len: int, kv_len: int) -> torch.Tensor:
    dense = torch.ones(batch, 1, q_len, kv_len, dtype=torch.bool)
    if kind == "padding":
        return dense[:, :, :1]
    if kind == "expanded":
        return dense[:, :, :1].expand_as(dense)
    if kind == "three dimensions":
        return dense[0]
    return dense.float().requires_grad_(kind == "additive with grad") if kind.startswith("additive") else dense


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, and all around it that its meaning depends on."""

    batch: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    dim_v: int
    dtype: torch.dtype
    of_q: str
    of_k: str
    of_v: str
    mask: str | None
    dropout: float
    causal: bool
    scale: float | None
    lse: bool
    rope: Rope | None
    requires_grad: bool
    grad: bool
    autocast: torch.dtype | None
    backend: str | None
    hadamard: HadamardMode
    on_unsupported: OnUnsupported | None
    variable: str | None
    check: bool

    def planned(self) -> Any:
        """What is planned, in terms that can be compared, or the error."""
        kind = {"dtype": self.dtype}
        q = laid_out(torch.zeros(self.batch, 2, self.q_len, self.dim, **kind), self.of_q)
        k = laid_out(torch.zeros(self.batch, self.kv_heads, self.kv_len, self.dim, **kind), self.of_k)
        v = laid_out(torch.zeros(self.batch, self.kv_heads, self.kv_len, self.dim_v, **kind), self.of_v)
        k.requires_grad_(self.requires_grad)
        mask = None if self.mask is None else mask_of(self.mask, self.batch, self.q_len, self.kv_len)
        provenance = Provenance.AUTOMATIC if self.backend is None else Provenance.ARGUMENT
        wanted = Settings(self.backend, self.hadamard, self.on_unsupported, provenance)
        environment = {} if self.variable is None else {"LPATTN_BACKEND": self.variable}
        autocast = contextlib.nullcontext() if self.autocast is None else torch.autocast("cpu", dtype=self.autocast)
        with mock.patch.dict(os.environ, environment), torch.set_grad_enabled(self.grad), autocast:
            gradient = needs_grad(q, k, v, mask)
            options = (mask, self.dropout, self.causal, self.scale, wanted, self.lse, gradient, self.rope)
            try:
                found = plan.make_plan(q, k, v, *options, check=self.check)
            except lpattn.LpattnError as error:
                return type(error), str(error)
        choice = found.choice
        codes = {name: [reason.code for reason in reasons] for name, reasons in choice.reasons.items()}
        said = (choice.backend, choice.provenance, codes, choice.exact_reason and choice.exact_reason.code)
        return found.call, said, found.backend.name, found.autocast, found.quiet, found.shape, found.strides


cases = st.builds(
    Case,
    batch=st.sampled_from([1, 2]),
    kv_heads=st.sampled_from([1, 2]),
    q_len=st.sampled_from([0, 1, 5, 6]),
    kv_len=st.sampled_from([1, 5, 6]),
    dim=st.sampled_from([8, 16]),
    dim_v=st.sampled_from([8, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    of_q=st.sampled_from(LAYOUTS),
    of_k=st.sampled_from(LAYOUTS),
    of_v=st.sampled_from(LAYOUTS),
    mask=st.sampled_from(MASKS),
    dropout=st.sampled_from([0.0, 0.0, 0.5, 2.0]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.0, 0.5]),
    lse=st.booleans(),
    rope=st.sampled_from([None, None, Rope(False, 8), Rope(True, 8)]),
    requires_grad=st.booleans(),
    grad=st.booleans(),
    autocast=st.sampled_from([None, None, torch.bfloat16, torch.float16]),
    backend=st.sampled_from([None, None, "narrow", "wide", "bf16_reference"]),
    hadamard=st.sampled_from([HadamardMode.NONE, HadamardMode.QKV]),
    on_unsupported=st.sampled_from([None, *OnUnsupported]),
    variable=st.sampled_from([None, None, None, "narrow", "bf16_reference"]),
    check=st.booleans(),
)


@st.composite
def alike(draw: st.DrawFn) -> list[Case]:
    """Cases each of which differs from the one before in a single thing."""
    found = [draw(cases)]
    names = [field.name for field in dataclasses.fields(Case)]
    for _ in range(draw(st.integers(3, 10))):
        name = draw(st.sampled_from(names))
        found.append(dataclasses.replace(found[-1], **{name: getattr(draw(cases), name)}))
    return found


@given(alike())
@with_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_remembered_plan_equals_a_fresh_one(make_backend, drawn):
    made = [
        make_backend("narrow", rank=3.0, masks=frozenset({lpattn.MaskKind.NONE}), head_dims=frozenset({8}), lse=False),
        make_backend(
            "wide",
            rank=2.0,
            strided_last_dim=False,
            dropout=False,
            supports=lambda call: [Reason("sink", "scale 0")] if call.softmax_scale == 0.0 else [],
        ),
    ]
    for backend in made:
        lpattn.register_backend(backend)
    try:
        plan._plans.clear()
        remembered = [case.planned() for case in drawn]
        fresh = []
        for case in drawn:
            plan._plans.clear()
            fresh.append(case.planned())
        assert remembered == fresh
    finally:
        for backend in made:
            lpattn.unregister_backend(backend.name)


def test_a_call_seen_before_is_not_planned_again(add_backend, qkv, monkeypatch):
    add_backend()
    q, k, v = qkv()
    lpattn.low_precision_sdpa(q, k, v, backend="fake")
    monkeypatch.setattr(plan, "_plan_anew", None)
    lpattn.low_precision_sdpa(q, k, v, backend="fake")


# The output's memory


@pytest.mark.parametrize(("heads", "length"), [(1, 6), (4, 1), (1, 1)])
def test_where_only_a_stride_of_size_1_differs_nothing_is_copied(heads, length):
    out = torch.randn(2, heads, length, 8)
    strided = in_bshd_memory(out)
    assert strided.data_ptr() == out.data_ptr()
    assert strided.stride() == (length * heads * 8, 8, heads * 8, 1)
    assert torch.equal(strided, out)


@pytest.mark.parametrize("layout", ["bhsd", "every other"])
@pytest.mark.parametrize(("heads", "length"), [(4, 6), (1, 6), (4, 1)])
def test_other_memory_is_copied(heads, length, layout):
    out = laid_out(torch.randn(2, heads, length, 8), layout)
    strided = in_bshd_memory(out)
    assert strided.stride() == (length * heads * 8, 8, heads * 8, 1)
    assert torch.equal(strided, out)


def test_a_view_keeps_its_place():
    out = torch.randn(3, 4, 1, 8)[1:]
    assert torch.equal(in_bshd_memory(out), out)
