"""The adapter with a stand-in for nvidia-cudnn-frontend; tests marked gpu run the wheel itself."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import types
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import lpattn
from lpattn import AttentionCall, CausalKind, MaskKind
from lpattn.quantize import round_e4m3
from lpattn.testing import BackendTests, run_checks
from lpattn_cudnn import CudnnBackend, _signature, graphs, lpattn_backends
from lpattn_cudnn.operands import quantize


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
        q, k, v = (self._operand(pack[tensor], tensor) for tensor in self.inputs)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        v = v * read["descale_v"]
        scores = q @ k.mT
        if self.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        # Keys are hidden before the multiplication, also those that fill the last tile; and what is too small is 0.
        factor = read["descale_q"] * read["descale_k"] * self.scale
        factor = factor if factor >= torch.finfo(torch.float32).tiny else 0.0
        scores = F.pad(scores, (0, -scores.shape[-1] % 128), value=-torch.inf) * factor
        v = F.pad(v, (0, 0, 0, -v.shape[-2] % 128))
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp()
        p = round_e4m3(weights * read["scale_s"]).float() * read["descale_s"]
        output, stats, amax_s, amax_o = self.outputs
        total = weights.sum(-1, keepdim=True)
        result = ((p @ v) / total).transpose(1, 2)
        if output.data_type == "e4m3":
            assert pack[output].dtype == torch.float8_e4m3fn
            result = result * read["scale_o"]
            # Clipping would be silent.
            assert result.isnan().any() or result.numel() == 0 or result.abs().max() <= 448
        else:
            assert (output.data_type, pack[output].dtype, read["scale_o"]) == ("bf16", torch.bfloat16, 1.0)
        pack[output].copy_(result)
        assert tuple(pack[output].transpose(1, 2).stride()) == output.stride or pack[output].numel() == 0
        pack[amax_s].fill_(1.0)
        pack[amax_o].fill_(1.0)
        if self.with_stats:
            pack[stats].copy_(top + total.log())

    @staticmethod
    def _operand(data, described):
        assert data.dtype == torch.float8_e4m3fn
        assert data.is_contiguous()
        assert tuple(data.transpose(1, 2).shape) == described.dim
        return data.float().transpose(1, 2)


MODULE = types.SimpleNamespace(
    pygraph=Graph,
    create_handle=lambda: "handle",
    destroy_handle=lambda handle: None,
    set_stream=lambda handle, stream: None,
    data_type=types.SimpleNamespace(FP8_E4M3="e4m3", FLOAT="float", BFLOAT16="bf16"),
    heur_mode=types.SimpleNamespace(A="a", FALLBACK="fallback"),
)


class OnTheCPU(CudnnBackend):
    """The adapter as it is, on the CPU; the output is bfloat16, as from sm_100 on."""

    name = "cudnn_on_cpu"
    capabilities = dataclasses.replace(CudnnBackend.capabilities, device_types=frozenset({"cpu"}), architectures=None)

    def probe(self, device):
        return [] if device.type == "cpu" else super().probe(device)

    def supports(self, call):
        reasons = super().supports(call)
        if call.head_dim in Graph.refused_head_dims:
            reasons.append(lpattn.Reason("head_dim", f"head_dim {call.head_dim}: no plan"))
        return reasons


class HopperOnTheCPU(OnTheCPU):
    """The output is e4m3, as on sm_90."""

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        call = dataclasses.replace(call, capability=(9, 0))
        return super().attention(query, key, value, call, attn_mask, dropout_p)


@pytest.fixture(params=[OnTheCPU, HopperOnTheCPU], ids=["bfloat16 output", "e4m3 output"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnTheCPU]:
    monkeypatch.setattr(graphs, "_cudnn", lambda: MODULE)
    monkeypatch.setattr(graphs, "_place", lambda index: torch.device("cpu"))
    monkeypatch.setattr(graphs, "_current_stream", lambda index: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    made = request.param()
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
    plain = AttentionCall(1, 1, 1, 256, 256, 128, 128, torch.float32, "cpu")
    assert backend._graphs.refusal(_signature(plain)) == ""
    refused = dataclasses.replace(plain, head_dim=192, head_dim_v=192)
    assert backend._graphs.refusal(_signature(refused)) == "RuntimeError: No valid engine configs for Matmul"
    q = torch.randn(1, 1, 8, 192)
    with pytest.raises(lpattn.BackendError, match=r"cuDNN builds no graph for Signature.*No valid engine configs"):
        backend.attention(q, q, q, AttentionCall(1, 1, 1, 8, 8, 192, 192, torch.float32, "cpu"))


def test_nothing_is_built_while_a_cuda_graph_is_captured(backend, monkeypatch) -> None:
    q = torch.randn(1, 1, 8, 64)
    attend(backend, q, q, q)
    monkeypatch.setattr(graphs, "_is_capturing", lambda: True)
    Graph.built = 0
    attend(backend, q, q, q)
    with pytest.raises(lpattn.BackendError, match="run the call once before capturing"):
        attend(backend, q, q, q, is_causal=True)
    unknown = AttentionCall(1, 1, 1, 256, 256, 192, 192, torch.float32, "cpu")
    assert backend._graphs.refusal(_signature(unknown)) == ""
    assert Graph.built == 0
    monkeypatch.setattr(graphs, "_is_capturing", lambda: False)
    assert "No valid engine" in backend._graphs.refusal(_signature(unknown))  # asked, once it can be


def test_graphs_and_handles_are_destroyed_in_this_order(backend, monkeypatch) -> None:
    events = []
    monkeypatch.setattr(MODULE, "destroy_handle", lambda handle: events.append(handle))
    q = torch.randn(1, 1, 8, 64)
    made = graphs.Graphs()
    call = AttentionCall(1, 1, 1, 8, 8, 64, 64, torch.float32, "cpu", softmax_scale=0.125)
    made.run(_signature(call), quantize(q, q, q, call))
    (built,) = made._built.values()
    weakref.finalize(built.graph, events.append, "graph")
    del built, made
    gc.collect()
    assert events == ["graph", "handle"]


def test_one_trial_stands_for_a_kind_of_call(backend) -> None:
    plain = AttentionCall(1, 1, 1, 256, 256, 128, 128, torch.float32, "cpu")
    same = ({"batch": 7}, {"q_len": 100, "kv_len": 100}, {"softmax_scale": 0.3}, {"num_heads": 8, "num_kv_heads": 8})
    other = (
        {"num_heads": 8},
        {"q_len": 1},
        {"q_len": 100},
        {"head_dim": 64, "head_dim_v": 64},
        {"return_lse": True},
        {"causal": CausalKind.TOP_LEFT},
        {"capability": (9, 0)},
    )

    def trials(changes):
        return {_signature(dataclasses.replace(plain, **change)).typical for change in changes}

    assert trials(same) == trials([{}])
    assert len(trials([{}, *other])) == 1 + len(other)


def test_the_words_of_a_refusal_are_those_of_cudnn() -> None:
    long = "no engine proposed a plan (the backend declined: not on\nthis GPU; python engines declined: a; b)"
    assert graphs.words(RuntimeError(long)) == "RuntimeError: not on this GPU"
    assert graphs.words(RuntimeError("plain; words")) == "RuntimeError: plain; words"


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_scales_of_nothing_are_numbers(size) -> None:
    x = torch.full((1, 1, 4, 64), size)
    call = AttentionCall(1, 1, 1, 4, 4, 64, 64, torch.float32, "cpu", softmax_scale=0.125)
    operands = quantize(x, x, x, call)
    # Finite and normal: cuDNN multiplies them, and makes NaN of a masked logit times zero.
    product = operands.q_descale * operands.k_descale * 0.125
    assert product.item() >= torch.finfo(torch.float32).tiny
    assert operands.o_scale.isfinite()


def test_outputs_in_e4m3_are_not_clipped() -> None:
    """All weights round up, all of v's tokens are its largest: the output exceeds them by 1/16."""
    v = torch.full((1, 1, 64, 64), 3.0)
    v[:, :, ::2] = -3.0
    operands = quantize(v, v, v, AttentionCall(1, 1, 1, 64, 64, 64, 64, torch.float32, "cpu"))
    largest = float(operands.value.float().abs().max() * operands.v_descale)
    assert largest == pytest.approx(3.0)
    assert 448 / 1.25 < largest * (1 + 2**-4) * float(operands.o_scale) < 448


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
