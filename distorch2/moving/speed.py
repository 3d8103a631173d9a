"""Measuring how fast this machine copies and computes. Other work on the devices meanwhile falsifies that."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..weights.devices import CPU
from ..weights.slab import allocate
from .streams import backend_of

_COPIED_BYTES = 64 * 1024**2
_SIDE = 2048
_PRODUCTS = 8
_TIMES = 4
_WARM_UP_S = 0.1
"""Of work that is not timed: a GPU that was idle does not run at its speed at once, and its link neither."""
_LONGEST_S = 0.5
"""After that one timing is enough."""
_TICK_MS = 0.0005
"""Of an event's clock, in CUDA."""


def link_bytes_per_second(source: torch.device, target: torch.device) -> float:
    """Of copies, from page-locked memory where `source` is the CPU. Takes an eighth of a second.

    Raises `RuntimeError` where there is no memory for it.
    """
    if source == CPU:
        there = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    else:
        there = allocate(_COPIED_BYTES, source)
    here = allocate(_COPIED_BYTES, target)
    return _COPIED_BYTES / _seconds(target, lambda: here.copy_(there, non_blocking=True))


def multiplications_per_second(device: torch.device) -> float:
    """In products of square matrices of fp16. Takes an eighth of a second. Raises `RuntimeError` also where torch has
    no kernels for this device."""
    one, other, product = (torch.zeros(_SIDE, _SIDE, dtype=torch.float16, device=device) for _ in range(3))

    def multiply() -> None:
        for _ in range(_PRODUCTS):
            torch.mm(one, other, out=product)

    return _PRODUCTS * _SIDE**3 / _seconds(device, multiply)


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """The least that it took, of a few times."""
    backend, milliseconds, begun = backend_of(device), list[float](), time.perf_counter()
    with backend.device(device):
        while not milliseconds or (len(milliseconds) < _TIMES and time.perf_counter() - begun < _LONGEST_S):
            begin, end = (backend.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            if time.perf_counter() - begun >= _WARM_UP_S:
                milliseconds.append(begin.elapsed_time(end))
    return max(min(milliseconds), _TICK_MS) / 1000
