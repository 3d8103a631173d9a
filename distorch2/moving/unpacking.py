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


def reason_against(device: torch.device) -> str:
    """Why slabs cannot be unpacked on a device; blank where they can. No compiler is started."""
    if device.type not in _KINDS:
        return f"no kernels are made for {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


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
        self, packed: PackedSlab, target: torch.Tensor, copy: Callable[[torch.Tensor, torch.Tensor], Any], is_free: Any
    ) -> None:
        """Have `copy(source, slot)` copy the packed bytes on the current stream, and unpack them into `target` when the
        event `is_free` has come."""
        slot, is_unpacked = next(self._turns)
        copying, staged = self._backend.current_stream(target.device), slot[: packed.nbytes]
        copying.wait_event(is_unpacked)
        copy(packed.buffer, staged)
        self.stream.wait_stream(copying)
        self.stream.wait_event(is_free)
        with self._backend.stream(self.stream):
            unpack_into(PackedSlab(packed.layout, staged), target)
        is_unpacked.record(self.stream)


def unpack_into(packed: PackedSlab, target: torch.Tensor) -> None:
    """Fill `target` (uint8, of the slab's bytes, on the same device) on the stream that is the current one."""
    layout, buffer = packed.layout, packed.buffer
    if reason_against(target.device):
        target.copy_(unpack(packed))
        return
    with on_device(target.device):
        _kernel()[(layout.num_blocks,)](
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


@functools.cache
def _kernel() -> Any:
    """Made when it is first needed: importing Triton takes time, and not every machine has it."""
    import triton
    import triton.language as tl

    @triton.jit
    def unpack(
        packed,
        first_escapes,
        target,
        codes,
        bases,
        escapes,
        num_values,
        bytes_of_plane,
        WIDTH: tl.constexpr,
        ESCAPE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        block = tl.program_id(0)
        value = block * BLOCK + tl.arange(0, BLOCK)
        if WIDTH == 4:
            pair = tl.load(packed + codes + value // 2).to(tl.int32)
            code = (pair >> (value % 2 * 4)) & 15
        else:
            code = tl.zeros([BLOCK], tl.int32)
            for bit in tl.static_range(WIDTH):
                of_eight = tl.load(packed + codes + bit * bytes_of_plane + value // 8).to(tl.int32)
                code |= ((of_eight >> (value % 8)) & 1) << bit
        is_escape = code == ESCAPE
        rank = tl.load(first_escapes + block) + tl.cumsum(is_escape.to(tl.int32), 0) - 1
        escaped = tl.load(packed + escapes + rank, mask=is_escape, other=0).to(tl.int32)
        exponent = tl.where(is_escape, escaped, tl.load(packed + bases + block).to(tl.int32) + code)
        rest = tl.load(packed + value).to(tl.int32)
        bits = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)
        tl.store(target + value, bits.to(tl.int16), mask=value < num_values)

    return unpack
