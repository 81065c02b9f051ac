"""benchmarks/attention.py on the CPU: what it measures, what it refuses to time, and what it keeps apart."""

from __future__ import annotations

import math

import accuracy
import attention
import cases
import pytest
import torch
import torch.nn.functional as F
from common import Budget, host_timer

import lpattn

SHAPES = [
    cases.Shape(1, 2, 2, 70, 32, False),
    cases.Shape(2, 4, 2, 64, 32, True),
    cases.Shape(2, 2, 2, 64, 32, False, kv_lengths=(64, 40)),
]


class Scaled(lpattn.Backend):
    """Exact attention times a factor, which leaves 20 * log10(1 / |1 - factor|) dB."""

    name = "scaled"
    capabilities = lpattn.Capabilities(
        dtypes=frozenset({torch.bfloat16}),
        masks=frozenset(lpattn.MaskKind),
        hadamard=frozenset({lpattn.HadamardMode.NONE, lpattn.HadamardMode.QKV}),
    )

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def probe(self, device):
        return []

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        causal = call.causal is lpattn.CausalKind.TOP_LEFT
        return self.factor * F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=causal, enable_gqa=True
        )


@pytest.fixture
def scaled():
    """Registers that backend with a factor."""

    def register(factor: float) -> None:
        lpattn.register_backend(Scaled(factor))

    return register


@pytest.fixture
def no_fa3(monkeypatch):
    monkeypatch.setattr("variants.fa3_function", lambda: None)


