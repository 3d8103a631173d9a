"""Page-locking slabs and upload buffers, in ComfyUI's account of page-locked memory: copies from them are fast."""

from __future__ import annotations

import collections
import math
import threading

import torch

from .program import Program

_users: collections.Counter[int] = collections.Counter()
"""Address of page-locked memory -> how many have it so: one piece may be copied to several devices."""
_lock = threading.RLock()
"""The program may let models go while it page-locks, and these give their memory back then."""


class PinnedSlabs:
    """Program memory that is page-locked for copies to one device. It must not be freed before `unpin`."""

    def __init__(self, device: torch.device, program: Program) -> None:
        self._program = program
        self._is_useful = program.can_pin_for(device)
        self._slabs: dict[int, torch.Tensor] = {}  # by address
        self._refused_bytes = math.inf  # the least that the system has refused

    @property
    def num_bytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs.values())

    def holds(self, slab: torch.Tensor) -> bool:
        return slab.data_ptr() in self._slabs

    def pin(self, slab: torch.Tensor) -> bool:
        """Page-lock `slab` if it can be and ComfyUI's budget allows it; whether it is."""
        if self.holds(slab):
            return True
        if not self._is_useful or slab.device.type != "cpu":
            return False
        with _lock:
            _users[slab.data_ptr()] += 1  # first: nobody else is to unlock it meanwhile
            is_locked = _users[slab.data_ptr()] > 1
            try:
                is_locked = is_locked or self._lock_pages(slab)
            finally:
                if not is_locked:
                    del _users[slab.data_ptr()]
            if not is_locked:
                return False
        self._slabs[slab.data_ptr()] = slab
        return True

    def _lock_pages(self, slab: torch.Tensor) -> bool:
        if not self._program.may_pin(slab.nbytes):
            return False
        # Asking again for what was refused costs a warning and a wait for the device each time.
        if slab.nbytes >= self._refused_bytes:
            return False
        if not self._program.pin(slab):
            self._refused_bytes = slab.nbytes
            return False
        return True

    def unpin(self, slab: torch.Tensor | None) -> None:
        """Give `slab`, if there is one, back if it is page-locked. No copy from it may be under way."""
        if slab is None or self._slabs.pop(slab.data_ptr(), None) is None:
            return
        with _lock:
            _users[slab.data_ptr()] -= 1
            if not _users[slab.data_ptr()]:
                del _users[slab.data_ptr()]
                self._program.unpin(slab)
        self._refused_bytes = math.inf

    def unpin_all(self) -> None:
        while self._slabs:
            self.unpin(next(iter(self._slabs.values())))
