"""From layers and an allocation to a plan. Pure: it moves no tensor and asks no device.

Each device in turn takes its share of the layers that are left, spread evenly over their order, so that copies of
streamed layers can be spread over the time in which resident ones compute. A share is rounded to whole layers against
the running total of what was asked so far (cumulative rounding), so that rounding errors do not add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .plan import GIB, OVERFLOW_DEVICE, ComponentRequest, DeviceMemory, Layer, Placement, Plan, PlanError


def make_plan(layers: Sequence[Layer], request: ComponentRequest, memory: Mapping[str, DeviceMemory]) -> Plan:
    """Place `layers` (in the order in which they were registered) as `request` asks.

    `memory` has an entry for every device of the request. A device is never given more than its free memory, and less
    than one layer more or less than asked unless memory ran short. What fits nowhere else goes to `cpu`, with a note.
    Raises `PlanError` when a device of the request is not in `memory`.
    """
    compute_device, allocation = request.compute_device, request.allocation
    for device in (compute_device, *allocation.devices):
        if device not in memory:
            raise PlanError(f"there is no device {device!r}; this machine has {', '.join(memory)}")

    fixed = {index for index, layer in enumerate(layers) if not layer.movable or not layer.num_bytes}
    fixed_bytes = sum(layers[index].num_bytes for index in fixed)
    total_bytes = {device: device_memory.total_bytes for device, device_memory in memory.items()}
    model_bytes = sum(layer.num_bytes for layer in layers)
    shares = dict(allocation.shares(model_bytes, compute_device, total_bytes))
    # Layers that cannot move stay on the compute device, whatever was asked.
    excess = max(0, fixed_bytes - shares.get(compute_device, 0))
    asked = _with_excess(shares, compute_device, excess)
    room = {device: memory[device].free_bytes for device in asked if device != OVERFLOW_DEVICE}

    device_of = dict.fromkeys(fixed, compute_device)
    sizes = {index: layer.num_bytes for index, layer in enumerate(layers) if index not in fixed}
    carried = 0
    for device in _by_precedence(asked, compute_device):
        fixed_here = fixed_bytes if device == compute_device else 0
        target = asked[device] - fixed_here
        limit = None
        if room.get(device) is not None:
            limit = room[device] - fixed_here
            target = min(target, limit)  # what is over it is cpu's, not the next device's
        taken = _spread(sizes, target + carried, limit)
        carried += target - sum(sizes[index] for index in taken)
        device_of.update(dict.fromkeys(taken, device))
        sizes = {index: size for index, size in sizes.items() if index not in device_of}
    device_of.update(dict.fromkeys(sizes, OVERFLOW_DEVICE))

    placements = tuple(Placement(layer, device_of[index]) for index, layer in enumerate(layers))
    plan = Plan(compute_device, placements)
    notes = (
        allocation.note,
        _fixed_note(compute_device, fixed_bytes, excess, model_bytes),
        *_room_notes(plan, asked, room),
    )
    return replace(plan, notes=tuple(note for note in notes if note))


def _with_excess(shares: Mapping[str, int], compute_device: str, excess: int) -> dict[str, int]:
    """`shares` with `excess` more bytes on the compute device, taken from the others in proportion."""
    if not excess:
        return dict(shares)
    others = {device: num_bytes for device, num_bytes in shares.items() if device != compute_device}
    total = sum(others.values())
    reduced, reached, given = {}, 0, 0
    for device, num_bytes in others.items():
        reached += num_bytes
        boundary = reached * (total - excess) // total
        reduced[device] = boundary - given
        given = boundary
    return {compute_device: shares.get(compute_device, 0) + excess, **reduced}


def _by_precedence(devices: Iterable[str], compute_device: str) -> list[str]:
    """The compute device first, the one that takes what is left last, the others in the order of the request."""
    return sorted(devices, key=lambda device: (device == OVERFLOW_DEVICE, device != compute_device))


def _spread(sizes: Mapping[int, int], target: int, limit: int | None) -> list[int]:
    """Keys whose sizes add up to about `target`, evenly spread: within half a layer, and never over `limit`.

    Error diffusion, as Bresenham's line (1965): every layer adds its part of the target to a debt, and is taken when
    the debt is at least half of it.
    """
    total = sum(sizes.values())
    target = max(0, min(target, total))
    taken, used, debt = [], 0, 0  # the debt in units of 1/total bytes, to stay exact
    for index, size in sizes.items():
        debt += size * target
        if 2 * debt >= size * total and (limit is None or used + size <= limit):
            taken.append(index)
            used += size
            debt -= size * total
    return taken


def _fixed_note(compute_device: str, fixed_bytes: int, excess: int, model_bytes: int) -> str:
    """Said when layers that cannot move take a hundredth of the model more than was asked."""
    if excess * 100 < model_bytes or not excess:
        return ""
    return f"{fixed_bytes / GIB:.2f} GiB cannot leave {compute_device}: quantised or shared weights and the like"


def _room_notes(plan: Plan, asked: Mapping[str, int], room: Mapping[str, int | None]) -> list[str]:
    notes = [
        f"{device} has {free_bytes / GIB:.2f} GiB free of the {asked[device] / GIB:.2f} GiB asked; the rest is on cpu"
        for device, free_bytes in room.items()
        if free_bytes is not None and asked[device] > free_bytes
    ]
    unasked = plan.bytes_on(OVERFLOW_DEVICE) - asked.get(OVERFLOW_DEVICE, 0)
    largest = max((placement.layer.num_bytes for placement in plan.placements), default=0)
    if not notes and plan.compute_device != OVERFLOW_DEVICE and largest and unasked >= largest:
        notes = [f"{unasked / GIB:.2f} GiB that no other device has room for are on cpu"]
    return notes
