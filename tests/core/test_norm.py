"""low_precision_rope_sdpa with a norm: q and k over their root mean square, rotated, then attended to."""

import pytest
import torch

import lpattn
from lpattn import InvalidArgumentError, LpattnWarning, Norm, ops
from lpattn.ledger import Ledger
from lpattn.norm import normalize, scale_tokens
from lpattn.settings import Settings
from lpattn.types import Provenance

BACKENDS = pytest.mark.parametrize("backend", ["bf16_reference", "plain", "rotating", "by_head", "normalizing"])
"""The reference, a backend without a rotation, one with, and one with a norm, too."""
EPS = 0.1


def inputs(dtype=torch.float32):
    """q, k, v [B, S, H, D], grouped, with rows of different sizes; cos and sin; a weight for each of q and k."""
    torch.manual_seed(0)
    size = torch.logspace(-1, 1, 6)[:, None, None]
    q, k, v = ((torch.randn(2, 6, h, 8) * size).to(dtype) for h in (4, 2, 2))
    return (q, k, v, torch.randn(1, 6, 1, 4), torch.randn(1, 6, 1, 4)), (torch.randn(8), torch.randn(8))


@pytest.fixture
def backends(add_backend):
    return {
        "plain": add_backend("plain", rank=0.5),
        "rotating": add_backend("rotating", rank=0.5, fused_rope=True),
        "normalizing": add_backend("normalizing", rank=0.5, fused_rope=True, norm=True, norm_over_heads=True),
        "by_head": add_backend("by_head", rank=0.5, fused_rope=True, norm=True),
    }


@pytest.fixture
def expected(plain, rotation, normal, scaled):
    """By the formulas in float64: output and log-sum-exp."""

    def attend(q, k, v, cos, sin, norm, **options):
        if norm.rstd_q is None:
            q, k = normal(q, norm.eps_q, norm.weight_q), normal(k, norm.eps_k, norm.weight_k)
        else:
            q, k = scaled(q, norm.rstd_q, norm.weight_q), scaled(k, norm.rstd_k, norm.weight_k)
        q, k = (rotation(x, cos, sin, False).transpose(1, 2) for x in (q, k))
        return plain(q, k, v.transpose(1, 2), **options)

    return attend


