"""How large groups and staging buffers are."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

GROUP_BYTES = 64 * 1024**2
"""Large enough for a copy at the full speed of the link, and for few copies, each of which costs a model whose step is
bound by the CPU some 60 microseconds. A small model is cut into at least `MIN_GROUPS`, since the staging buffer has to
hold a few."""
MIN_GROUPS = 32
STAGING_BYTES = 512 * 1024**2
"""Enough, unless three groups need more: in forecasts of `benchmarks/simulator.py` twice as much gains under 1 % for
Flux- and SDXL-sized models at any fraction, whether the link or the computation takes longer."""


class _Layer(Protocol):
    @property
    def slab_bytes(self) -> int: ...

    @property
    def is_table(self) -> bool: ...


_PACKED_PART = 0.76
PACKED_SLOTS = 3
"""How many packed groups the compute device has room for: one is copied while another is unpacked, and copies need not
wait."""

_L = TypeVar("_L", bound=_Layer)


def group_bytes(model_bytes: int) -> int:
    """How large groups of a model of this size may be, unless one layer is larger."""
    return min(GROUP_BYTES, model_bytes // MIN_GROUPS)


def in_groups(layers: Iterable[_L], most_bytes: int) -> list[tuple[_L, ...]]:
    """Consecutive layers together, up to so many bytes. A table is a group of its own."""
    groups: list[tuple[_L, ...]] = []
    members: list[_L] = []
    num_bytes = 0
    for layer in layers:
        is_alone = layer.is_table or (members and members[-1].is_table)
        if members and (is_alone or num_bytes + layer.slab_bytes > most_bytes):
            groups.append(tuple(members))
            members, num_bytes = [], 0
        members.append(layer)
        num_bytes += layer.slab_bytes
    return [*groups, tuple(members)] if members else groups


def staging_bytes(group_sizes: Sequence[int]) -> int:
    """Memory through which groups of these sizes are streamed: an eighth of them, up to `STAGING_BYTES`, but room for
    three groups at least: two whose layers take turns, and one to copy into."""
    streamed = sum(group_sizes)
    return min(streamed, max(sum(heapq.nlargest(3, group_sizes)), min(streamed // 8, STAGING_BYTES)))


def packed_bytes(num_bytes: int) -> int:
    """About what bf16 weights of a network take when they are packed: with 4 bits of exponent for each, and few
    escapes. The bound is nine tenths (`packed_room_bytes`)."""
    return int(num_bytes * _PACKED_PART)


def unpacked_bytes(num_bytes: int) -> int:
    """How many bytes are packed to about `num_bytes`."""
    return int(num_bytes / _PACKED_PART)


def packed_room_bytes(group_sizes: Sequence[int]) -> int:
    """Memory into which packed groups are copied before they are unpacked. What is packed has nine tenths of its size,
    or less (`weights/packing.py`)."""
    return PACKED_SLOTS * -(-9 * max(group_sizes, default=0) // 10)
