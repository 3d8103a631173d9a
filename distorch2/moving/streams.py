"""torch's streams, by device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the current one: some kernels run there, whatever device their arguments are on."""
    backend = backend_of(device)
    return contextlib.nullcontext() if backend is None else backend.device(device)


def context_of(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """Makes `stream` the current one. It may not be entered while it is entered.

    From torch 2.7 on a stream of the current accelerator is such a context itself, and that costs less.
    """
    if hasattr(stream, "__enter__") and torch.accelerator.current_accelerator() == torch.device(stream.device.type):
        return stream
    return backend_of(stream.device).stream(stream)


_streams: dict[tuple[torch.device, str], Any] = {}


def stream_for(device: torch.device, purpose: str, priority: int = 0) -> Any:
    """A stream of `device`, on which everything for one purpose goes one after another, whoever asks for it. One with a
    lower `priority`, as it is when the stream is made, is served first.

    A GPU has few queues for many streams, and what is on two streams of one queue waits for each other.
    """
    first = _streams.get((device, purpose)) or backend_of(device).Stream(device, priority=priority)
    if not hasattr(first, "stream_id"):
        return first
    _streams[device, purpose] = first
    # An object of its own: it keeps which stream was the current one before it was entered.
    return type(first)(stream_id=first.stream_id, device_index=first.device_index, device_type=first.device_type)


@contextlib.contextmanager
def on_stream_for(device: torch.device, purpose: str, priority: int = 0, in_order: bool = True) -> Iterator[None]:
    """Make the stream for a purpose, as of `stream_for`, the current one of `device`, if that has streams.

    If `in_order`, it first waits for the current stream's work, and afterwards the current stream waits for its.
    """
    backend = backend_of(device)
    if backend is None:
        yield
        return
    outside, inside = backend.current_stream(device), stream_for(device, purpose, priority)
    if in_order:
        inside.wait_stream(outside)
    try:
        with backend.stream(inside):
            yield
    finally:
        if in_order:
            outside.wait_stream(inside)


def wait_for(device: torch.device) -> None:
    """Return when a device has done all that it was given."""
    backend = backend_of(device)
    if backend is not None and backend.is_initialized():
        backend.synchronize(device)


class Turns:
    """A lock that orders devices as well: what its holder gives them begins after what the holder before gave them,
    though each thread has streams of its own. A thread that has it may take it again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._ends: dict[torch.device, Any] = {}  # an event by device, at the end of the last turn

    @contextlib.contextmanager
    def taken(self, devices: Iterable[torch.device]) -> Iterator[None]:
        with self._lock:
            for device, end in self._ends.items():
                backend_of(device).current_stream(device).wait_event(end)
            try:
                yield
            finally:
                for device in devices:
                    if backend_of(device) is not None:
                        self._ends[device] = backend_of(device).current_stream(device).record_event()


def backend_of(device: torch.device) -> Any:
    """torch's module for its streams and events, None where it has none."""
    return getattr(torch, device.type) if device.type not in ("cpu", "mps") else None


class PeakMemory:
    """From here on: what torch has allocated of an accelerator at most. Torch's own count is not reset."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._backend = device, backend_of(device)
        self._is_counted = hasattr(self._backend, "max_memory_allocated")
        self._begun, self._peak = self._allocated(), self._most()

    def risen_by(self) -> int | None:
        """Bytes over what was allocated at the beginning; None where there was more at another time before."""
        most = self._most()
        return most - self._begun if most > self._peak else None

    def _allocated(self) -> int:
        return int(self._backend.memory_allocated(self._device)) if self._is_counted else 0

    def _most(self) -> int:
        return int(self._backend.max_memory_allocated(self._device)) if self._is_counted else 0
