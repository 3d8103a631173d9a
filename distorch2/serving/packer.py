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
from ..moving.unpacking import coder_for, unpacked_on
from ..planning.plan import AUTO, ON
from ..weights.devices import CPU
from ..weights.packing import PackedSlab, pack
from ..weights.slab import allocate
from .groups import StoredGroup

logger = logging.getLogger(__name__)

_BUFFERS_BYTES = 1024**3
"""In all, unless one group needs more."""


class Packer:
    """Packs while it `is_on`: with `ON` from the beginning, with `AUTO` from `start`, which may be called while it
    `can_start`. After a failure that is not want of memory it neither packs nor starts again."""

    def __init__(self, device: torch.device, program: Program, pinned: PinnedSlabs, pack_weights: str) -> None:
        self.is_on, self.can_start = pack_weights == ON, pack_weights == AUTO
        self._device, self._program, self._pinned = device, program, pinned
        self._has_warned = False
        self._buffers: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._is_packing = threading.Lock()

    def start(self) -> None:
        self.is_on, self.can_start = True, False

    def pack(self, slab: torch.Tensor, group: StoredGroup) -> PackedSlab | None:
        """A slab for a group, packed on its own accelerator, or on the compute device where it is in main memory; None
        where it cannot be."""
        return self._packed_by(self._device_for(slab), slab, group)

    def unpacked(self, packed: PackedSlab) -> torch.Tensor:
        """The slab again, on the accelerator that packs it; in main memory where that has no room for it."""
        try:
            return unpacked_on(self._device_for(packed), packed)
        except RuntimeError as error:
            if not self._program.is_out_of_memory(error):
                raise
        return unpacked_on(CPU, packed)

    def _device_for(self, slab: torch.Tensor | PackedSlab) -> torch.device:
        """Which packs and unpacks it: its accelerator, since two may not reach each other, or the compute device."""
        return self._device if slab.device == CPU else slab.device

    @contextlib.contextmanager
    def buffers(self, groups: Sequence[StoredGroup], number: int) -> Iterator[None]:
        """For `fill_packed`, of these groups: up to so many at a time."""
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

    def fill_packed(self, group: StoredGroup, device: torch.device) -> torch.Tensor | PackedSlab:
        """A slab with the weights that the modules have, packed for main memory or for the compute device; as it is, in
        main memory, where it cannot be. Within `buffers`; several threads may call it."""
        buffer = self._buffers.get()
        try:
            slab = group.fill(buffer[: group.slab_bytes])
            with self._is_packing:  # it takes memory of the device
                packed = self._packed_by(self._device, slab, group)
                if packed is not None and packed.device != device:
                    slab[: packed.nbytes].copy_(packed.buffer)
            if packed is None:
                return group.new_slab(CPU).copy_(slab)
            if packed.device == device:
                return packed
            return PackedSlab(packed.layout, allocate(packed.nbytes, CPU).copy_(slab[: packed.nbytes]))
        finally:
            self._buffers.put(buffer)

    def _packed_by(self, device: torch.device, slab: torch.Tensor, group: StoredGroup) -> PackedSlab | None:
        if not self.is_on:
            return None
        try:
            with on_device(device):
                packed = pack(slab.to(device, non_blocking=True), coder_for(device))
        except Exception as error:  # of a compiler, too
            self.is_on = self._program.is_out_of_memory(error)
            if not (self.is_on and self._has_warned):
                self._has_warned = True
                logger.warning("DisTorch2: weights are not packed (%s)", str(error).partition("\n")[0])
            return None
        group.stays_unpacked = packed is None
        return packed
