"""Which devices this machine has, as torch reports them, and their memory. Nothing of ComfyUI, nothing kept open."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import psutil
import torch

HOST_DEVICE = "cpu"
# ROCm builds of torch report AMD cards as cuda. torch has npu and mlu only where their extension was imported.
_INDEXED_BACKENDS = ("cuda", "xpu", "npu", "mlu")
_UNIFIED_MEMORY_DEVICES = (HOST_DEVICE, "mps")


@dataclass(frozen=True)
class MemoryInfo:
    """Memory of a device in bytes; what torch holds in its cache without using it counts as free."""

    total_bytes: int
    free_bytes: int


@lru_cache(maxsize=1)
def list_devices() -> tuple[str, ...]:
    """Names of the devices, `cpu` first, then the accelerators by index. Asks torch once per process."""
    names = [HOST_DEVICE]
    for backend_name in _INDEXED_BACKENDS:
        backend = getattr(torch, backend_name, None)
        if backend is not None and backend.is_available():
            names += [f"{backend_name}:{index}" for index in range(backend.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return tuple(names)


def first_accelerator() -> str:
    """The first accelerator, or `cpu` where there is none."""
    return next((name for name in list_devices() if name != HOST_DEVICE), HOST_DEVICE)


def memory_info(device: str) -> MemoryInfo:
    """Total and free memory of a device of `list_devices()`.

    Initialises the device where it was not yet. Raises `ValueError` for a device that this machine does not have.
    """
    if device not in list_devices():
        raise ValueError(f"there is no device {device!r}; this machine has {', '.join(list_devices())}")
    if device in _UNIFIED_MEMORY_DEVICES:
        host = psutil.virtual_memory()
        return MemoryInfo(host.total, host.available)
    backend_name, _, index = device.partition(":")
    backend = getattr(torch, backend_name)
    free_bytes, total_bytes = backend.mem_get_info(int(index))
    cached_bytes = backend.memory_reserved(int(index)) - backend.memory_allocated(int(index))
    return MemoryInfo(total_bytes, free_bytes + cached_bytes)
