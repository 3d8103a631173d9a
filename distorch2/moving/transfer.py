"""Copies of weights to the compute device."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ..weights.files import SlabInFiles
from ..weights.packing import PackedSlab
from .crossing import Crossing
from .file_reader import FileReader, copy_now
from .streams import backend_of, context_of, stream_for
from .unpacking import Unpacker

_LEAST_TO_HALVE_BYTES = 2 * 1024**2
"""Below this size, starting a second copy costs more than halving the transfer saves."""


class Copy:
    """A copy of `source` into `target`, of as many bytes when they are not packed, that can be submitted again and
    again."""

    def __init__(self, source: torch.Tensor | SlabInFiles | PackedSlab, target: torch.Tensor) -> None:
        self.source = source
        self.target = target
        memory = source.buffer if isinstance(source, PackedSlab) else source
        self.is_page_locked = self.is_pageable = False
        if isinstance(memory, torch.Tensor) and memory.device.type == "cpu":
            self.is_page_locked = memory.is_pinned()
            self.is_pageable = not self.is_page_locked
        backend = backend_of(target.device)
        self.events = () if backend is None else (backend.Event(), backend.Event())
        """One for each way that a part may take. Reused on every submit: creating events is slower. A wait that was
        queued earlier still refers to the earlier record."""
        self.done_events: Sequence[torch.Event] = ()
        """The events that the last submit recorded."""
        self._begin, self._end = target.data_ptr(), target.data_ptr() + target.nbytes
        self.is_awaited = True
        """Whether the compute device waits for it already, or need not."""

    def overlaps(self, other: Copy) -> bool:
        """Whether they write to the same memory."""
        return self._begin < other._end and other._begin < self._end


class Transfer:
    """Copies to one device: on a stream of their own where the device has streams, else at once.

    `copies` counts the copies that were submitted. Memory that is not page-locked is copied by way of `upload`, if
    there is one. Of page-locked memory a half takes the `detour`, if there is one. What lies in files comes by way of
    `reader`, and what is packed by way of `unpacker`.
    """

    def __init__(self, device: torch.device, reader: FileReader | None = None) -> None:
        self.device = device
        self._index = device.index  # the current stream is looked up faster by number
        self.copies = 0
        self._upload: Upload | None = None
        self._detour: Detour | None = None
        self._unpacker: Unpacker | None = None
        self._reader = reader
        self._backend = backend_of(device)
        self._stream: Any = None
        self._on_stream: Any = None
        self._donor_streams: dict[torch.device, Any] = {}
        self._reached: dict[torch.device, bool] = {}  # whether copies from a donor arrive
        self._given: Any = None  # an event, recorded after the work that the device has been given so far
        self._waits: list[tuple[Any, Any]] | None = None  # events before and after each, while they are noted
        self._copied_ahead: list[Copy] = []  # by several ways: those that nobody has waited for

    @property
    def has_streams(self) -> bool:
        return self._backend is not None

    @property
    def packed_room_bytes(self) -> int:
        """Of the device."""
        return 0 if self._unpacker is None else sum(slot.nbytes for slot in self._unpacker.slots)

    @property
    def unpacker(self) -> Unpacker | None:
        return self._unpacker

    @property
    def upload(self) -> Upload | None:
        return self._upload

    @property
    def detour(self) -> Detour | None:
        return self._detour

    def take(self, upload: Upload | None = None, detour: Detour | None = None) -> None:
        """Have copies take one more of these ways from now on."""
        self._upload, self._detour = upload or self._upload, detour or self._detour

    def unpack_by(self, unpacker: Unpacker | None) -> None:
        """Have what is packed come this way from now on, instead of the one before, whose slots may be freed then."""
        if self._unpacker is not None:
            self.wait()
        self._unpacker = unpacker

    def leave_detour(self) -> None:
        try:
            self.wait()
        finally:
            self._detour = None

    def close(self) -> None:
        """Leave all ways; their buffers may be freed then. Others may be taken later."""
        self.wait()
        self._upload = self._detour = self._unpacker = None
        if self._reader is not None:
            self._reader.close()

    def expect(self, copies: Sequence[Copy]) -> None:
        """These are to be submitted, in about this order, until the next `wait`."""
        if self._reader is not None and self._backend is not None:
            self._reader.expect([copy.source for copy in copies if isinstance(copy.source, SlabInFiles)])

    def submit(self, copies: Sequence[Copy]) -> None:
        """Start `copies`, one after another, when the work that the compute device has been given so far is done.

        That work may still read what the targets hold.
        """
        self.copies += len(copies)
        if self._backend is None:
            for copy in copies:
                copy_now(copy.source, copy.target)
            return
        if self._stream is None:
            self._stream, self._given = stream_for(self.device, "copying"), self._backend.Event()
            self._on_stream = context_of(self._stream)
        self._given.record(self._backend.current_stream(self._index))
        self._stream.wait_event(self._given)
        with self._on_stream:
            for copy in copies:
                if self._copied_ahead:
                    self._come_after_those_before(copy)
                streams = self._start(copy)  # one or two
                copy.done_events = [stream.record_event(event) for stream, event in zip(streams, copy.events)]
                copy.is_awaited = False
                if self._detour is not None or self._unpacker is not None:
                    self._copied_ahead.append(copy)

    def _come_after_those_before(self, copy: Copy) -> None:
        """A copy that was made ahead and not used may still be writing to the target of `copy`, by another way."""
        self._copied_ahead = [other for other in self._copied_ahead if not other.is_awaited]
        for other in [other for other in self._copied_ahead if other.overlaps(copy)]:
            for event in other.done_events:
                self._stream.wait_event(event)
                for way in (self._detour, self._unpacker):
                    if way is not None:
                        way.stream.wait_event(event)
            self._copied_ahead.remove(other)

    def _start(self, copy: Copy) -> Sequence[Any]:
        """Returns the streams that the copy runs on."""
        source, target = copy.source, copy.target
        if isinstance(source, PackedSlab):
            assert self._unpacker is not None
            self._unpacker.unpack(source, target, functools.partial(self._copy, copy.is_pageable), self._stream)
            return (self._unpacker.stream,)
        if isinstance(source, SlabInFiles):
            assert self._reader is not None
            self._reader.copy(source, target)
        elif self._detour is not None and copy.is_page_locked and source.nbytes >= _LEAST_TO_HALVE_BYTES:
            half = source.nbytes // 2
            self._detour.copy(source[half:], target[half:], self._given)
            target[:half].copy_(source[:half], non_blocking=True)
            return self._stream, self._detour.stream
        else:
            self._copy(copy.is_pageable, source, target)
        return (self._stream,)

    def _copy(self, is_pageable: bool, source: torch.Tensor, target: torch.Tensor) -> None:
        """On the stream for copies."""
        if self._upload is not None and is_pageable:
            try:
                self._upload.copy(source, target)
                self._upload.flush()
            except BaseException:
                with contextlib.suppress(Exception):  # later, the parts that are left would overwrite other groups
                    self._upload.wait()
                raise
        elif source.device.type == self.device.type:
            with self._backend.stream(self._stream_on(source.device)):
                target.copy_(source if self._can_reach(source.device) else source.cpu(), non_blocking=True)
        else:
            target.copy_(source, non_blocking=True)

    def _stream_on(self, donor: torch.device) -> Any:
        """The stream for copies from a donor. On the donor's default stream, CUDA would let such copies wait for all
        work of both devices, and both devices wait for the copies."""
        if donor not in self._donor_streams:
            self._donor_streams[donor] = stream_for(donor, f"lending to {self.device}")
        stream = self._donor_streams[donor]
        stream.wait_stream(self._backend.current_stream(donor))  # which may have written the weights
        return stream

    def _can_reach(self, donor: torch.device) -> bool:
        if donor not in self._reached:
            self._reached[donor] = Crossing(self.device, donor).check()
        return self._reached[donor]

    def use(self, copy: Copy) -> None:
        """Let what the compute device is given from now on wait for `copy`."""
        if not copy.is_awaited:
            stream = self._backend.current_stream(self._index)
            begins = None if self._waits is None else self._recorded(stream)
            for event in copy.done_events:
                stream.wait_event(event)
            if self._waits is not None:
                self._waits.append((begins, self._recorded(stream)))
            copy.is_awaited = True

    @contextlib.contextmanager
    def timed(self) -> Iterator[Timing]:
        """Times what the compute device is given meanwhile, and how long it waits for copies."""
        stream = self._backend.current_stream(self._index)
        waits: list[tuple[Any, Any]] = []
        self._waits = waits
        begins = self._recorded(stream)
        timing = Timing(waits)
        try:
            yield timing
        finally:
            self._waits = None
            timing.whole = (begins, self._recorded(stream))

    def _recorded(self, stream: Any) -> Any:
        event = self._backend.Event(enable_timing=True)
        event.record(stream)
        return event

    def bytes_per_second(self, copies: Sequence[Copy]) -> float:
        """The speed of these copies, measured by doing them a few times."""
        num_bytes, seconds = sum(copy.source.nbytes for copy in copies), []
        for _ in range(3):  # the first time, there may be memory to get and buffers to set up
            self.wait()
            started = time.perf_counter()
            self.submit(copies)
            self.wait()
            seconds.append(time.perf_counter() - started)
        return num_bytes / min(seconds)

    def wait(self) -> None:
        """Return when all copies are done: slabs and staging buffer may be written or freed then."""
        self._copied_ahead.clear()
        if self._reader is not None:
            self._reader.forget()
        if self._detour is not None:
            self._detour.wait()
        if self._backend is not None and self._backend.is_initialized():
            self._backend.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


class Timing:
    """How long the compute device took for something, and waited for copies meanwhile: events before and after each."""

    def __init__(self, waits: Sequence[tuple[Any, Any]]) -> None:
        self._waits = waits
        self.whole: tuple[Any, Any] | None = None
        """Of all; None until it is over."""

    def waiting_part(self) -> float | None:
        """0 to 1; None until the device has done it."""
        if self.whole is None or not self.whole[1].query():
            return None
        milliseconds = self.whole[0].elapsed_time(self.whole[1])
        return self._waiting_ms() / milliseconds if milliseconds else 0.0

    def computing_seconds(self) -> float | None:
        """Of the device, beside waiting; None until it has done it."""
        if self.whole is None or not self.whole[1].query():
            return None
        return (self.whole[0].elapsed_time(self.whole[1]) - self._waiting_ms()) / 1000

    def _waiting_ms(self) -> float:
        return sum(begin.elapsed_time(end) for begin, end in self._waits)


class Detour:
    """The way from page-locked host memory to one device by another accelerator, whose link to the host is free.

    `slots` are buffers (uint8, of one size) on the other accelerator that take turns. What is copied is on the device
    when `stream` has done what it was given.
    """

    def __init__(self, device: torch.device, slots: Sequence[torch.Tensor]) -> None:
        helper = slots[0].device
        self.slots = slots
        self._backend = backend_of(device)
        self.stream = stream_for(device, "detour")
        self._to_helper, self._onward = stream_for(helper, "to helper"), stream_for(helper, "onward")
        self._to_helper.wait_stream(self._backend.current_stream(helper))  # which may have used the slots' memory
        self._turns = itertools.cycle([(slot, self._backend.Event(), self._backend.Event()) for slot in slots])

    def wait(self) -> None:
        """Return when the slots are not in use, whatever broke off."""
        self._to_helper.synchronize()
        self._onward.synchronize()

    def copy(self, source: torch.Tensor, target: torch.Tensor, is_free: torch.Event) -> None:
        """Start to copy bytes from the host into `target`, which is written to when `is_free`."""
        self.stream.wait_event(is_free)
        step = self.slots[0].nbytes
        for begin in range(0, source.nbytes, step):
            part = source[begin : begin + step]
            slot, is_filled, is_empty = next(self._turns)
            staged = slot[: part.nbytes]
            self._to_helper.wait_event(is_empty)
            with self._backend.stream(self._to_helper):
                staged.copy_(part, non_blocking=True)
            is_filled.record(self._to_helper)
            self._onward.wait_event(is_filled)
            # Between devices torch copies on the current stream of the first, and lets that of the second wait.
            with self._backend.stream(self.stream), self._backend.stream(self._onward):
                target[begin : begin + step].copy_(staged, non_blocking=True)
            is_empty.record(self._onward)


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
        with torch.inference_mode():  # wherever the next tensor was made, this may be part of an inference tensor
            part.copy_(filling.result(), non_blocking=True)
        is_read.record(self._backend.current_stream(self._device))

    def wait(self) -> None:
        """Return when the buffers are not in use any more, also where a part could not be filled."""
        try:
            self.flush()
        finally:
            for filling, *_ in self._filling:
                filling.exception()  # it has ended then
            self._filling.clear()
            for _ in self.buffers:
                next(self._turns)[1].synchronize()


def _fill(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():  # which is on for one thread at a time
        return target.copy_(source)
