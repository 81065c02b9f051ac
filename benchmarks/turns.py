"""Processes that compile side by side, and measure one after another, once none of them compiles any more."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path


class Turns:
    """What processes that share a folder agree on.

    Args:
        folder: theirs; empty at first.
        processes: how many there are.
        patience: seconds that one waits for the others to be ready.
    """

    def __init__(self, folder: Path, processes: int, patience: float) -> None:
        self._folder, self._processes, self._patience = folder, processes, patience

    def ready(self) -> None:
        """Say that this process compiles no more, be it that it failed."""
        (self._folder / f"ready-{os.getpid()}").touch()

    @contextlib.contextmanager
    def mine(self) -> Iterator[None]:
        """Wait until all are ready, and until it is this process' turn; the turn ends with the block."""
        self.ready()
        end = time.monotonic() + self._patience
        while len(list(self._folder.glob("ready-*"))) < self._processes and time.monotonic() < end:
            time.sleep(0.05)
        with (self._folder / "turn").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
