"""``lpattn explain --compiled``: what becomes of a model's attention under torch.compile, layer by layer."""

from __future__ import annotations

import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lpattn.cli.text import print_json
from lpattn.eager.apply import apply_low_precision_attention, unwrapped
from lpattn.eager.layers import state_of
from lpattn.eager.report import attention_report


def run(arguments: Namespace) -> int:
    """Compile and run a model once, and print its report. Returns 1 where that fails, or none is intercepted."""
    from lpattn.compile.passes_only import passes_only  # imports inductor

    model, inputs = _load(arguments)
    if not any(state_of(module) is not None for module in unwrapped(model).modules()):
        apply_low_precision_attention(
            model, arguments.backend, arguments.hadamard or "none", on_unsupported=arguments.on_unsupported
        )
    torch._dynamo.reset()
    under = torch.compile(unwrapped(model), backend=passes_only)
    try:
        with torch.no_grad():
            under(**inputs) if isinstance(inputs, Mapping) else under(*inputs)
    except torch._dynamo.exc.TorchDynamoException as error:
        # What follows is a stack that goes through torch and lpattn.
        said = str(error).partition("\nfrom user code:")[0].strip()
        print(f"{arguments.compiled}: torch.compile cannot compile the model: {said}", file=sys.stderr)
        return 1
    report = attention_report(model)
    if arguments.json:
        layers = {
            name: {
                "rope": layer.rope,
                "norm": layer.norm,
                "low": dict(layer.low),
                "exact": dict(layer.exact),
                "reasons": dict(layer.reasons),
                "detours": dict(layer.detours),
            }
            for name, layer in report.items()
        }
        print_json({"layers": layers})
    else:
        print(report)
    return 0 if len(report) else 1


def _load(arguments: Namespace) -> tuple[nn.Module, Any]:
    """The model and its inputs, from the function that the option names."""
    name = arguments.compiled
    module, _, function = name.partition(":")
    if not module or not function:
        arguments.parser.error(f"argument --compiled: must be MODULE:FUNCTION, such as my_models:build; got {name!r}")
    # As `python -m` does: modules of the folder that the command is called in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        arguments.parser.error(f"argument --compiled: {name!r} cannot be imported: {error}")
    made = build()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        arguments.parser.error(
            f"argument --compiled: {name} must return (model, inputs), inputs a tuple or a dict of arguments; "
            f"got {type(made).__name__}"
        )
    model, inputs = made
    return model, inputs if isinstance(inputs, (tuple, list, Mapping)) else (inputs,)
