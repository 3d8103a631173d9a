"""Packing slabs on an accelerator, and unpacking them there, in one launch each, as `weights/packing.py` defines it."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..weights.devices import CPU
from ..weights.packing import BLOCK_VALUES, NUM_EXPONENTS, Coder, PackedSlab, Reference, unpack
from .streams import backend_of, context_of, on_device, stream_for

_KINDS = ("cuda",)
"""Of devices for which Triton makes kernels: NVIDIA's and, with a ROCm build of torch, AMD's."""
_WARPS = 2


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


class Kernels:
    """A `Coder` by kernels, for slabs on the device that is the current one, on its current stream."""

    def counts(self, slab: torch.Tensor) -> torch.Tensor:
        from .packing_kernels import count

        num_values = slab.nbytes // 2
        num_blocks = -(-num_values // BLOCK_VALUES)
        counts = torch.empty(num_blocks, NUM_EXPONENTS, dtype=torch.int32, device=slab.device)
        count[(num_blocks,)](slab, counts, num_values, BLOCK=BLOCK_VALUES, NUM_EXPONENTS=NUM_EXPONENTS)
        return counts

    def encode(self, slab: torch.Tensor, packed: PackedSlab) -> None:
        from .packing_kernels import encode

        self._run(encode, slab, packed)

    def decode(self, packed: PackedSlab, slab: torch.Tensor) -> None:
        from .packing_kernels import decode

        self._run(decode, slab, packed)

    def _run(self, kernel: Any, slab: torch.Tensor, packed: PackedSlab) -> None:
        layout = packed.layout
        kernel[(layout.num_blocks,)](
            slab,
            packed.buffer,
            layout.codes,
            layout.bases,
            layout.first_escapes,
            layout.escapes,
            layout.num_bytes_unpacked // 2,
            layout.num_values // 8,
            WIDTH=layout.width,
            ESCAPE=layout.escape_code,
            BLOCK=BLOCK_VALUES,
            num_warps=_WARPS,
        )


def coder_for(device: torch.device) -> Coder:
    """Kernels where Triton makes them for this kind of device; else the definition, which simulated devices use."""
    return Reference() if reason_against(device.type) else Kernels()


def unpacked_on(device: torch.device, packed: PackedSlab) -> torch.Tensor:
    """The slab again, on an accelerator or, slowly, in main memory. From another accelerator it comes by way of the
    host: they may say that they can reach each other when they cannot."""
    if packed.device not in (device, CPU):
        packed = packed.to(CPU)
    with on_device(device):
        return unpack(packed if packed.device == device else packed.to(device), coder_for(device))


class Unpacker:
    """Unpacks slabs on one device on a `stream` of its own: meanwhile copying goes on. Those from elsewhere are copied
    into `slots` there (uint8) that take turns."""

    def __init__(self, device: torch.device, slots: Sequence[torch.Tensor]) -> None:
        self.slots = slots
        self.slot_bytes = min((slot.nbytes for slot in slots), default=0)
        self._device = device
        backend = backend_of(device)
        self._coder = coder_for(device)
        self.stream = stream_for(device, "unpacking")
        self.stream.wait_stream(backend.current_stream(device))  # which may have used the slots' memory
        self._on_stream = context_of(self.stream)
        self._turns = itertools.cycle([(slot, backend.Event()) for slot in slots])
        self._is_there = backend.Event()

    def unpack(
        self,
        packed: PackedSlab,
        target: torch.Tensor,
        copy: Callable[[torch.Tensor, torch.Tensor], Any],
        copying: Any,
    ) -> None:
        """Have `copy(source, slot)` copy the packed bytes on the stream `copying`, the current one, where they are
        elsewhere, and then unpack them into `target`."""
        if packed.device == self._device:
            self._decode(packed, target, copying)
            return
        slot, is_unpacked = next(self._turns)
        staged = slot[: packed.nbytes]
        copying.wait_event(is_unpacked)
        copy(packed.buffer, staged)
        self._decode(PackedSlab(packed.layout, staged), target, copying)
        is_unpacked.record(self.stream)

    def _decode(self, packed: PackedSlab, target: torch.Tensor, after: Any) -> None:
        self._is_there.record(after)
        self.stream.wait_event(self._is_there)
        with self._on_stream:
            self._coder.decode(packed, target)
