"""What code must know of being traced, without importing Dynamo, which takes a second."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def is_traced() -> bool:
    """Whether torch.compile, torch.export, make_fx or torch.jit.trace follows the code that asks."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(_PROXY) is not None
    )


def constant_while_tracing(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Have Dynamo run a function of constants while it traces, and take the result as a constant.

    What is raised in there is raised where Dynamo follows: an error in a constant is to it a failure of its own.
    """

    def outcome(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> tuple[Any, type[Exception] | None, Any]:
        try:
            return function(*args, **kwargs), None, ()
        except Exception as error:
            return None, type(error), error.args

    # What torch.compiler.assume_constant_result sets; that would import Dynamo at once.
    outcome._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @functools.wraps(function)
    def traced(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        result, error, details = outcome(*args, **kwargs)
        if error is not None:
            raise error(*details)
        return result

    return traced
