"""What a model keeps on another accelerator, as ComfyUI's memory manager sees it: a model of its own there."""

from __future__ import annotations

import weakref

import torch

from ..moving.program import KeepsOnDonors
from ..weights.devices import CPU
from .core import ModelPatcher, mm


class WeightsOnDonor(torch.nn.Module):
    """What ComfyUI takes for the model of a `DonorShare`; its log shows the name."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device


class DonorShare(ModelPatcher):
    """The slabs of one distribution on one accelerator.

    ComfyUI makes room for them when the model is loaded, evicts them to the host when others need the room, and brings
    them back. Where nothing is computed (it is no relay) all that is free may be used, whatever ComfyUI would reserve.
    """

    def __init__(self, distribution: KeepsOnDonors, donor: torch.device, is_relay: bool) -> None:
        super().__init__(WeightsOnDonor(donor), donor, CPU)
        self._is_relay = is_relay
        self._reference = weakref.ref(distribution)  # which holds this object

    def model_size(self) -> int:
        distribution = self._reference()
        return distribution.slab_bytes_planned_on(self.load_device) if distribution is not None else 0

    def loaded_size(self) -> int:
        distribution = self._reference()
        return distribution.bytes_on(self.load_device) if distribution is not None else 0

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Let slabs lie here as far as there is room. Before the model itself is placed there are none yet."""
        added = extra_memory if self._is_relay else mm.get_free_memory(self.load_device)
        return self._limit(self.loaded_size() + added)

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Move slabs to the host until so much is free. Returns the bytes freed."""
        return -self._limit(self.loaded_size() - memory_to_free)

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        if unpatch_all:
            self._limit(0)
        return self.model

    def _limit(self, num_bytes: float) -> int:
        """Returns the bytes that were added."""
        before = self.loaded_size()
        distribution = self._reference()
        if distribution is not None:
            distribution.limit(self.load_device, num_bytes)
        return self.loaded_size() - before
