"""What is placed where: frozen records of names and integers, without modules or tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

from . import sizing
from .relief import num_to_relieve, spread

GIB = 1024**3
SMALL_BYTES = 64 * 1024
"""Layers up to this size cost more to stream than they free."""
OVERFLOW_DEVICE = "cpu"
"""Takes what no other device has room for."""
DISK_NAME = "disk"
"""In allocations, plans and reports."""


def size_text(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 1024**2:.1f} MiB"


def kind_of(device: str) -> str:
    """`cuda` of `cuda:1`."""
    return device.partition(":")[0]


class PlanError(ValueError):
    """A request that cannot be planned; the message says what would be accepted."""

    __module__ = "distorch2"  # ComfyUI shows it; as a pack this is a folder of the user's


class Allocation(Protocol):
    """How much of a model each device is asked to keep: a parsed allocation string, or `VirtualVram`."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices named in it."""

    @property
    def note(self) -> str:
        """What a reader may not expect, or an empty string."""

    def shares(
        self,
        model_bytes: int,
        compute_device: str,
        device_total_bytes: Mapping[str, int],
    ) -> tuple[tuple[str, int], ...]:
        """(device, bytes) in the order of preference; the bytes add up to `model_bytes`."""


@runtime_checkable
class Automatic(Protocol):
    """To be replaced by shares that `automatic.choose` chooses: a parsed `auto`."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Those that may keep something beside the compute device."""

    @property
    def keep_bytes(self) -> int:
        """Of each device, to be kept free."""


@dataclass(frozen=True)
class Shares:
    """An `Allocation` of so many bytes for each device, which add up to the model."""

    num_bytes: Mapping[str, int]
    note = ""

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self.num_bytes)

    def shares(
        self, model_bytes: int, compute_device: str, device_total_bytes: Mapping[str, int]
    ) -> tuple[tuple[str, int], ...]:
        return tuple(self.num_bytes.items())


@dataclass(frozen=True)
class VirtualVram:
    """Keep `gb` GiB of the model on `donor_device` and the rest on the compute device.

    With `more_donors` each of the donors keeps an equal part. Raises `PlanError` when `gb` is negative or not finite.
    """

    gb: float
    donor_device: str
    more_donors: tuple[str, ...] = ()
    note = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gb) and self.gb >= 0):
            raise PlanError(f"virtual VRAM is {self.gb} GB; use 0 or more")

    @property
    def devices(self) -> tuple[str, ...]:
        return (self.donor_device, *self.more_donors)

    def shares(
        self,
        model_bytes: int,
        compute_device: str,
        device_total_bytes: Mapping[str, int],
    ) -> tuple[tuple[str, int], ...]:
        if self.donor_device == compute_device:
            return ((compute_device, model_bytes),)
        donated = int(min(self.gb * GIB, model_bytes))
        parts, rest = divmod(donated, len(self.devices))
        donors = ((donor, parts + (rest if donor == self.donor_device else 0)) for donor in self.devices)
        return ((compute_device, model_bytes - donated), *donors)


AUTO, STREAM, RELAY = DONOR_MODES = ("auto", "stream", "relay")
"""What happens with weights on a donor: `STREAM` copies them to the compute device when they are needed; `RELAY` runs
the units that they belong to where they lie, and moves the activations; `AUTO` relays where that gives the same."""

_, ON, OFF = PACK_MODES = (AUTO, "on", "off")
"""Whether streamed bf16 weights are packed without loss. `ON`: from the start, and resident ones for which there is no
room. `AUTO`: when computing is found to wait for copies, or when main memory is short."""
STREAMED_ONLY = "streamed only"
"""What a plan with `AUTO` has from then on: streamed weights are packed, and resident ones are not."""
LEAST_TO_PACK_BYTES = 256 * 1024**2
"""With `AUTO`, less is streamed as it is: little is gained."""


