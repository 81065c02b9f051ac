"""The adapter with a stand-in for nvidia-cudnn-frontend; tests marked gpu run the wheel itself."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator

import pytest
import torch

import lpattn
from lpattn import AttentionCall, MaskKind
from lpattn.quantize import round_e4m3
from lpattn.testing import BackendTests, run_checks
from lpattn_cudnn import CudnnBackend, graphs, lpattn_backends


class Tensor:
    """A tensor of a graph, as far as the adapter describes it."""

    def __init__(self, **described: object) -> None:
        self.__dict__.update(described)

    def set_output(self, value):
        self.output = value
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_data_type(self, data_type):
        self.data_type = data_type
        return self


class Graph:
    """The frontend's graph: it checks the order of the calls, and computes on the CPU."""

    built = 0
    refused_head_dims = frozenset({192})

    def __init__(self, **context):
        assert context["handle"] == "handle"
        self.steps = []

    def tensor(self, **described):
        return Tensor(**described)

    def sdpa_fp8(self, q, k, v, *, generate_stats, attn_scale, use_causal_mask, name, **scalars):
        assert set(scalars) == set(graphs._SCALARS)
        assert attn_scale > 0
        self.inputs, self.scalars = (q, k, v), scalars
        self.scale, self.causal, self.with_stats = attn_scale, use_causal_mask, generate_stats
        self.outputs = tuple(Tensor() for _ in range(4))
        return self.outputs

    def validate(self):
        self.steps.append("validate")

    def build_operation_graph(self):
        self.steps.append("build_operation_graph")

    def create_execution_plans(self, modes):
        self.steps.append("create_execution_plans")

    def check_support(self):
        if self.inputs[0].dim[3] in self.refused_head_dims:
            raise RuntimeError("No valid engine configs\nfor Matmul")
        self.steps.append("check_support")

    def build_plans(self):
        order = ["validate", "build_operation_graph", "create_execution_plans", "check_support"]
        assert self.steps == order
        type(self).built += 1

    def get_workspace_size(self):
        return 17

    def execute(self, pack, workspace, handle):
        assert workspace.numel() >= 17
        read = {name: float(pack[tensor]) for name, tensor in self.scalars.items()}
        assert read["descale_s"] * read["scale_s"] == 1.0
        q, k, v = (self._operand(pack[t], t, read[f"descale_{n}"]) for t, n in zip(self.inputs, "qkv", strict=True))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.mT * self.scale
        if self.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp()
        p = round_e4m3(weights * read["scale_s"]).float() * read["descale_s"]
        output, stats, amax_s, amax_o = self.outputs
        total = weights.sum(-1, keepdim=True)
        pack[output].copy_(((p @ v) / total).transpose(1, 2))
        assert tuple(pack[output].transpose(1, 2).stride()) == output.stride or pack[output].numel() == 0
        pack[amax_s].fill_(1.0)
        pack[amax_o].fill_(1.0)
        if self.with_stats:
            pack[stats].copy_(top + total.log())

    @staticmethod
    def _operand(data, described, descale):
        assert data.dtype == torch.float8_e4m3fn
        assert data.is_contiguous()
        assert tuple(data.transpose(1, 2).shape) == described.dim
        return data.float().transpose(1, 2) * descale


MODULE = types.SimpleNamespace(
    pygraph=Graph,
    data_type=types.SimpleNamespace(FP8_E4M3="e4m3", FLOAT="float", BFLOAT16="bf16"),
    heur_mode=types.SimpleNamespace(A="a", FALLBACK="fallback"),
)


class OnTheCPU(CudnnBackend):
    """The adapter as it is, on the CPU."""

    name = "cudnn_on_cpu"
    capabilities = dataclasses.replace(CudnnBackend.capabilities, device_types=frozenset({"cpu"}), architectures=None)

    def probe(self, device):
        return [] if device.type == "cpu" else super().probe(device)

    def supports(self, call):
        reasons = super().supports(call)
        if call.head_dim in Graph.refused_head_dims:
            reasons.append(lpattn.Reason("head_dim", f"head_dim {call.head_dim}: no plan"))
        return reasons


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnTheCPU]:
    monkeypatch.setattr(graphs, "_cudnn", lambda: MODULE)
    monkeypatch.setattr(graphs.Graphs, "_handle", lambda self, index: "handle")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    made = OnTheCPU()
    lpattn.register_backend(made)
    yield made
    lpattn.unregister_backend(made.name)


