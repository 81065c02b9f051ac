"""The adapter with a stand-in for SageAttention that has its traps; tests marked gpu run the wheel itself."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Iterator

import pytest
import torch

import lpattn
from lpattn import AttentionCall, CausalKind, HadamardMode, MaskKind
from lpattn.testing import BackendTests, exact_attention, run_checks, sqnr
from lpattn_sageattention import SageAttentionBackend, lpattn_backends
from lpattn_sageattention.wheel import Wheel, installed_wheel


def int8(x: torch.Tensor, block: int) -> torch.Tensor:
    """Rounded to INT8 with a scale per block of tokens, as the kernels do it: a NaN becomes a number."""
    padded = torch.nn.functional.pad(x.float().nan_to_num(), (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
    scale = padded.abs().amax((3, 4), keepdim=True) / 127
    return ((padded / scale.clamp_min(1e-30)).round() * scale).flatten(2, 3)[:, :, : x.shape[2]]


class StandIn:
    """The `sageattention` of one version, on the CPU."""

    def __init__(self, major: int) -> None:
        self.major = major
        self.options: list[dict[str, object]] = []

    def sageattn(self, q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **swallowed):
        assert self.major == 1
        self.options.append({"smooth_k": smooth_k, **swallowed})
        if smooth_k:
            k -= k.mean(2, keepdim=True)  # as version 1 does: in the caller's tensor
        missing = 0 if is_causal else -k.shape[2] % 64
        assert not is_causal or q.shape[2] % 128 == 0  # else it reads a scale that is not there
        return self._attend(q, k, v, is_causal, sm_scale, missing)[0]

    def sageattn_qk_int8_pv_fp8_cuda_sm90(
        self, q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, return_lse=False, **options
    ):
        self.options.append({"smooth_k": smooth_k, **options})
        out, lse = self._attend(q, k, v, is_causal, sm_scale, 0)
        return (out, lse) if return_lse else out

    def _attend(self, q, k, v, is_causal, sm_scale, missing):
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        half = v.to(torch.float16)
        assert half.isfinite().all() or not v.isfinite().all(), "v overflows in float16"
        exact, lse = exact_attention(int8(q, 128), int8(k, 64), half, None, is_causal, sm_scale)
        # Products of 64 keys are added up in float16.
        assert float(half.float().nan_to_num().abs().amax()) * 64 < 65504
        counted = 1 + missing * (-lse).exp()  # the missing keys, each with a logit of 0
        return (exact / counted[..., None]).to(q.dtype), lse.float()


class OnTheCPU(SageAttentionBackend):
    """The adapter as it is, on the CPU."""

    def __init__(self, wheel: Wheel) -> None:
        super().__init__(wheel)
        self.capabilities = dataclasses.replace(self.capabilities, device_types=frozenset({"cpu"}))

    def probe(self, device):
        return [] if device.type == "cpu" else super().probe(device)

    def _kernel(self, device):
        return lambda *args, **kwargs: self._wheel.forward((9, 0), *args, **kwargs)


@pytest.fixture(params=["1.0.6", "2.2.0"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnTheCPU]:
    made = OnTheCPU(Wheel(request.param))
    made.name = "sage_on_cpu"
    made._wheel.__dict__["_module"] = StandIn(made._wheel.major)
    lpattn.register_backend(made)
    yield made
    lpattn.unregister_backend("sage_on_cpu")


def qkv(batch=2, heads=4, kv_heads=2, length=128, dim=64, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, h, length, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)]


def attend(*tensors, **options):
    return lpattn.low_precision_sdpa(*tensors, backend="sage_on_cpu", enable_gqa=True, **options)


def test_it_passes_the_conformance_suite(backend) -> None:
    suite = type("OfTheStandIn", (BackendTests,), {"backend": backend.name})
    outcomes = list(run_checks(suite, skip=("import_is_pure", "strict_compile")))
    assert [(o.check, o.detail) for o in outcomes if o.status.is_failure] == []
    passed = {o.check for o in outcomes if o.status == "passed"}
    assert {"accuracy", "scales_are_exact", "causal_is_top_left", "nan_stays_where_it_is", "layouts"} <= passed
    assert ("lse_is_natural" in passed) == (backend._wheel.major > 1)


def test_only_what_the_function_knows_is_passed(backend) -> None:
    attend(*qkv())
    (options,) = backend._wheel._module.options
    known = {"smooth_k"} if backend._wheel.major == 1 else {"smooth_k", "pv_accum_dtype"}
    assert set(options) == known
    assert options["smooth_k"] is False


def call(**changes) -> AttentionCall:
    sizes = {"batch": 1, "num_heads": 2, "num_kv_heads": 2, "q_len": 64, "kv_len": 64, "head_dim": 64, "head_dim_v": 64}
    made = AttentionCall(**sizes, dtype=torch.bfloat16, device_type="cuda", capability=(9, 0))
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"mask": MaskKind.BOOL, "mask_shape": (1, 1, 1, 64)}, "mask"),
        ({"mask": MaskKind.ADDITIVE, "mask_shape": (1, 1, 64, 64)}, "mask"),
        ({"dropout": True}, "dropout"),
        ({"hadamard": HadamardMode.QKV}, "hadamard"),
        ({"causal": CausalKind.TOP_LEFT, "kv_len": 128}, "causal_alignment"),
        ({"head_dim_v": 128}, "head_dim_v"),
        ({"head_dim": 256, "head_dim_v": 256}, "head_dim"),
        ({"softmax_scale": float("inf")}, "scale"),
        ({"capability": (7, 5)}, "architecture"),
        ({"dtype": torch.float64}, "dtype"),
    ],
)
@pytest.mark.parametrize("version", ["1.0.6", "2.2.0"])
def test_what_sage_would_ignore_is_refused(version, changes, code) -> None:
    assert code in [reason.code for reason in SageAttentionBackend(Wheel(version)).supports(call(**changes))]


def test_version_1_needs_whole_tiles_of_keys_unless_causal() -> None:
    one, two = (SageAttentionBackend(Wheel(version)) for version in ("1.0.6", "2.2.0"))
    (reason,) = one.supports(call(kv_len=100))
    assert reason.code == "kv_len"
    assert "kv_len 100" in reason.message
    assert one.supports(call(kv_len=128)) == one.supports(call(q_len=100, kv_len=100, causal=CausalKind.TOP_LEFT)) == []
    assert two.supports(call(kv_len=100)) == []
    assert one.exact_lengths
    assert not two.exact_lengths


def test_the_stand_in_has_the_bug_that_is_refused(backend) -> None:
    # Else the refusal would not be tried.
    q, k, v = qkv(length=100)
    if backend._wheel.major == 1:
        wrong = backend.attention(q, k, v, call(batch=2, num_heads=4, q_len=100, kv_len=100, softmax_scale=0.125))
        assert sqnr(exact_attention(q, k, v)[0], wrong) < 20


@pytest.mark.parametrize("size", [1e4, 1e-6])
def test_v_far_outside_of_float16_s_range(backend, size) -> None:
    q, k, v = qkv()
    v = v * size
    out = attend(q, k, v, is_causal=True)
    assert sqnr(exact_attention(q, k, v, None, True)[0], out) > 25


def test_large_batches_are_split(backend, monkeypatch) -> None:
    q, k, v = qkv(batch=5)
    whole = attend(q, k, v)
    monkeypatch.setattr("lpattn_sageattention._LARGEST_GRID", 2)
    assert torch.equal(attend(q, k, v), whole)
    assert len(backend._wheel._module.options) == 1 + 3


def test_elements_that_lie_far_apart_are_copied(monkeypatch) -> None:
    from lpattn_sageattention import _addressable

    x = torch.zeros(2, 1000)[:, :10]
    assert _addressable(x) is x
    monkeypatch.setattr("lpattn_sageattention._LARGEST_OFFSET", 1000)
    assert _addressable(x).is_contiguous()


# Probing


def test_without_the_wheel_it_says_how_to_get_it() -> None:
    reasons = SageAttentionBackend(Wheel("")).probe(torch.device("cpu"))
    assert [reason.code for reason in reasons] == ["device", "not_installed"]
    assert "lpattn-sageattention[v1]" in reasons[-1].remedy


def test_a_wheel_that_does_not_import() -> None:
    wheel = Wheel("2.2.0")
    original = importlib.import_module

    def crash(name, *rest):
        if name == "sageattention":
            raise ImportError("libcudart.so.12: cannot open\nshared object file")
        return original(name, *rest)

    importlib.import_module = crash
    try:
        (reason,) = wheel.reasons_against((9, 0))
    finally:
        importlib.import_module = original
    assert reason.code == "import_failed"
    assert "libcudart.so.12: cannot open shared object file" in reason.message


@pytest.fixture
def module(monkeypatch):
    """A `sageattention` in sys.modules, with the compiled kernels of one architecture."""
    package, core = types.ModuleType("sageattention"), types.ModuleType("sageattention.core")
    package.core = core
    package.sageattn_qk_int8_pv_fp8_cuda_sm90 = lambda: None
    core.SM90_ENABLED, core.SM89_ENABLED = True, False
    monkeypatch.setitem(sys.modules, "sageattention", package)
    monkeypatch.setitem(sys.modules, "sageattention.core", core)
    return package


@pytest.mark.parametrize(
    ("capability", "code"), [((9, 0), None), ((8, 9), "not_compiled"), ((10, 0), "architecture"), ((8, 6), "signature")]
)
def test_version_2_runs_on_what_it_was_compiled_for(module, capability, code) -> None:
    reasons = Wheel("2.2.0").reasons_against(capability)
    assert [reason.code for reason in reasons] == ([code] if code else [])


def test_nothing_is_imported_at_registration(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)
    (found,) = lpattn_backends()
    assert found.name == "sageattention"
    assert "sageattention" not in sys.modules
    assert found.version == installed_wheel().label


@pytest.mark.gpu
class TestSageAttention(BackendTests):
    """The installed wheel on a GPU."""

    backend = "sageattention"

    @pytest.fixture(autouse=True)
    def _registered(self) -> None:
        if "sageattention" not in [info.name for info in lpattn.available_backends()]:
            lpattn.register_backend(*lpattn_backends())  # on the path, and not installed
