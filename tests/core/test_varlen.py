"""Packed sequences: what they mean, which backend they go to, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import lpattn
from lpattn.calls import build_call
from lpattn.settings import make_settings

LENGTHS_Q, LENGTHS_K = [5, 0, 12, 3], [7, 4, 12, 0]


def starts(lengths):
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


def packed(heads=4, kv_heads=2, dim=16, dim_v=24, extra=2):
    torch.manual_seed(0)
    q = torch.randn(sum(LENGTHS_Q) + extra, heads, dim)
    k, v = (torch.randn(sum(LENGTHS_K) + extra, kv_heads, d) for d in (dim, dim_v))
    return q, k, v, starts(LENGTHS_Q), starts(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K)


def exact(*inputs, **options):
    return lpattn.low_precision_varlen_sdpa(*inputs, backend="bf16_reference", **options)


def expected(q, k, v, cu_q, cu_k, window, scale=None):
    """Sequence by sequence and query by query, in float64."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for sequence in range(len(cu_q) - 1):
        (a, b), (c, d) = cu_q[sequence : sequence + 2].tolist(), cu_k[sequence : sequence + 2].tolist()
        for i in range(a, b):
            position = i - a + (d - c) - (b - a)
            keys = [
                c + j
                for j in range(d - c)
                if (window[0] < 0 or j >= position - window[0]) and (window[1] < 0 or j <= position + window[1])
            ]
            if keys:
                groups = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
                logits = (q[i].double()[:, None] * k[keys][:, groups].double().transpose(0, 1)).sum(-1) * scale
                out[i] = (logits.softmax(-1)[..., None] * v[keys][:, groups].double().transpose(0, 1)).sum(1)
                lse[i] = logits.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 3), (0, 0), (3, -1)])
def test_every_sequence_attends_to_itself(window) -> None:
    inputs = packed()
    out, lse = exact(*inputs, window_size=window, return_lse=True)
    want, want_lse = expected(*inputs[:5], window)
    assert torch.allclose(out.double(), want, atol=1e-5)
    assert torch.allclose(lse.double(), want_lse, atol=1e-5)
    assert torch.equal(exact(*inputs, window_size=window), out)


def test_keys_of_the_queries_sequences() -> None:
    q, k, v = torch.randn(3, 20, 4, 16)
    cu = starts([8, 12])
    out = exact(q, k, v, cu, None, 12, 12, scale=0.3)
    assert torch.allclose(out.double(), expected(q, k, v, cu, cu, (-1, -1), 0.3)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["fp8_triton", "int8_triton"])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1)])
def test_the_portable_kernel_on_packed_sequences(name, window, sqnr) -> None:
    pytest.importorskip("triton", reason="triton, in which the kernel is written, is not installed")
    from lpattn import varlen
    from lpattn.backends.triton.kernels import portable_for
    from lpattn.types import HadamardMode

    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [x.to(device) if isinstance(x, torch.Tensor) else x for x in packed()]
    q, k, v, cu_q, cu_k, max_q, max_k = inputs
    call = varlen.build_call(q, k, v, cu_q, max_q, max_k, None, HadamardMode.NONE, True, window, False)
    out, lse = portable_for(call, name == "int8_triton").attend_packed(q, k, v, cu_q, cu_k, call)
    want, want_lse = expected(*(x.cpu() for x in inputs[:5]), window)
    assert sqnr(out.cpu(), want) > (20 if name == "fp8_triton" else 35)
    assert torch.equal(lse.cpu() == -torch.inf, want_lse == -torch.inf)
    seen = want_lse > -torch.inf
    assert not out.cpu()[~seen].any()
    assert (lse.cpu() - want_lse)[seen].abs().max() < 0.2


def on_the_kernel(name, q, k, v, cu_q, cu_k, max_q, max_k):
    """(output, lse) of the portable kernel: interpreted, or on the GPU."""
    pytest.importorskip("triton", reason="triton, in which the kernel is written, is not installed")
    from lpattn import varlen
    from lpattn.backends.triton.kernels import portable_for
    from lpattn.types import HadamardMode

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, cu_q, cu_k = (x.to(device) for x in (q, k, v, cu_q, cu_k))
    call = varlen.build_call(q, k, v, cu_q, max_q, max_k, None, HadamardMode.NONE, True, (-1, -1), False)
    out, lse = portable_for(call, name == "int8_triton").attend_packed(q, k, v, cu_q, cu_k, call)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("name", ["fp8_triton", "int8_triton"])
