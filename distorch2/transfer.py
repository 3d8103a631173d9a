"""Copies of weights to the compute device, and of activations both ways. The only file that deals with streams and
events."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class Copy:
    """A copy of `source` into `target`, of as many bytes, that can be submitted again and again."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.source = source
        self.target = target
        self.is_pageable = source.device.type == "cpu" and not source.is_pinned()
        self.is_done: torch.Event | None = None
        self.is_awaited = True
        """Whether the compute device waits for it already, or need not."""


class Transfer:
    """Copies to one device, on a stream of their own where the device has streams; else each is done at once.

    `copies` counts what was submitted. What is not page-locked is copied by way of `upload`, if there is one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies = 0
        self.upload: Upload | None = None
        self._backend = _backend_of(device)
        self._stream: Any = None
        self._on_stream: Any = None
        self._given: Any = None  # an event: what the device has been given so far is done

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
            self._stream, self._given = self._backend.Stream(self.device), self._backend.Event()
            self._on_stream = self._backend.stream(self._stream)
        self._given.record(self._backend.current_stream(self.device))
        self._stream.wait_event(self._given)
        with self._on_stream:
            for copy in copies:
                if self.upload is not None and copy.is_pageable:
                    self.upload.copy(copy.source, copy.target)
                    self.upload.flush()
                else:
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

    The driver's own copies from such memory are several times slower, and so is one thread that reads a memory-mapped
    file: every buffer has its own. The caller waits until a buffer is free.
    """

    def __init__(self, device: torch.device, buffers: Sequence[torch.Tensor]) -> None:
        self.buffers = buffers
        self._device = device
        self._backend: Any = getattr(torch, device.type)
        self._turns = itertools.cycle([(buffer, self._backend.Event()) for buffer in buffers])
        self._num_bytes = min(buffer.nbytes for buffer in buffers)
        self._threads = ThreadPoolExecutor(len(buffers))
        self._filling: collections.deque[tuple[Future[torch.Tensor], torch.Tensor, torch.Event]] = collections.deque()

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Fill `target` on the device with `source`, in the dtype of `target`; both are contiguous.

        The last parts are on their way after `flush`, on the stream that is the current one then.
        """
        source, target = source.reshape(-1), target.view(-1)
        step = self._num_bytes // target.element_size()
        for begin in range(0, target.numel(), step):
            if len(self._filling) == len(self.buffers):
                self._send()
            part = target[begin : begin + step]
            buffer, is_read = next(self._turns)
            is_read.synchronize()
            staged = buffer[: part.nbytes].view(part.dtype)
            self._filling.append((self._threads.submit(_fill, staged, source[begin : begin + step]), part, is_read))

    def flush(self) -> None:
        while self._filling:
            self._send()

    def _send(self) -> None:
        filling, part, is_read = self._filling.popleft()
        part.copy_(filling.result(), non_blocking=True)
        is_read.record(self._backend.current_stream(self._device))

    def wait(self) -> None:
        """Return when the buffers are not in use any more."""
        self.flush()
        for _ in self.buffers:
            next(self._turns)[1].synchronize()


def _fill(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():  # which is on for one thread at a time
        return target.copy_(source)


class Crossing:
    """Copies of activations between two devices, each way on a stream of its own where both have streams.

    What the device that receives is given afterwards waits for them. Two devices of the same kind may say that they can
    reach each other when they cannot: the first copy is checked, and where it is wrong copies go by way of the host.
    """

    def __init__(self, one: torch.device, other: torch.device) -> None:
        self._devices = one, other
        self._have_streams = all(_backend_of(device) is not None for device in self._devices)
        self._streams = {device: _backend_of(device).Stream(device) for device in self._devices if self._have_streams}
        self.is_direct: bool | None = None if self._have_streams and one.type == other.type else False
        """None until it is checked."""

    @contextlib.contextmanager
    def leaving(self, device: torch.device) -> Iterator[None]:
        """For copies from `device` of what it has been given to make so far."""
        if not self._have_streams:
            yield
            return
        if self.is_direct is None:
            self._check()
        stream = self._streams[device]
        stream.wait_stream(_backend_of(device).current_stream(device))
        with _backend_of(device).stream(stream):
            yield

    def copy(self, tensor: torch.Tensor, device: torch.device, into: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of `tensor` on `device`, in new memory or in that of a tensor there, that counts its writes."""
        if into is None:
            with torch.inference_mode(False):
                into = torch.empty_like(tensor, device=device, memory_format=torch.preserve_format)
        if self.is_direct:
            into.copy_(tensor, non_blocking=True)  # between devices torch waits for the streams of both, on both
        elif self._have_streams and tensor.device.type == "cuda" == device.type:
            self._copy_by_host(tensor, into)
        else:
            into.copy_(tensor.cpu())
        # Streams of another class are of a backend in Python, as the tests have, where torch has no memory to reuse.
        if self._have_streams and isinstance(self._streams[tensor.device], torch.Stream):
            tensor.record_stream(self._streams[tensor.device])
        return into

    def _copy_by_host(self, source: torch.Tensor, target: torch.Tensor) -> None:
        staged = torch.empty_like(source, device="cpu", pin_memory=True)
        staged.copy_(source, non_blocking=True)
        stream, current = self._streams[target.device], _backend_of(target.device).current_stream(target.device)
        stream.wait_stream(self._streams[source.device])
        stream.wait_stream(current)  # which may have used the memory before
        with _backend_of(target.device).stream(stream):
            target.copy_(staged, non_blocking=True)
        current.wait_stream(stream)

    def _check(self) -> None:
        one, other = self._devices
        expected = torch.arange(2**16, dtype=torch.int32)
        self.is_direct = True
        try:
            with self.leaving(one):
                there = self.copy(expected.to(one), other)
            with self.leaving(other):
                back = self.copy(there, one)
            is_right = torch.equal(there.cpu(), expected) and torch.equal(back.cpu(), expected)
        except BaseException:
            self.is_direct = None
            raise
        self.is_direct = is_right


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the current one: some kernels run there, whatever device their arguments are on."""
    backend = _backend_of(device)
    return contextlib.nullcontext() if backend is None else backend.device(device)


def _backend_of(device: torch.device) -> Any:
    """torch's module for its streams and events, None where it has none."""
    return getattr(torch, device.type) if device.type not in ("cpu", "mps") else None
