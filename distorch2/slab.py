"""Slabs: one contiguous buffer that holds all weights of a layer, and the views into it.

A quantised tensor (a subclass that offers `__tensor_flatten__`) is packed as the plain tensors inside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

ALIGNMENT_BYTES = 256
"""Of every tensor in a slab: as torch's own allocations, since kernels, and so bits, depend on alignment."""


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold the data of `tensor`: itself, or those inside a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


@dataclass(frozen=True)
class _Field:
    """One parameter in a slab: offsets of its plain tensors, and how to put it together from them."""

    name: str
    offsets: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    quantised: tuple[Any, ...] | None  # (class, inner names, context, size, stride)

    def view(self, buffer: torch.Tensor) -> torch.nn.Parameter:
        views = [
            buffer[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for offset, shape, dtype in zip(self.offsets, self.shapes, self.dtypes)
        ]
        if self.quantised is None:
            return torch.nn.Parameter(views[0], requires_grad=False)
        tensor_class, names, context, size, stride = self.quantised
        tensor = tensor_class.__tensor_unflatten__(dict(zip(names, views)), context, size, stride)
        return torch.nn.Parameter(tensor, requires_grad=False)


@dataclass(frozen=True)
class SlabLayout:
    """Where each parameter of a layer lies in its slab of `num_bytes` bytes."""

    fields: tuple[_Field, ...]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> SlabLayout:
        """Lay out `tensors`, plain ones in the dtype that `dtypes` gives for their name."""
        fields, offset = [], 0
        for name, tensor in tensors.items():
            offsets, shapes, stored_dtypes = [], [], []
            quantised = None
            if hasattr(tensor, "__tensor_flatten__"):
                names, context = tensor.__tensor_flatten__()
                quantised = (type(tensor), names, context, tensor.size(), tensor.stride())
            for plain in plain_tensors(tensor):
                dtype = dtypes.get(name, plain.dtype) if quantised is None else plain.dtype
                offsets.append(offset)
                shapes.append(plain.shape)
                stored_dtypes.append(dtype)
                offset += aligned(plain.numel() * dtype.itemsize)
            fields.append(_Field(name, tuple(offsets), tuple(shapes), tuple(stored_dtypes), quantised))
        return cls(tuple(fields), offset)

    def parameters(self, buffer: torch.Tensor) -> dict[str, torch.nn.Parameter]:
        """Parameters that are views into `buffer` (uint8, at least `num_bytes` long)."""
        return {field.name: field.view(buffer) for field in self.fields}


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """A buffer of bytes that can be written outside inference mode as well."""
    with torch.inference_mode(False):
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def write(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy `value` into the memory of `parameter`, which keeps its dtype."""
    for target, source in zip(plain_tensors(parameter), plain_tensors(value), strict=True):
        target.data.copy_(source)
