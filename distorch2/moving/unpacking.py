"""Packed slabs: copied as they are, and unpacked on the accelerator, in one launch each. `weights/packing.py` defines
what is computed."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..weights.packing import BLOCK_VALUES, PackedSlab, unpack
from .streams import backend_of, on_device

_KINDS = ("cuda",)
"""Of devices for which Triton makes kernels: NVIDIA's and, with a ROCm build of torch, AMD's."""
_WARPS = 4


@functools.cache
def reason_against(kind: str) -> str:
    """Why slabs cannot be unpacked on a kind of device; blank where they may be. No compiler is started."""
    if kind not in _KINDS:
        return f"no kernels are made for {kind}"
    try:
        is_there = importlib.util.find_spec("triton") is not None
    except ValueError:  # something that only has the name
        is_there = False
    return "" if is_there else "Triton is not installed"


def unpacked(packed: PackedSlab) -> torch.Tensor:
    """The slab again, by the way in which it will be served."""
    slab = torch.empty(packed.layout.num_bytes_unpacked, dtype=torch.uint8, device=packed.device)
    unpack_into(packed, slab)
    return slab


class Unpacker:
    """Unpacks slabs that have been copied to one device into `slots` there (uint8) that take turns, on a `stream` of
    its own: meanwhile copying goes on."""

    def __init__(self, device: torch.device, slots: Sequence[torch.Tensor]) -> None:
        self.slots = slots
        self._backend = backend_of(device)
        self.stream = self._backend.Stream(device)
        self.stream.wait_stream(self._backend.current_stream(device))  # which may have used the slots' memory
        self._turns = itertools.cycle([(slot, self._backend.Event()) for slot in slots])

    def unpack(
        self, packed: PackedSlab, target: torch.Tensor, copy: Callable[[torch.Tensor, torch.Tensor], Any]
    ) -> None:
        """Have `copy(source, slot)` copy the packed bytes on the current stream, and then unpack them into `target`."""
        slot, is_unpacked = next(self._turns)
        copying, staged = self._backend.current_stream(target.device), slot[: packed.nbytes]
        copying.wait_event(is_unpacked)
        copy(packed.buffer, staged)
        self.stream.wait_stream(copying)
        with self._backend.stream(self.stream):
            unpack_into(PackedSlab(packed.layout, staged), target)
        is_unpacked.record(self.stream)


def unpack_into(packed: PackedSlab, target: torch.Tensor) -> None:
    """Fill `target` (uint8, of the slab's bytes, on the same device) on the stream that is the current one."""
    layout, buffer = packed.layout, packed.buffer
    if reason_against(target.device.type):
        target.copy_(unpack(packed))
        return
    from .unpack_kernel import unpack as kernel

    with on_device(target.device):
        kernel[(layout.num_blocks,)](
            buffer,
            buffer[layout.first_escapes : layout.escapes].view(torch.int32),
            target.view(torch.int16),
            layout.codes,
            layout.bases,
            layout.escapes,
            layout.num_bytes_unpacked // 2,
            layout.num_values // 8,
            WIDTH=layout.width,
            ESCAPE=layout.escape_code,
            BLOCK=BLOCK_VALUES,
            num_warps=_WARPS,
        )