def measure(shape: cases.Shape, **changes) -> dict:
    return attention.measure(shape, host_timer(1), 3, 0.0, device="cpu", **changes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("data", list(cases.DATA))
def test_exact_attention_is_exact(shape, data):
    qkv = cases.inputs(shape, data, "cpu")
    out = F.scaled_dot_product_attention(
        *qkv, attn_mask=shape.mask("cpu"), is_causal=shape.causal, enable_gqa=shape.num_heads != shape.num_kv_heads
    )
    assert cases.sqnr(out, qkv, shape) > 45
    assert cases.sqnr(out * 0.99, qkv, shape, rows=5, all_heads=True) == pytest.approx(40, abs=1.5)
    assert cases.sqnr(out * math.nan, qkv, shape) == -math.inf


def test_the_kinds_of_data_are_what_they_say():
    shape = cases.Shape(2, 4, 2, 4096, 64, False)
    q, k, v = cases.inputs(shape, "outliers", "cpu")
    # Of normal numbers, one in two million is beyond 5; of one in a thousand with variance 101, 62 %.
    assert float((q.abs() > 5).float().mean()) == pytest.approx(0.00062, rel=0.1)
    q, k, v = cases.inputs(shape, "bias", "cpu")
    spreads = [float(x.float().mean(2).std()) for x in (q, k, v)]
    assert spreads == pytest.approx([0.0, 4.0, 1.0], abs=0.5)
    assert torch.equal(q, cases.inputs(shape, "randn", "cpu")[0])


def test_padding_counts_only_what_is_seen():
    full, padded = cases.Shape(2, 2, 2, 64, 32, False), SHAPES[2]
    assert padded.flop == full.flop * (64 + 40) / (2 * 64)
    assert padded.mask("cpu").sum(-1).flatten().tolist() == [64, 40]
    assert str(padded).endswith("keys 64+40")
    assert cases.Shape(**{"kv_lengths": None, **attention.asdict(full)}) == full


def test_windows_count_only_what_is_seen():
    shape = cases.Shape(1, 2, 2, 64, 32, False, window=5)
    mask = shape.mask("cpu")
    assert shape.flop == pytest.approx(4 * 2 * 32 * float(mask.sum()))
    assert mask[0, 0, 40].nonzero().flatten().tolist() == [36, 37, 38, 39, 40]
    q, k, v = cases.inputs(shape, "randn", "cpu")
    out = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
    assert cases.sqnr(out, (q, k, v), shape) > 80


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_right_is_timed(scaled, no_fa3, shape):
    scaled(0.95)
    found = measure(shape, modes=("none", "qkv", "v_only"))
    assert set(found["speedup"]) == {"scaled", "scaled+hadamard_qkv"}
    assert found["best_exact"] in found["milliseconds"]
    assert found["sqnr_db"]["scaled"] == pytest.approx(26, abs=0.5)
    assert "hadamard" in found["refused"]["scaled+hadamard_v_only"]
    assert attention.Shape(**found["shape"]) == shape
    assert f"{shape}" in attention.line(found)
    assert "scaled+hadamard_qkv" in attention.report([found])


@pytest.mark.parametrize(
    ("factor", "data", "refused"), [(0.7, "randn", True), (0.7, "bias", False), (0.5, "bias", True)]
)
def test_what_is_wrong_is_not_timed(scaled, no_fa3, factor, data, refused):
    scaled(factor)
    found = measure(SHAPES[0], data=data)
    assert ("scaled" in found["milliseconds"]) is not refused
    assert found["refused"].get("scaled", "").startswith("wrong: ") is refused


def test_the_automatic_choice_and_the_kernel_alone_are_kept_apart(no_fa3, monkeypatch):
    class Quick:
        """FlashAttention-3's kernel, as it were."""

        def __init__(self, qkv, shape):
            self._out = F.scaled_dot_product_attention(*qkv)

        def __call__(self):
            return None

        def restored(self):
            return self._out

    monkeypatch.setattr(attention, "KernelAlone", Quick)
    found = measure(SHAPES[0], extras=True)
    assert set(found["speedup"]) == {"auto"}
    assert found["automatic"]["ran_on"] == "bf16_reference"
    assert found["automatic"]["over_sdpa"] > 0
    assert found["kernel_alone"]["milliseconds"] > 0
    for whole in ("milliseconds", "speedup", "teraflops", "spread", "sqnr_db"):
        assert attention.KERNEL not in found[whole]
    assert "without quantization" in attention.report([found])


def test_graphs_are_measured_where_there_is_a_timer_for_them(no_fa3, monkeypatch):
    monkeypatch.setattr(attention, "captured", lambda runs: lambda: [run() for run in runs])
    found = measure(SHAPES[0], extras=True, graph_timer=lambda run: host_timer(1)(run) / attention.GRAPH_CALLS)
    assert found["graph_milliseconds"].keys() == found["milliseconds"].keys()
    assert found["automatic"]["graph_over_sdpa"] > 0

    def fails(runs):
        raise RuntimeError("not while capturing")

    monkeypatch.setattr(attention, "captured", fails)
    found = measure(SHAPES[0], extras=True, graph_timer=host_timer(1))
    assert "graph_milliseconds" not in found
    assert found["refused"]["exact:sdpa as a graph"] == "RuntimeError: not while capturing"


def test_an_exact_kernel_that_cannot_be_the_best_is_dropped():
    seconds = {"exact:a": 1.0, "exact:b": 1.4, "exact:c": 1.6, "fp8_fa3": 9.0}
    usable = {name: name.upper for name in seconds}
    slow = attention.hopeless(usable, lambda run: seconds[run().lower()])
    assert set(slow) == {"exact:c"}


def test_the_budget_leaves_out(monkeypatch, no_fa3):
    monkeypatch.setattr(attention, "DeviceTimer", lambda *calls, **each: host_timer(1))
    spent = attention.Bench(Budget(0.0, 1.0), 3)
    assert spent(SHAPES, device="cpu") == []
    assert spent.left_out == [str(shape) for shape in SHAPES]
    bench = attention.Bench(Budget(60.0, 0.01), 3)
    assert len(bench(SHAPES, device="cpu")) == len(SHAPES)
    assert bench.left_out == []
    results, left_out = accuracy.measure(Budget(0.0, 1.0), [512], "cpu")
    assert (results, len(left_out)) == ([], 3)


def test_a_shape_that_nothing_exact_runs_is_left_out(monkeypatch):
    monkeypatch.setattr(attention, "DeviceTimer", lambda *calls, **each: host_timer(1))
    monkeypatch.setattr(attention, "exact_variants", lambda qkv, shape, device: {})
    bench = attention.Bench(Budget(60.0, 0.01), 3)
    assert bench(SHAPES[:1], device="cpu") == []
    assert "no exact kernel" in bench.left_out[0]


def test_accuracy_is_of_every_kind_of_data(scaled, no_fa3):
    scaled(0.9)
    results, left_out = accuracy.measure(Budget(60.0, 1.0), [96], "cpu")
    assert left_out == []
    assert [result["data"] for result in results] == ["randn", "outliers", "bias"]
    for result in results:
        assert result["sqnr_db"]["scaled"] == pytest.approx(20, abs=0.3)
        assert result["sqnr_db"]["exact:sdpa"] > 45
    assert "96, bias" in accuracy.report(results)


@pytest.mark.parametrize(
    ("given", "modes"),
    [(None, ("none",)), ([], ("none", "qkv")), (["v_only"], ("none", "v_only")), (["qkv", "v_only"], attention.MODES)],
)
def test_modes_of_a_sweep(given, modes):
    assert attention.sweep_modes(given) == modes


def test_a_sweep_has_every_kind_of_call_once():
    shapes = cases.sweep(cases.LENGTHS, cases.DIMS)
    kinds = {(s.length, s.head_dim, s.causal, s.holes, s.bias, s.num_heads != s.num_kv_heads) for s in shapes}
    masked = [length for length in cases.LENGTHS if 1024 <= length <= 16384]
    assert len(kinds) == len(shapes) == len(cases.DIMS) * (4 * len(cases.LENGTHS) + 4 * len(masked))


@pytest.mark.parametrize("kind", ["holes", "bias"])
def test_a_mask_is_in_the_reference(kind):
    shape = cases.Shape(1, 2, 1, 64, 16, False, **{kind: True})
    qkv = cases.inputs(shape, "randn", "cpu")
    given = {"attn_mask": shape.mask("cpu"), "enable_gqa": True}
    out = torch.nn.functional.scaled_dot_product_attention(*qkv, **given)
    assert cases.sqnr(out, qkv, shape) > 40
    assert cases.sqnr(torch.nn.functional.scaled_dot_product_attention(*qkv, enable_gqa=True), qkv, shape) < 20
