"""What fp8_fa3 says about a machine: every obstacle there is, with the values, and what to do about it."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

import lpattn
from lpattn.backends.fa3 import FA3Backend, wheel
from lpattn.backends.fa3.wheel import NOT_INSTALLED, Build
from lpattn.types import AttentionCall, CausalKind, HadamardMode, MaskKind, Reason, Rope

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")

CALL = AttentionCall(2, 8, 2, 256, 256, 128, 128, torch.bfloat16, "cuda", capability=(9, 0), softmax_scale=128**-0.5)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def codes(reasons: list[Reason]) -> list[str]:
    return [reason.code for reason in reasons]


def test_nothing_is_said_against_a_hopper_with_the_wheel(install, hopper) -> None:
    install({})
    backend = FA3Backend()
    assert backend.probe(CUDA) == []
    assert backend.version == "spy-fa3 1.2.3"
    assert backend.supports(CALL) == []


def test_without_cuda_and_wheel_both_are_said_with_the_command(install) -> None:
    reasons = FA3Backend().probe(CPU)
    assert codes(reasons) == ["device", "not_installed"]
    assert reasons[0].message == "device cpu: runs on cuda"
    assert FA3Backend().version == ""


def test_triton_is_needed_too(install, hopper, monkeypatch) -> None:
    install({})
    monkeypatch.setitem(sys.modules, "triton", None)
    (reason,) = FA3Backend().probe(CUDA)
    assert reason.code == "not_installed"
    assert str(reason).endswith("triton, in which q, k and v are quantized, is not installed (pip install triton)")
    monkeypatch.setattr(wheel, "BUILDS", ())
    assert [r.message.split()[0] for r in FA3Backend().probe(CUDA)] == ["triton,", "neither"]


def test_the_command_that_installs_it_is_named_where_there_is_one() -> None:
    expected = 'pip install "lpattn[fa3]"' if wheel._HAS_WHEEL else "build FlashAttention-3 from source"
    assert expected in str(NOT_INSTALLED)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_architectures_are_refused_by_name(install, hopper, monkeypatch, capability) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    install({})
    (reason,) = FA3Backend().probe(CUDA)
    assert reason.message == f"architecture sm_{capability[0]}{capability[1]}: has kernels for sm_90"


def test_all_obstacles_are_said_at_once(install, hopper, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    install({"FLASHATTENTION_DISABLE_FP8": True}, interface="raise ImportError('no such thing')")
    reasons = FA3Backend().probe(CUDA)
    assert codes(reasons) == ["architecture", "no_fp8", "import_failed"]
    assert "spy-fa3 1.2.3" in reasons[1].message
    assert "importing spy_fa3_interface raised ImportError: no such thing" in reasons[2].message


def test_a_cuda_device_that_pytorch_does_not_see(install, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert codes(FA3Backend().probe(CUDA)) == ["device", "not_installed"]


@pytest.mark.parametrize(
    ("has", "error", "code", "parts"),
    [
        (
            "12.8",
            "libcudart.so.13: cannot open shared object file",
            "cuda_version",
            ["built for CUDA 13", "is for CUDA 12.8"],
        ),
        (None, "libcudart.so.13: cannot open shared object file", "cuda_version", ["built for CUDA 13", "has no CUDA"]),
        ("13.0", "libcudart.so.13: cannot open shared object file", "import_failed", ["libcudart.so.13"]),
        ("13.0", "x.so: undefined symbol: _ZN3c10", "torch_version", ["another PyTorch", torch.__version__]),
    ],
)
def test_a_library_for_something_else_is_told_apart(install, hopper, monkeypatch, has, error, code, parts) -> None:
    monkeypatch.setattr(torch.version, "cuda", has)
    install({}, interface=f"raise ImportError({error!r})")
    (reason,) = FA3Backend().probe(CUDA)
    assert reason.code == code
    assert all(part in reason.message for part in [*parts, error])


def test_the_library_is_not_loaded_where_there_is_no_cuda(install, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    install({}, interface="raise AssertionError('loaded')")
    assert codes(FA3Backend().probe(CPU)) == ["device"]


def test_a_build_without_the_operator(install, hopper) -> None:
    install({}, build=dataclasses.replace(wheel_build(), namespace="lpattn_spy_none"))
    (reason,) = FA3Backend().probe(CUDA)
    assert reason.code == "no_operator"
    assert "torch.ops.lpattn_spy_none.fwd" in reason.message


def test_an_operator_without_arguments_that_are_needed(install, hopper) -> None:
    library = torch.library.Library("lpattn_spy_old", "DEF")
    library.define("fwd(Tensor q, Tensor k, Tensor v, float? softmax_scale, bool is_causal, int num_splits) -> Tensor")
    install({}, build=dataclasses.replace(wheel_build(), namespace="lpattn_spy_old"))
    (reason,) = FA3Backend().probe(CUDA)
    assert reason.code == "signature"
    assert "has no argument q_descale, k_descale, v_descale, seqused_k" in reason.message


def test_one_usable_build_is_enough(install, hopper) -> None:
    broken = Build("broken-fa3", "spy_broken_interface", "spy_broken_config", "lpattn_spy_broken")
    install({"FLASHATTENTION_DISABLE_FP8": True}, build=broken)
    install({})
    backend = FA3Backend()
    assert backend.probe(CUDA) == []
    assert backend.version == "spy-fa3 1.2.3"


def test_head_dims_are_those_of_the_wheel(install, hopper) -> None:
    install({"FLASHATTENTION_DISABLE_HDIM96": True, "FLASHATTENTION_DISABLE_HDIM192": True})
    (reason,) = FA3Backend().supports(dataclasses.replace(CALL, head_dim=96, head_dim_v=96))
    assert reason.message == "head_dim 96: this wheel has kernels for 64, 128, 256"
    assert FA3Backend().supports(dataclasses.replace(CALL, head_dim=256, head_dim_v=256)) == []


def test_head_dims_without_a_wheel_or_without_flags(install, hopper) -> None:
    odd = dataclasses.replace(CALL, head_dim=80, head_dim_v=80)
    (reason,) = FA3Backend().supports(odd)
    assert reason.message == "head_dim 80: fa3-fwd has kernels for 64, 96, 128, 192, 256"
    install(flags=None)
    (reason,) = FA3Backend().supports(odd)
    assert reason.message == "head_dim 80: this wheel has kernels for 64, 96, 128, 192, 256"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"dtype": torch.float64}, "dtype"),
        ({"head_dim_v": 64}, "head_dim_v"),
        ({"mask": MaskKind.BOOL, "mask_shape": (2, 1, 256, 256)}, "mask"),
        ({"mask": MaskKind.BOOL, "mask_shape": (2, 8, 1, 256)}, "mask"),
        ({"mask": MaskKind.BOOL, "mask_shape": (1, 1, 256, 1)}, "mask"),
        ({"mask": MaskKind.ADDITIVE, "mask_shape": (2, 1, 1, 256)}, "mask"),
        ({"causal": CausalKind.TOP_LEFT, "kv_len": 512}, "causal_alignment"),
        ({"dropout": True}, "dropout"),
        ({"softmax_scale": float("nan")}, "scale"),
        ({"softmax_scale": float("inf")}, "scale"),
        ({"softmax_scale": 1e39}, "scale"),
        ({"q_len": 0}, "empty"),
        ({"capability": (8, 9)}, "architecture"),
        ({"device_type": "cpu", "capability": None}, "device"),
    ],
)
def test_what_it_cannot_run_is_declined(install, hopper, change, code) -> None:
    install({})
    assert codes(FA3Backend().supports(dataclasses.replace(CALL, **change))) == [code]


def test_other_masks_are_declined_with_the_shape_that_is_not(install, hopper) -> None:
    install({})
    (reason,) = FA3Backend().supports(dataclasses.replace(CALL, mask=MaskKind.BOOL, mask_shape=(2, 1, 256, 256)))
    assert reason.message == ("bool attn_mask [2, 1, 256, 256]: takes key-padding masks only, bool [B, 1, 1, kv_len]")


@pytest.mark.parametrize("dim", [96, 192])
@pytest.mark.parametrize("mode", [HadamardMode.QKV, HadamardMode.V_ONLY])
def test_transforms_need_a_power_of_two(install, hopper, dim, mode) -> None:
    install({})
    call = dataclasses.replace(CALL, head_dim=dim, head_dim_v=dim)
    assert FA3Backend().supports(call) == []
    (reason,) = FA3Backend().supports(dataclasses.replace(call, hadamard=mode))
    assert reason.code == "hadamard"
    assert str(reason) == f'hadamard {mode} with head_dim {dim}: transforms powers of two only (pass hadamard="none")'


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"causal": CausalKind.TOP_LEFT},
        {"kv_len": 77},
        {"return_lse": True},
        {"softmax_scale": 0.0},
        {"softmax_scale": -0.5},
        {"contiguous_last_dim": False},
        {"num_kv_heads": 1},
        {"q_len": 1},
        {"hadamard": HadamardMode.QKV},
        {"hadamard": HadamardMode.V_ONLY},
        {"mask": MaskKind.BOOL, "mask_shape": (2, 1, 1, 256)},
        {"mask": MaskKind.BOOL, "mask_shape": (1, 1, 1, 256)},
        {"mask": MaskKind.BOOL, "mask_shape": (2, 1, 1, 1)},
        {"rope": Rope(interleaved=True, rotary_dim=64)},
    ],
)
def test_what_it_can_run_is_accepted(install, hopper, change) -> None:
    install({})
    assert FA3Backend().supports(dataclasses.replace(CALL, **change)) == []


def test_it_has_fused_rotation_and_key_padding() -> None:
    assert FA3Backend.capabilities.rope
    assert FA3Backend.capabilities.key_padding
    assert FA3Backend.capabilities.hadamard == frozenset(HadamardMode)


def test_it_is_a_built_in_backend() -> None:
    (info,) = [i for i in lpattn.available_backends("cpu") if i.name == "fp8_fa3"]
    assert not info.available
    assert info.source == "built-in"


def test_an_unmeasured_call_is_never_chosen_automatically() -> None:
    assert FA3Backend().rank(dataclasses.replace(CALL, capability=(7, 0))) == 0.0


def wheel_build() -> Build:
    return Build("spy-fa3", "spy_fa3_interface", "spy_fa3_config", "lpattn_spy_fa3")
