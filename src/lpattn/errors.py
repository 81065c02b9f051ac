"""The exceptions.

::

    LpattnError
      UnknownBackendError    (ValueError)    a name that no backend has
      UnsupportedCallError   (RuntimeError)  no admitted backend can run this call
      BackendUnavailableError(RuntimeError)  a named backend that no device of this machine can run
      InvalidArgumentError   (ValueError)    a wrong value, shape or dtype, or options that contradict each other
      RegistrationError      (ValueError)    a backend that breaks the protocol, or a name that is taken
      BackendError           (RuntimeError)  a backend that returned no valid output
    LpattnWarning            (UserWarning)   the model runs, but not as it may have been meant
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lpattn.types import Reason


class LpattnError(Exception):
    """Base of everything lpattn raises on purpose."""


class UnknownBackendError(LpattnError, ValueError):
    """No backend has this name."""


class UnsupportedCallError(LpattnError, RuntimeError):
    """No backend that the settings admit can run this attention call.

    Attributes:
        reasons: for every known backend, all its reasons (:class:`lpattn.Reason`), as the message lists them; empty
            where the inputs themselves are the reason.
    """

    # Set after creation, since Dynamo cannot trace an exception that has an __init__ of its own.
    reasons: Mapping[str, tuple[Reason, ...]] = MappingProxyType({})


class BackendUnavailableError(LpattnError, RuntimeError):
    """A backend was named that no device of this machine can run."""


class InvalidArgumentError(LpattnError, ValueError):
    """A value, shape or dtype that is not valid, or options that contradict each other."""


class RegistrationError(LpattnError, ValueError):
    """A backend that does not follow the protocol, or whose name is already taken."""


class BackendError(LpattnError, RuntimeError):
    """A backend returned something that is not the output of the call."""


class LpattnWarning(UserWarning):
    """The model runs, but not as the user may have meant."""


_INTERNAL = (os.path.dirname(__file__), os.path.dirname(torch.__file__))


def warn(text: str) -> None:
    """Give a warning that points at the user's line: the first frame outside of lpattn and PyTorch."""
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame = frame.f_back
        level += 1
    warnings.warn(text, LpattnWarning, stacklevel=level)
