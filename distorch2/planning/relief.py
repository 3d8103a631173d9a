"""What is packed on the compute device or leaves it, for want of room: in which order, and how much of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from .sizing import staging_bytes


class _Relief(Protocol):
    @property
    def freed_bytes(self) -> int: ...

    @property
    def newly_streamed_bytes(self) -> int:
        """Of a slab for which the staging buffer has to have room from then on; 0 where it has."""


def spread(count: int) -> list[int]:
    """The numbers below `count` in an order in which the first of them, however many, are spread over all: that of van
    der Corput's sequence (1935)."""
    num_digits = count.bit_length()
    return sorted(range(count), key=lambda index: f"{index:0{num_digits}b}"[::-1])


def num_to_relieve(
    in_order: Iterable[_Relief], resident_bytes: int, streamed_sizes: Sequence[int], compute_bytes: float
) -> int:
    """How many of the reliefs `in_order` it takes, for no more than `compute_bytes` on the compute device.

    There lie `resident_bytes`, and a staging buffer for groups of `streamed_sizes`. Where no number is enough it is the
    one that leaves the least.
    """
    sizes, resident = list(streamed_sizes), resident_bytes
    least, found = resident + staging_bytes(sizes), 0
    for number, relief in enumerate(in_order, 1):
        if least <= compute_bytes:
            break
        resident -= relief.freed_bytes
        if relief.newly_streamed_bytes:
            sizes.append(relief.newly_streamed_bytes)
        needed = resident + staging_bytes(sizes)
        if needed < least:
            least, found = needed, number
    return found
