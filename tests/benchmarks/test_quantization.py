"""benchmarks/quantization.py on the CPU, with a quantization in plain PyTorch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import quantization
import quantizers
import torch
from cases import Shape
from common import host_timer

from lpattn.norm import normalize_both
from lpattn.quantize import Granularity, hadamard_transform, quantize_e4m3
from lpattn.rope import rotate
from lpattn.types import HadamardMode

SHAPE = Shape(2, 4, 2, 65, 32, False)


def plain(query, key, value, *, hadamard, rope, norm):
    """quantize_per_head in plain PyTorch, with the mean as the constant of k and v."""
    query, key = normalize_both(query, key, norm)
    if rope is not None:
        tables = ((query, rope.cos, rope.sin), (key, rope.cos_k, rope.sin_k))
        query, key = (rotate(x.transpose(1, 2), c, s, rope.interleaved).transpose(1, 2) for x, c, s in tables)
    kv_heads = key.shape[1]
    turned = (hadamard is HadamardMode.QKV,) * 2 + (hadamard is not HadamardMode.NONE,)
    operands = [
        hadamard_transform(x.float()) if t else x.float() for x, t in zip((query, key, value), turned, strict=True)
    ]
    means = [x.mean(2, keepdim=True) for x in operands[1:]]
    operands = [operands[0], *(x - mean for x, mean in zip(operands[1:], means, strict=True))]
    q, k, v = (quantize_e4m3(x, Granularity.PER_HEAD, num_kv_heads=kv_heads) for x in operands)
    q_descale, k_descale, v_descale = (x.scale.reshape(len(query), kv_heads) for x in (q, k, v))
    return SimpleNamespace(
        query=q.data.transpose(1, 2),
        key=k.data.transpose(1, 2),
        value=v.data.transpose(1, 2),
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        constants=tuple(mean.squeeze(2) for mean in means),
        hadamard=hadamard,
    )


def without_the_constant(*qkv, **options):
    found = plain(*qkv, **options)
    found.constants = tuple(torch.zeros_like(c) for c in found.constants)
    return found


PLAIN = quantizers.Quantizer(plain, quantizers.dequantized_per_head)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return quantizers.make(SHAPE, "bshd", True, "cpu")


@pytest.mark.parametrize("layout", quantizers.LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_inputs_look_alike_in_every_layout(layout, interleaved):
    made = quantizers.make(SHAPE, layout, interleaved, "cpu")
    assert made.q.shape == (2, 4, 65, 32)
    assert made.k.shape == made.v.shape == (2, 2, 65, 32)
    assert made.q.is_contiguous() is (layout == "bhsd")
    cos, sin = made.tables(made.k)
    assert cos.shape == sin.shape == (2, 65, 2, 32)


def test_bytes_are_inputs_read_and_outputs_written_once(inputs):
    elements = 2 * 65 * 32 * (4 + 2 + 2)
    assert inputs.bytes(rope=False) == 3 * elements
    assert inputs.bytes(rope=True) == 3 * elements + 2 * 65 * 32 * 4


@pytest.mark.parametrize("kind", quantizers.KINDS, ids=lambda kind: kind.name("plain"))
@pytest.mark.parametrize("layout", quantizers.LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_right_quantization_passes(kind, layout, interleaved):
    pytest.importorskip(
        "triton", reason="the tables of a rotation are a type of the fused quantization, which needs it"
    )
    made = quantizers.make(SHAPE, layout, interleaved, "cpu")
    assert min(quantizers.quality(PLAIN, kind, made).values()) > quantization.FLOOR


@pytest.mark.parametrize("quantizer", ["per_head", "per_block"])
@pytest.mark.parametrize(
    "kind", [kind for kind in quantizers.KINDS if kind.mode is HadamardMode.NONE], ids=lambda kind: kind.name("fused")
)
def test_the_fused_quantizations_pass(inputs, kind, quantizer):
    pytest.importorskip("triton", reason="the fused quantizations are written in it")
    from lpattn.quantize.fused.launcher import INTERPRETED

    if not INTERPRETED:
        pytest.skip("tensors are on the CPU: a GPU runs the benchmark itself, which looks first")
    assert min(quantizers.quality(quantizers.quantizers()[quantizer], kind, inputs).values()) > quantization.FLOOR


@pytest.mark.parametrize("name", "qkv")
def test_each_operand_is_checked(inputs, name):
    def one_wrong(query, key, value, **options):
        qkv = {"q": query, "k": key, "v": value}
        return plain(*(x.roll(1, 2) if n == name else x for n, x in qkv.items()), **options)

    found = quantizers.quality(dataclasses.replace(PLAIN, run=one_wrong), quantizers.Kind(), inputs)
    assert [n for n, sqnr in found.items() if sqnr < quantization.FLOOR] == [name]


def test_the_constants_are_checked(inputs):
    inputs = dataclasses.replace(inputs, k=inputs.k + 2, v=inputs.v - 2)
    wrong = dataclasses.replace(PLAIN, run=without_the_constant)
    found = quantizers.quality(wrong, quantizers.Kind(), inputs)
    assert found["q"] > quantization.FLOOR > max(found["k"], found["v"])


def test_no_set_of_inputs_is_cached_when_its_turn_comes():
    for size in (10, 10**6, 10**9):
        assert (quantization.input_sets(size, 10**6) - 1) * size >= 3 * 10**6
    assert quantization.input_sets(10**9, 10**6) == 2


def test_copies_move_the_bytes():
    runs = quantization.copies(64, 3, "cpu")
    assert [run().numel() for run in runs] == [32] * 3
    assert len({tuple(run().tolist()) for run in runs}) == 3


def test_turns_are_taken():
    turn = quantization.rotating([lambda: "a", lambda: "b"])
    assert [turn() for _ in range(5)] == ["a", "b", "a", "b", "a"]


def measure(tested) -> dict:
    def capture(runs):
        assert len(runs) == quantization.GRAPH_CALLS
        return lambda: [run() for run in runs[:2]]

    timers = quantization.Timers(host_timer(1), host_timer(1))
    return quantization.measure(SHAPE, "bshd", tested, timers, 3, 0.0, cache=10**4, device="cpu", capture=capture)


def test_variants_are_compared_with_copies_of_their_size():
    pytest.importorskip(
        "triton", reason="the tables of a rotation are a type of the fused quantization, which needs it"
    )
    found = measure({"plain": PLAIN})
    assert found["refused"] == {}
    names = ["plain", "plain+hadamard_qkv", "plain+hadamard_v_only", "plain+rope", "plain+norm+rope"]
    assert list(found["variants"]) == names
    sizes = [variant["bytes"] for variant in found["variants"].values()]
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3] == sizes[4]
    assert found["variants"]["plain"]["over_plain"] == {"events": 1.0, "graph": 1.0}
    assert "plain+hadamard_v_only" in quantization.report([found])


def test_what_is_wrong_is_not_timed():
    found = measure({"wrong": dataclasses.replace(PLAIN, run=lambda *qkv, **options: plain(*qkv[::-1], **options))})
    assert found["variants"] == {}
    assert len(found["refused"]) == len(quantizers.KINDS)
    assert quantization.report([found])


def test_ratios():
    variant = {"bytes": 10**9, "plain": "a"}
    times = {"events": {"a": [2.0], "b": [4.0], quantization.copy_name(10**9): [1.0]}}
    found = quantization.summary("b", variant, times)
    assert found["fraction_of_copy"]["events"] == 0.25
    assert found["over_plain"]["events"] == 2.0
    assert found["terabytes_per_second"]["events"] == pytest.approx(0.00025)


def test_host_times_name_what_could_not_run():
    found = quantization.host({"plain": PLAIN}, 3, 0.0, dataclasses.replace(SHAPE, num_kv_heads=4), "cpu")
    assert set(found["microseconds"]) == {"plain: quantize q, k, v", "plain SDPA"}
    assert list(found["refused"]) == ["low_precision_sdpa, fp8_fa3"]
    assert found["target_met"] is None
    assert "low_precision_sdpa, fp8_fa3: " in quantization.host_report(found)
