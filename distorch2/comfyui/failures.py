"""What an error means: out of memory, or a device that is lost. ComfyUI's own predicate where it has one."""

from __future__ import annotations

import torch

from .core import mm

OUT_OF_MEMORY = torch.OutOfMemoryError
"""The class for which ComfyUI unloads all models."""

_HOST = "DefaultCPUAllocator"
"""Torch has no class of its own for the host, where it says this."""
_LOST = (
    "illegal memory access",
    "illegal instruction",
    "invalid program counter",
    "address space",
    "launch timed out",
    "misaligned address",
    "launch failure",
    "device-side assert",
    "hardware stack error",
    "uncorrectable",
    "unknown error",
    "is/are busy or unavailable",
    "device is lost",
    "DEVICE_LOST",
)
"""In the texts of errors after which an accelerator does nothing for this process any more."""


def is_out_of_memory(error: BaseException) -> bool:
    """On an accelerator, or on the host."""
    return mm.is_oom(error) or _HOST in str(error) or _accelerator_says(error, "out of memory")


def is_device_lost(error: BaseException) -> bool:
    """Whether nothing can be done on the accelerator any more, before the process is started again."""
    return _accelerator_says(error, *_LOST) and not is_out_of_memory(error)


def _accelerator_says(error: BaseException, *texts: str) -> bool:
    """Whether it is an error of CUDA, HIP or the like, with one of these texts."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    is_named = any(name in text for name in ("CUDA error", "HIP error", "UR error", "Level-Zero error"))
    is_of_accelerator = is_named or isinstance(error, getattr(torch, "AcceleratorError", ()))
    return is_of_accelerator and any(each in text for each in texts)
