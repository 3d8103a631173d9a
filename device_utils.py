"""Which devices this machine has, as torch reports them. Nothing of ComfyUI.

Their memory is asked of ComfyUI's memory manager, in `distorch2.comfyui.memory`: it knows what it could evict.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

HOST_DEVICE = "cpu"
# ROCm builds of torch report AMD cards as cuda. torch has npu and mlu only where their extension was imported, and one
# more backend may have taken the name that torch keeps for others.
_INDEXED_BACKENDS = ("cuda", "xpu", "npu", "mlu")


@lru_cache(maxsize=1)
def list_devices() -> tuple[str, ...]:
    """Names of the devices, `cpu` first, then the accelerators by index. Asks torch once per process."""
    names = [HOST_DEVICE]
    for backend_name in dict.fromkeys((*_INDEXED_BACKENDS, torch._C._get_privateuse1_backend_name())):
        backend = getattr(torch, backend_name, None)
        if backend is not None and backend.is_available():
            names += [f"{backend_name}:{index}" for index in range(backend.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return tuple(names)


def first_accelerator(devices: Sequence[str]) -> str:
    """The first accelerator among `devices`, or `cpu` where there is none."""
    return next((name for name in devices if name != HOST_DEVICE), HOST_DEVICE)
