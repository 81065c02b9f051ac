"""Launches go by addresses, and by kernels that were compiled before: that both are always the right ones.

No kernel runs here. What Triton would look at, the tensors, is held against what a launch takes instead of them: their
addresses, and a key under which the compiled kernel is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lpattn.backends.triton import TritonBackend
from lpattn.backends.triton.kernels import HopperKernel, kernel_for
from lpattn.calls import build_call
from lpattn.types import AttentionCall, HadamardMode, Norm, Rope

pytest.importorskip("triton", reason="triton, whose launches are looked at, is not installed")

Recorded = list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Every launch with addresses and tensors, in order; nothing runs."""
    from lpattn.kernels.hopper import launch
    from lpattn.quantize.fused.launcher import Launch

    found: Recorded = []
    monkeypatch.setattr(
        Launch, "on", lambda self, stream, pointers, tensors: found.append((self, tuple(pointers), tensors()))
    )
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    return found


def address(argument: Any) -> Any:
    """What a launch takes for a tensor, or for the descriptor of one."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if hasattr(argument, "block_shape"):
        return (argument.base.data_ptr(), argument.shape, argument.strides, argument.block_shape, argument.layout)
    return argument


def kind(argument: Any) -> Any:
    """What Triton compiles a kernel for."""
    if isinstance(argument, torch.Tensor):
        return (argument.dtype, argument.data_ptr() % 16 == 0)
    if hasattr(argument, "block_shape"):
        # Sizes are arguments of the kernel.
        return (argument.base.dtype, tuple(argument.block_shape), argument.base.data_ptr() % 16 == 0)
    return argument


def check(found: Recorded) -> None:
    """What must hold of all launches: with one key, nothing differs that is compiled in."""
    kinds: dict[Any, tuple[Any, ...]] = {}
    for launch, pointers, tensors in found:
        assert not any(isinstance(p, torch.Tensor) for p in pointers)
        assert [address(p) for p in pointers] == [address(t) for t in tensors]
        now = tuple(kind(t) for t in tensors)
        assert kinds.setdefault(launch._key, now) == now


def said(found: Recorded) -> list[Any]:
    """What launches say besides tensors."""
    return [(launch._key, launch._rest, launch._programs) for launch, _, _ in found]


def forget() -> None:
    """Make every plan anew from here on."""
    from lpattn.kernels import attention, mask_tiles
    from lpattn.kernels.hopper import launch
    from lpattn.quantize.fused import blocks, heads, inputs

    plans = (launch._plan, attention._plan, mask_tiles._plan, blocks._plan, heads._plan)
    for remembered in (kernel_for, inputs._listing, heads._restore, *plans):
        remembered.cache_clear()


def compare(recorded: Recorded, runs: list[Callable[[], object]]) -> None:
    """Run one after the other, with what earlier ones left behind, then each afresh."""
    recorded.clear()
    for run in runs:
        run()
    check(recorded)
    remembered = said(recorded)
    recorded.clear()
    for run in runs:
        forget()
        run()
    assert remembered == said(recorded)


LAYOUTS = ("bhsd", "bshd", "wide", "shifted", "every other")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides, and for "shifted" at an odd address."""
    batch, heads, tokens, dim = x.shape
    if layout == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "wide":
        return torch.cat((x, x), dim=3)[..., :dim]
    if layout == "shifted":
        return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(batch, heads, tokens, dim)
    if layout == "every other":
        return torch.stack((x, x), dim=4).flatten(3)[..., ::2]
    return x.contiguous()


