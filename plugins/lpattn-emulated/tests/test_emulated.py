import pytest
import torch

from lpattn import AttentionCall, CausalKind, HadamardMode, MaskKind
from lpattn_emulated import EmulatedBackend, lpattn_backends


def call(**changes):
    sizes = {"batch": 1, "num_heads": 4, "num_kv_heads": 2, "q_len": 20, "kv_len": 30, "head_dim": 40, "head_dim_v": 24}
    return AttentionCall(**(sizes | {"dtype": torch.float32, "device_type": "cpu", "softmax_scale": 0.2} | changes))


def qkv(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(1, *shape, dtype=dtype) for shape in ((4, 20, 40), (2, 30, 40), (2, 30, 24))]


def test_the_hook_returns_the_backend_and_it_runs_here():
    (backend,) = lpattn_backends()
    assert backend.name == "fp8_emulated"
    assert not backend.automatic
    assert backend.probe(torch.device("cpu")) == []


def test_a_device_that_cannot_is_a_reason_and_not_an_exception():
    (reason,) = EmulatedBackend().probe(torch.device("cuda:99"))
    assert reason.code == "e4m3"
    assert "cuda:99" in reason.message


@pytest.mark.parametrize(("said", "told"), [("no e4m3\nCompile with ...", "no e4m3"), ("", "RuntimeError")])
def test_of_a_long_error_the_first_line_is_told(monkeypatch, said, told):
    def refuse(*args, **options):
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "zeros", refuse)
    (reason,) = EmulatedBackend().probe(torch.device("cpu"))
    assert reason.message == f"cpu cannot cast to float8_e4m3fn: {told}"


def test_dropout_is_refused():
    (reason,) = EmulatedBackend().supports(call(dropout=True))
    assert reason.code == "dropout"


@pytest.mark.parametrize("dtype", sorted(EmulatedBackend.capabilities.dtypes, key=str), ids=str)
@pytest.mark.parametrize("hadamard", HadamardMode)
@pytest.mark.parametrize("causal", CausalKind)
@pytest.mark.parametrize("mask", MaskKind)
def test_what_it_declares_it_runs(dtype, hadamard, causal, mask):
    backend, (q, k, v) = EmulatedBackend(), qkv(dtype)
    this = call(dtype=dtype, hadamard=hadamard, causal=causal, mask=mask, return_lse=True)
    assert backend.supports(this) == []
    bias = None if mask is MaskKind.NONE else torch.randn(1, 4, 20, 30).to(dtype)
    attn_mask = bias > -1 if mask is MaskKind.BOOL else bias
    out, lse = backend.attention(q, k, v, this, attn_mask)
    tril = torch.ones(20, 30, dtype=torch.bool).tril()
    exact_mask = attn_mask
    if causal is CausalKind.TOP_LEFT:
        exact_mask = tril if mask is MaskKind.NONE else attn_mask & tril if mask is MaskKind.BOOL else attn_mask
        exact_mask = exact_mask.masked_fill(~tril, -torch.inf) if mask is MaskKind.ADDITIVE else exact_mask
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, exact_mask, scale=0.2, enable_gqa=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # e4m3 gives about 25 dB here; a wrong mask, scale or rotation gives less than 10.
    assert (out - exact).square().sum() < 10**-2 * exact.square().sum()
