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
MASKS = (
    None,
    "dense",
    "padding",
    "expanded",
    "additive",
    "additive with grad",
    "wide",
    "wide with grad",
    "three dimensions",
)


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
    if kind.startswith("wide"):
        return torch.zeros(batch, 1, 1, kv_len).requires_grad_(kind == "wide with grad").expand(-1, -1, q_len, -1)
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
    other_dtype: str | None
    odd_batch: str | None
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

    def of(self, other: bool) -> torch.dtype:
        return torch.float16 if other else self.dtype

    def planned(self) -> Any:
        """What is planned, in terms that can be compared, or the error."""
        q, k, v = (
            laid_out(torch.zeros(self.batch + (name == self.odd_batch), heads, tokens, dim, dtype=dtype), layout)
            for name, heads, tokens, dim, dtype, layout in (
                ("q", 2, self.q_len, self.dim, self.of(self.other_dtype == "q"), self.of_q),
                ("k", self.kv_heads, self.kv_len, self.dim, self.of(self.other_dtype == "k"), self.of_k),
                ("v", self.kv_heads, self.kv_len, self.dim_v, self.of(self.other_dtype == "v"), self.of_v),
            )
        )
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


VALUES: dict[str, list[Any]] = {
    "batch": [1, 2],
    "kv_heads": [1, 2],
    "q_len": [0, 1, 5, 6],
    "kv_len": [1, 5, 6],
    "dim": [8, 16],
    "dim_v": [8, 16],
    "dtype": [torch.float32, torch.bfloat16, torch.float64],
    "other_dtype": [None, None, None, "q", "k", "v"],
    "odd_batch": [None, None, None, "q", "k", "v"],
    "of_q": [*LAYOUTS],
    "of_k": [*LAYOUTS],
    "of_v": [*LAYOUTS],
    "mask": [*MASKS],
    "dropout": [0.0, 0.0, 0.5, 2.0],
    "causal": [False, True],
    "scale": [None, 0.0, 0.5],
    "lse": [False, True],
    "rope": [None, None, Rope(False, 8), Rope(True, 8)],
    "requires_grad": [False, True],
    "grad": [False, True],
    "autocast": [None, None, torch.bfloat16, torch.float16],
    "backend": [None, None, "narrow", "wide", "bf16_reference"],
    "hadamard": [HadamardMode.NONE, HadamardMode.QKV],
    "on_unsupported": [None, *OnUnsupported],
    "variable": [None, None, None, "narrow", "bf16_reference"],
    "check": [False, True],
}
cases = st.builds(Case, **{name: st.sampled_from(values) for name, values in VALUES.items()})


@st.composite
def alike(draw: st.DrawFn) -> list[Case]:
    """Cases each of which differs from the one before in a single thing."""
    found = [draw(cases)]
    names = [field.name for field in dataclasses.fields(Case)]
    for _ in range(draw(st.integers(3, 10))):
        name = draw(st.sampled_from(names))
        found.append(dataclasses.replace(found[-1], **{name: getattr(draw(cases), name)}))
    return found


@pytest.fixture
def backends(make_backend):
    """Two that refuse different calls."""
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


def compare(drawn: list[Case]) -> None:
    """Plan one after the other, with what earlier ones left behind, then each afresh."""
    plan._plans.clear()
    remembered = [case.planned() for case in drawn]
    for case, found in zip(drawn, remembered, strict=True):
        plan._plans.clear()
        assert case.planned() == found, case


@given(alike())
@with_settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_remembered_plan_equals_a_fresh_one(backends, drawn):
    compare(drawn)


PLAIN = Case(
    *(1, 2, 5, 5, 8, 8, torch.float32, None, None, "bhsd", "bhsd", "bhsd", None, 0.0, False, None, False, None, False),
    *(False, None, "wide", HadamardMode.NONE, OnUnsupported.FALLBACK, None, True),
)
BASES = {
    "plain": PLAIN,
    "unchecked": dataclasses.replace(PLAIN, check=False),
    "automatic": dataclasses.replace(PLAIN, backend=None),
    "masked": dataclasses.replace(PLAIN, mask="dense", batch=2),
    "with grad": dataclasses.replace(PLAIN, grad=True, requires_grad=True),
    "mask with grad": dataclasses.replace(PLAIN, mask="additive", grad=True, requires_grad=True),
    "wide mask": dataclasses.replace(PLAIN, mask="wide"),
    "wrong": dataclasses.replace(PLAIN, dropout=2.0, check=False),
    "autocast": dataclasses.replace(PLAIN, autocast=torch.bfloat16),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("name", VALUES)
def test_one_thing_that_differs_makes_it_another_plan(backends, base, name):
    for value in VALUES[name]:
        compare([base, dataclasses.replace(base, **{name: value})])


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
