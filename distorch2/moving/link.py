"""How fast main memory is copied to an accelerator."""

from __future__ import annotations

import torch

from ..weights.slab import allocate
from .streams import backend_of, stream_for

_MEASURED_BYTES = 64 * 1024**2

_measured: dict[torch.device, float] = {}


def link_bytes_per_second(device: torch.device, may_measure: bool = True) -> float | None:
    """From page-locked memory. Measured once, in a few hundredths of a second, which a run beside it would disturb.
    None where it is not known and may not be measured."""
    if device not in _measured and may_measure:
        _measured[device] = _measure(device)
    return _measured.get(device)


def _measure(device: torch.device) -> float:
    backend, stream = backend_of(device), stream_for(device, "copying")
    source = torch.empty(_MEASURED_BYTES, dtype=torch.uint8, pin_memory=True)
    target, milliseconds = allocate(_MEASURED_BYTES, device), []
    for _ in range(4):  # the first time, there may be buffers to set up
        begin, end = (backend.Event(enable_timing=True) for _ in range(2))
        with backend.stream(stream):
            begin.record(stream)
            target.copy_(source, non_blocking=True)
            end.record(stream)
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    return 1000 * _MEASURED_BYTES / min(milliseconds)