@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"max_q": 11}, [2]),
        ({"max_k": 6}, [0, 2]),
        ({"max_q": 1, "max_k": 1}, [0, 2, 3]),
        ({"cu_k": [0, 7, 11, 23, 27]}, [3]),
        ({"cu_k": [0, 7, 11, 23, 90]}, [3]),
        ({"cu_k": [0, 7, 16, 12, 12]}, [2]),
        ({"cu_q": [0, 5, 5, 17, 27]}, [3]),
    ],
)
def test_a_sequence_that_contradicts_is_nan_and_the_others_are_right(name, change, wrong, sqnr) -> None:
    """The kernel cannot wait for lengths on a GPU: it touches no other memory, and nobody takes the result for one."""
    names = ("q", "k", "v", "cu_q", "cu_k", "max_q", "max_k")
    given = dict(zip(names, packed(), strict=True))
    starts_q = given["cu_q"].tolist()
    given |= {n: torch.tensor(x, dtype=torch.int32) if n.startswith("cu") else x for n, x in change.items()}
    out, lse = on_the_kernel(name, **given)
    want, want_lse = expected(*(given[n] for n in names[:3]), *fitting(given), (-1, -1))
    for sequence in range(4):
        tokens = slice(starts_q[sequence], starts_q[sequence + 1])
        if sequence in wrong:
            assert out[tokens].isnan().all()
            assert lse[tokens].isnan().all()
        elif (want_lse[tokens] > -torch.inf).any():
            assert sqnr(out[tokens], want[tokens]) > 15


def fitting(given):
    """The lengths without what contradicts the tensors."""
    found = []
    for name, x in (("cu_q", given["q"]), ("cu_k", given["k"])):
        found.append(given[name].clamp_max(x.shape[0]))
    return found


@pytest.mark.parametrize("name", ["fp8_triton", "int8_triton"])
def test_tokens_in_front_of_the_first_sequence_are_in_none(name, sqnr) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k = packed()
    out, lse = on_the_kernel(name, q, k, v, cu_q + 2, cu_k + 2, max_q, max_k)
    want, _ = expected(q, k, v, cu_q + 2, cu_k + 2, (-1, -1))
    assert not out[:2].any()
    assert (lse[:2] == -torch.inf).all()
    assert sqnr(out, want) > (20 if name == "fp8_triton" else 35)


@pytest.mark.parametrize("name", ["fp8_triton", "int8_triton"])
def test_parts_of_one_tensor(name, sqnr) -> None:
    """As a projection writes q, k and v: one behind the other in each token, behind tokens of somebody else."""
    torch.manual_seed(0)
    together = torch.randn(30, 3, 2, 16)[5:]
    q, k, v = together.unbind(1)
    cu = starts([9, 16])
    out, _ = on_the_kernel(name, q, k, v, cu, cu, 16, 16)
    assert sqnr(out, expected(q, k, v, cu, cu, (-1, -1))[0]) > (20 if name == "fp8_triton" else 35)


def test_backends_that_do_not_take_them_say_so() -> None:
    class Plain(lpattn.Backend):
        name = "plain"
        capabilities = lpattn.Capabilities(dtypes=frozenset({torch.float32}), head_dim_v_differs=True)

        def probe(self, device):
            return []

        def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
            raise AssertionError

    lpattn.register_backend(Plain())
    inputs = packed()
    with pytest.raises(lpattn.UnsupportedCallError, match=r"plain +packed sequences: takes \[B, H, S, D\] only"):
        lpattn.low_precision_varlen_sdpa(*inputs, backend="plain")
    with pytest.warns(lpattn.LpattnWarning, match="packed sequences, window"):
        out = lpattn.low_precision_varlen_sdpa(*inputs, backend="plain", on_unsupported="fallback")
    assert torch.equal(out, exact(*inputs))


def test_an_output_of_another_shape_is_refused() -> None:
    class Wrong(lpattn.Backend):
        name = "wrong"
        capabilities = lpattn.Capabilities(dtypes=frozenset({torch.float32}), head_dim_v_differs=True, varlen=True)

        def probe(self, device):
            return []

        def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
            raise AssertionError

        def varlen_attention(self, query, key, value, cu_seqlens_q, cu_seqlens_k, call):
            return query

    lpattn.register_backend(Wrong())
    with pytest.raises(lpattn.BackendError, match=r"backend 'wrong' returned \[22, 4, 16\] torch.float32; it must be"):
        lpattn.low_precision_varlen_sdpa(*packed(), backend="wrong")


