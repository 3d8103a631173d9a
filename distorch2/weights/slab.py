"""Slabs: contiguous buffers that hold the weights of layers, and the views into them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .files import FileRange, Piece
from .quantised import description, plain_tensors, rebuilder

ALIGNMENT_BYTES = 256
"""Of every tensor in a slab: kernels, and so bits, may depend on alignment."""
PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2 * 1024**2


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class _Part:
    """One plain tensor in a slab."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor, dtype: torch.dtype, offset: int) -> _Part:
        """As `tensor`, whose elements keep their order in memory (channels last, say) if they lie without gaps."""
        by_stride = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
        is_dense = tensor.permute(by_stride).is_contiguous()
        stride = tensor.stride() if is_dense else torch.empty(tensor.shape, device="meta").stride()
        return cls(offset, tensor.shape, stride, dtype)

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def has_bytes_of(self, tensor: torch.Tensor) -> bool:
        """Whether the bytes of `tensor`, as they lie in memory, are those in the slab."""
        return (tensor.dtype, tensor.shape, tensor.stride()) == (self.dtype, self.shape, self.stride)

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        flat = buffer[self.offset : self.offset + self.num_bytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class _Field:
    """One parameter in a slab: `rebuild` makes it of its plain tensors."""

    name: str
    parts: tuple[_Part, ...]
    rebuild: Callable[[Sequence[torch.Tensor]], torch.nn.Parameter]
    description: object

    def fits(self, tensor: torch.Tensor | None) -> bool:
        if tensor is None or description(tensor) != self.description:
            return False
        # A scale of shape [1] in the file comes back with shape [] when the weight is quantised anew.
        whole, *scales = plain_tensors(tensor)
        found = [(whole.shape, whole.dtype), *((scale.numel(), scale.dtype) for scale in scales)]
        first, *others = self.parts
        return found == [(first.shape, first.dtype), *((part.shape.numel(), part.dtype) for part in others)]


@dataclass(frozen=True)
class SlabLayout:
    """Where each parameter of a layer lies in its `num_bytes` bytes of a slab."""

    fields: tuple[_Field, ...]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, Sequence[torch.dtype]]) -> SlabLayout:
        """Lay out `tensors` one after another; `dtypes`, by name, has one for each of their plain tensors."""
        fields, offset = [], 0
        for name, tensor in tensors.items():
            parts = []
            for plain, dtype in zip(plain_tensors(tensor), dtypes[name], strict=True):
                parts.append(_Part.of(plain, dtype, offset))
                offset += aligned(parts[-1].num_bytes)
            fields.append(_Field(name, tuple(parts), rebuilder(tensor), description(tensor)))
        return cls(tuple(fields), offset)

    def parameters(self, buffer: torch.Tensor) -> dict[str, torch.nn.Parameter]:
        """Parameters that are views into `buffer` (uint8, at least `num_bytes` long)."""
        return {field.name: field.rebuild([part.view(buffer) for part in field.parts]) for field in self.fields}

    def fill(self, buffer: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy `tensors`, by name, into `buffer`, in the dtypes of the layout, with zeros up to the next tensor.

        What is missing stays as it is."""
        for field in self.fields:
            if field.name not in tensors:
                continue
            for part, plain in zip(field.parts, plain_tensors(tensors[field.name]), strict=True):
                part.view(buffer).copy_(plain.view(part.shape))
                end = part.offset + part.num_bytes
                if end % ALIGNMENT_BYTES:
                    buffer[end : aligned(end)].zero_()

    def pieces(
        self, parts: Mapping[str, Sequence[tuple[torch.Tensor, FileRange | None]]], offset: int
    ) -> list[Piece] | None:
        """The layer in files, `offset` bytes from the start of a slab. `parts` has the plain tensors by name, and where
        each is found. None where a file has other bytes than the slab would."""
        pieces = []
        for field in self.fields:
            for part, (plain, found) in zip(field.parts, parts[field.name], strict=True):
                source: FileRange | torch.Tensor
                if found is None:
                    source = torch.empty(part.num_bytes, dtype=torch.uint8)
                    replace(part, offset=0).view(source).copy_(plain.view(part.shape))
                elif part.has_bytes_of(plain):
                    source = found
                else:
                    return None
                pieces.append(Piece(offset + part.offset, source))
        return pieces

    def fits(self, tensors: Mapping[str, torch.Tensor | None]) -> bool:
        """Whether these parameters, by name, are what is laid out."""
        return all(field.fits(tensors.get(field.name)) for field in self.fields)


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """A buffer of bytes that can be written outside inference mode as well.

    On the host it has its memory pages for itself, since those are what can be page-locked. They are huge ones where
    Linux has them, which take less time to get and to page-lock.
    """
    with torch.inference_mode(False):
        if device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        if num_bytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # torch's own words for it are clearer
                pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                pages.madvise(mmap.MADV_HUGEPAGE)
                return torch.frombuffer(pages, dtype=torch.uint8)
        buffer = torch.empty(num_bytes + 2 * PAGE_BYTES, dtype=torch.uint8, device=device)
        start = -buffer.data_ptr() % PAGE_BYTES
        return buffer[start : start + num_bytes]
