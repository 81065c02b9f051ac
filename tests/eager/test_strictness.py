"""An intercepted call is neither stricter nor laxer than the function itself."""

from __future__ import annotations

import math
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