def test_nothing_to_attend_to() -> None:
    q = torch.randn(0, 2, 8)
    out, lse = lpattn.low_precision_varlen_sdpa(q, q, q, starts([0]), None, 0, 0, return_lse=True)
    assert out.shape == (0, 2, 8)
    assert lse.shape == (0, 2)
    q = torch.randn(3, 2, 8)
    out = lpattn.low_precision_varlen_sdpa(q, q[:0], q[:0], starts([3]), starts([0]), 3, 0)
    assert not out.any()


def test_gradients_flow_through_the_exact_path() -> None:
    q, k, v = (torch.randn(6, 2, 8, requires_grad=True) for _ in range(3))
    exact(q, k, v, starts([2, 4]), None, 4, 4).sum().backward()
    assert v.grad.abs().sum() > 0


def test_as_an_operator_in_a_graph() -> None:
    inputs = packed()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v, cu_q, cu_k):
        return exact(q, k, v, cu_q, cu_k, 12, 12, window_size=(2, 0), return_lse=True)

    with torch.no_grad():
        out, lse = run(*inputs[:5])
        want, want_lse = exact(*inputs, window_size=(2, 0), return_lse=True)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_opcheck() -> None:
    q, k, v, cu_q, cu_k, max_q, max_k = packed()
    text = make_settings("bf16_reference", None, None, lpattn.Provenance.ARGUMENT).text
    options = (q, k, v, cu_q, cu_k, max_q, max_k, None, -1, 0, None, text)
    checks = ("test_schema", "test_faketensor")
    for operator in (torch.ops.lpattn.varlen_sdpa.default, torch.ops.lpattn.varlen_sdpa_lse.default):
        torch.library.opcheck(operator, options, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"query": torch.randn(1, 5, 4, 16)}, r"query must be a \[T, H, D\] tensor of packed sequences; got \[1, 5"),
        ({"key": torch.randn(9, 2, 8)}, r"key must be \[T_k, Hkv, 16\]"),
        ({"key": torch.randn(9, 3, 16), "value": torch.randn(9, 3, 16)}, "multiple of key's; got 4 and 3"),
        ({"value": torch.randn(9, 2, 16).double()}, "value must have the dtype and device of query"),
        ({"cu_seqlens_q": torch.zeros(3)}, r"cu_seqlens_q must be int32 \[sequences \+ 1\]"),
        ({"cu_seqlens_k": torch.zeros(4, dtype=torch.int32)}, "must name as many sequences"),
        ({"max_q": -1}, "max_q and max_k must be whole numbers"),
        ({"max_k": True}, "max_q and max_k must be whole numbers"),
        ({"window_size": (1,)}, r"window_size must be \(left, right\)"),
        ({"window_size": None}, r"window_size must be \(left, right\), two whole numbers.*; got None"),
        ({"window_size": (True, 0)}, r"window_size must be \(left, right\)"),
        ({"scale": "1"}, "scale must be a finite number, or None.*; got '1'"),
        ({"scale": math.inf}, "scale must be a finite number, or None.*; got inf"),
        ({"query": torch.ones(9, 4, 16, dtype=torch.int32)}, "query must be floating point; got torch.int32"),
        ({"query": torch.randn(9, 4, 0)}, r"query must have heads and a head_dim; got \[9, 4, 0\]"),
        ({"value": torch.randn(25, 0, 16)}, r"value must have heads and a head_dim; got \[25, 0, 16\]"),
        ({"max_q": 11}, "max_q is 11, and sequence 2 has 12 tokens; pass the largest"),
        ({"max_k": 6}, "max_k is 6, and sequence 2 has 12 tokens"),
        ({"cu_seqlens_k": torch.tensor([0, 7, 11, 23, 90])}, "cu_seqlens_k ends at 90, behind the last of 25 tokens"),
        ({"cu_seqlens_q": torch.tensor([0, 5, 4, 17, 20])}, "cu_seqlens_q must not be negative or decrease"),
        ({"cu_seqlens_q": torch.tensor([-1, 5, 5, 17, 20])}, "cu_seqlens_q must not be negative or decrease"),
    ],
)
def test_wrong_inputs(change, text) -> None:
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "max_q", "max_k")
    given = dict(zip(names, packed(), strict=True)) | change
    with pytest.raises(lpattn.InvalidArgumentError, match=text):
        lpattn.low_precision_varlen_sdpa(**given)


def test_a_call_that_is_not_packed_says_nothing_of_it() -> None:
    q = torch.randn(1, 2, 4, 8)
    call = build_call(q, q, q, None, 0.0, False, None, lpattn.HadamardMode.NONE, False)
    assert call.varlen is None
    assert "packed" not in call.describe()
    assert math.isclose(call.softmax_scale, 8**-0.5)
