"""Half of what is streamed by way of another accelerator, where that is measured to be worth it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import comfy.model_management as mm
import torch

from .slab import allocate
from .transfer import Copy, Detour, Transfer

logger = logging.getLogger(__name__)

_SLOT_BYTES = 16 * 1024**2
_NUM_SLOTS = 4
"""Taken of the other accelerator: enough to fill one slot while others are emptied, at the speed of the link."""
_MEASURED_BYTES = 256 * 1024**2
_LEAST_TO_DETOUR_BYTES = 1024**3
"""Copying less takes a few hundredths of a second anyway."""
_LEAST_GAIN = 1.2


def take_detour(transfer: Transfer, slabs: Sequence[torch.Tensor], staging: torch.Tensor) -> None:
    """Give `transfer` a detour if copies of `slabs`, which are page-locked, are measured to be so much faster with it.

    `staging` is written to.
    """
    others = [
        device
        for device in mm.get_all_torch_devices()
        if device.type == transfer.device.type and device != transfer.device
    ]
    if not others or sum(slab.nbytes for slab in slabs) < _LEAST_TO_DETOUR_BYTES:
        return
    copies, room = [], staging[:_MEASURED_BYTES]
    for slab in slabs:
        part = slab[: room.nbytes]
        if part.nbytes:
            copies.append(Copy(part, room[: part.nbytes]))
            room = room[part.nbytes :]
    direct = transfer.bytes_per_second(copies)
    for helper in others:
        try:
            both = _speed_with(helper, transfer, copies)
        except RuntimeError as error:  # of a device that nobody asked for
            logger.info("DisTorch2: nothing is streamed by way of %s (%s)", helper, str(error).splitlines()[0])
            both = 0.0
        if both > _LEAST_GAIN * direct:
            logger.info(
                "DisTorch2: half of what is streamed to %s comes by way of %s: %.1f GB/s instead of %.1f",
                transfer.device,
                helper,
                both / 1e9,
                direct / 1e9,
            )
            return
        transfer.wait()
        transfer.detour = None


def _speed_with(helper: torch.device, transfer: Transfer, copies: Sequence[Copy]) -> float:
    """Bytes a second with a detour by way of `helper`, which `transfer` has then; 0 if it is not to have one."""
    if mm.get_free_memory(helper) < mm.minimum_inference_memory():
        return 0.0
    transfer.detour = Detour(transfer.device, [allocate(_SLOT_BYTES, helper) for _ in range(_NUM_SLOTS)])
    for copy in copies:
        copy.target.zero_()  # which has the right bytes from the copies before
    speed = transfer.bytes_per_second(copies)
    return speed if all(torch.equal(copy.target.cpu(), copy.source) for copy in copies) else 0.0
