"""An intercepted call is neither stricter nor laxer than the function itself."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpattn


class Call(nn.Module):
    """Calls SDPA with what it is given."""

    def forward(self, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(*tensors, **options)


@pytest.fixture(params=["eager", "compiled"])
def applied(request):
    """A function that applies lpattn to a model of one call, in eager mode and compiled."""
    torch._dynamo.reset()

    def make(**settings: Any) -> nn.Module:
        model = lpattn.apply_low_precision_attention(Call(), **settings)
        return model if request.param == "eager" else torch.compile(model, backend="aot_eager", fullgraph=True)

    yield make
    torch._dynamo.reset()


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_runs_exactly(applied, marked, scale) -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    model = applied(backend="marked", on_unsupported="fallback")
    with pytest.warns(lpattn.LpattnWarning, match=f"scale {scale}: must be finite"):
        out = model(q, k, v, scale=scale)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=scale), equal_nan=True)
    assert lpattn.attention_report(model)[""].exact == {"scale": 1}
    with pytest.raises(lpattn.UnsupportedCallError, match=f"marked cannot run .* scale {scale}: must be finite"):
        applied(backend="marked")(q, k, v, scale=scale)


def test_a_scale_may_be_a_bool(applied, marked) -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    out = applied(backend="marked")(q, k, v, scale=True)
    torch.testing.assert_close(out, 2 * F.scaled_dot_product_attention(q, k, v, scale=1.0))


def of(*batch_and_heads: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, 6, 8) for batch, heads in batch_and_heads]


@pytest.mark.parametrize("settings", [{"backend": "marked"}, {"on_unsupported": "fallback"}])
def test_fewer_kv_heads_without_enable_gqa_are_refused_as_by_the_function(applied, marked, settings) -> None:
    q, k, v = of((2, 4), (2, 2), (2, 2))
    model = applied(**settings)
    for _ in range(2):
        # Compiled, it is the function's fake that refuses them.
        with pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match|broadcast a dimension of length 2"):
            model(q, k, v)
        assert not lpattn.attention_report(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lpattn.LpattnWarning)
        model(q, k, v, enable_gqa=True)
        lpattn.low_precision_sdpa(q, k, v, **settings)


def test_a_single_kv_head_needs_no_enable_gqa(applied, marked) -> None:
    q, k, v = of((2, 4), (2, 1), (2, 1))
    torch.testing.assert_close(applied(backend="marked")(q, k, v), 2 * F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4), (1, 4), (1, 4)),
        ((1, 4), (2, 4), (2, 4)),
        ((2, 4), (2, 4), (1, 4)),
        ((1, 4), (1, 4), (2, 4)),
        ((2, 4), (1, 1), (1, 1)),
        ((2, 1), (2, 4), (2, 4)),
        ((2, 4), (2, 1), (2, 4)),
        ((1, 1), (1, 1), (1, 4)),
    ],
)
def test_what_the_function_broadcasts_is_broadcast(applied, marked, shapes) -> None:
    q, k, v = of(*shapes)
    expected = F.scaled_dot_product_attention(q, k, v)
    model = applied(backend="marked", on_unsupported="fallback")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lpattn.LpattnWarning)  # compiled code counts without one
        out = model(q, k, v)
    torch.testing.assert_close(out, expected)
    assert lpattn.attention_report(model)[""].exact == {"shapes": 1}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_jit_trace_records_the_function_itself_where_it_must(marked) -> None:
    model = lpattn.apply_low_precision_attention(Call(), "marked", on_unsupported="fallback")
    q, k, v = of((2, 4), (2, 4), (1, 4))
    traced = torch.jit.trace(model, (q, k, v), check_trace=False)
    torch.testing.assert_close(traced(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert "aten::scaled_dot_product_attention" in str(traced.inlined_graph)
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        torch.jit.trace(model, of((2, 4), (2, 2), (2, 2)))