def test_it_passes_the_conformance_suite(backend) -> None:
    suite = type("OfTheStandIn", (BackendTests,), {"backend": backend.name})
    outcomes = list(run_checks(suite, skip=("import_is_pure", "strict_compile")))
    assert [(o.check, o.detail) for o in outcomes if o.status.is_failure] == []
    assert sum(o.status == "passed" for o in outcomes) > 25


def attend(backend, q, k, v, **options):
    return lpattn.low_precision_sdpa(q, k, v, backend=backend.name, enable_gqa=True, **options)


def test_a_graph_is_built_once_per_shape(backend) -> None:
    q = torch.randn(1, 2, 64, 64)
    Graph.built = 0
    for _ in range(3):
        attend(backend, q, q, q)
    assert Graph.built == 1
    attend(backend, q, q, q, is_causal=True)
    attend(backend, q, q, q, return_lse=True)
    attend(backend, q, q, q, scale=0.3)
    attend(backend, q, q, q, scale=-0.3)
    assert Graph.built == 4  # a negative scale is q's sign


def test_the_cache_is_bounded(backend, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "_CACHE_SIZE", 2)
    for length in (4, 5, 6, 4):
        x = torch.randn(1, 1, length, 64)
        attend(backend, x, x, x)
    assert [signature.q_len for signature in backend._graphs._built] == [6, 4]


def test_what_cudnn_says_is_the_reason(backend) -> None:
    assert backend._graphs.refusal(0, 192) == "RuntimeError: No valid engine configs for Matmul"
    assert backend._graphs.refusal(0, 128) == ""
    q = torch.randn(1, 1, 8, 192)
    with pytest.raises(lpattn.BackendError, match=r"cuDNN builds no graph for Signature.*No valid engine configs"):
        backend.attention(q, q, q, AttentionCall(1, 1, 1, 8, 8, 192, 192, torch.float32, "cpu"))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"mask": MaskKind.BOOL, "mask_shape": (1, 1, 1, 8)}, "mask"),
        ({"dropout": True}, "dropout"),
        ({"head_dim_v": 128}, "head_dim_v"),
        ({"softmax_scale": float("nan")}, "scale"),
        ({"capability": (8, 9)}, "architecture"),
    ],
)
def test_what_it_does_not_do_is_refused(changes, code) -> None:
    call = AttentionCall(1, 1, 1, 8, 8, 64, 64, torch.bfloat16, "cuda", capability=(9, 0))
    assert [r.code for r in CudnnBackend().supports(dataclasses.replace(call, **changes))] == [code]


# Probing


def test_without_the_wheel_it_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reasons = graphs.import_reasons.__wrapped__()
    assert [(r.code, r.remedy) for r in reasons] == [("not_installed", 'pip install "lpattn-cudnn[cudnn]"')]


def test_a_wheel_that_does_not_import(monkeypatch) -> None:
    def crash():
        raise ImportError("libcudnn.so.9:\ncannot open")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(graphs, "_cudnn", crash)
    (reason,) = graphs.import_reasons.__wrapped__()
    assert reason.code == "import_failed"
    assert reason.message.endswith("ImportError: libcudnn.so.9: cannot open")


def test_a_frontend_without_the_operation(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(graphs, "_cudnn", lambda: types.SimpleNamespace(pygraph=object))
    (reason,) = graphs.import_reasons.__wrapped__()
    assert reason.code == "signature"


def test_the_probe_names_the_device_first() -> None:
    assert CudnnBackend().probe(torch.device("cpu"))[0].code == "device"


@pytest.mark.gpu
class TestCudnn(BackendTests):
    """The installed wheel on a GPU."""

    backend = "cudnn_fp8"

    @pytest.fixture(autouse=True)
    def _registered(self) -> None:
        if "cudnn_fp8" not in [info.name for info in lpattn.available_backends()]:
            lpattn.register_backend(*lpattn_backends())  # on the path, and not installed
