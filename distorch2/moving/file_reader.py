"""Reading slabs from files: several threads at a time, in large parts, ahead of use."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..weights.devices import CPU
from ..weights.files import SlabInFiles, WeightsFile
from ..weights.slab import allocate
from .pinning import PinnedSlabs
from .streams import backend_of, on_device

PART_BYTES = 8 * 1024**2
READ_AHEAD_BYTES = 256 * 1024**2
"""Page-locked, for each model that is read from the disk while it runs."""
_MEASURED_PARTS = 16
_THREADS = 8
"""A drive is at its full speed with a few large requests at a time."""


@dataclass(frozen=True)
class _Buffer:
    memory: torch.Tensor
    copied: Any
    """An event: the bytes that it had last are on the device."""


@dataclass(frozen=True)
class _Reading:
    """A part of a slab, from `begin` on, that is being read into a buffer, or has been."""

    slab: SlabInFiles
    begin: int
    buffer: _Buffer
    result: Future[torch.Tensor]


class FileReader:
    """Copies slabs that lie in files to one device, by way of page-locked memory, from the first copy to `close`.

    After a slab the one is read ahead that came after it the last time. `part_bytes` and `most_bytes` are the sizes of
    what one thread reads at a time, and of the memory.
    """

    def __init__(
        self,
        device: torch.device,
        pinned: PinnedSlabs,
        part_bytes: int = PART_BYTES,
        most_bytes: int = READ_AHEAD_BYTES,
    ) -> None:
        self._device, self._pinned = device, pinned
        self._backend = backend_of(device)
        self._step, self._most_bytes = part_bytes, most_bytes
        self._room: torch.Tensor | None = None
        self._free: collections.deque[_Buffer] = collections.deque()
        self._after: dict[SlabInFiles, SlabInFiles] = {}
        self._last: SlabInFiles | None = None
        self._ahead: collections.deque[_Reading] = collections.deque()
        self._to_read: tuple[SlabInFiles, int] | None = None  # after `_ahead`: slab and offset in it
        self._threads = ThreadPoolExecutor(_THREADS)

    def expect(self, slabs: Sequence[SlabInFiles]) -> None:
        """Copies will be asked for in this order, in a cycle, or in another, which is learnt."""
        after = dict(zip(slabs, [*slabs[1:], *slabs[:1]], strict=True))
        if self._room is not None and self._room_for({**self._after, **after}) > self._room.nbytes:
            self.close()
        self._after |= after

    def copy(self, source: SlabInFiles, target: torch.Tensor) -> None:
        """Fill `target` on the device, on the stream that is the current one. Waits until all is read.

        Raises `FileError`, after which nothing is being read.
        """
        if self._last is not None:
            self._after[self._last] = source
        self._last = source
        if self._room is None:
            self._open()
        try:
            self._skip_to(source)
            for begin in range(0, source.nbytes, self._step):
                self._read_ahead()
                reading = self._ahead[0]
                assert reading.begin == begin
                target[begin : begin + self._step].copy_(reading.result.result(), non_blocking=True)
                reading.buffer.copied.record(self._backend.current_stream(self._device))
                self._free.append(self._ahead.popleft().buffer)
            self._read_ahead()
        except BaseException:
            self.forget()
            raise

    def _room_for(self, slabs: Iterable[SlabInFiles]) -> int:
        num_bytes = sum(slab.nbytes for slab in slabs) or self._most_bytes
        return -(-min(num_bytes, self._most_bytes) // self._step) * self._step

    def _open(self) -> None:
        self._room = allocate(self._room_for(self._after), CPU)
        self._pinned.pin(self._room)
        self._free.extend(_Buffer(memory, self._backend.Event()) for memory in self._room.split(self._step))

    def close(self) -> None:
        self.forget()
        self._free.clear()
        if self._room is not None:
            self._pinned.unpin(self._room)
            self._room = None

    def _skip_to(self, source: SlabInFiles) -> None:
        """What was read ahead of it in vain is dropped."""
        while self._ahead and (self._ahead[0].slab is not source or self._ahead[0].begin):
            self._drop_first()
        if not self._ahead:
            self._to_read = source, 0

    def _drop_first(self) -> None:
        reading = self._ahead.popleft()
        reading.result.cancel()
        if not reading.result.cancelled():
            reading.result.exception()  # it has ended then
        self._free.append(reading.buffer)

    def _read_ahead(self) -> None:
        """Start to read as far as there are buffers."""
        while self._free and self._to_read is not None:
            slab, begin = self._to_read
            buffer, num_bytes = self._free.popleft(), min(self._step, slab.nbytes - begin)
            result = self._threads.submit(self._read, slab, begin, buffer, num_bytes)
            self._ahead.append(_Reading(slab, begin, buffer, result))
            following = self._after.get(slab)
            if begin + num_bytes < slab.nbytes:
                self._to_read = slab, begin + num_bytes
            else:
                self._to_read = None if following is None else (following, 0)

    def _read(self, slab: SlabInFiles, begin: int, buffer: _Buffer, num_bytes: int) -> torch.Tensor:
        with on_device(self._device):
            buffer.copied.synchronize()
        return slab.read_into(buffer.memory[:num_bytes], begin)

    def forget(self) -> None:
        """What was read ahead, or was expected, is not used: slabs are to be replaced. No buffer is in use then."""
        self._after.clear()
        while self._ahead:
            self._drop_first()
        self._to_read = self._last = None
        for buffer in self._free:
            buffer.copied.synchronize()


def copy_now(source: torch.Tensor | SlabInFiles, target: torch.Tensor) -> torch.Tensor:
    """Fill `target`, on any device, and return it when that is done."""
    if not isinstance(source, SlabInFiles):
        return target.copy_(source)
    if target.device == CPU:
        return _read(source, target)
    return target.copy_(_read(source, allocate(source.nbytes, CPU)))


def _read(slab: SlabInFiles, target: torch.Tensor) -> torch.Tensor:
    begins = range(0, slab.nbytes, PART_BYTES)
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(lambda begin: slab.read_into(target[begin : begin + PART_BYTES], begin), begins))
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
            list(threads.map(lambda into, begin: file.read_into(memoryview(into.numpy()), begin), room, begins))
            _speeds[file.drive] = room.nbytes / (time.perf_counter() - started)
    return _speeds[file.drive]
