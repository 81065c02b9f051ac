"""The checks, by what they look at: :data:`CHECKS` has all of them in the order in which they run."""

from lpattn.testing.checks import (
    combinations,
    edges,
    features,
    machinery,
    masks,
    memory,
    numerics,
    packed,
    protocol,
    refusals,
)
from lpattn.testing.outcome import CheckFunction, is_check

_MODULES = (protocol, refusals, numerics, edges, masks, combinations, memory, features, packed, machinery)

CHECKS: dict[str, CheckFunction] = {
    name: function
    for module in _MODULES
    for name, function in vars(module).items()
    if is_check(function) and function.__module__ == module.__name__
}
"""Every check by name."""

__all__ = ["CHECKS"]
