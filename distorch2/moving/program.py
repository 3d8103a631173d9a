"""What moving and serving weights ask of the program that they run in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class KeepsOnDonors(Protocol):
    """Slabs on donors, in bytes."""

    def slab_bytes_planned_on(self, donor: torch.device) -> int: ...

    def bytes_on(self, donor: torch.device) -> int: ...

    def limit(self, donor: torch.device, num_bytes: float) -> None: ...


class Program(Protocol):
    """ComfyUI's is `COMFYUI` in `comfyui/program.py`."""

    def can_pin_for(self, device: torch.device) -> bool:
        """Whether page-locked memory makes copies to this device faster."""

    def may_pin(self, num_bytes: int) -> bool:
        """Whether the budget for page-locked memory allows so much more."""

    def pin(self, buffer: torch.Tensor) -> bool:
        """Page-lock host memory; whether that was done."""

    def unpin(self, buffer: torch.Tensor) -> None: ...

    def devices(self) -> Sequence[torch.device]:
        """Those that models may lie on."""

    def devices_in_use(self) -> set[torch.device]:
        """Those that models lie on."""

    def has_room_to_compute(self, device: torch.device) -> bool: ...

    def spare_host_memory(self) -> float:
        """Bytes of main memory that may be taken. Less than 0 where there is less than is to be left."""

    def release_host_memory(self, num_bytes: float) -> None:
        """Drop what can be dropped until so many bytes may be taken."""

    def is_running(self, module: torch.nn.Module) -> bool:
        """Whether a model is in use now, or has just been loaded for it."""

    def temporary_folder(self) -> str:
        """Where files may lie that are gone when the program ends. It may not be there yet."""

    def share_on(self, donor: torch.device, owner: KeepsOnDonors, is_relay: bool) -> Any:
        """What the program's memory manager takes for a model on `donor`: the slabs that `owner` keeps there."""

    def raise_if_cancelled(self) -> None: ...

    def progress_of(self, total: int) -> Callable[[], None]:
        """To be called as often as `total` says while something is loaded. It may raise as `raise_if_cancelled`."""

    def is_out_of_memory(self, error: BaseException) -> bool: ...

    def is_training(self) -> bool: ...

    def is_compiler_active(self) -> bool:
        """Whether what is allocated now may be replayed by the program's compiler."""

    def outside_compiler(self) -> AbstractContextManager[None]: ...
