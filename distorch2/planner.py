"""From layers and an allocation to a plan. Pure: it moves no tensor and asks no device.

Each device in turn takes its share of the layers that are left, spread evenly over the execution order, so that the
copies of streamed layers can run while resident ones compute. A share is rounded to whole layers against the running
total of what was asked so far (cumulative rounding), so that rounding errors do not add up over the devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .plan import GIB, OVERFLOW_DEVICE, ComponentRequest, DeviceMemory, Layer, Placement, Plan, PlanError


def make_plan(layers: Sequence[Layer], request: ComponentRequest, memory: Mapping[str, DeviceMemory]) -> Plan:
    """Place `layers` (in execution order) as `request` asks.

    `memory` has an entry for every device of the request. A device is given less than one layer more or less than
    asked, and never more than its free memory; what does not fit goes to `cpu`, with a note in the plan.
    Raises `PlanError` when a device of the request is not in `memory`.
    """
    compute_device, allocation = request.compute_device, request.allocation
    for device in (compute_device, *allocation.devices):
        if device not in memory:
            raise PlanError(f"there is no device {device!r}; this machine has {', '.join(memory)}")

    model_bytes = sum(layer.num_bytes for layer in layers)
    fixed_bytes = sum(layer.num_bytes for layer in layers if not layer.movable)
    total_bytes = {device: device_memory.total_bytes for device, device_memory in memory.items()}
    asked = dict(allocation.shares(model_bytes, compute_device, total_bytes))
    asked = _reserve_fixed(asked, compute_device, fixed_bytes)
    room = {
        device: free_bytes
        for device in asked
        if device != OVERFLOW_DEVICE and (free_bytes := memory[device].free_bytes) is not None
    }

    device_of = {index: compute_device for index, layer in enumerate(layers) if not layer.movable}
    left = [index for index, layer in enumerate(layers) if layer.movable]
    carried = 0
    for device in _by_precedence(asked, compute_device):
        fixed_here = fixed_bytes if device == compute_device else 0
        target = asked[device] - fixed_here
        sizes = [layers[index].num_bytes for index in left]
        if device in room and asked[device] + carried + max(sizes, default=0) > room[device]:
            # It may fill up: its share is rounded down, and what has no room is cpu's, not the next device's.
            limit = room[device] - fixed_here
            taken = _spread(sizes, min(target, limit), limit)
            carried = 0
        else:
            taken = _spread(sizes, target + carried)
            carried += target - sum(sizes[position] for position in taken)
        device_of.update((left[position], device) for position in taken)
        left = [index for index in left if index not in device_of]
    device_of.update(dict.fromkeys(left, OVERFLOW_DEVICE))

    placements = tuple(Placement(layer, device_of[index]) for index, layer in enumerate(layers))
    notes = (allocation.note, *(_room_note(device, asked[device], room[device]) for device in room))
    return Plan(compute_device, placements, tuple(note for note in notes if note))


def _reserve_fixed(asked: dict[str, int], compute_device: str, fixed_bytes: int) -> dict[str, int]:
    """Give the compute device at least the layers that cannot move, the others less in proportion."""
    others = {device: num_bytes for device, num_bytes in asked.items() if device != compute_device}
    missing = fixed_bytes - asked.get(compute_device, 0)
    if missing <= 0:
        return asked
    total = sum(others.values())
    reduced, reached, given = {}, 0, 0
    for device, num_bytes in others.items():
        reached += num_bytes
        boundary = reached * (total - missing) // total
        reduced[device] = boundary - given
        given = boundary
    return {compute_device: fixed_bytes, **reduced}


def _by_precedence(devices: Iterable[str], compute_device: str) -> list[str]:
    """The compute device first, the one that takes what is left last, the others in the order of the request."""
    return sorted(devices, key=lambda device: (device == OVERFLOW_DEVICE, device != compute_device))


def _spread(sizes: Sequence[int], target: int, limit: int | None = None) -> list[int]:
    """Positions whose sizes add up to about `target`, evenly spread: within half a layer, never over `limit`.

    Error diffusion, as Bresenham's line (1965): every layer adds its part of the target to a debt, and is taken when
    the debt is at least half of it.
    """
    total = sum(sizes)
    target = max(0, min(target, total))
    taken, used, debt = [], 0, 0  # the debt in units of 1/total bytes, to stay exact
    for position, size in enumerate(sizes):
        debt += size * target
        if 2 * debt >= size * total and (limit is None or used + size <= limit):
            taken.append(position)
            used += size
            debt -= size * total
    return taken


def _room_note(device: str, asked_bytes: int, free_bytes: int) -> str:
    if asked_bytes <= free_bytes:
        return ""
    return f"{device} has {free_bytes / GIB:.2f} GiB free of the {asked_bytes / GIB:.2f} GiB asked; the rest is on cpu"
