"""Whether a model that runs eagerly calls code that is compiled by itself: Dynamo sees a mode, and no dispatch key."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_MARK = "_torchdynamo_orig_callable"
"""What torch.compile puts on the functions that it makes."""


unseen_code = threading.Event()
"""Set once code was compiled that no look at a model had found. It may be anybody's: Dynamo keeps it by its source, and
runs it again without asking."""


def calls_compiled_code(root: nn.Module) -> bool:
    """Whether a module of a model has, or names, a function that torch.compile made, as far as can be seen."""
    classes: set[Any] = {type(module) for module in root.modules()}
    own = (value for module in root.modules() for value in vars(module).values())
    return any(map(_class_calls, classes)) or any(map(_is_compiled_function, own))


@functools.cache
def _class_calls(cls: type[nn.Module]) -> bool:
    return any(map(_is_compiled_function, _named_by(cls)))


def _named_by(cls: type[nn.Module]) -> Iterator[object]:
    """What a class defines, and what its functions may call by a global name."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for value in vars(base).values():
            function = getattr(value, "__func__", value)
            yield function
            if isinstance(function, types.FunctionType):
                yield from (function.__globals__.get(name) for name in function.__code__.co_names)


def _is_compiled_function(value: object) -> bool:
    # Not of all that has the mark: a compiled module carries a forward of lpattn's in its graph.
    return isinstance(value, types.FunctionType) and hasattr(value, _MARK)
