"""ComfyUI as the rooms that serve and move weights see it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from ..moving.program import KeepsOnDonors
from . import core
from .core import mm
from .donor_share import DonorShare
from .failures import is_out_of_memory


class _ComfyUI:
    """See `Program` in `moving/program.py` for what each is."""

    def can_pin_for(self, device: torch.device) -> bool:
        return mm.is_device_cuda(device)

    def may_pin(self, num_bytes: int) -> bool:
        # The memory is in use already: the budget for memory is asked for nothing more.
        return mm.ensure_pin_budget(0) and mm.ensure_pin_registerable(num_bytes)

    def pin(self, buffer: torch.Tensor) -> bool:
        return mm.pin_memory(buffer)

    def unpin(self, buffer: torch.Tensor) -> None:
        mm.unpin_memory(buffer)

    def devices(self) -> Sequence[torch.device]:
        return mm.get_all_torch_devices()

    def devices_in_use(self) -> set[torch.device]:
        return {loaded.device for loaded in mm.current_loaded_models}

    def has_room_to_compute(self, device: torch.device) -> bool:
        return mm.get_free_memory(device) >= mm.minimum_inference_memory()

    def spare_host_memory(self) -> float:
        return core.spare_host_memory()

    def release_host_memory(self, num_bytes: float) -> None:
        core.release_host_memory(num_bytes)

    def is_running(self, module: torch.nn.Module) -> bool:
        loaded = [each for each in mm.current_loaded_models if each.model is not None and each.currently_used]
        return any(each.model.model is module for each in loaded)

    def temporary_folder(self) -> str:
        return core.temporary_folder()

    def share_on(self, donor: torch.device, owner: KeepsOnDonors, is_relay: bool) -> DonorShare:
        return DonorShare(owner, donor, is_relay)

    def raise_if_cancelled(self) -> None:
        mm.throw_exception_if_processing_interrupted()

    def progress_of(self, total: int) -> Callable[[], None]:
        return functools.partial(core.utils.ProgressBar(total).update, 1)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return is_out_of_memory(error)

    def is_training(self) -> bool:
        return mm.in_training

    def is_compiler_active(self) -> bool:
        return core.is_compiler_active()

    def outside_compiler(self) -> AbstractContextManager[None]:
        return core.outside_compiler()


COMFYUI = _ComfyUI()
