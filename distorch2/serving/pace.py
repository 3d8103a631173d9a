"""Whether copies keep up with computing, found out while a module runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..moving.transfer import Timing, Transfer

_PASSES_BEFORE = 1
"""Of each run: copies are not ahead yet."""
_PASSES_TIMED = 2


class Pace:
    """Times a few passes, of one run or of several short ones, and again in a run after they have been judged."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._num_passes = 0
        self._timings: list[Timing] = []
        self._are_judged = False

    def begin_run(self) -> None:
        self._num_passes = 0
        if self._are_judged:
            self._timings, self._are_judged = [], False

    @contextlib.contextmanager
    def a_pass(self) -> Iterator[None]:
        self._num_passes += 1
        if self._num_passes <= _PASSES_BEFORE or len(self._timings) == _PASSES_TIMED:
            yield
            return
        with self._transfer.timed() as timing:
            yield
        self._timings.append(timing)

    def waiting_part(self) -> float | None:
        """The least part of a timed pass that computing waited for copies, 0 to 1; None before all are done."""
        parts = [part for timing in self._timings if (part := timing.waiting_part()) is not None]
        if len(parts) < _PASSES_TIMED:
            return None
        self._are_judged = True
        return min(parts)
