"""What an applied module carries: an instance ``forward`` bound to a :class:`LayerState`.

An instance attribute that is a bound method survives pickle, deepcopy, hooks and FSDP2, which swaps the class, leaves
``type(module)`` and ``state_dict`` alone, and is seen by ``module(x)``, ``module.forward(x)`` and Dynamo alike.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from lpattn import ops
from lpattn.active import active, included
from lpattn.eager import compiled, fused
from lpattn.eager.interception import RedirectMode, wrapper_codes
from lpattn.errors import warn
from lpattn.ledger import Ledger
from lpattn.settings import Settings, new_scope
from lpattn.tracing import constant_while_tracing
from lpattn.types import Reason

_NEED_WEIGHTS = Reason(
    "need_weights", "nn.MultiheadAttention with need_weights=True computes its weights exactly, without SDPA"
)


_applications: weakref.WeakValueDictionary[str, Application] = weakref.WeakValueDictionary()


class Application:
    """One call of apply_low_precision_attention.

    Attributes:
        scope: number under which warnings are given once.
        key: the same as text, which is a constant for Dynamo even where all numbers are dynamic.
        compiles: whether the model, when it runs eagerly, was seen to call code that is compiled by itself.
        checked: whether it is known that the root attends, or said that it does not.
    """

    def __init__(self, root: nn.Module | None, compiles: bool = False) -> None:
        self._root = None if root is None else weakref.ref(root)
        self.scope = new_scope()
        self.key = str(self.scope)
        self.compiles = compiles
        self.checked = False
        _applications[self.key] = self

    @property
    def root(self) -> nn.Module | None:
        """The module it was applied to; None when that is gone."""
        return None if self._root is None else self._root()

    def check_intercepted(self) -> None:
        """Warn if no layer under the root has seen a call: then the model's attention does not go through SDPA."""
        self.checked = True
        root = self.root
        if root is None or any(s.ledger.total for m in root.modules() if (s := state_of(m)) is not None):
            return
        warn(
            f"{type(root).__name__} ran, but none of its attention was intercepted: nothing in it called "
            "torch.nn.functional.scaled_dot_product_attention inside a module's forward, so nothing runs in low "
            "precision.\nLoad Hugging Face models with attn_implementation='sdpa' (not 'eager' or 'flex_attention'), "
            "and have custom models call scaled_dot_product_attention"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Application:
        root = self.root
        clone = Application(memo.get(id(root), root), self.compiles)
        memo[id(self)] = clone
        return clone

    def __reduce__(self) -> Any:
        return Application, (self.root, self.compiles)


@constant_while_tracing
def warn_untouched(key: str) -> None:
    """While tracing: warn that the application's root holds no attention that could be redirected."""
    if (application := _applications.get(key)) is not None and not application.checked:
        application.check_intercepted()


_states: weakref.WeakKeyDictionary[nn.Module, LayerState] = weakref.WeakKeyDictionary()


class LayerState:
    """The settings and counts of one module in force, and its way back.

    Attributes:
        settings: the strongest entry's; None makes the installed forward an inert pass-through.
        entries: applications that cover the module, weakest (outermost root) first.
        inner: the user's own instance ``forward`` underneath; None where the class's runs.
        class_forward, traced_forward: the class's forward, and what stands for it while it is traced.
        ledger, tag: counts, and the 0-dim tensor by which compiled code names them.
        watched: on an application's root, that application; None elsewhere.
    """

    def __init__(self, module: nn.Module, inner: Callable[..., Any] | None = None) -> None:
        self._module = weakref.ref(module)
        self.inner = inner
        # Kept here, since Dynamo cannot follow the look-up on every class, and torch 2.11's loses track of closures.
        self.class_forward: Callable[..., Any] = type(module).forward
        is_encoder_layer = self.class_forward is nn.TransformerEncoderLayer.forward
        self.traced_forward = fused.traced_encoder_layer_forward if is_encoder_layer else self.class_forward
        self.entries: list[tuple[Application, Settings]] = []
        self.settings: Settings | None = None
        self.ledger = Ledger()
        with torch.inference_mode(False):  # compiled code may pass it to an operator outside of inference mode
            self.tag = torch.tensor(self.ledger.id, device="cpu")
        # As torch._dynamo.mark_static_address(guard=False) does, which would import Dynamo: CUDA graphs then leave the
        # tag where it is, and layers still share one graph.
        self.tag._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
        self.watched: Application | None = None
        _states[module] = self

    @property
    def module(self) -> nn.Module:
        """The module that carries this state."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this forward no longer exists; keep a reference to the module itself")
        return module

    @property
    def forward(self) -> Callable[..., Any]:
        """The bound method that the module carries; pickle looks it up by this name."""
        return types.MethodType(installed_forward(type(self.module)), self)

    def child(self, name: str) -> LayerState | None:
        """The state of a submodule; None if it has none."""
        return state_of(getattr(self.module, name))

    def set_entries(self, entries: list[tuple[Application, Settings]]) -> None:
        """Replace the covering applications; the last one is in force."""
        self.entries = entries
        self.settings = entries[-1][1] if entries else None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        module = self.module
        # Copied apart from its module, a state would be a second one for it: the original serves.
        if id(module) not in memo:
            return self
        clone = LayerState(memo[id(module)], copy.deepcopy(self.inner, memo))
        memo[id(self)] = clone
        clone._adopt([(copy.deepcopy(application, memo), settings) for application, settings in self.entries])
        return clone

    def __reduce__(self) -> Any:
        return _rebuild, (self.module, self.inner, self.entries)

    def _adopt(self, entries: list[tuple[Application, Settings]]) -> None:
        self.set_entries([(a, replace(settings, scope=a.scope)) for a, settings in entries])


def _rebuild(
    module: nn.Module, inner: Callable[..., Any] | None, entries: list[tuple[Application, Settings]]
) -> LayerState:
    state = LayerState(module, inner)
    state._adopt(entries)
    return state


def state_of(module: nn.Module) -> LayerState | None:
    """The state that a module carries, also under somebody else's wrapper; None if lpattn is not applied to it."""
    return _visible_state(module) or _states.get(module)


def _visible_state(module: nn.Module) -> LayerState | None:
    state = getattr(module.__dict__.get("forward"), "__self__", None)
    return state if isinstance(state, LayerState) else None


def attach(module: nn.Module) -> LayerState:
    """Install a forward on the module, or return the state that it already carries."""
    if (state := _visible_state(module)) is None:
        if (covered := _states.get(module)) is not None:
            # Somebody's forward lies over ours, or replaced it: ours becomes inert, and a new one goes on top.
            covered.set_entries([])
        state = LayerState(module, module.__dict__.get("forward"))
        module.__dict__["forward"] = state.forward
    return state


def detach(module: nn.Module, state: LayerState) -> None:
    """Put back what was there. Where somebody wrapped the installed forward, it stays as an inert pass-through."""
    state.set_entries([])
    _states.pop(module, None)
    if _visible_state(module) is state:
        if state.inner is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = state.inner


def installed_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The function that modules of a class carry as ``forward``, bound to their state."""
    return _make_forward(cls, cls.forward)  # type: ignore[arg-type]


@functools.cache
def _make_forward(cls: type[nn.Module], class_forward: Callable[..., Any]) -> Callable[..., Any]:
    may_need_weights = issubclass(cls, nn.MultiheadAttention)

    def forward(self: LayerState, /, *args: Any, **kwargs: Any) -> Any:
        # Most modules of a model only pass through here: what they do not need waits.
        compiling = torch.compiler.is_compiling()
        run = self.inner
        if run is None:
            run = self.traced_forward if compiling else self.class_forward
            all_args = (self.module, *args)
        else:
            all_args = args
        if self.settings is None:
            return run(*all_args, **kwargs)
        outer, tracing = active.layer, active.tracing
        active.layer = self
        try:
            if compiling and not tracing:
                active.attended = False
            if may_need_weights and kwargs.get("need_weights", len(args) <= 4 or args[4]):
                ops.count_exact(self.tag, _NEED_WEIGHTS.code, _NEED_WEIGHTS.message)
                active.attended = True
            if compiling:
                if tracing:
                    return run(*all_args, **kwargs)
                active.tracing = True
                with RedirectMode():
                    result = run(*all_args, **kwargs)
                if self.watched is not None and not active.attended:
                    warn_untouched(self.watched.key)
                return result
            # Behind a graph break, Dynamo compiles what runs from here on: it sees a mode, and no dispatch key.
            compiled_inside = get_eval_frame_callback()
            if outer is not None and not compiled_inside:
                return run(*all_args, **kwargs)
            compiled_inside = compiled_inside or self.entries[-1][0].compiles or compiled.unseen_code.is_set()
            with RedirectMode() if compiled_inside else included():
                result = run(*all_args, **kwargs)
            if self.watched is not None and not self.watched.checked:
                self.watched.check_intercepted()
            return result
        finally:
            active.layer = outer
            active.tracing = tracing

    # A code object of its own per class: Dynamo caches, and limits recompilations, by code object.
    code = forward.__code__.replace(co_name=f"{cls.__name__}_forward")
    wrapper_codes.add(code)
    own = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    return functools.update_wrapper(own, class_forward)
