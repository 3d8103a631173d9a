"""Whether copies keep up with computing, and what memory that takes, found out while a module runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..moving.streams import PeakMemory
from ..moving.transfer import Timing, Transfer

MOST_WAITING = 0.05
"""Of the time. Where computing waits longer for copies, packed ones gain more than it costs to unpack them."""
_PASSES_BEFORE = 1
"""Of each run: copies are not ahead yet."""
_PASSES_TIMED = 2


class Pace:
    """Times a few passes of a run, or of several short ones."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._num_passes = 0
        self._timings: list[Timing] = []
        self._computing_seconds: float | None = None
        self.activation_bytes: int | None = None
        """What the compute device needed at most beside what was there before a pass. None until that is known."""

    def begin_run(self) -> float | None:
        """Returns the least part of a timed pass before that computing waited for copies, 0 to 1; None where too few
        were timed since it was told last."""
        self._num_passes = 0
        waiting_part = self.waiting_part()
        self.computing_seconds()  # those of the run before stay
        if waiting_part is not None:
            self._timings = []
        return waiting_part

    def waiting_part(self) -> float | None:
        """What `begin_run` would return."""
        parts = [part for timing in self._timings if (part := timing.waiting_part()) is not None]
        return min(parts) if len(parts) >= _PASSES_TIMED else None

    def computing_seconds(self) -> float | None:
        """What a timed pass took beside waiting; None until one is done."""
        seconds = [each for timing in self._timings if (each := timing.computing_seconds()) is not None]
        self._computing_seconds = min(seconds, default=self._computing_seconds)
        return self._computing_seconds

    @contextlib.contextmanager
    def a_pass(self) -> Iterator[None]:
        self._num_passes += 1
        if self._num_passes <= _PASSES_BEFORE:
            peak = PeakMemory(self._transfer.device)
            yield
            self.activation_bytes = peak.risen_by() or self.activation_bytes
        elif len(self._timings) == _PASSES_TIMED:
            yield
        else:
            with self._transfer.timed() as timing:
                yield
            self._timings.append(timing)
