"""Page-locking slabs and upload buffers, in ComfyUI's account of page-locked memory: copies from them are fast."""

from __future__ import annotations

import comfy.model_management as mm
import torch


class PinnedSlabs:
    """Host memory that is page-locked for copies to one device. It must not be freed before `unpin`."""

    def __init__(self, device: torch.device) -> None:
        self._is_useful = mm.is_device_cuda(device)
        self._slabs: dict[int, torch.Tensor] = {}  # by address

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
        # Its memory is in use already, so the budget for memory is asked for nothing more.
        if not (mm.ensure_pin_budget(0) and mm.ensure_pin_registerable(slab.nbytes) and mm.pin_memory(slab)):
            return False
        self._slabs[slab.data_ptr()] = slab
        return True

    def unpin(self, slab: torch.Tensor) -> None:
        """Give `slab` back if it is page-locked. No copy from it may be under way."""
        if self._slabs.pop(slab.data_ptr(), None) is not None:
            mm.unpin_memory(slab)

    def unpin_all(self) -> None:
        while self._slabs:
            mm.unpin_memory(self._slabs.popitem()[1])
