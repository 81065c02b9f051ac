"""Applies low-precision attention to a model, in place, and undoes it."""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import nn

from lpattn.dispatch import REFERENCE
from lpattn.eager.compiled import calls_compiled_code
from lpattn.eager.layers import Application, LayerState, attach, detach, state_of
from lpattn.errors import InvalidArgumentError, UnknownBackendError, warn
from lpattn.policy import AUTO, EXACT, LayerRules, rule_for
from lpattn.settings import Settings, check_machine, is_exact, make_settings, with_environment
from lpattn.types import AttentionBackend, HadamardMode, Provenance


def apply_low_precision_attention(
    model: nn.Module,
    backend: str | AttentionBackend | None = None,
    hadamard: str | HadamardMode = HadamardMode.NONE,
    *,
    on_unsupported: str | None = None,
    layers: LayerRules | None = None,
) -> nn.Module:
    """Make the attention of a model run in low precision. Changes the model in place.

    Nothing runs and nothing is allocated on a device; classes, ``state_dict`` keys, signatures and hooks stay as they
    are. Applying again replaces the settings; applying to a part of the model wins inside of that part.

    Args:
        model: any module, compiled (``torch.compile(model)``) or not.
        backend: name of a backend, in any case; None picks the fastest that can run each call, and exact attention
            where low precision does not pay.
        hadamard: rotation of q, k, v before quantization, where a low-precision backend runs.
        on_unsupported: ``"fallback"`` runs calls that the backend cannot run exactly, with one warning per reason;
            ``"raise"`` refuses them. None is ``"raise"`` where a backend is named, ``"fallback"`` where none is.
        layers: which submodules, as ``{pattern: "exact" | "auto" | backend name}`` (:mod:`fnmatch` on the fully
            qualified name; first match wins; a container covers what lies in it), or a callable of (name, module).
            Layers that no rule matches follow ``backend``.

    Returns:
        The same object.

    Raises:
        UnknownBackendError: a name that no backend has (also in ``layers`` or in ``LPATTN_BACKEND``).
        BackendUnavailableError: a named backend that no device of this machine can run, unless
            ``on_unsupported="fallback"`` (then one warning).
        InvalidArgumentError: a wrong value, or options that contradict each other.
    """
    root = unwrapped(model)
    if isinstance(root, torch.jit.ScriptModule):
        raise InvalidArgumentError(
            f"{type(root).__name__} is a module of torch.jit, which takes no other forward; apply to the module that "
            "it was made from, or to one that calls it"
        )
    application = Application(root, calls_compiled_code(root))
    base = make_settings(backend, hadamard, on_unsupported, Provenance.MODEL)
    base = replace(base, scope=application.scope)
    _check_rules(layers)
    coverable = _coverable(root)
    rules = [rule_for(layers, names, module) for names, module in coverable]
    covered = [
        (module, _layer_settings(base, rule, on_unsupported))
        for (_, module), (_, rule) in zip(coverable, rules, strict=True)
    ]
    if not covered:
        raise InvalidArgumentError(
            f"{type(model).__name__} has no module that could run attention; pass the model, not a layer of torch.nn "
            "(nn.MultiheadAttention and nn.TransformerEncoderLayer are fine)"
        )
    # Everything is checked before the first module changes: an error leaves the model as it was.
    texts = [check_machine(with_environment(settings)) for _, settings in covered]
    texts += [_dead_rules(root, layers, {pattern for pattern, _ in rules}), _unreachable(coverable)]
    for text in dict.fromkeys(texts):
        if text is not None:
            warn(text)
    for module, settings in covered:
        state = attach(module)
        state.ledger.clear()
        _cover(state, application, settings)
        state.watched = application if module is root else None
    return model


def remove_low_precision_attention(model: nn.Module) -> nn.Module:
    """Undo :func:`apply_low_precision_attention`, exactly.

    What was applied to the model, or to parts of it, goes. For a part of a model that was applied as a whole: an
    application to the part goes, and the whole's rules there again; without one, the part becomes exact.

    Args:
        model: the module; one that lpattn was never applied to is left alone.

    Returns:
        The same object.
    """
    root = unwrapped(model)
    inside = set(root.modules())
    states = [(m, s) for m in inside if (s := state_of(m)) is not None]
    own = {id(a) for _, s in states for a, _ in s.entries if a.root in inside}
    for module, state in states:
        remaining = [(a, settings) for a, settings in state.entries if a.root not in inside] if own else []
        if remaining:
            state.set_entries(remaining)
        else:
            detach(module, state)
    return model