@BACKENDS
@pytest.mark.parametrize(("eps_q", "eps_k"), [(EPS, 0.0), (EPS, None), (None, EPS)])
@pytest.mark.parametrize("weighted", ["qk", "q", "k", ""])
def test_each_tensor_has_a_norm_of_its_own(backends, expected, backend, eps_q, eps_k, weighted):
    given, weights = inputs()
    chosen = zip("qk", weights, (eps_q, eps_k), strict=True)
    norm = Norm(eps_q, eps_k, *(w if name in weighted and eps is not None else None for name, w, eps in chosen))
    copies = [t.clone() for t in given]
    out, lse = lpattn.low_precision_rope_sdpa(*given, norm=norm, backend=backend, return_lse=True, is_causal=True)
    want, want_lse = expected(*given, norm, is_causal=True)
    torch.testing.assert_close(out, want.float(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, want_lse.float(), atol=2e-5, rtol=2e-5)
    assert all(torch.equal(t, c) for t, c in zip(given, copies, strict=True))
    if backend in ("rotating", "by_head", "normalizing"):
        assert backends[backend].norms == [None if backend == "rotating" else norm]


def over_heads(weighted=True):
    """A norm over all heads, of no tensor that there is: numbers and weights are taken as they come."""
    torch.manual_seed(1)
    rstd = (0.5 + torch.rand(2, 6), 0.5 + torch.rand(2, 6))
    return Norm(None, None, *((torch.randn(4, 8), torch.randn(2, 8)) if weighted else (None, None)), *rstd)


@BACKENDS
@pytest.mark.parametrize("weighted", [True, False])
def test_over_all_heads(backends, expected, backend, weighted):
    given, _ = inputs()
    norm = over_heads(weighted)
    out, lse = lpattn.low_precision_rope_sdpa(*given, norm=norm, backend=backend, return_lse=True, is_causal=True)
    want, want_lse = expected(*given, norm, is_causal=True)
    torch.testing.assert_close(out, want.float(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, want_lse.float(), atol=2e-5, rtol=2e-5)
    if backend in ("rotating", "by_head", "normalizing"):
        assert backends[backend].norms == [norm if backend == "normalizing" else None]


def test_over_all_heads_as_the_docstring_computes_it(backends):
    """What PyTorch makes of [B, S, H * D]."""
    (q, k, v, cos, sin), _ = inputs()
    weights = [torch.randn(x.shape[2:]) for x in (q, k)]
    rstd = [x.flatten(2).square().mean(-1).add(EPS).rsqrt() for x in (q, k)]
    out = lpattn.low_precision_rope_sdpa(
        q, k, v, cos, sin, norm=Norm(None, None, *weights, *rstd), backend="normalizing"
    )
    q, k = (
        torch.nn.functional.rms_norm(x.flatten(2), [x[0, 0].numel()], w.flatten(), EPS).view(x.shape)
        for x, w in zip((q, k), weights, strict=True)
    )
    torch.testing.assert_close(out, lpattn.low_precision_rope_sdpa(q, k, v, cos, sin, backend="rotating"))


@BACKENDS
def test_autocast(backends, expected, backend):
    given, weights = inputs()
    norm = Norm(EPS, EPS, *weights)
    with torch.autocast("cpu", torch.bfloat16):
        out = lpattn.low_precision_rope_sdpa(*given, norm=norm, backend=backend)
    torch.testing.assert_close(out.double(), expected(*given, norm)[0], atol=0.1, rtol=5e-2)


@pytest.mark.parametrize("over", ["head", "heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_is_rounded_once(normal, scaled, dtype, over):
    x, weight = (100 * torch.randn(3, 5, 2, 64)).to(dtype), torch.randn(2, 64)
    if over == "head":
        got, want = normalize(x, 1e-6, weight[0]), normal(x, 1e-6, weight[0])
    else:
        rstd = torch.rand(3, 5) / 100
        got, want = scale_tokens(x, rstd, weight), scaled(x, rstd, weight)
    assert got.dtype == dtype
    step = 4e-7 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps / 2
    limit = step if dtype != torch.float64 else 1e-15
    assert ((got.double() - want).abs() <= 1.01 * limit * want.abs() + 1e-7 * (dtype == torch.float16)).all()


def test_what_pytorch_means_by_it():
    x, weight = torch.randn(3, 5, 2, 64), torch.randn(64)
    torch.testing.assert_close(normalize(x, 1e-3, weight), torch.nn.functional.rms_norm(x, (64,), weight, 1e-3))


@pytest.mark.parametrize("which", ["rstd_q", "rstd_k"])
def test_what_tokens_are_multiplied_with_is_not_detached(backends, which):
    given, norm = inputs()[0], over_heads()
    getattr(norm, which).requires_grad_()
    with pytest.warns(LpattnWarning, match="require grad"):
        out = lpattn.low_precision_rope_sdpa(*given, norm=norm)
    out.sum().backward()
    assert getattr(norm, which).grad.abs().max() > 0


@pytest.mark.parametrize("which", ["weight_q", "weight_k"])
def test_a_weight_that_requires_grad_is_not_detached(backends, which):
    given, weights = inputs()
    norm = Norm(EPS, EPS, *weights)
    getattr(norm, which).requires_grad_()
    with pytest.warns(LpattnWarning, match="require grad"):
        out = lpattn.low_precision_rope_sdpa(*given, norm=norm)
    out.sum().backward()
    assert getattr(norm, which).grad.abs().max() > 0


def test_the_report_says_who_normalized(backends):
    class Attention(torch.nn.Module):
        def forward(self, given, norm, backend):
            return lpattn.low_precision_rope_sdpa(*given, norm=norm, backend=backend)

    model = torch.nn.Sequential()
    model.attn = Attention()
    lpattn.apply_low_precision_attention(model)
    given, weights = inputs()
    for backend, norm, said in (
        ("normalizing", Norm(EPS, EPS, *weights), "fused"),
        ("normalizing", Norm(EPS, None), "fused in q"),
        ("normalizing", Norm(None, EPS), "fused in k"),
        ("normalizing", over_heads(), "fused"),
        ("by_head", over_heads(), "by_head has no fused norm over all heads"),
        ("rotating", Norm(EPS, EPS), "rotating has no fused norm"),
        ("plain", Norm(EPS, EPS), "plain has no fused norm"),
        ("normalizing", None, None),
    ):
        model.attn(given, norm, backend)
        report = lpattn.attention_report(model)
        assert report["attn"].norm == said
        assert (f"; norm {said}" in str(report)) == (said is not None)
    with torch.autocast("cpu", torch.bfloat16):
        model.attn(given, Norm(EPS, EPS), "normalizing")
    assert lpattn.attention_report(model)["attn"].norm == "autocast is enabled"


@pytest.mark.parametrize(
    ("norm", "text"),
    [
        ("rms", "norm must be a lpattn.Norm; got str"),
        (Norm("a", None), "norm.eps_q must be a number, or None; got 'a' (str)"),
        (Norm(EPS, True), "norm.eps_k must be a number, or None; got True (bool)"),
        (Norm(EPS, EPS, [1.0] * 8), "norm.weight_q must be a tensor, or None; got list"),
        (Norm(-1.0, EPS), "norm.eps_q must be at least 0 and finite, or None; got -1.0"),
        (Norm(EPS, float("inf")), "norm.eps_k must be at least 0 and finite, or None; got inf"),
        (
            Norm(EPS, None, None, torch.ones(8)),
            "norm.weight_k is given, but norm.eps_k is None: k has no norm",
        ),
        (
            Norm(EPS, EPS, torch.ones(4, 8)),
            "norm.weight_q must be float16, bfloat16, float32 or float64 of shape [head_dim] = [8]; "
            "got torch.float32 [4, 8]",
        ),
        (
            Norm(EPS, EPS, None, torch.ones(8, dtype=torch.int64)),
            "norm.weight_k must be float16, bfloat16, float32 or float64 of shape [head_dim] = [8]; "
            "got torch.int64 [8]",
        ),
        (Norm(EPS, EPS, torch.ones(8, device="meta")), "norm.weight_q must be on cpu as q is; got meta"),
        (Norm(), "norm has neither eps nor rstd, of q or of k: it normalizes nothing; pass norm=None"),
        (
            Norm(EPS, EPS, torch.ones(8).to(torch.float8_e4m3fn)),
            "norm.weight_q must be float16, bfloat16, float32 or float64 of shape [head_dim] = [8]; got "
            "torch.float8_e4m3fn [8]",
        ),
        (
            Norm(EPS, EPS, torch.ones(8).to_sparse()),
            "norm.weight_q must be a dense tensor; got torch.sparse_coo: pass its to_dense()",
        ),
        (
            Norm(rstd_k=torch.ones(2, 6)),
            "norm.rstd_q must be a tensor (rstd_q and rstd_k go together); got NoneType",
        ),
        (
            Norm(rstd_q=torch.ones(2, 6), rstd_k=torch.ones(2, 6, 1)),
            "norm.rstd_k must be float16, bfloat16, float32 or float64 of shape [B, S] = [2, 6]; "
            "got torch.float32 [2, 6, 1]",
        ),
        (
            Norm(None, EPS, rstd_q=torch.ones(2, 6), rstd_k=torch.ones(2, 6)),
            "norm.eps_k is given beside norm.rstd_q or norm.rstd_k: eps belongs to a norm over head_dim, and where a "
            "norm spans heads, to the computation of rstd",
        ),
        (
            Norm(None, None, torch.ones(8), torch.ones(8), torch.ones(2, 6), torch.ones(2, 6)),
            "norm.weight_q must be float16, bfloat16, float32 or float64 of shape [H, head_dim] = [4, 8]; "
            "got torch.float32 [8]",
        ),
        (
            Norm(None, None, None, torch.ones(2, 8), torch.ones(2, 6), torch.ones(2, 6)),
            "norm.weight_q and norm.weight_k go together beside norm.rstd_q; got only one of them: pass ones for the "
            "other",
        ),
    ],
)
def test_wrong_norms(norm, text):
    with pytest.raises(InvalidArgumentError) as caught:
        lpattn.low_precision_rope_sdpa(*inputs()[0], norm=norm)
    assert str(caught.value) == text


# The operators of compiled graphs

FAKE = Settings("normalizing", provenance=Provenance.MODEL).text
EXACT = Settings("bf16_reference", provenance=Provenance.MODEL).text
OPERATORS = pytest.mark.parametrize("operator", [ops.rope_sdpa, ops.rope_sdpa_lse])


def arguments(settings, *norm, layer=None):
    given, _ = inputs()
    return *given, None, None, False, None, 0.0, False, None, layer, settings, *norm


@OPERATORS
@pytest.mark.parametrize("settings", [FAKE, EXACT], ids=["fake", "exact"])
@pytest.mark.parametrize("which", ["both", "q", "over_heads", "unweighted"])
def test_opcheck(backends, operator, settings, which):
    _, (of_q, of_k) = inputs()
    norm = {
        "both": (EPS, 0.2, of_q, of_k),
        "q": (EPS, None, of_q, None, None, None, "k: no"),
        "over_heads": (None, None, *over_heads().tensors),
        "unweighted": (0.0, 0.0),
    }[which]
    torch.library.opcheck(operator, arguments(settings, *norm), test_utils=("test_schema", "test_faketensor"))


@OPERATORS
def test_operators_compute_what_the_function_computes(backends, operator):
    given, weights = inputs()
    lse = operator is ops.rope_sdpa_lse
    spanning = over_heads()
    want = lpattn.low_precision_rope_sdpa(*given, norm=spanning, backend="normalizing", return_lse=lse)
    torch.testing.assert_close(operator(*arguments(FAKE, None, None, *spanning.tensors)), want)
    del backends["normalizing"].norms[:]
    want = lpattn.low_precision_rope_sdpa(*given, norm=Norm(EPS, 0.2, *weights), backend="normalizing", return_lse=lse)
    torch.testing.assert_close(operator(*arguments(FAKE, EPS, 0.2, *weights)), want)
    one, two = backends["normalizing"].norms
    assert (one.eps_q, one.eps_k) == (two.eps_q, two.eps_k)


def test_why_a_norm_was_not_fused_reaches_the_report(backends):
    ledger = Ledger()
    tag = torch.tensor(ledger.id)
    for norm, said in (
        ((EPS, EPS, None, None, None, None, ""), "fused"),
        ((EPS, None, None, None, None, None, "k: no norm"), "fused in q; k: no norm"),
        ((None, None, None, None, None, None, "q: no; k: no"), "q: no; k: no"),
        ((), None),
    ):
        ops.rope_sdpa(*arguments(FAKE, *norm, layer=tag))
        assert ledger.norm == said


@pytest.mark.parametrize("norm", [Norm(EPS, 0.2, *inputs()[1]), over_heads()], ids=["of_a_head", "over_heads"])
def test_it_is_traced(backends, expected, norm):
    given, _ = inputs()
    run = torch.compile(
        lambda *given: lpattn.low_precision_rope_sdpa(*given, norm=norm, backend="normalizing"),
        backend="aot_eager",
        fullgraph=True,
    )
    with torch.no_grad():
        torch.testing.assert_close(run(*given), expected(*given, norm)[0].float(), atol=2e-5, rtol=2e-5)
    assert len(backends["normalizing"].norms) == 1


@pytest.mark.parametrize("why", ["q", "rstd_q", "weight_k", "autocast"])
def test_what_the_operator_does_not_take_is_normalized_while_it_is_traced(backends, expected, why):
    """Gradients and autocast are decided on while the graph is made."""
    given, norm = inputs()[0], over_heads()
    run = torch.compile(
        lambda *given: lpattn.low_precision_rope_sdpa(*given, norm=norm),
        backend="aot_eager",
        fullgraph=True,
    )
    if why == "autocast":
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out = run(*given)
        torch.testing.assert_close(out.double(), expected(*given, norm)[0], atol=0.1, rtol=5e-2)
        return
    leaf = given[0] if why == "q" else getattr(norm, why)
    leaf.requires_grad_()
    out = run(*given)
    torch.testing.assert_close(
        out.detach(), expected(*(t.detach() for t in given), norm)[0].float(), atol=2e-5, rtol=2e-5
    )
    out.sum().backward()
    assert leaf.grad.abs().max() > 0
