"""How fast this machine copies and computes: measured once, and kept in a file in ComfyUI's user folder.

Values are by the names of the devices, and by torch's version: another card, or another torch, is measured anew. So is
everything once the file is deleted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from .comfyui.core import user_folder
from .comfyui.program import COMFYUI
from .moving.speed import link_bytes_per_second, multiplications_per_second
from .moving.streams import backend_of
from .weights.devices import CPU

_FILE_NAME = "speeds.json"
_one_at_a_time = threading.Lock()
_known: dict[str, float] | None = None
"""What the file has; None before it is read."""


def link(source: torch.device, target: torch.device, may_measure: bool) -> float | None:
    """Bytes per second of copies, from page-locked memory where `source` is the CPU. None where there is none, where
    nothing is known and it may not be measured, or where that fails."""
    if source == CPU and not COMFYUI.can_pin_for(target):
        return None
    name = f"bytes per second from {_name_of(source)} to {_name_of(target)}"
    return _known_or_measured(name, lambda: link_bytes_per_second(source, target), may_measure)


def multiplications(device: torch.device, may_measure: bool) -> float | None:
    """Per second, in products of matrices of fp16. None as for `link`."""
    name = f"multiplications per second of {_name_of(device)}"
    return _known_or_measured(name, lambda: multiplications_per_second(device), may_measure)


def _known_or_measured(name: str, measure: Callable[[], float], may_measure: bool) -> float | None:
    global _known
    name = f"{name}, torch {torch.__version__}"
    with _one_at_a_time:
        if _known is None:
            _known = _read()
        if name not in _known and may_measure:
            try:
                _known[name] = measure()
            except RuntimeError:  # there is no memory for it, or torch lacks kernels for this device
                return None
            _write(_known)
        return _known.get(name)


def _name_of(device: torch.device) -> str:
    """That of one card, whatever number it has today; two of the same name may have different links."""
    if device == CPU:
        return "main memory"
    properties = backend_of(device).get_device_properties(device) if device.type == "cuda" else None
    mark = getattr(properties, "uuid", device)
    slot = getattr(properties, "pci_bus_id", "")
    return f"{backend_of(device).get_device_name(device)} ({' '.join(filter(None, (str(mark), str(slot))))})"


def _read() -> dict[str, float]:
    """Nothing of a file that is not as `_write` writes it."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(_path().read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(map(_is_speed, found.values())):
            return found
    return {}


def _is_speed(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def _write(known: dict[str, float]) -> None:
    """Where that fails it is measured again after the next start."""
    with contextlib.suppress(OSError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        new = _path().with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        new.replace(_path())


def _path() -> Path:
    return Path(user_folder()) / _FILE_NAME
