"""What is placed where: frozen records of names and integers, without modules or tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

GIB = 1024**3
GROUP_BYTES = 32 * 1024**2
"""Large enough for a copy at the full speed of the link."""
STAGING_BYTES = 512 * 1024**2
"""Enough, unless three groups need more: in forecasts of `benchmarks/simulator.py` twice as much gains under 1 % for
Flux- and SDXL-sized models at any fraction, whether the link or the computation takes longer."""
OVERFLOW_DEVICE = "cpu"
"""Takes what no other device has room for."""


class PlanError(ValueError):
    """A request that cannot be planned; the message says what would be accepted."""


class Allocation(Protocol):
    """How much of a model each device is asked to keep: a parsed allocation string, or `VirtualVram`."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices named in it."""

    @property
    def note(self) -> str:
        """What a reader may not expect, or an empty string."""

    def shares(
        self, model_bytes: int, compute_device: str, device_total_bytes: Mapping[str, int]
    ) -> tuple[tuple[str, int], ...]:
        """(device, bytes) in the order of preference; the bytes add up to `model_bytes`."""


@dataclass(frozen=True)
class VirtualVram:
    """Keep `gb` GiB of the model on `donor_device` and the rest on the compute device.

    Raises `PlanError` when `gb` is negative or not finite.
    """

    gb: float
    donor_device: str
    note = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gb) and self.gb >= 0):
            raise PlanError(f"virtual VRAM is {self.gb} GB; use 0 or more")

    @property
    def devices(self) -> tuple[str, ...]:
        return (self.donor_device,)

    def shares(
        self, model_bytes: int, compute_device: str, device_total_bytes: Mapping[str, int]
    ) -> tuple[tuple[str, int], ...]:
        if self.donor_device == compute_device:
            return ((compute_device, model_bytes),)
        donated = int(min(self.gb * GIB, model_bytes))
        return (compute_device, model_bytes - donated), (self.donor_device, donated)


@dataclass(frozen=True)
class ComponentRequest:
    """Where one component of a checkpoint computes, and which devices keep its weights."""

    compute_device: str
    allocation: Allocation


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of one device in bytes; `free_bytes` is None where a plan is not to be limited by it."""

    total_bytes: int
    free_bytes: int | None = None


@dataclass(frozen=True)
class Layer:
    """A module with weights of its own: its dotted name ("" is the root) and its bytes as loaded.

    One that is not `movable` stays on the compute device. `slab_bytes` is what a movable one takes in a slab, where its
    tensors are aligned. `block` names the repeated part of the model that it belongs to.
    """

    name: str
    num_bytes: int
    movable: bool = True
    slab_bytes: int = 0
    block: str = ""


@dataclass(frozen=True)
class Placement:
    layer: Layer
    device: str


@dataclass(frozen=True)
class Group:
    """Layers on the same donor that are moved by one copy."""

    device: str
    layers: tuple[Layer, ...]

    @cached_property
    def slab_bytes(self) -> int:
        return sum(layer.slab_bytes for layer in self.layers)


@dataclass(frozen=True)
class Plan:
    """For every layer, in the order of registration, the device that keeps it."""

    compute_device: str
    placements: tuple[Placement, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def all_on(cls, device: str, layers: Iterable[Layer]) -> Plan:
        """Everything resident on one device."""
        return cls(device, tuple(Placement(layer, device) for layer in layers))

    @cached_property
    def model_bytes(self) -> int:
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
    def streamed(self) -> tuple[Placement, ...]:
        """Placements on donors."""
        return tuple(placement for placement in self.placements if placement.device != self.compute_device)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The streamed layers in groups of up to `GROUP_BYTES`; a larger layer is a group of its own."""
        groups: list[Group] = []
        for device in self.donors:
            layers: list[Layer] = []
            num_bytes = 0
            for layer in self.layers_on(device):
                if layers and num_bytes + layer.slab_bytes > GROUP_BYTES:
                    groups.append(Group(device, tuple(layers)))
                    layers, num_bytes = [], 0
                layers.append(layer)
                num_bytes += layer.slab_bytes
            groups.append(Group(device, tuple(layers)))
        return tuple(groups)

    @cached_property
    def staging_bytes(self) -> int:
        """Memory of the compute device through which groups are streamed.

        An eighth of what is streamed, up to `STAGING_BYTES`, but room for three groups at least: two whose layers take
        turns, and one to copy into.
        """
        sizes = [group.slab_bytes for group in self.groups]
        return min(sum(sizes), max(3 * max(sizes, default=0), min(sum(sizes) // 8, STAGING_BYTES)))

    @cached_property
    def compute_bytes(self) -> int:
        """What the plan takes on the compute device: resident layers and the staging buffer."""
        return self.bytes_on(self.compute_device) + self.staging_bytes

    def layers_on(self, device: str) -> tuple[Layer, ...]:
        return tuple(placement.layer for placement in self.placements if placement.device == device)

    def bytes_on(self, device: str) -> int:
        return sum(layer.num_bytes for layer in self.layers_on(device))
