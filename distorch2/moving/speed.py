"""How fast this machine copies and computes, measured where it is not known from before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from ..weights.slab import allocate
from .streams import backend_of

_COPIED_BYTES = 64 * 1024**2
_SIDE = 2048
_PRODUCTS = 8
_TIMES = 4
"""The first time, there may be buffers to set up."""
_WARM_UP_S = 0.1
"""Of work that is not timed: a GPU that was idle does not run at its speed at once."""
_LONGEST_S = 0.5
"""After that one timing is enough."""
_TICK_MS = 0.0005
"""Of an event's clock, in CUDA."""

_one_at_a_time = threading.Lock()
_links: dict[torch.device, float] = {}
_products: dict[torch.device, float] = {}


def link_bytes_per_second(device: torch.device, may_measure: bool = True) -> float | None:
    """Of copies from page-locked memory. Measured once, in a few hundredths of a second, which a run beside it would
    disturb. None where it is not known and may not be measured."""
    with _one_at_a_time:
        if device not in _links and may_measure:
            source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
            target = allocate(_COPIED_BYTES, device)
            _links[device] = _COPIED_BYTES / _seconds(device, lambda: target.copy_(source, non_blocking=True))
        return _links.get(device)


def multiplications_per_second(device: torch.device, may_measure: bool = True) -> float | None:
    """In products of square matrices of fp16. Measured as `link_bytes_per_second` is, in an eighth of a second."""
    with _one_at_a_time:
        if device not in _products and may_measure:
            one, other, product = (torch.zeros(_SIDE, _SIDE, dtype=torch.float16, device=device) for _ in range(3))

            def multiply() -> None:
                for _ in range(_PRODUCTS):
                    torch.mm(one, other, out=product)

            _products[device] = _PRODUCTS * _SIDE**3 / _seconds(device, multiply, _WARM_UP_S)
        return _products.get(device)


def _seconds(device: torch.device, work: Callable[[], Any], warm_up_s: float = 0.0) -> float:
    """The least that it took, of a few times."""
    backend, milliseconds, begun = backend_of(device), list[float](), time.perf_counter()
    with backend.device(device):
        while not milliseconds or (len(milliseconds) < _TIMES and time.perf_counter() - begun < _LONGEST_S):
            begin, end = (backend.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            if time.perf_counter() - begun >= warm_up_s:
                milliseconds.append(begin.elapsed_time(end))
    return max(min(milliseconds), _TICK_MS) / 1000
