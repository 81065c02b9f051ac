"""What the layers of a model ran on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lpattn.eager.apply import clean_name, unwrapped
from lpattn.eager.layers import state_of


@dataclass(frozen=True, eq=False)
class LayerReport(Mapping[str, Any]):
    """What one layer's attention calls ran on; also a mapping of its attributes, for ``dict(layer)`` and JSON.

    Attributes:
        low: number of calls by low-precision backend.
        exact: number of calls that ran exactly, by code of the reason.
        reasons: for each such code, the latest reason in words.
        detours: why calls did not run by their backend's fastest kernel, by code the latest reason in words.
        rope: ``"fused"`` or why not, of the latest call that was compiled or asked for a rotation; None if none was.
        norm: ``"fused"`` or why not, of the norm of q and k in front of that rotation; None where there is none.
        provenance: which setting decided the latest call, such as ``"model"`` or ``"layer rule"``.
        captured: True if a CUDA graph captured calls of this layer; its replays run no host code and are not counted.
    """

    low: Mapping[str, int]
    exact: Mapping[str, int]
    reasons: Mapping[str, str]
    detours: Mapping[str, str]
    rope: str | None
    norm: str | None
    provenance: str | None
    captured: bool

    def __getitem__(self, field: str) -> Any:
        return vars(self)[field]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))


class AttentionReport(Mapping[str, LayerReport]):
    """Layers by fully qualified name, in the model's order; only those that attended. ``str()`` gives a text."""

    def __init__(self, layers: Mapping[str, LayerReport]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> LayerReport:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        low, exact = (sum(sum(layer[kind].values()) for layer in self.values()) for kind in ("low", "exact"))
        return f"<AttentionReport: layers {len(self)}, calls in low precision {low}, exact {exact}>"

    def __str__(self) -> str:
        if not self._layers:
            return "no attention call was intercepted"
        lines = []
        for name, layer in self._layers.items():
            ran = [f"{backend} x{count}" for backend, count in layer.low.items()]
            ran += [f"exact x{count} ({layer.reasons[code]})" for code, count in layer.exact.items()]
            rope = f"; rope {layer.rope}" if layer.rope else ""
            norm = f"; norm {layer.norm}" if layer.norm else ""
            detours = f"; some not by its fastest kernel: {', '.join(layer.detours.values())}" if layer.detours else ""
            replays = "; captured in a CUDA graph, replays are not counted" if layer.captured else ""
            decided = f" [{layer.provenance}]" if layer.provenance else ""
            lines.append(f"{name or '(root)'}: {', '.join(ran)}{decided}{detours}{rope}{norm}{replays}")
        return "\n".join(lines)


def attention_report(model: nn.Module) -> AttentionReport:
    """What each layer's attention ran on since lpattn was applied.

    Calls are counted when they run, in eager and compiled code alike; under CUDA-graph replay no host code runs, so
    that replays are not counted.

    Args:
        model: a module that lpattn was applied to, or one around or inside of it; compiled or not.

    Returns:
        A mapping from layer name to :class:`LayerReport`; empty if nothing was intercepted.

    Raises:
        InvalidArgumentError: not a module.
    """
    layers = {}
    for name, module in unwrapped(model).named_modules():
        state = state_of(module)
        if state is None or not state.ledger.total:
            continue
        ledger = state.ledger
        layers[clean_name(name)] = LayerReport(
            low=dict(ledger.low),
            exact=dict(ledger.exact),
            reasons={code: str(reason) for code, reason in ledger.details.items()},
            detours={code: str(reason) for code, reason in ledger.detours.items()},
            rope=ledger.rope,
            norm=ledger.norm,
            provenance=str(ledger.provenance) if ledger.provenance else None,
            captured=ledger.captured,
        )
    return AttentionReport(layers)
