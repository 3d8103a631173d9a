"""Packing the slabs of groups, by the device that will unpack them."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator, Sequence

import torch

from ..moving.pinning import PinnedSlabs
from ..moving.program import Program
from ..moving.streams import on_device
from ..moving.unpacking import coder_for
from ..weights.devices import CPU
from ..weights.packing import PackedSlab, pack
from ..weights.slab import allocate
from .groups import StoredGroup

logger = logging.getLogger(__name__)

_BUFFERS_BYTES = 1024**3
"""In all, unless one group needs more."""


class Packer:
    """Packs while it `is_on`: until it fails for another reason than want of memory."""

    def __init__(self, device: torch.device, program: Program, pinned: PinnedSlabs, is_on: bool) -> None:
        self.is_on = is_on
        self._device, self._program, self._pinned = device, program, pinned
        self._has_warned = False
        self._buffers: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._is_packing = threading.Lock()

    def packed(self, slab: torch.Tensor, on: torch.device) -> PackedSlab | None:
        """A slab, packed where it is, or one in main memory on the compute device. None where it stays as it is."""
        # Two accelerators may not reach each other: each packs its own slabs.
        by = self._device if slab.device == CPU else slab.device
        packed = self._packed_by(by, slab)
        return packed if packed is None or packed.device == on else packed.to(on)

    @contextlib.contextmanager
    def buffers(self, groups: Sequence[StoredGroup], number: int) -> Iterator[None]:
        """For `filled`, of these groups: up to so many at a time."""
        num_bytes = max((group.slab_bytes for group in groups), default=1)
        number = min(number, len(groups), max(1, _BUFFERS_BYTES // num_bytes))
        buffers = [allocate(num_bytes, CPU).zero_() for _ in range(number)]
        try:
            for buffer in buffers:
                self._pinned.pin(buffer)  # what has been written to is locked faster
                self._buffers.put(buffer)
            yield
        finally:
            self._buffers = queue.SimpleQueue()
            for buffer in buffers:
                self._pinned.unpin(buffer)

    def filled(self, group: StoredGroup, device: torch.device) -> torch.Tensor | PackedSlab:
        """A slab with the weights that the modules have, packed for main memory or for the compute device; as it is, in
        main memory, where it cannot be. Within `buffers`; several threads may call it."""
        buffer = self._buffers.get()
        try:
            slab = group.fill(buffer[: group.slab_bytes])
            with self._is_packing:  # it takes memory of the device
                packed = self._packed_by(self._device, slab)
                if packed is not None and packed.device != device:
                    slab[: packed.nbytes].copy_(packed.buffer)
            if packed is None:
                return group.new_slab(CPU).copy_(slab)
            if packed.device == device:
                return packed
            return PackedSlab(packed.layout, allocate(packed.nbytes, CPU).copy_(slab[: packed.nbytes]))
        finally:
            self._buffers.put(buffer)

    def _packed_by(self, device: torch.device, slab: torch.Tensor) -> PackedSlab | None:
        if not self.is_on:
            return None
        try:
            with on_device(device):
                return pack(slab.to(device, non_blocking=True), coder_for(device))
        except Exception as error:  # of a compiler, too
            self.is_on = self._program.is_out_of_memory(error)
            if not (self.is_on and self._has_warned):
                self._has_warned = True
                logger.warning("DisTorch2: weights are not packed (%s)", str(error).partition("\n")[0])
            return None
