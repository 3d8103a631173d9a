"""Which resident groups leave the compute device for want of room, in which order, and how many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from .sizing import staging_bytes


class _Group(Protocol):
    @property
    def num_bytes(self) -> int: ...

    @property
    def slab_bytes(self) -> int: ...

    @property
    def is_streamed(self) -> bool: ...


def spread(count: int) -> list[int]:
    """The numbers below `count` in an order in which the first of them, however many, are spread over all: that of van
    der Corput's sequence (1935)."""
    num_digits = count.bit_length()
    return sorted(range(count), key=lambda index: f"{index:0{num_digits}b}"[::-1])


def num_to_evict(
    in_order: Iterable[_Group], resident_bytes: int, streamed_sizes: Sequence[int], compute_bytes: float
) -> int:
    """How many of the groups `in_order` have to go, for no more than `compute_bytes` on the compute device.

    There lie `resident_bytes`, these groups included, and a staging buffer for groups of `streamed_sizes`, to which
    evicted ones are added. Where no number is enough it is the one that leaves the least.
    """
    sizes, resident = list(streamed_sizes), resident_bytes
    least, found = resident + staging_bytes(sizes), 0
    for number, group in enumerate(in_order, 1):
        if least <= compute_bytes:
            break
        resident -= group.num_bytes
        if group.is_streamed:
            sizes.append(group.slab_bytes)
        needed = resident + staging_bytes(sizes)
        if needed < least:
            least, found = needed, number
    return found
