"""Slabs: contiguous buffers that hold the weights of layers, and the views into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

ALIGNMENT_BYTES = 256
"""Of every tensor in a slab: kernels, and so bits, may depend on alignment."""
PAGE_BYTES = 4096


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class _Field:
    """One parameter in a slab."""

    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class SlabLayout:
    """Where each parameter of a layer lies in its `num_bytes` bytes of a slab."""

    fields: tuple[_Field, ...]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> SlabLayout:
        """Lay out `tensors` one after another, each in the dtype that `dtypes` has for its name."""
        fields, offset = [], 0
        for name, tensor in tensors.items():
            field = _Field(name, offset, tensor.shape, dtypes[name])
            fields.append(field)
            offset += aligned(field.num_bytes)
        return cls(tuple(fields), offset)

    def parameters(self, buffer: torch.Tensor) -> dict[str, torch.nn.Parameter]:
        """Parameters that are views into `buffer` (uint8, at least `num_bytes` long)."""
        views = {}
        for field in self.fields:
            view = buffer[field.offset : field.offset + field.num_bytes].view(field.dtype).view(field.shape)
            views[field.name] = torch.nn.Parameter(view, requires_grad=False)
        return views


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """A buffer of bytes that can be written outside inference mode as well.

    On the host it has its memory pages for itself, since those are what can be page-locked.
    """
    with torch.inference_mode(False):
        if device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        buffer = torch.empty(num_bytes + 2 * PAGE_BYTES, dtype=torch.uint8, device=device)
        start = -buffer.data_ptr() % PAGE_BYTES
        return buffer[start : start + num_bytes]
