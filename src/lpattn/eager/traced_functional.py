"""``F.multi_head_attention_forward`` of the installed torch, for Dynamo to look into, with its SDPA call redirected.

A function is traced with the globals of the module that it names, so that its copy needs a module of its own: this one,
with everything in torch.nn.functional, and two of its names replaced.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from lpattn.active import current_settings
from lpattn.functional import redirect

globals().update({name: value for name, value in vars(F).items() if not name.startswith("__")})


def has_torch_function(tensors: object) -> bool:
    """No: the mode has done its work when this copy runs."""
    return False


def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
    """SDPA under the settings in force."""
    settings = current_settings()
    if settings is None:
        return F.scaled_dot_product_attention(*args, **kwargs)
    return redirect(*args, **kwargs, settings=settings)


_original = F.multi_head_attention_forward
multi_head_attention_forward: Callable[..., Any] = types.FunctionType(
    _original.__code__, globals(), _original.__name__, _original.__defaults__
)