def masks(q_len: int, kv_len: int) -> dict[str, torch.Tensor | None]:
    """Masks that are passed on in different ways."""
    dense = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
    return {
        "none": None,
        "padding": torch.ones(1, 1, 1, kv_len, dtype=torch.bool),
        "dense": dense,
        "dense, per head": dense.repeat(1, 2, 1, 1),
        "dense, shifted": laid_out(dense, "shifted"),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    of_q: str
    of_k: str
    of_v: str
    hadamard: HadamardMode
    causal: bool
    lse: bool
    mask: str
    rope: str | None
    norm: tuple[float | None, float | None, torch.dtype | None] | None
    scale: float | None

    @property
    def layouts(self) -> tuple[str, str, str]:
        return self.of_q, self.of_k, self.of_v

    def run(self, backend: TritonBackend) -> None:
        q, k, v = (
            laid_out(torch.zeros(1, heads, tokens, self.dim, dtype=self.dtype), layout)
            for heads, tokens, layout in zip(
                (2, self.kv_heads, self.kv_heads), (self.q_len, self.kv_len, self.kv_len), self.layouts, strict=True
            )
        )
        mask = masks(self.q_len, self.kv_len)[self.mask]
        rope = None if self.rope is None else Rope(interleaved=False, rotary_dim=self.dim)
        causal = self.causal and mask is None
        call = build_call(q, k, v, mask, 0.0, causal, self.scale, self.hadamard, self.lse, rope)
        call = dataclasses.replace(call, capability=(9, 0))
        assert isinstance(kernel_for(call, int8=False), HopperKernel)
        if self.rope is None:
            backend.attention(q, k, v, call, mask)
            return
        tables = [
            laid_out(torch.zeros(1, 1, n, self.dim), self.rope).transpose(1, 2) for n in (self.q_len, self.kv_len)
        ]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options: dict[str, Any] = {"cos_k": tables[1], "sin_k": tables[1]}
        if self.norm is not None:
            eps_q, eps_k, dtype = self.norm
            weight = None if dtype is None else torch.ones(self.dim, dtype=dtype)
            options["norm"] = Norm(eps_q, eps_k, weight, weight)
            if eps_q is None:
                of_q, of_k = (None if weight is None else weight.expand(x.shape[2], -1) for x in (q, k))
                options["norm"] = Norm(None, None, of_q, of_k, *(torch.ones(x.shape[:2]) for x in (q, k)))
        backend.rope_attention(q, k, v, tables[0], tables[0], call, mask, **options)


cases = st.builds(
    Case,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    kv_heads=st.sampled_from([1, 2]),
    q_len=st.sampled_from([3, 130]),
    kv_len=st.sampled_from([3, 130]),
    dim=st.sampled_from([64, 80, 128]),
    of_q=st.sampled_from(LAYOUTS),
    of_k=st.sampled_from(LAYOUTS),
    of_v=st.sampled_from(LAYOUTS),
    hadamard=st.sampled_from([HadamardMode.NONE, HadamardMode.NONE, HadamardMode.QKV, HadamardMode.V_ONLY]),
    causal=st.booleans(),
    lse=st.booleans(),
    mask=st.sampled_from(["none", "padding", "dense", "dense, per head", "dense, shifted"]),
    rope=st.sampled_from([None, None, *LAYOUTS]),
    norm=st.sampled_from(
        [
            None,
            (1e-6, 1e-6, None),
            (None, None, None),
            (None, None, torch.bfloat16),
            (1e-5, 1e-6, torch.bfloat16),
            (1e-5, 1e-6, torch.float32),
            (1e-5, None, torch.float32),
        ]
    ),
    scale=st.sampled_from([None, 0.5]),
)


@st.composite
def alike(draw: st.DrawFn) -> list[Case]:
    """Cases that differ in little, which is what could be taken for each other."""
    found = [draw(cases)]
    # Whatever is not in the call is what a plan may forget.
    names = [*(field.name for field in dataclasses.fields(Case)), *["of_q", "of_k", "of_v", "rope", "norm", "mask"] * 4]
    for _ in range(draw(st.integers(4, 8))):
        name = draw(st.sampled_from(names))
        found.append(dataclasses.replace(found[-1], **{name: getattr(draw(cases), name)}))
    return found


@given(alike())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_calls_of_the_hopper_kernel(recorded: Recorded, drawn: list[Case]) -> None:
    backend = TritonBackend()
    compare(recorded, [functools.partial(case.run, backend) for case in drawn])


@given(alike())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_quantization_per_head(recorded: Recorded, drawn: list[Case]) -> None:
    from lpattn.quantize.fused import quantize_per_head, restore_output, used_keys

    def run(case: Case) -> None:
        q = laid_out(torch.zeros(1, 2, case.q_len, case.dim, dtype=case.dtype), case.layouts[0])
        k, v = (
            laid_out(torch.zeros(1, case.kv_heads, case.kv_len, case.dim, dtype=case.dtype), layout)
            for layout in case.layouts[1:]
        )
        keys = used_keys(torch.ones(1, 1, 1, case.kv_len, dtype=torch.bool), 1, case.kv_len)
        keys = None if case.mask == "none" else keys
        found = quantize_per_head(q, k, v, hadamard=case.hadamard, keys=keys, with_lse_shift=case.lse)
        out = torch.zeros(1, case.q_len, 2, case.dim, dtype=torch.bfloat16)
        restore_output(out, found, case.dtype)

    compare(recorded, [functools.partial(run, case) for case in drawn])


def plain_call() -> tuple[torch.Tensor, AttentionCall]:
    q = torch.zeros(1, 2, 130, 64, dtype=torch.bfloat16)
    call = build_call(q, q, q, None, 0.0, False, None, HadamardMode.NONE, False)
    return q, dataclasses.replace(call, capability=(9, 0))


def test_a_call_seen_before_is_not_planned_again(recorded, monkeypatch) -> None:
    q, call = plain_call()
    backend = TritonBackend()
    backend.attention(q, q, q, call)
    monkeypatch.setattr(HopperKernel, "_steps_for", None)
    backend.attention(q, q, q, call)
    assert len(recorded) == 6
    assert [launch for launch, _, _ in recorded[:3]] == [launch for launch, _, _ in recorded[3:]]


def test_the_steps_that_are_remembered_are_bounded(recorded) -> None:
    q, call = plain_call()
    backend = TritonBackend()
    kernel = kernel_for(call, backend.int8, backend.exponential)
    for extra in range(0, 8 * 80, 8):
        backend.attention(torch.zeros(1, 2, 130, 64 + extra, dtype=torch.bfloat16)[..., :64], q, q, call)
    assert 0 < len(kernel._steps) <= 64
