"""One SDPA call under settings: run at once in eager mode, put into the graph while the code is traced."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lpattn import ops
from lpattn.active import active, outside_redirection
from lpattn.calls import cast_like_autocast, is_grouped, needs_grad, without_causal_bias
from lpattn.errors import InvalidArgumentError, UnsupportedCallError
from lpattn.execute import attend
from lpattn.plan import refusal_outside
from lpattn.settings import Settings, from_text, with_environment
from lpattn.tracing import constant_while_tracing, is_traced
from lpattn.types import Reason


def redirect(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    # No 0.0: where all sizes are dynamic, Dynamo makes such a default an input of the graph, and compiles twice.
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    settings: Settings,
) -> Any:
    """A call of SDPA that was intercepted; arguments and result are SDPA's."""
    # It overrides SDPA itself, but a mode comes first, and no operator of a graph would know of it.
    attn_mask, is_causal = without_causal_bias(attn_mask, is_causal, query)
    if is_traced():
        if not enable_gqa and is_grouped(query, key):  # SDPA refuses the call
            return _sdpa_itself(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        return put_into_graph(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, settings=settings)
    layer = active.layer
    ledger = None if layer is None else layer.ledger
    return attend(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, settings=settings, ledger=ledger
    )


def put_into_graph(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    settings: Settings,
    return_lse: bool = False,
) -> Any:
    """The same while the code is traced: an operator, or SDPA itself where a graph can hold nothing else.

    Raises:
        UnsupportedCallError: strict settings, and the call must stay SDPA.
        InvalidArgumentError: so it must, and ``return_lse``, which SDPA does not have.
    """
    layer = active.layer
    if reason := _unfit_for_graph(query, key, value, attn_mask, dropout_p, is_causal):
        if refusal := _refusal_while_tracing(settings.text, *reason):
            raise UnsupportedCallError(refusal)
        if return_lse:
            raise InvalidArgumentError(f"return_lse cannot be traced for this call: {reason[1]}")
        if layer is not None:
            ops.count_exact(layer.tag, *reason)
        grouped = enable_gqa or is_grouped(query, key)
        return _sdpa_itself(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped)
    query, key, value, attn_mask = cast_like_autocast(query, key, value, attn_mask)
    if torch.compiler.is_dynamo_compiling():
        _look_for_rope()
    operator = ops.sdpa_lse if return_lse else ops.sdpa
    tag = None if layer is None else layer.tag
    return operator(query, key, value, attn_mask, dropout_p, is_causal, scale, tag, settings.text)


def _sdpa_itself(*args: Any, **options: Any) -> torch.Tensor:
    """SDPA, not redirected. For Dynamo it is not in any case: the mode that redirects is off while it does so."""
    if torch.compiler.is_dynamo_compiling():
        return F.scaled_dot_product_attention(*args, **options)
    with outside_redirection():
        return F.scaled_dot_product_attention(*args, **options)


def _unfit_for_graph(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> tuple[str, str] | None:
    """Code and message of why a traced call must stay PyTorch's own SDPA; None if it can become an operator."""
    if needs_grad(query, key, value, attn_mask):
        return "requires_grad", "inputs require grad, and compiled low precision has no backward pass"
    if dropout_p > 0.0:
        return "dropout", "dropout_p > 0: an operator's random numbers would not be the compiler's"
    if query.is_nested or query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return "dimensions", "q, k, v are not plain [B, H, S, D] tensors"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return "shapes", "q, k and v have different batch sizes"
    if key.shape[1] != value.shape[1] or query.shape[1] < key.shape[1]:
        return "shapes", "k and v have different numbers of heads, or more than q"
    if is_causal and attn_mask is not None:
        return "mask_and_causal", "both attn_mask and is_causal=True"
    return None


@constant_while_tracing
def _look_for_rope() -> None:
    """Have the compilation that traces this call look for rotations in front of it. An export compiles nothing."""
    if torch.compiler.is_exporting():
        return
    from lpattn.compile.install import install  # imports inductor

    install()


@constant_while_tracing
def _refusal_while_tracing(settings_text: str, code: str, message: str) -> str:
    return refusal_outside(with_environment(from_text(settings_text)), Reason(code, message))
