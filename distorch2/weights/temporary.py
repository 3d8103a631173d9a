"""Slabs in temporary files, for weights that no other file has. The files go with the process, however it ends."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable

import torch

from .files import FileError, FileRange, Piece, SlabInFiles, WeightsFile
from .slab import PAGE_BYTES

_FILE_BYTES = 1024**3
"""Of one temporary file, unless a slab is larger: few of them, since open files are limited."""


class TemporarySlabs:
    """Slabs in files in the folder that `folder` returns. A file goes when no slab in it is used any more."""

    def __init__(self, folder: Callable[[], str]) -> None:
        self._folder = folder
        self._file: WeightsFile | None = None
        self._pages: mmap.mmap | None = None
        self._used_bytes = 0

    def store(self, slab: torch.Tensor) -> tuple[torch.Tensor, SlabInFiles]:
        """Write `slab` (uint8, in host memory) to a file. Returns a mapping of these bytes, to be read and written, and
        where they lie in the file.

        Raises `FileError` when the folder has no room for them, or cannot be written to.
        """
        folder = self._folder()
        try:
            if self._pages is None or self._used_bytes + slab.nbytes > len(self._pages):
                self._begin_file(folder, max(slab.nbytes, _FILE_BYTES))
            assert self._file is not None and self._pages is not None
            begin = self._used_bytes
            # Not by way of the mapping: a full drive is an error here, and would be a crash there.
            self._file.write(memoryview(slab.numpy()), begin)
        except OSError as error:
            self._file = self._pages = None
            raise FileError(
                f"no room in {folder} for {slab.nbytes >> 20} MiB of weights that fit into no memory "
                f"({error.strerror}); free some, or start ComfyUI with --temp-directory on a larger drive"
            ) from error
        self._used_bytes += -(-slab.nbytes // PAGE_BYTES) * PAGE_BYTES
        with torch.inference_mode(False):
            mapped = torch.frombuffer(self._pages, dtype=torch.uint8, count=slab.nbytes, offset=begin)
        return mapped, SlabInFiles(slab.nbytes, [Piece(0, FileRange(self._file, begin, slab.nbytes))])

    def _begin_file(self, folder: str, num_bytes: int) -> None:
        self._file = self._pages = None
        os.makedirs(folder, exist_ok=True)
        handle = tempfile.TemporaryFile(prefix="distorch2_", dir=folder, buffering=0)  # noqa: SIM115 # it stays open
        handle.truncate(num_bytes)
        self._file = WeightsFile(handle, f"a temporary file in {folder}")
        self._pages = mmap.mmap(handle.fileno(), num_bytes)
        self._used_bytes = 0
