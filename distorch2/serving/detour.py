"""Half of what is streamed by way of another accelerator, where that is measured to be worth it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Collection, Sequence

import torch

from ..moving.program import Program
from ..moving.transfer import Copy, Detour, Transfer
from ..weights.slab import allocate

logger = logging.getLogger(__name__)

_SLOT_BYTES = 16 * 1024**2
_NUM_SLOTS = 4
"""Taken of the other accelerator: enough to fill one slot while others are emptied, at the speed of the link."""
_MEASURED_BYTES = 256 * 1024**2
_LEAST_TO_DETOUR_BYTES = 1024**3
"""Copying less takes a few hundredths of a second anyway."""
_LEAST_GAIN = 1.2


_gains: dict[tuple[torch.device, torch.device], float] = {}
"""(compute device, other) -> how many times as fast copies are by both ways, measured once in a process."""


def take_detour(
    transfer: Transfer,
    slabs: Sequence[torch.Tensor],
    staging: torch.Tensor,
    named: Collection[torch.device],
    program: Program,
    busy: Collection[torch.device] = (),
) -> None:
    """Give `transfer` a detour if that makes copies of the page-locked `slabs` at least `_LEAST_GAIN` times as fast.

    The helper is a device that is `named` in the plan, or one on which ComfyUI has a model: nothing is done on a card
    that nobody asked for, nor on one that is `busy` at the same time. Overwrites `staging`.
    """
    in_use = {*named, *program.devices_in_use()}
    others = [
        device
        for device in program.devices()
        if device in in_use
        and device not in busy
        and device.type == transfer.device.type
        and device != transfer.device
        and _gains.get((transfer.device, device), math.inf) > _LEAST_GAIN
    ]
    if not others or sum(slab.nbytes for slab in slabs) < _LEAST_TO_DETOUR_BYTES:
        return
    copies, room = [], staging[:_MEASURED_BYTES]
    for slab in slabs:
        part = slab[: room.nbytes]
        if part.nbytes:
            copies.append(Copy(part, room[: part.nbytes]))
            room = room[part.nbytes :]
    for helper in others:
        pair = transfer.device, helper
        try:
            if not program.has_room_to_compute(helper):
                continue
            direct = transfer.bytes_per_second(copies) if pair not in _gains else 0.0
            transfer.take(detour=Detour(transfer.device, [allocate(_SLOT_BYTES, helper) for _ in range(_NUM_SLOTS)]))
            if pair not in _gains:
                _gains[pair] = _speed(transfer, copies) / direct
        except RuntimeError as error:  # of a device that is not needed
            logger.info("DisTorch2: nothing is streamed by way of %s (%s)", helper, str(error).splitlines()[0])
            with contextlib.suppress(RuntimeError):
                transfer.leave_detour()
            continue
        if _gains[pair] > _LEAST_GAIN:
            logger.info(
                "DisTorch2: half of what is streamed to %s comes by way of %s, which is %.1f times as fast",
                transfer.device,
                helper,
                _gains[pair],
            )
            return
        transfer.leave_detour()


def _speed(transfer: Transfer, copies: Sequence[Copy]) -> float:
    """Bytes a second; 0 if wrong bytes arrive."""
    for copy in copies:
        copy.target.zero_()  # which may have the right bytes from copies before
    speed = transfer.bytes_per_second(copies)
    return speed if all(torch.equal(copy.target.cpu(), copy.source) for copy in copies) else 0.0
