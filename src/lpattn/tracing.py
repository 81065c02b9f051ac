"""What code must know of being traced, without importing Dynamo, which takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_Function = TypeVar("_Function", bound=Callable[..., object])


def is_traced() -> bool:
    """Whether torch.compile, torch.export, make_fx or torch.jit.trace follows the code that asks."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(_PROXY) is not None
    )


def constant_while_tracing(function: _Function) -> _Function:
    """Have Dynamo run a function of constants while it traces, and take the result as a constant.

    It sets what torch.compiler.assume_constant_result sets; that would import Dynamo at once.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
