"""Redirects SDPA on this thread, and only there.

Inside applied models a dispatch key that nothing else uses is included in the thread's dispatch state. Kernels that are
registered for it see ``aten::scaled_dot_product_attention`` however it was imported or called (also from C++); all
other operators fall through at no cost, and no other thread notices.

Dynamo cannot follow a dispatch key. While torch.compile traces an applied model, and inside the context manager (whose
presence Dynamo must notice), a TorchFunctionMode does the same. In eager mode it costs about a microsecond per
operator, which is why applied models do without.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch._guards import TracingContext
from torch.overrides import TorchFunctionMode

from lpattn.active import REDIRECTION_KEY, active, current_settings, excluded
from lpattn.eager import compiled, fused
from lpattn.execute import account_outside
from lpattn.redirection import redirect
from lpattn.settings import Settings
from lpattn.types import Reason

_fallthrough = torch.library.Library("_", "IMPL")
_fallthrough.fallback(torch.library.fallthrough_kernel, REDIRECTION_KEY)
_kernels = torch.library.Library("aten", "IMPL")

_COMPILED = Reason(
    "compiled_by_itself",
    "code that is compiled by itself, in a model that is not: lpattn saw it when it was compiled",
    "run the model again, which redirects it",
)
_MODULE_CALL = torch.nn.Module._call_impl.__code__
wrapper_codes: set[CodeType] = set()
"""Code objects of the forwards that lpattn installs: where the walk up the stack ends."""


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    settings = current_settings()
    # The compiler's tensors are of types of their own.
    traced = settings is not None and type(query) is not torch.Tensor and _is_compiled_by_itself(settings)
    if settings is None or traced or _belongs_elsewhere():
        with excluded():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    return redirect(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, settings=settings)


def _belongs_elsewhere() -> bool:
    """Whether a module that lpattn was not applied to (called in a hook, or added later) runs inside of the layer."""
    layer = active.layer
    if layer is None or active.context_settings is not None:
        return False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code not in wrapper_codes:
        if frame.f_code is _MODULE_CALL:
            module = frame.f_locals["self"]
            if hasattr(getattr(module.__dict__.get("forward"), "__self__", None), "ledger"):
                return False  # a hook of one of the model's own modules
            if not type(module).__module__.startswith("torch."):
                name = type(module).__name__
                layer.ledger.count_exact(
                    Reason(
                        "not_applied",
                        f"{name} was not part of the model when lpattn was applied",
                        "apply again, if it is now",
                    )
                )
                return True
        frame = frame.f_back
    return False


def _is_compiled_by_itself(settings: Settings) -> bool:
    """Whether this is code that is being compiled, inside of a model that runs eagerly, unseen until now.

    What is compiled now would run with these settings whatever is in force then. The next time that the model runs, a
    mode redirects, by which Dynamo guards.

    Raises:
        UnsupportedCallError: strict settings.
    """
    layer = active.layer
    if layer is None or TracingContext.try_get() is None:
        return False
    compiled.unseen_code.set()
    if not layer.ledger.exact.get(_COMPILED.code):
        account_outside(_COMPILED, settings, layer.ledger)
    return True


_kernels.impl("scaled_dot_product_attention", _sdpa, REDIRECTION_KEY)
_kernels.impl("_native_multi_head_attention", fused.multi_head_attention, REDIRECTION_KEY)
_kernels.impl("_transformer_encoder_layer_fwd", fused.encoder_layer, REDIRECTION_KEY)


class RedirectMode(TorchFunctionMode):
    """The same redirection as a mode: for code that is traced, and for the context manager."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            settings = current_settings()
            if settings is None:
                return func(*args, **kwargs)
            active.attended = True
            return redirect(*args, **kwargs, settings=settings)
        if func is F.multi_head_attention_forward and fused.can_redirect(kwargs):
            active.attended = True
            return fused.traced_multi_head_attention_forward(*args, **kwargs)
        if func is torch._transformer_encoder_layer_fwd and current_settings() is not None:
            # Eager code does not come here under a mode; what Dynamo traces of a layer without lpattn's forward does.
            return fused.encoder_layer(*args, **kwargs)
        if func is torch.Tensor.unflatten:
            # Its Python body calls super(), on which Dynamo breaks the graph under any mode.
            return _unflatten(*args, **kwargs)
        return func(*args, **kwargs)


def _unflatten(tensor: torch.Tensor, dim: int, sizes: Any) -> torch.Tensor:
    dim = dim % tensor.dim()
    return tensor.reshape(*tensor.shape[:dim], *cast("tuple[int, ...]", tuple(sizes)), *tensor.shape[dim + 1 :])
