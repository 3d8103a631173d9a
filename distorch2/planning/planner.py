"""From layers and an allocation to a plan. Pure: it moves no tensor and asks no device.

Donors that relay take whole units first, from the end of the model, so that activations cross over as seldom as can be;
what is left of their shares is streamed. Then the compute device takes its share, in such a way that what it leaves is
spread evenly over the time of a step, so that the copies of streamed layers are as well; how long a block takes is not
known, and all are taken to be equal. The donors then take theirs in turn, spread evenly over the layers that are left.
A share is rounded to whole layers against the running total of what was asked so far (cumulative rounding), so that
rounding errors do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from .automatic import UNKNOWN, Speeds, choose
from .plan import (
    AUTO,
    DISK_NAME,
    ON,
    OVERFLOW_DEVICE,
    RELAY,
    SMALL_BYTES,
    STREAM,
    Automatic,
    ComponentRequest,
    DeviceMemory,
    Layer,
    Placement,
    Plan,
    PlanError,
    Shares,
    kind_of,
    size_text,
)
from .sizing import packed_bytes, unpacked_bytes

_SCALE = 2**32  # for fractions of a byte


def make_plan(
    layers: Sequence[Layer],
    request: ComponentRequest,
    memory: Mapping[str, DeviceMemory],
    speeds: Speeds = UNKNOWN,
) -> Plan:
    """Place `layers` (in the order in which they were registered) as `request` asks.

    `memory` has an entry for every device of the request. A device is never given more than its free memory, and less
    than one layer more or less than asked unless memory ran short. What fits nowhere else goes to `cpu`, with a note.
    If weights are to be packed, the compute device is given what was asked, and `Plan.within` is to make it fit.
    `speeds` are for an allocation that is to be chosen. Raises `PlanError` when a device of the request is not in
    `memory`.
    """
    if request.pack_weights == ON and request.compute_device in memory and any(layer.is_bf16 for layer in layers):
        return _plan_to_pack(layers, request, memory, speeds)
    plan = _plan_within(layers, request, memory, speeds)
    compute_memory, reserved = memory[plan.compute_device], 0
    free_bytes = compute_memory.free_bytes
    # Buffers need room beside the resident layers.
    while free_bytes is not None and plan.compute_bytes > free_bytes and reserved < plan.buffer_bytes:
        reserved = plan.buffer_bytes
        less = replace(compute_memory, free_bytes=max(0, free_bytes - reserved))
        plan = _plan_within(layers, request, {**memory, plan.compute_device: less}, speeds)
    return plan


def _plan_to_pack(
    layers: Sequence[Layer], request: ComponentRequest, memory: Mapping[str, DeviceMemory], speeds: Speeds
) -> Plan:
    """As if weights on the compute device were packed: more of them have room there."""
    compute_memory = memory[request.compute_device]
    room = None
    if isinstance(request.allocation, Automatic) and compute_memory.free_bytes is not None:
        # What does not fit even packed may have room on other cards.
        to_fill = max(0, compute_memory.free_bytes - request.allocation.keep_bytes)
        bf16_bytes = sum(layer.num_bytes for layer in layers if layer.is_bf16)
        room = compute_memory.free_bytes + min(unpacked_bytes(to_fill) - to_fill, bf16_bytes - packed_bytes(bf16_bytes))
    with_room = {**memory, request.compute_device: replace(compute_memory, free_bytes=room)}
    plan = _plan_within(layers, request, with_room, speeds)
    if compute_memory.free_bytes is None or plan.compute_bytes <= compute_memory.free_bytes:
        return plan
    note = (
        f"{plan.compute_device} has {size_text(compute_memory.free_bytes)} free of the "
        f"{size_text(plan.compute_bytes)} planned; weights there are packed, and what does not fit then is on cpu"
    )
    return replace(plan, notes=(*plan.notes, note))


def _plan_within(
    layers: Sequence[Layer], request: ComponentRequest, memory: Mapping[str, DeviceMemory], speeds: Speeds
) -> Plan:
    compute_device, allocation = request.compute_device, request.allocation
    for device in (compute_device, *allocation.devices):
        if device not in memory:
            raise PlanError(f"there is no device {device!r}; this machine has {', '.join(memory)}")

    fixed = {index for index, layer in enumerate(layers) if not layer.movable or not layer.num_bytes}
    fixed_bytes = sum(layers[index].num_bytes for index in fixed)
    total_bytes = {device: device_memory.total_bytes for device, device_memory in memory.items()}
    model_bytes = sum(layer.num_bytes for layer in layers)
    if isinstance(allocation, Automatic):
        allocation = choose(model_bytes, request, memory, speeds)
    shares = dict(allocation.shares(model_bytes, compute_device, total_bytes))
    # Layers that cannot move stay on the compute device, whatever was asked.
    excess = max(0, fixed_bytes - shares.get(compute_device, 0))
    asked = _with_excess(shares, compute_device, excess)
    room = {device: memory[device].free_bytes for device in asked if device != OVERFLOW_DEVICE}

    device_of = dict.fromkeys(fixed, compute_device)
    sizes = {index: layer.num_bytes for index, layer in enumerate(layers) if index not in fixed}
    computing = relaying_donors(request, [device for device in asked if memory[device].can_compute])
    targets = {device: min(asked[device], _limit(room, device)) for device in computing}
    device_of |= _relayed(layers, sizes, targets)
    placed = {device: sum(layers[i].num_bytes for i, d in device_of.items() if d == device) for device in asked}
    sizes = {index: size for index, size in sizes.items() if index not in device_of}
    carried = 0
    for device in _by_precedence(asked, compute_device):
        target = asked[device] - placed[device]
        limit = None
        free_bytes = room.get(device)
        if free_bytes is not None:
            limit = free_bytes - placed[device]
            target = max(0, min(target, limit))  # what is over it is cpu's, not the next device's
        wanted = min(max(0, target + carried), sum(sizes.values()))
        if device == compute_device:
            taken = _for_compute_device(layers, sizes, wanted, limit)
        else:
            taken = _spread(sizes, wanted, limit)
        carried += target - sum(sizes[index] for index in taken)
        device_of.update(dict.fromkeys(taken, device))
        sizes = {index: size for index, size in sizes.items() if index not in device_of}
    device_of.update(dict.fromkeys(sizes, OVERFLOW_DEVICE))

    placements = tuple(Placement(layer, device_of[index]) for index, layer in enumerate(layers))
    plan = Plan(
        compute_device,
        placements,
        relays=computing,
        donor_mode=request.donor_mode,
        pack_weights=request.pack_weights,
    )
    notes = (
        allocation.note,
        _fixed_note(compute_device, fixed_bytes, excess, model_bytes),
        *_room_notes(plan, asked, room),
    )
    return replace(plan, notes=tuple(note for note in notes if note))


def plan_beside(asked: Plan, layers: Sequence[Layer], device: str, others: Iterable[str]) -> Plan:
    """A plan for `device` to run a model while `others` run it too, each with inputs of its own.

    Of the model's `layers` there `device` keeps as many bytes as it does in the plan that was `asked` for; one that
    keeps none there, as many as the compute device. It has its part of what other accelerators keep, and all that is
    on the disk. The rest lies on `cpu`. Devices that keep equally many bytes, to a layer, keep the same layers, so that
    what they stream lies there only once.
    """
    others = tuple(others)
    kept = {each: asked.bytes_on(each) or asked.bytes_on(asked.compute_device) for each in (device, *others)}
    largest = max((layer.num_bytes for layer in layers), default=0)
    wanted = {device: min(num_bytes for num_bytes in kept.values() if abs(num_bytes - kept[device]) <= largest)}
    for donor in asked.donors:
        if donor not in (device, *others, OVERFLOW_DEVICE):
            wanted[donor] = asked.bytes_on(donor) // (1 if donor == DISK_NAME else 1 + len(others))
    left = sum(layer.num_bytes for layer in layers)
    shares = {}
    for each, num_bytes in wanted.items():
        shares[each] = min(left, num_bytes)
        left -= shares[each]
    shares[OVERFLOW_DEVICE] = shares.get(OVERFLOW_DEVICE, 0) + left
    request = ComponentRequest(device, Shares(shares), STREAM)
    plan = _plan_within(layers, request, dict.fromkeys(shares, DeviceMemory(0)), UNKNOWN)  # the total is not looked at
    return replace(plan, notes=(), pack_weights=asked.pack_weights_on(device), others=others)


ROUNDS = 3
"""How often each device comes to its turn in a plan that alternates. With more rounds devices wait less for each other
and more activations cross over; see `benchmarks/several_gpus_forecast.py`."""


def plan_alternating(asked: Plan, layers: Sequence[Layer]) -> Plan | None:
    """A plan for several inputs to be relayed at the same time: the units of the compute device and of the donors that
    relay alternate, up to `ROUNDS` times, so that one device has work while another has the other input.

    Donors have as many bytes as in the plan that was `asked` for, to a unit. None unless each of the model's `layers`
    is on the compute device or a donor that relays, and at least two of them would have a unit.
    """
    home, device_of = asked.compute_device, {item.layer.name: item.device for item in asked.placements}
    if any(device_of.get(layer.name) not in (home, *asked.relays) for layer in layers):
        return None
    sizes: dict[str, int] = {}
    for layer in layers:
        if layer.unit and layer.movable:
            sizes[layer.unit] = sizes.get(layer.unit, 0) + layer.num_bytes
    wanted = {device: asked.bytes_on(device) for device in (home, *asked.relays)}
    wanted[home] -= sum(layer.num_bytes for layer in layers) - sum(sizes.values())
    for rounds in range(ROUNDS, 0, -1):
        runs_on = _alternating(sizes, wanted, rounds)
        if len(set(runs_on.values())) > 1:
            placements = (
                Placement(layer, runs_on.get(layer.unit, home) if layer.movable else home) for layer in layers
            )
            return replace(asked, placements=tuple(placements), notes=(), relieved=())
    return None


def _alternating(sizes: Mapping[str, int], wanted: Mapping[str, int], rounds: int) -> dict[str, str]:
    """Unit -> device. Each device has its turn `rounds` times, but the first gets what is over: no other device gets
    more than is `wanted`."""
    first, *others = wanted
    used, found, rest = dict.fromkeys(wanted, 0), dict[str, str](), list(sizes)

    def give(unit: str, device: str) -> None:
        found[unit] = device
        used[device] += sizes[unit]

    for number in range(1, rounds + 1):
        for device, num_bytes in wanted.items():
            while rest and used[device] + sizes[rest[0]] / 2 < num_bytes * number / rounds:
                if device != first and used[device] + sizes[rest[0]] > num_bytes:
                    break
                give(rest.pop(0), device)
    for unit in rest:
        give(unit, first)
    for unit in sorted((unit for unit in found if found[unit] == first), key=lambda unit: -sizes[unit]):
        for device in others:
            if used[first] - sizes[unit] >= wanted[first] and used[device] + sizes[unit] <= wanted[device]:
                used[first] -= sizes[unit]
                give(unit, device)
                break
    return found


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


def relaying_donors(request: ComponentRequest, devices: Iterable[str]) -> tuple[str, ...]:
    """Those of `devices` that are to compute beside the compute device: in doubt, those of its kind."""
    donors = [device for device in devices if device != request.compute_device]
    if request.donor_mode == RELAY:
        return tuple(donors)
    is_same_kind = [device for device in donors if kind_of(device) == kind_of(request.compute_device)]
    return tuple(is_same_kind) if request.donor_mode == AUTO else ()


def _relayed(layers: Sequence[Layer], sizes: Mapping[int, int], targets: Mapping[str, float]) -> dict[int, str]:
    """Key -> donor, for units that fit whole into these shares: the last units for the last donor, and so on."""
    units: dict[str, list[int]] = {}
    for index in sizes:
        if layers[index].unit:
            units.setdefault(layers[index].unit, []).append(index)
    rest = list(units.values())
    device_of: dict[int, str] = {}
    for device, target in reversed(list(targets.items())):
        while rest and (num_bytes := sum(sizes[index] for index in rest[-1])) <= target:
            device_of |= dict.fromkeys(rest.pop(), device)
            target -= num_bytes
    return device_of


def _limit(room: Mapping[str, int | None], device: str) -> float:
    free_bytes = room.get(device)
    return math.inf if free_bytes is None else free_bytes


def _by_precedence(devices: Iterable[str], compute_device: str) -> list[str]:
    """The compute device first, the one that takes what is left last, the others in the order of the request."""
    return sorted(devices, key=lambda device: (device != compute_device, device == OVERFLOW_DEVICE))


def _for_compute_device(layers: Sequence[Layer], sizes: Mapping[int, int], target: int, limit: int | None) -> list[int]:
    """Keys for the compute device: the small layers, which cost more to stream than they free, and of the others so
    many from each block that equally many bytes are left in all blocks, as far as they have so many.

    In a block the largest are left first: fewer layers for the same bytes. Error diffusion from block to block, as in
    `_spread`, and never over `limit`. A layer that belongs to no block is one.
    """
    small = [index for index, size in sizes.items() if size <= SMALL_BYTES]
    small_bytes = sum(sizes[index] for index in small)
    if small_bytes > target:
        small, small_bytes = [], 0
    chosen = set(small)
    blocks: dict[str, list[int]] = {}
    for index in sizes:
        if index not in chosen:
            blocks.setdefault(layers[index].block or layers[index].name, []).append(index)
    amounts = [sum(sizes[index] for index in members) for members in blocks.values()]
    level = int(_levelled(amounts, sum(amounts) - (target - small_bytes)) * _SCALE)
    kept: list[int] = []
    debt = 0
    for members, amount in zip(blocks.values(), amounts, strict=True):
        debt += min(level, amount * _SCALE)
        by_size = sorted(members, key=lambda index: -sizes[index])
        while by_size and 2 * debt > sizes[by_size[0]] * _SCALE:
            debt -= sizes[by_size.pop(0)] * _SCALE
        kept += by_size
    kept_bytes = small_bytes + sum(sizes[index] for index in kept)
    for index in sorted(kept, key=lambda index: -sizes[index]):
        if limit is None or kept_bytes <= limit:
            break
        kept.remove(index)
        kept_bytes -= sizes[index]
    return small + kept


def _levelled(amounts: Iterable[int], total: int) -> Fraction:
    """The level at which `amounts`, each cut off there, add up to `total`."""
    rest = sorted(amounts)
    for number, amount in enumerate(rest):
        num_left = len(rest) - number
        if amount * num_left >= total:
            return Fraction(total, num_left)
        total -= amount
    return Fraction(0)


def _spread(sizes: Mapping[int, int], target: int, limit: int | None) -> list[int]:
    """Keys whose sizes add up to about `target`: within half a layer of its part at any point, and never over `limit`.

    Error diffusion, as Bresenham's line (1965): every layer adds its part of the target to a debt, and is taken when
    the debt is at least half of it.
    """
    total = sum(sizes.values())
    taken, used, debt = [], 0, 0  # the debt in bytes times the total
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
    return f"{size_text(fixed_bytes)} cannot leave {compute_device}: shared weights, buffers and the like"


def _room_notes(plan: Plan, asked: Mapping[str, int], room: Mapping[str, int | None]) -> list[str]:
    notes = [
        f"{device} has {size_text(free_bytes)} free of the {size_text(asked[device])} asked; the rest is on cpu"
        for device, free_bytes in room.items()
        if free_bytes is not None and asked[device] > free_bytes
    ]
    unasked = plan.bytes_on(OVERFLOW_DEVICE) - asked.get(OVERFLOW_DEVICE, 0)
    largest = max((placement.layer.num_bytes for placement in plan.placements), default=0)
    if not notes and plan.compute_device != OVERFLOW_DEVICE and largest and unasked >= largest:
        notes = [f"{size_text(unasked)} that no other device has room for are on cpu"]
    return notes
