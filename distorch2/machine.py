"""How fast this machine copies and computes: measured once, and kept in a file in ComfyUI's user folder.

A value is for this very card, and for this version of torch. Everything is measured again after the file has been
deleted and ComfyUI started again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from .comfyui.core import user_folder
from .comfyui.program import COMFYUI
from .moving import speed
from .moving.streams import backend_of
from .weights.devices import CPU

_FILE_NAME = "speeds.json"
_one_at_a_time = threading.Lock()


def bytes_per_second(source: str, target: str, may_measure: bool) -> float | None:
    """Of copies between these devices; from `cpu`, of its page-locked memory. None where there is none, where nothing
    is known and it may not be measured, or where that fails."""
    there, here = torch.device(source), torch.device(target)
    if there == CPU and not COMFYUI.can_pin_for(here):
        return None
    key = f"bytes per second from {_name_of(there)} to {_name_of(here)}"
    return _known_or_measured(key, lambda: speed.link_bytes_per_second(there, here), may_measure)


def multiplications_per_second(name: str, may_measure: bool) -> float | None:
    """Of a device, in products of matrices of fp16. None as for `bytes_per_second`."""
    device = torch.device(name)
    key = f"multiplications per second of {_name_of(device)}"
    return _known_or_measured(key, lambda: speed.multiplications_per_second(device), may_measure)


def _known_or_measured(key: str, measure: Callable[[], float], may_measure: bool) -> float | None:
    key += f", torch {torch.__version__}"
    with _one_at_a_time:
        if key not in _known() and may_measure:
            try:
                _known()[key] = measure()
            except RuntimeError:  # there is no memory for it, or torch lacks kernels for this device
                return None
            _write(_known())
        return _known().get(key)


def _name_of(device: torch.device) -> str:
    """Of this very card, whatever its number is today where torch has an identifier for it: two of one model may have
    different links."""
    if device == CPU:
        return "main memory"
    properties = backend_of(device).get_device_properties(device) if device.type == "cuda" else None
    return f"{backend_of(device).get_device_name(device)} ({getattr(properties, 'uuid', device)})"


@functools.cache
def _known() -> dict[str, float]:
    """What the file had when it was read first, and what has been measured since."""
    return _read()


def _read() -> dict[str, float]:
    """What the file has, without what `_write` would not have written."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(_path().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {key: value for key, value in found.items() if _is_speed(value)}
    return {}


def _is_speed(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def _write(known: dict[str, float]) -> None:
    """Add these to what other processes have written. Where that fails they are measured again after the next start."""
    with contextlib.suppress(OSError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_path().parent) as folder:
            new = Path(folder) / _FILE_NAME
            new.write_text(json.dumps({**_read(), **known}, indent=2) + "\n", encoding="utf-8")
            new.replace(_path())


def _path() -> Path:
    return Path(user_folder()) / _FILE_NAME
