"""What memory there is, as ComfyUI's memory manager counts it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..planning.plan import ComponentRequest, DeviceMemory, PlanError
from ..planning.planner import relaying_donors
from ..weights.devices import CPU, DISK_NAME
from .core import mm

_CONTEXT_BYTES = 512 * 1024**2
"""About what CUDA takes of a GPU for a process that uses it."""


def memory_of(requests: Sequence[ComponentRequest], *others: str, may_start: bool = True) -> dict[str, DeviceMemory]:
    """Memory of the devices of these requests and of others that compute, with `cpu` and `disk` always among them.

    Of a device that computes, what models hold that ComfyUI can evict counts as free, and the room that it leaves for
    inference does not. What models hold on a device that only keeps weights does not count as free. A GPU that this
    process has not used is asked only if it `may_start` to use it; else it is taken to be free.
    """
    homes = {*others, *(request.compute_device for request in requests)}
    computing = {
        *homes,
        *(donor for request in requests for donor in relaying_donors(request, request.allocation.devices)),
    }
    keeping = {device for request in requests for device in request.allocation.devices}
    present = list(dict.fromkeys(["cpu", *(str(device) for device in mm.get_all_torch_devices())]))
    if DISK_NAME in homes:
        raise PlanError(f"{DISK_NAME} keeps weights and cannot compute; use {', '.join(present)}")
    named = sorted((computing | keeping) - {"cpu", DISK_NAME})
    for name in named:
        if name not in present:
            raise PlanError(f"there is no device {name!r}; this machine has {', '.join([*present, DISK_NAME])}")
        if not hasattr(torch, torch.device(name).type):  # torch.mps and torch.cpu exist; what they lack is not used
            raise PlanError(
                f"{name} is of a kind that torch has no streams and events for (DirectML, say): nothing can be kept "
                "elsewhere for it, or on it for others; use ComfyUI's own loader there"
            )
    memory = {"cpu": DeviceMemory(int(mm.get_total_memory(CPU))), DISK_NAME: DeviceMemory(0, can_compute=False)}
    for name in named:
        device = torch.device(name)
        if may_start or is_started(device):
            total_bytes, free_bytes = int(mm.get_total_memory(device)), int(mm.get_free_memory(device))
        else:
            total_bytes = torch.cuda.get_device_properties(device).total_memory
            free_bytes = total_bytes - _CONTEXT_BYTES
        if name in computing:
            loaded = (item for item in mm.current_loaded_models if item.device == device and item.model is not None)
            free_bytes += int(sum(item.model_loaded_memory() for item in loaded) - mm.minimum_inference_memory())
        can_compute = all(_supports_all_of(name, home) for home in homes)
        memory[name] = DeviceMemory(total_bytes, max(0, free_bytes), can_compute)
    return memory


def is_started(device: torch.device) -> bool:
    """Whether this process uses the device already: to ask a GPU what memory it has takes some hundred MiB of it."""
    return device.type != "cuda" or torch._C._cuda_hasPrimaryContext(device.index or 0)


def _supports_all_of(device: str, other: str) -> bool:
    """Whether `device` has the dtypes and kernels of `other`. Of CUDA's it is known by their compute capability."""
    if not device.startswith("cuda") or not other.startswith("cuda"):
        return True
    return torch.cuda.get_device_capability(device) >= torch.cuda.get_device_capability(other)