@dataclass(frozen=True)
class ComponentRequest:
    """Where one component of a checkpoint computes, which devices keep its weights, which of `DONOR_MODES` they are in,
    and which of `PACK_MODES` is wanted, where the compute device can unpack weights.

    Raises `PlanError` for another mode.
    """

    compute_device: str
    allocation: Allocation | Automatic
    donor_mode: str = AUTO
    pack_weights: str = AUTO

    def __post_init__(self) -> None:
        if self.donor_mode not in DONOR_MODES:
            raise PlanError(f"donor mode is {self.donor_mode!r}; use {', '.join(DONOR_MODES)}")
        if self.pack_weights not in PACK_MODES:
            raise PlanError(f"pack weights is {self.pack_weights!r}; use {', '.join(PACK_MODES)}")


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of one device in bytes; `free_bytes` is None where a plan is not to be limited by it.

    `can_compute` says whether it has all that a component needs to run there.
    """

    total_bytes: int
    free_bytes: int | None = None
    can_compute: bool = True


@dataclass(frozen=True)
class Layer:
    """A module with weights of its own: its dotted name ("" is the root) and its bytes as loaded.

    One that is not `movable` stays on the compute device. `slab_bytes` is what a movable one takes in a slab, where its
    tensors are aligned. `block` names the repeated part of the model that it belongs to, and `unit` the module that can
    run on another device as a whole; "" where there is none. `is_table`: an embedding, of which only single rows are
    read. `is_bf16`: most of its bytes are bf16 weights, which can be packed. With some patches the weights take
    `extra_bytes` more; with these or without, it is the same layer.
    """

    name: str
    num_bytes: int
    movable: bool = True
    slab_bytes: int = 0
    block: str = ""
    unit: str = ""
    is_table: bool = False
    is_bf16: bool = False
    extra_bytes: int = field(default=0, compare=False)


RESIDENT, PACKED, STREAMED, RELAYED, LOOKED_UP = ("resident", "packed", "streamed", "relayed", "looked up")
"""Of a layer's weights: they lie on the compute device; they do, and are unpacked for each run; they are copied there
for each run; the donor runs the layer; the rows that are asked for are copied."""


@dataclass(frozen=True)
class Placement:
    layer: Layer
    device: str


@dataclass(frozen=True)
class Group:
    """Layers on the same donor that are moved by one copy; of units that run there, if it `is_relayed`. Or layers that
    are packed on the compute device, `is_packed_resident`.

    A table is a group of its own, and is not moved.
    """

    device: str
    layers: tuple[Layer, ...]
    is_relayed: bool = False
    is_packed_resident: bool = False

    @property
    def is_table(self) -> bool:
        return any(layer.is_table for layer in self.layers)

    @property
    def is_streamed(self) -> bool:
        return not (self.is_relayed or self.is_table)

    @cached_property
    def is_packable(self) -> bool:
        """Whether the group is streamed and most of its bytes are bf16: it can be packed."""
        of_bf16 = sum(layer.num_bytes for layer in self.layers if layer.is_bf16)
        return self.is_streamed and 2 * of_bf16 > sum(layer.num_bytes for layer in self.layers)

    @cached_property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes + layer.extra_bytes for layer in self.layers)

    @cached_property
    def slab_bytes(self) -> int:
        return sum(layer.slab_bytes + layer.extra_bytes for layer in self.layers)


@dataclass(frozen=True)
class Relief:
    """One way to free room on the compute device. If it `packs`, a resident group is packed there. Otherwise the group
    leaves the device; `was_packed` says whether it is packed there until then."""

    group: Group
    was_packed: bool = False

    @property
    def packs(self) -> bool:
        return self.group.is_packed_resident

    @property
    def freed_bytes(self) -> int:
        packed = sizing.packed_bytes(self.group.num_bytes)
        if self.was_packed:
            return packed
        return self.group.num_bytes - packed if self.packs else self.group.num_bytes

    @property
    def newly_streamed_bytes(self) -> int:
        """Its slab, if the staging buffer has to have room for it from now on. One that was packed has it already."""
        return self.group.slab_bytes if self.group.is_streamed and not self.was_packed else 0


@dataclass(frozen=True)
class Plan:
    """For every layer, in the order of registration, the device that keeps it.

    `relieved` are the reliefs that were taken for want of room, in order. Their groups are `packed_residents` on the
    compute device, or `evicted` from it. On `relays`, donors that compute, the units run all of whose layers lie there.
    `donor_mode` is the one of `DONOR_MODES` that was asked for. `pack_weights` is one of `PACK_MODES`, or
    `STREAMED_ONLY`. `others` are devices that run the same model at the same time, with plans of their own.
    """

    compute_device: str
    placements: tuple[Placement, ...]
    notes: tuple[str, ...] = ()
    relieved: tuple[Relief, ...] = ()
    relays: tuple[str, ...] = ()
    donor_mode: str = STREAM
    pack_weights: str = OFF
    others: tuple[str, ...] = ()

    @classmethod
    def all_on(cls, device: str, layers: Iterable[Layer]) -> Plan:
        """Everything resident on one device."""
        return cls(device, tuple(Placement(layer, device) for layer in layers))

    def exchanged(self, device: str, layers: Iterable[Layer]) -> Plan:
        """For the same model on another compute device: the roles of the two devices are exchanged.

        `layers` are those of the model there. One that is not in this plan is resident.
        """
        names = {self.compute_device: device, device: self.compute_device}
        device_of = {item.layer.name: names.get(item.device, item.device) for item in self.placements}
        placements = tuple(Placement(layer, device_of.get(layer.name, device)) for layer in layers)
        relays = tuple(names.get(relay, relay) for relay in self.relays)
        return Plan(
            device, placements, relays=relays, donor_mode=self.donor_mode, pack_weights=self.pack_weights_on(device)
        )

    def pack_weights_on(self, device: str) -> str:
        """The mode for another compute device, which may not be able to unpack weights."""
        return self.pack_weights if kind_of(device) == kind_of(self.compute_device) else OFF

    @cached_property
    def evicted(self) -> tuple[Group, ...]:
        return tuple(relief.group for relief in self.relieved if not relief.packs)

    @cached_property
    def packed_residents(self) -> tuple[Group, ...]:
        evicted = {group.layers for group in self.evicted}
        return tuple(relief.group for relief in self.relieved if relief.packs and relief.group.layers not in evicted)

    @cached_property
    def model_bytes(self) -> int:
        """Without extra bytes: groups are the same whatever is patched."""
        return sum(placement.layer.num_bytes for placement in self.placements)

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """The devices that keep something, the compute device first."""
        used = {placement.device for placement in self.placements}
        return tuple(sorted(used, key=lambda device: (device != self.compute_device, device)))

    @cached_property
    def donors(self) -> tuple[str, ...]:
        return tuple(device for device in self.devices if device != self.compute_device)

    @cached_property
    def relayed_units(self) -> dict[str, str]:
        """Name of a unit -> the donor that runs it. Evicted layers are to run on the compute device."""
        evicted = self._evicted_names
        devices: dict[str, set[str]] = {}
        for placement in self.placements:
            layer = placement.layer
            if layer.unit and layer.movable and layer.num_bytes:
                device = self.compute_device if layer.name in evicted else placement.device
                devices.setdefault(layer.unit, set()).add(device)
        return {unit: device for unit, (device, *others) in devices.items() if not others and device in self.relays}

    def is_relayed(self, placement: Placement) -> bool:
        return self.relayed_units.get(placement.layer.unit) == placement.device

    @cached_property
    def streamed(self) -> tuple[Placement, ...]:
        """Placements on donors that are copied to the compute device."""
        return tuple(placement for placement in self.placements if self.how_served(placement) == STREAMED)

    def is_streamed_packed(self, placement: Placement) -> bool:
        """Whether the weights are to be packed from the start, if they become smaller."""
        is_streamed = self.how_served(placement) == STREAMED
        return self.pack_weights in (ON, STREAMED_ONLY) and is_streamed and placement.layer.is_bf16

    def copied_bytes_from(self, donor: str) -> int:
        """In each step; of what is to be packed, about."""
        streamed = [item for item in self.streamed if item.device == donor]
        packed = sum(item.layer.num_bytes for item in streamed if self.is_streamed_packed(item))
        return sum(item.layer.num_bytes for item in streamed) - packed + sizing.packed_bytes(packed)

    def how_served(self, placement: Placement) -> str:
        if placement.device == self.compute_device:
            return PACKED if placement.layer.name in self._packed_names else RESIDENT
        if self.is_relayed(placement):
            return RELAYED
        return LOOKED_UP if placement.layer.is_table else STREAMED

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The layers that are not resident in groups of up to `group_bytes`; a larger layer is a group of its own."""
        evicted = self._evicted_names
        groups: list[Group] = []
        for device in self.donors:
            on_device = [item for item in self.placements if item.device == device and item.layer.name not in evicted]
            for is_relayed in (True, False):  # the last lose their place first when there is less room
                layers = (item.layer for item in on_device if self.is_relayed(item) == is_relayed)
                groups += self._grouped(device, layers, is_relayed)
        return (*groups, *self.packed_residents, *self.evicted)

    @cached_property
    def _evicted_names(self) -> frozenset[str]:
        return frozenset(layer.name for group in self.evicted for layer in group.layers)

    @cached_property
    def _packed_names(self) -> frozenset[str]:
        return frozenset(layer.name for group in self.packed_residents for layer in group.layers)

    @cached_property
    def group_bytes(self) -> int:
        return sizing.group_bytes(self.model_bytes)

    @cached_property
    def staging_bytes(self) -> int:
        """Memory of the compute device through which groups are streamed."""
        return sizing.staging_bytes(self._streamed_sizes)

    @cached_property
    def packed_room_bytes(self) -> int:
        """Memory of the compute device through which packed groups come from donors, besides."""
        return self._room_for(self._packable_from_donors)

    @cached_property
    def is_worth_packing(self) -> bool:
        """Whether enough is streamed that can be packed."""
        return sum(group.slab_bytes for group in self._packable_from_donors) >= LEAST_TO_PACK_BYTES

    @cached_property
    def _packable_from_donors(self) -> list[Group]:
        return [group for group in self.groups if group.is_packable and not group.is_packed_resident]

    def _room_for(self, packable: Iterable[Group]) -> int:
        """The memory for these to come packed, if they do."""
        are_packed = self.pack_weights in (ON, STREAMED_ONLY)
        return sizing.packed_room_bytes([group.slab_bytes for group in packable]) if are_packed else 0

    @property
    def buffer_bytes(self) -> int:
        return self.staging_bytes + self.packed_room_bytes

    @property
    def staging_bytes_of_units(self) -> int:
        """The same for relayed units that have to run on the compute device after all. It is not planned for."""
        return sizing.staging_bytes([group.slab_bytes for group in self.groups if group.is_relayed])

    @property
    def _streamed_sizes(self) -> list[int]:
        return [group.slab_bytes for group in self.groups if group.is_streamed]

    @cached_property
    def compute_bytes(self) -> int:
        """What the plan takes on the compute device: resident layers and buffers."""
        return self.bytes_on(self.compute_device) + self.buffer_bytes

    def layers_on(self, device: str) -> tuple[Layer, ...]:
        return tuple(placement.layer for placement in self.placements if placement.device == device)

    def bytes_on(self, device: str) -> int:
        if device == self.compute_device:
            return self.resident_bytes + sum(sizing.packed_bytes(group.num_bytes) for group in self.packed_residents)
        return self._unpacked_bytes_on(device)

    @cached_property
    def resident_bytes(self) -> int:
        """On the compute device, without the groups that are packed there."""
        return self._unpacked_bytes_on(self.compute_device) - sum(group.num_bytes for group in self.packed_residents)

    def _unpacked_bytes_on(self, device: str) -> int:
        return sum(layer.num_bytes + layer.extra_bytes for layer in self.layers_on(device))

    def with_extra_bytes(self, extra_bytes: Mapping[str, int]) -> Plan:
        """The same layers at the same places in the same groups, of which some, by name, take so many bytes more."""
        if not extra_bytes:
            return self
        placements = (
            Placement(replace(item.layer, extra_bytes=extra_bytes.get(item.layer.name, 0)), item.device)
            for item in self.placements
        )
        return replace(self, placements=tuple(placements))

    def within(self, compute_bytes: float, before: Plan | None = None) -> Plan:
        """This plan, with as many resident groups packed or evicted as it takes to need no more than `compute_bytes` on
        the compute device; with those that leave the least there, where even that is more.

        For a smaller number these are relieved and more, so that little moves when it changes. What `before`, the plan
        that is served, has relieved comes back only if two groups more would fit: free memory differs a little from
        prompt to prompt.
        """
        number = self._num_to_relieve(compute_bytes)
        num_before = len(before.relieved) if before is not None else 0
        if before is not None and number < num_before and before.relieved == self._reliefs[:num_before]:
            number = min(num_before, self._num_to_relieve(compute_bytes - 2 * self.group_bytes))
        if not number:
            return self
        relieved = self._reliefs[:number]
        device_of = {layer.name: relief.group.device for relief in relieved for layer in relief.group.layers}
        placements = (Placement(item.layer, device_of.get(item.layer.name, item.device)) for item in self.placements)
        return replace(self, placements=tuple(placements), relieved=relieved)

    def _num_to_relieve(self, compute_bytes: float) -> int:
        """Packing alone takes no slots: those are for packed groups from donors. If a group has to leave, the slots for
        every group that may come packed then are counted."""
        resident, sizes = self.bytes_on(self.compute_device), self._streamed_sizes
        number = num_to_relieve(self._reliefs, resident, sizes, compute_bytes - self.packed_room_bytes)
        if all(relief.packs for relief in self._reliefs[:number]):
            return number
        room = self._room_for(group for group in (*self.groups, *self._evictable) if group.is_packable)
        return num_to_relieve(self._reliefs, resident, sizes, compute_bytes - room)

    @cached_property
    def _reliefs(self) -> tuple[Relief, ...]:
        """In the order in which they are taken: all that are to be packed are, before any leave."""
        may_pack = self.pack_weights == ON
        evicting = [Relief(group, was_packed=may_pack and group.is_packable) for group in self._evictable]
        to_pack = [relief.group for relief in evicting if relief.was_packed]
        return (
            *(Relief(Group(self.compute_device, each.layers, is_packed_resident=True)) for each in to_pack),
            *evicting,
        )

    @cached_property
    def _evictable(self) -> tuple[Group, ...]:
        """Groups of resident layers in the order of eviction, spread over the model. Small layers are the last."""
        if self.compute_device == OVERFLOW_DEVICE:
            return ()
        movable = [layer for layer in self.layers_on(self.compute_device) if layer.movable and layer.num_bytes]
        large, small = (
            self._grouped(OVERFLOW_DEVICE, (layer for layer in movable if (layer.num_bytes <= SMALL_BYTES) == is_small))
            for is_small in (False, True)
        )
        return (*(large[index] for index in spread(len(large))), *small)

    def _grouped(self, device: str, layers: Iterable[Layer], is_relayed: bool = False) -> list[Group]:
        return [Group(device, members, is_relayed) for members in sizing.in_groups(layers, self.group_bytes)]
