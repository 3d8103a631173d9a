"""Slabs of bf16 weights, packed without loss: to 69 to 76% of their size for the weights of networks.

Of a bf16 value 8 of 16 bits are the exponent, and in a block of weights few exponents are frequent. So a value is kept
as a byte with sign and mantissa, and a code of `width` bits for the exponent: how far it is above the base of its
block. The last code means that the exponent is one of the block's escapes, which are bytes in a list. This is a
fixed-width variant of what DFloat11 (Zhang et al., 2025) does with Huffman codes: every value is found without those
before it.

A slab is packed as it is, whatever tensors lie in it, so that any bit pattern comes back: zeros of both signs, NaNs
with their payload, and padding. `Reference` is the definition; on accelerators `moving/unpacking.py` does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from .slab import aligned, allocate

BLOCK_VALUES = 1024
WIDTHS = (3, 4)
_LEAST_GAIN = 0.1
"""A slab that would not become so much smaller stays as it is."""
_VALUES_AT_A_TIME = 4 * 1024**2
"""To count takes 9 bytes a value, and more for each block."""
NUM_EXPONENTS = 256


@dataclass(frozen=True)
class PackedLayout:
    """Where in a packed slab what lies, in bytes from its start.

    First one byte for each value, sign and mantissa. Values are counted with those that fill the last block.
    """

    num_bytes_unpacked: int
    width: int
    """Bits of a code."""
    num_escapes: int

    @property
    def num_blocks(self) -> int:
        return -(-self.num_bytes_unpacked // (2 * BLOCK_VALUES))

    @property
    def num_values(self) -> int:
        return self.num_blocks * BLOCK_VALUES

    @property
    def escape_code(self) -> int:
        return 2**self.width - 1

    @cached_property
    def codes(self) -> int:
        """Of 4 bits: two in a byte, the first in the lower half. Of 3: a plane for each bit, the lowest first, with the
        bits of eight values in a byte, the first in the lowest."""
        return self.num_values

    @cached_property
    def bases(self) -> int:
        """A byte for each block."""
        return self.codes + self.num_values * self.width // 8

    @cached_property
    def first_escapes(self) -> int:
        """An int32 for each block: how many escapes there are in the blocks before it."""
        return aligned(self.bases + self.num_blocks)

    @cached_property
    def escapes(self) -> int:
        """A byte for each."""
        return self.first_escapes + 4 * self.num_blocks

    @property
    def num_bytes(self) -> int:
        return aligned(self.escapes + self.num_escapes)


@dataclass(frozen=True)
class PackedSlab:
    layout: PackedLayout
    buffer: torch.Tensor
    """uint8, of `layout.num_bytes`."""

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    def to(self, device: torch.device) -> PackedSlab:
        buffer = allocate(self.nbytes, device)
        return PackedSlab(self.layout, buffer.copy_(self.buffer))


class Coder(Protocol):
    """The parts of packing that look at every value, on the device of the slab (uint8)."""

    def counts(self, slab: torch.Tensor) -> torch.Tensor:
        """How often each exponent occurs in each block: int32 [blocks, 256]. The last value again fills the last
        block."""

    def encode(self, slab: torch.Tensor, packed: PackedSlab) -> None:
        """Write signs and mantissas, codes, and escapes; bases and first escapes are there."""

    def decode(self, packed: PackedSlab, slab: torch.Tensor) -> None:
        """Fill the slab."""


def pack(slab: torch.Tensor, coder: Coder | None = None) -> PackedSlab | None:
    """A slab (uint8, on any device), packed there in the width in which it is smallest.

    None where that gains too little, or where `coder` (by default `Reference`) would not give the same bytes back.
    """
    if not slab.nbytes:
        return None
    coder = coder or Reference()
    packed = prepared(slab, coder)
    if packed.nbytes > (1 - _LEAST_GAIN) * slab.nbytes:
        return None
    coder.encode(slab, packed)
    return packed if torch.equal(unpack(packed, coder), slab) else None


def unpack(packed: PackedSlab, coder: Coder | None = None) -> torch.Tensor:
    """The slab again, on the device of the packed one."""
    slab = torch.empty(packed.layout.num_bytes_unpacked, dtype=torch.uint8, device=packed.device)
    (coder or Reference()).decode(packed, slab)
    return slab


def prepared(slab: torch.Tensor, coder: Coder, widths: Sequence[int] = WIDTHS) -> PackedSlab:
    """A packed slab in the smallest of `widths`, with bases and first escapes written; the coder is to write the rest.

    The base of a block is the first of those `2**width - 1` exponents in a row that cover most of its values.
    """
    up_to = torch.nn.functional.pad(coder.counts(slab).cumsum(1, dtype=torch.int32), (1, 0))  # those below each
    bases, first_escapes, num_escapes = {}, {}, []
    for width in widths:
        num_codes = 2**width - 1
        with_code, bases[width] = (up_to[:, num_codes:] - up_to[:, :-num_codes]).max(1)
        until = (BLOCK_VALUES - with_code).cumsum(0, dtype=torch.int32)
        first_escapes[width] = torch.nn.functional.pad(until[:-1], (1, 0))
        num_escapes.append(until[-1])
    layouts = [
        PackedLayout(slab.nbytes, width, number)
        for width, number in zip(widths, torch.stack(num_escapes).tolist(), strict=True)
    ]
    layout = min(layouts, key=lambda each: each.num_bytes)
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=slab.device)
    buffer[layout.bases : layout.bases + layout.num_blocks] = bases[layout.width].to(torch.uint8)
    buffer[layout.first_escapes : layout.escapes] = first_escapes[layout.width].view(torch.uint8)
    return PackedSlab(layout, buffer)


class Reference:
    """The `Coder` that is the definition, with torch's own functions."""

    def counts(self, slab: torch.Tensor) -> torch.Tensor:
        exponents = _exponents(_in_blocks(slab))
        counts = torch.zeros(len(exponents), NUM_EXPONENTS, dtype=torch.int32, device=slab.device)
        blocks = _VALUES_AT_A_TIME // BLOCK_VALUES
        for some, of_some in zip(exponents.split(blocks), counts.split(blocks), strict=True):
            of_some.scatter_add_(1, some.long(), torch.ones_like(some, dtype=torch.int32))
        return counts

    def encode(self, slab: torch.Tensor, packed: PackedSlab) -> None:
        layout, buffer = packed.layout, packed.buffer
        values = _in_blocks(slab)
        exponents = _exponents(values)
        bases = buffer[layout.bases : layout.bases + layout.num_blocks]
        above = exponents - bases[:, None]  # wraps around below the base, to more than there are codes
        is_escape = above >= layout.escape_code
        codes = torch.where(is_escape, layout.escape_code, above).view(-1)
        buffer[: layout.num_values] = (values.bitwise_right_shift(8) & 0x80 | values & 0x7F).view(-1)
        into = buffer[layout.codes : layout.bases]
        if layout.width == 4:
            into.copy_(codes[::2] | codes[1::2] << 4)
        else:
            bits = (codes.view(-1, 8) >> bit & 1 for bit in range(layout.width))
            into.copy_(torch.cat([_bytes_of(of_plane) for of_plane in bits]))
        buffer[layout.escapes : layout.escapes + layout.num_escapes] = exponents[is_escape]

    def decode(self, packed: PackedSlab, slab: torch.Tensor) -> None:
        layout, buffer = packed.layout, packed.buffer
        codes = buffer[layout.codes : layout.bases]
        if layout.width == 4:
            code = torch.stack([codes & 15, codes >> 4], dim=1).view(-1)
        else:
            planes = codes.view(layout.width, -1, 1).bitwise_right_shift(_bit_numbers(buffer.device)).bitwise_and_(1)
            code = sum(plane << bit for bit, plane in enumerate(planes.view(layout.width, -1)))
        base = buffer[layout.bases : layout.bases + layout.num_blocks].repeat_interleave(BLOCK_VALUES)
        exponent = base + code  # of an escape it may wrap around: it is replaced
        exponent[code == layout.escape_code] = buffer[layout.escapes : layout.escapes + layout.num_escapes]
        rest = buffer[: layout.num_values].to(torch.int16)
        bits = (rest & 0x80) << 8 | exponent.to(torch.int16) << 7 | rest & 0x7F
        slab.copy_(bits.view(torch.uint8)[: slab.nbytes])


def _in_blocks(slab: torch.Tensor) -> torch.Tensor:
    """Its values as int16 [blocks, values of a block]; the last one again fills the last block."""
    values = slab.view(torch.int16)
    missing = -values.numel() % BLOCK_VALUES
    return torch.cat([values, values[-1:].expand(missing)]).view(-1, BLOCK_VALUES)


def _exponents(values: torch.Tensor) -> torch.Tensor:
    return values.bitwise_right_shift(7).bitwise_and_(0xFF).to(torch.uint8)


def _bytes_of(bits: torch.Tensor) -> torch.Tensor:
    """Of [..., 8] zeros and ones (uint8), the first the lowest."""
    return (bits << _bit_numbers(bits.device)).sum(1, dtype=torch.uint8)


def _bit_numbers(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
