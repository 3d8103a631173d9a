"""Copies from the host and from slabs to the compute device. The only file that deals with streams and events."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch


class Copy:
    """A copy of `source` into `target`, of as many bytes, that can be submitted again and again."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.source = source
        self.target = target
        self.is_done: torch.Event | None = None
        self.is_awaited = True
        """Whether the compute device waits for it already, or need not."""


class Transfer:
    """Copies to one device, on a stream of their own where the device has streams; else each is done at once.

    `copies` counts what was submitted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies = 0
        self._backend: Any = getattr(torch, device.type) if device.type not in ("cpu", "mps") else None
        self._stream: Any = None

    def submit(self, copies: Sequence[Copy]) -> None:
        """Start `copies`, one after another, when the work that the compute device has been given so far is done.

        So what was read from their targets before may be overwritten.
        """
        self.copies += len(copies)
        if self._backend is None:
            for copy in copies:
                copy.target.copy_(copy.source)
            return
        if self._stream is None:
            self._stream = self._backend.Stream(self.device)
        self._stream.wait_stream(self._backend.current_stream(self.device))
        with self._backend.stream(self._stream):
            for copy in copies:
                copy.target.copy_(copy.source, non_blocking=True)
                if copy.is_done is None:
                    copy.is_done = self._backend.Event()
                copy.is_done.record(self._stream)
                copy.is_awaited = False

    def use(self, copy: Copy) -> None:
        """Let what the compute device is given from now on wait for `copy`."""
        if self._backend is not None and not copy.is_awaited and copy.is_done is not None:
            self._backend.current_stream(self.device).wait_event(copy.is_done)
            copy.is_awaited = True

    def wait(self) -> None:
        """Return when everything is done, so that slabs and staging buffer may be written or freed."""
        if self._backend is not None and self._backend.is_initialized():
            self._backend.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


class Upload:
    """Copies from pageable host memory to one device by way of page-locked `buffers` (uint8) that take turns.

    The driver's own copies from such memory are several times slower. Use it while the device computes nothing.
    """

    def __init__(self, device: torch.device, buffers: Sequence[torch.Tensor]) -> None:
        self._backend: Any = getattr(torch, device.type)
        self._stream = self._backend.current_stream(device)
        self._buffers = itertools.cycle([(buffer, self._backend.Event()) for buffer in buffers])
        self._num_bytes = min(buffer.nbytes for buffer in buffers)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Fill `target` on the device with `source`, in the dtype of `target`; both are contiguous."""
        source, target = source.reshape(-1), target.view(-1)
        step = self._num_bytes // target.element_size()
        for begin in range(0, target.numel(), step):
            part = target[begin : begin + step]
            buffer, is_read = next(self._buffers)
            is_read.synchronize()
            staged = buffer[: part.nbytes].view(part.dtype)
            staged.copy_(source[begin : begin + step])
            part.copy_(staged, non_blocking=True)
            is_read.record(self._stream)

    def wait(self) -> None:
        """Return when the buffers are not in use any more."""
        self._stream.synchronize()
