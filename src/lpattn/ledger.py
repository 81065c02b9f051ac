"""Counts of what ran, one ledger per layer. Knows the vocabulary only."""

from __future__ import annotations

import itertools
import threading
import weakref

from lpattn.types import Choice, Provenance, Reason

_ids = itertools.count(1)
_ledgers: weakref.WeakValueDictionary[int, Ledger] = weakref.WeakValueDictionary()


class Ledger:
    """What one layer's attention calls ran on. Thread-safe.

    Attributes:
        id: process-wide number by which compiled code refers to the ledger.
        low: calls by low-precision backend.
        exact: calls by code of the reason why they ran exactly.
        details: for each such code, the latest reason in full.
        detours: by code, the latest reasons why a call did not run by its backend's fastest kernel.
        rope: ``"fused"``, or why not; None while no compiled call ran, and none that asked for a rotation.
        norm: ``"fused"``, or why not, of a norm in front of a rotation; None while there was none.
        provenance: which setting decided the latest call.
        captured: whether a CUDA graph captured a call: its replays run no host code and are not counted.
    """

    __slots__ = (
        "__weakref__",
        "_lock",
        "captured",
        "details",
        "detours",
        "exact",
        "id",
        "low",
        "norm",
        "provenance",
        "rope",
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.id = next(_ids)
        self.low: dict[str, int] = {}
        self.exact: dict[str, int] = {}
        self.details: dict[str, Reason] = {}
        self.detours: dict[str, Reason] = {}
        self.rope: str | None = None
        self.norm: str | None = None
        self.provenance: Provenance | None = None
        self.captured = False
        _ledgers[self.id] = self

    def count(self, choice: Choice) -> None:
        """Count one call."""
        if choice.exact_reason is not None:
            self.count_exact(choice.exact_reason)
        else:
            with self._lock:
                self.low[choice.backend] = self.low.get(choice.backend, 0) + 1
                self.detours.update({detour.code: detour for detour in choice.detours})
        self.provenance = choice.provenance

    def count_exact(self, reason: Reason) -> None:
        """Count one call that ran exactly."""
        with self._lock:
            self.exact[reason.code] = self.exact.get(reason.code, 0) + 1
            self.details[reason.code] = reason

    def clear(self) -> None:
        """Forget everything counted."""
        with self._lock:
            self.low.clear()
            self.exact.clear()
            self.details.clear()
            self.detours.clear()
            self.rope = None
            self.norm = None
            self.provenance = None
            self.captured = False

    @property
    def total(self) -> int:
        """All calls counted."""
        return sum(self.low.values()) + sum(self.exact.values())


def find_ledger(ledger_id: int) -> Ledger | None:
    """The ledger of that id; None if its layer is gone."""
    return _ledgers.get(ledger_id)
