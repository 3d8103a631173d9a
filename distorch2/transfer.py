"""Copies from slabs to the compute device. The only file that deals with the order of work on a device."""

from __future__ import annotations

import torch


class Transfer:
    """Copies slabs into a slot on the compute device, in the order of the work on its current stream.

    The current stream is that of the computation, so a slot is overwritten only after the kernels that read it, and
    read only after it was written. `copies` counts what was submitted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies = 0

    def submit(self, slab: torch.Tensor, slot: torch.Tensor) -> None:
        """Copy all of `slab` to the start of `slot`; a page-locked slab without waiting for the copy."""
        slot[: slab.numel()].copy_(slab, non_blocking=True)
        self.copies += 1

    def wait(self) -> None:
        """Return when every copy is done, so that slabs and slots may be written or freed."""
        if self.device.type == "cpu":
            return
        if self.device.type == "mps":
            torch.mps.synchronize()
        else:
            getattr(torch, self.device.type).synchronize(self.device)
