"""Reading slabs from files: several threads at a time, in large parts, ahead of use."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..weights.files import SlabInFiles, WeightsFile
from .streams import backend_of, on_device

PART_BYTES = 8 * 1024**2
READ_AHEAD_BYTES = 256 * 1024**2
"""Page-locked, for each model that is read from the disk while it runs."""
_MEASURED_PARTS = 16
_THREADS = 8
"""A drive is at its full speed with a few large requests at a time."""


@dataclass(frozen=True)
class _Part:
    """A part of a slab that is being read, from `begin` on, into `buffer`, or has been."""

    slab: SlabInFiles
    begin: int
    buffer: torch.Tensor
    is_free: Any
    """An event: the buffer's bytes before are on the device."""
    reading: Future[torch.Tensor]


class FileReader:
    """Copies slabs that lie in files to one device, by way of `buffers` (uint8, page-locked, of one size).

    After a slab the one is read ahead that came after it the last time.
    """

    def __init__(self, device: torch.device, buffers: Sequence[torch.Tensor]) -> None:
        self._device = device
        self._backend = backend_of(device)
        self._free = collections.deque((buffer, self._backend.Event()) for buffer in buffers)
        self._step = buffers[0].nbytes
        self._after: dict[SlabInFiles, SlabInFiles] = {}
        self._last: SlabInFiles | None = None
        self._ahead: collections.deque[_Part] = collections.deque()
        self._next: tuple[SlabInFiles, int] | None = None  # what is to be read after `_ahead`: slab and offset in it
        self._threads = ThreadPoolExecutor(_THREADS)

    def expect(self, slabs: Sequence[SlabInFiles]) -> None:
        """They are asked for in this order, as far as that is known, again and again."""
        self._after |= zip(slabs, [*slabs[1:], *slabs[:1]], strict=True)

    def copy(self, source: SlabInFiles, target: torch.Tensor) -> None:
        """Fill `target` on the device, on the stream that is the current one. Waits until all is read.

        Raises `FileError`, after which nothing is being read.
        """
        if self._last is not None:
            self._after[self._last] = source
        self._last = source
        try:
            self._drop_until(source)
            for begin in range(0, source.nbytes, self._step):
                self._read_ahead()
                part = self._ahead.popleft()
                assert part.begin == begin
                target[begin : begin + self._step].copy_(part.reading.result(), non_blocking=True)
                part.is_free.record(self._backend.current_stream(self._device))
                self._free.append((part.buffer, part.is_free))
            self._read_ahead()
        except BaseException:
            self.forget()
            raise

    def _drop_until(self, source: SlabInFiles) -> None:
        """Have `source` come next; what was read ahead of it in vain is dropped."""
        while self._ahead and (self._ahead[0].slab is not source or self._ahead[0].begin):
            self._drop_first()
        if not self._ahead:
            self._next = source, 0

    def _drop_first(self) -> None:
        part = self._ahead.popleft()
        part.reading.cancel()
        if not part.reading.cancelled():
            part.reading.exception()  # it has ended then
        self._free.append((part.buffer, part.is_free))

    def _read_ahead(self) -> None:
        """Start to read as far as there are buffers."""
        while self._free and self._next is not None:
            slab, begin = self._next
            buffer, is_free = self._free.popleft()
            room = buffer[: min(self._step, slab.nbytes - begin)]
            reading = self._threads.submit(self._read, slab, begin, room, is_free)
            self._ahead.append(_Part(slab, begin, buffer, is_free, reading))
            following = self._after.get(slab)
            if begin + self._step < slab.nbytes:
                self._next = slab, begin + self._step
            else:
                self._next = None if following is None else (following, 0)

    def _read(self, slab: SlabInFiles, begin: int, room: torch.Tensor, is_free: Any) -> torch.Tensor:
        with on_device(self._device):
            is_free.synchronize()
        return slab.read_into(room, begin)

    def forget(self) -> None:
        """What was read ahead, or was expected, is not used: slabs are to be replaced. No buffer is in use then."""
        self._after.clear()
        while self._ahead:
            self._drop_first()
        self._next = self._last = None
        for _, is_free in self._free:
            is_free.synchronize()


def read(slab: SlabInFiles, target: torch.Tensor) -> torch.Tensor:
    """Fill `target` in main memory, and return it."""
    with ThreadPoolExecutor(_THREADS) as threads:
        parts = [
            threads.submit(slab.read_into, target[begin : begin + PART_BYTES], begin)
            for begin in range(0, slab.nbytes, PART_BYTES)
        ]
    for part in parts:
        part.result()
    return target


_speeds: dict[int, float] = {}
"""By drive."""


def bytes_per_second(file: WeightsFile) -> float:
    """How fast a file is read from its drive, measured once for each drive: parts spread over the file."""
    if file.drive not in _speeds:
        step = max(PART_BYTES, file.num_bytes // _MEASURED_PARTS)
        begins = range(0, max(1, file.num_bytes - PART_BYTES), step)
        room = torch.empty(len(begins), min(PART_BYTES, file.num_bytes), dtype=torch.uint8)
        room.zero_()  # has memory before the time is taken
        for begin in begins:
            file.drop_cached(begin, PART_BYTES)
        with ThreadPoolExecutor(_THREADS) as threads:
            started = time.perf_counter()
            parts = [
                threads.submit(file.read_into, memoryview(into.numpy()), begin)
                for into, begin in zip(room, begins, strict=True)
            ]
            for part in parts:
                part.result()
            _speeds[file.drive] = room.nbytes / (time.perf_counter() - started)
    return _speeds[file.drive]