def _cover(state: LayerState, application: Application, settings: Settings) -> None:
    """Put an application in force, below those whose roots lie deeper in the model."""
    root = application.root
    assert root is not None
    inside = set(root.modules())
    others = [(a, s) for a, s in state.entries if a.root is not None and a.root is not root]
    deeper = [(a, s) for a, s in others if a.root in inside]
    outer = [(a, s) for a, s in others if a.root not in inside]
    state.set_entries([*outer, (application, settings), *deeper])


def _layer_settings(base: Settings, rule: str | None, on_unsupported: str | None) -> Settings:
    if rule is None:
        return base
    word = rule.strip().lower()
    if word == AUTO:
        return replace(base, backend=None, provenance=Provenance.LAYER_RULE)
    if word == EXACT:
        return replace(base, backend=REFERENCE, provenance=Provenance.LAYER_RULE)
    try:
        hadamard = HadamardMode.NONE if is_exact(rule) else base.hadamard
    except UnknownBackendError as error:
        raise UnknownBackendError(f"layer rule {rule!r} is not {EXACT!r}, {AUTO!r} or a backend: {error}") from None
    named = make_settings(rule, hadamard, on_unsupported, Provenance.LAYER_RULE)
    return replace(named, scope=base.scope)


def _coverable(root: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """The modules that could run attention, with all their names: all but plain torch.nn ones, and the root.

    Of torch.nn, those that attend are among them.
    """
    found: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        # Modules of torch.jit carry no forward of Python's: their attention counts as that of the one that calls them.
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)) or is_compiled(module):
            continue
        plain = type(module).__module__.startswith("torch.nn.modules.")
        attends = isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        if not plain or attends or (module is root and any(True for _ in root.children())):
            found.setdefault(module, []).append(clean_name(name))
    return [(names, module) for module, names in found.items()]


def _unreachable(coverable: list[tuple[list[str], nn.Module]]) -> str | None:
    """A warning about forwards whose body runs after they have returned."""
    kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    names = [names[0] or "(root)" for names, m in coverable if any(kind(type(m).forward) for kind in kinds)]
    if not names:
        return None
    return (
        f"the forward of {', '.join(names)} is a generator or a coroutine: its body runs after the call, where its "
        "attention cannot be intercepted, and runs exactly. Use low_precision_sdpa in it"
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile(module)`` returned."""
    children = module.__dict__.get("_modules")  # of torch.jit's modules no dict
    return isinstance(children, dict) and isinstance(children.get("_orig_mod"), nn.Module)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of what torch.compile returned.

    Raises:
        InvalidArgumentError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"model must be a torch.nn.Module; got {type(model).__name__}. For a pipeline, pass its model, such as "
            "pipe.transformer; for code without a module, use `with lpattn.low_precision_attention():`"
        )
    while is_compiled(model):
        model = model._orig_mod  # type: ignore[assignment]
    return model


def clean_name(name: str) -> str:
    """A qualified name without the levels that torch.compile inserts."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _check_rules(layers: LayerRules | None) -> None:
    if layers is None or callable(layers):
        return
    if not hasattr(layers, "items"):
        raise InvalidArgumentError(
            f"layers must be a dict such as {{'blocks.0.*': 'exact', '*': 'auto'}} or a callable; "
            f"got {type(layers).__name__}"
        )
    for pattern, rule in layers.items():
        if not isinstance(pattern, str) or not isinstance(rule, str):
            raise InvalidArgumentError(
                f"layers maps patterns to rules, both strings; got {pattern!r}: {rule!r}. "
                f"A rule is {EXACT!r}, {AUTO!r} or a backend name"
            )


def _dead_rules(root: nn.Module, layers: LayerRules | None, used: set[str | None]) -> str | None:
    """A warning about patterns that decided on no module."""
    if layers is None or callable(layers):
        return None
    dead = [pattern for pattern in layers if pattern not in used]
    if not dead:
        return None
    return (
        f"layer rules that decide on no module of {type(root).__name__} that runs attention: "
        f"{', '.join(map(repr, dead))}; they match none, or an earlier rule comes first"
    )
