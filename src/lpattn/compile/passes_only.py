"""A backend for torch.compile that runs inductor's graph passes, and then the graph as it is: no code is generated.

For looking at what the passes do, in seconds and without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import view_to_reshape


def passes_only(graph: fx.GraphModule, example_inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """Decompose and functionalize as inductor does, run the custom passes in their place, and interpret the result."""
    compiled: Any = compile_fx(graph, example_inputs, inner_compile=_run_passes)  # type: ignore[arg-type]
    return compiled


def _run_passes(graph: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    view_to_reshape(graph)
    passes = inductor_config.post_grad_custom_pre_pass
    for custom in passes if isinstance(passes, (list, tuple)) else [passes]:
        if custom is not None:
            custom(graph.graph)
    graph.graph.lint()
    graph.recompile()

    def run(inputs: list[Any]) -> Any:
        given = list(inputs)
        inputs.clear()
        return graph(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
