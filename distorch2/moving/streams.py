"""torch's streams, by device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


def stream_for(device: torch.device, purpose: str) -> Any:
    """A stream of `device`, on which everything for one purpose goes one after another, whoever asks for it.

    A GPU has few queues for many streams, and what is on two streams of one queue waits for each other.
    """
    first = _streams.get((device, purpose)) or backend_of(device).Stream(device)
    if not hasattr(first, "stream_id"):
        return first
    _streams[device, purpose] = first
    # An object of its own: it keeps which stream was the current one before it was entered.
    return type(first)(stream_id=first.stream_id, device_index=first.device_index, device_type=first.device_type)


@contextlib.contextmanager
def on_stream_for(device: torch.device, purpose: str, in_order: bool = True) -> Iterator[None]:
    """Makes the stream for a purpose the current one of `device`, if that has streams.

    If `in_order`, what is given to it comes after what the current stream has been given before, and what that is given
    afterwards comes last.
    """
    backend = backend_of(device)
    if backend is None:
        yield
        return
    outside, inside = backend.current_stream(device), stream_for(device, purpose)
    if in_order:
        inside.wait_stream(outside)
    with backend.stream(inside):
        yield
    if in_order:
        outside.wait_stream(inside)


def backend_of(device: torch.device) -> Any:
    """torch's module for its streams and events, None where it has none."""
    return getattr(torch, device.type) if device.type not in ("cpu", "mps") else None
