"""Weights in files: ranges of bytes that are read with checks, and slabs that consist of them."""

from __future__ import annotations

import bisect
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import torch


class FileError(RuntimeError):
    """Weights cannot be read from a file, or written to a temporary one, or have changed in a file."""

    __module__ = "distorch2"  # ComfyUI shows it; as a pack this is a folder of the user's


class WeightsFile:
    """A file that stays open: also when it is deleted, or another takes its name. Several threads may read it."""

    _open: weakref.WeakValueDictionary[str, WeightsFile] = weakref.WeakValueDictionary()

    def __init__(self, handle: BinaryIO, path: str) -> None:
        self.path = path
        self._handle = handle
        self._lock = threading.Lock()
        self._state = _state_of(os.fstat(handle.fileno()))

    @classmethod
    def at(cls, path: str) -> WeightsFile:
        """The one that is open by this path, or a new one. Raises `OSError`."""
        found, status = cls._open.get(path), os.stat(path)
        is_same = found is not None and os.path.samestat(os.fstat(found._handle.fileno()), status)
        if found is None or not is_same or found._state != _state_of(status):
            found = cls._open[path] = cls(open(path, "rb", buffering=0), path)  # noqa: SIM115 # it stays open
        return found

    def check(self) -> None:
        """Raises `FileError` when it was written into since it was opened."""
        if _state_of(os.fstat(self._handle.fileno())) != self._state:
            raise FileError(
                f"{self.path} was written into while it was in use; load the model again (in ComfyUI: Free model "
                "and node cache, then run the workflow)"
            )

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on. Raises `FileError` when they cannot be read."""
        while buffer.nbytes:
            try:
                if hasattr(os, "preadv"):
                    num_read = os.preadv(self._handle.fileno(), [buffer], offset)
                else:
                    with self._lock:
                        self._handle.seek(offset)
                        num_read = self._handle.readinto(buffer) or 0  # type: ignore[attr-defined] # it is unbuffered
            except OSError as error:
                raise FileError(f"cannot read {self.path}: {error.strerror}") from error
            if not num_read:
                raise FileError(
                    f"{self.path} ends before byte {offset + buffer.nbytes}, where weights were; it was cut short "
                    "while it was in use: restore it and load the model again"
                )
            buffer, offset = buffer[num_read:], offset + num_read

    @property
    def drive(self) -> int:
        return os.fstat(self._handle.fileno()).st_dev

    @property
    def num_bytes(self) -> int:
        return self._state[0]

    def drop_cached(self, offset: int, num_bytes: int) -> None:
        """Have bytes that nobody has mapped read from the drive the next time, where the system can do that."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle.fileno(), offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def write(self, data: memoryview, offset: int) -> None:
        """Raises `OSError`, that of a full drive too."""
        with self._lock:
            self._handle.seek(offset)
            while data.nbytes:
                data = data[self._handle.write(data) :]


def _state_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class FileRange:
    file: WeightsFile
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Piece:
    """Bytes of a slab, from `offset` on: in a file or, few of them, in host memory (uint8)."""

    offset: int
    source: FileRange | torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.source.num_bytes if isinstance(self.source, FileRange) else self.source.nbytes


@dataclass(frozen=True, eq=False)
class SlabInFiles:
    """A slab of `nbytes` bytes that is not in memory. `pieces` are in order; what lies between them is padding."""

    nbytes: int
    pieces: Sequence[Piece]

    @cached_property
    def _ends(self) -> list[int]:
        return [piece.offset + piece.num_bytes for piece in self.pieces]

    def read_into(self, target: torch.Tensor, begin: int = 0) -> torch.Tensor:
        """Fill `target` (uint8, in host memory) with the bytes from `begin` on, and return it."""
        end = begin + target.nbytes
        bytes_of_target = memoryview(target.numpy())
        for piece in self.pieces[bisect.bisect_right(self._ends, begin) :]:
            if piece.offset >= end:
                break
            first, last = max(piece.offset, begin), min(piece.offset + piece.num_bytes, end)
            inside = bytes_of_target[first - begin : last - begin]
            if isinstance(piece.source, FileRange):
                piece.source.file.read_into(inside, piece.source.offset + first - piece.offset)
            else:
                inside[:] = memoryview(piece.source.numpy())[first - piece.offset : last - piece.offset]
        return target
