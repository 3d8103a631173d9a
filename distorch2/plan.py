"""What is placed where: frozen records of names and integers, without modules or tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

GIB = 1024**3
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
        donated = min(int(self.gb * GIB), model_bytes)
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
    """A module with weights of its own: its dotted name and its bytes as loaded.

    Layers that are not `movable` stay on the compute device: weights of a module that holds other modules.
    """

    name: str
    num_bytes: int
    movable: bool = True


@dataclass(frozen=True)
class Placement:
    layer: Layer
    device: str


@dataclass(frozen=True)
class Plan:
    """For every layer, in execution order, the device that keeps it."""

    compute_device: str
    placements: tuple[Placement, ...]
    notes: tuple[str, ...] = ()

    @property
    def model_bytes(self) -> int:
        return sum(placement.layer.num_bytes for placement in self.placements)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that keep something, the compute device first."""
        used = {placement.device for placement in self.placements}
        return tuple(sorted(used, key=lambda device: (device != self.compute_device, device)))

    @property
    def donors(self) -> tuple[str, ...]:
        return tuple(device for device in self.devices if device != self.compute_device)

    def layers_on(self, device: str) -> tuple[Layer, ...]:
        return tuple(placement.layer for placement in self.placements if placement.device == device)

    def bytes_on(self, device: str) -> int:
        return sum(layer.num_bytes for layer in self.layers_on(device))
