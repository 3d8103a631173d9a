"""Slabs in main memory from which several modules with the same weights are served: they are there once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

import torch

from ..planning.plan import Group
from ..weights.packing import PackedSlab
from .groups import StoredGroup

Slab = TypeVar("Slab", torch.Tensor, PackedSlab, torch.Tensor | PackedSlab)


class Member(Protocol):
    """A distribution of one of the modules."""

    @property
    def module(self) -> torch.nn.Module | None: ...

    @property
    def groups(self) -> Mapping[Group, StoredGroup]: ...

    @property
    def is_placed(self) -> bool: ...

    def give_up(self, keys: Iterable[Group]) -> None:
        """Have those of these groups that lie in main memory lie on the disk."""


class SharedSlabs:
    """The slabs of each group that modules are served from, and the distributions of these modules.

    Copies of a module for other devices are filled from the same file and patched in the same way; that their bytes are
    the same is seen by comparing them. A slab goes with the last that is served from it, and is not written into.
    Several threads may call the methods.
    """

    def __init__(self) -> None:
        self.is_packing = False
        """Set once one of the modules has what it streams packed; the others then start as well."""
        self._slabs: dict[Group, list[tuple[weakref.ref[torch.Tensor | PackedSlab], bool]]] = {}
        self._members: list[weakref.ref[Member]] = []
        self._lock = threading.Lock()

    def join(self, member: Member) -> None:
        self._members = [each for each in self._members if each() is not None] + [weakref.ref(member)]

    @property
    def members(self) -> list[Member]:
        return [member for member in (reference() for reference in self._members) if member is not None]

    def share(self, key: Group, slab: Slab, is_patched: bool) -> Slab:
        """The slab of another module with these bytes; where there is none, this one, which is known from now on."""
        for known, _ in self._known(key):
            if _are_the_same(known, slab):
                return known  # type: ignore[return-value] # of the same kind
        with self._lock:
            self._slabs[key] = [each for each in self._slabs.get(key, []) if each[0]() is not None]
            self._slabs[key].append((weakref.ref(slab), is_patched))
        return slab

    def has_unpatched(self, key: Group) -> bool:
        """Whether there is a slab of the group that is likely to be the next module's too, before that is patched."""
        return any(not is_patched for _, is_patched in self._known(key))

    def has(self, key: Group, slab: torch.Tensor) -> bool:
        return any(known is slab for known, _ in self._known(key))

    def holders(self, key: Group, memory: torch.Tensor) -> list[Member]:
        """Which serve a group from this memory, in the order in which they joined."""
        found = []
        for member in self.members:
            group = member.groups.get(key)
            held = group.host_slab if group is not None else None
            if held is not None and held.data_ptr() == memory.data_ptr():
                found.append(member)
        return found

    def keys_by_holder(self, keys: Iterable[Group], groups: Mapping[Group, StoredGroup]) -> dict[Member, list[Group]]:
        """Of those of these groups that lie in main memory: which members serve them from there."""
        found: dict[Member, list[Group]] = {}
        for key in keys:
            memory = groups[key].host_slab
            for member in self.holders(key, memory) if memory is not None else ():
                found.setdefault(member, []).append(key)
        return found

    def _known(self, key: Group) -> list[tuple[torch.Tensor | PackedSlab, bool]]:
        known = ((reference(), is_patched) for reference, is_patched in self._slabs.get(key, ()))
        return [(slab, is_patched) for slab, is_patched in known if slab is not None]


def _are_the_same(one: torch.Tensor | PackedSlab, other: torch.Tensor | PackedSlab) -> bool:
    if isinstance(one, PackedSlab) and isinstance(other, PackedSlab):
        return one.layout == other.layout and _are_the_same(one.buffer, other.buffer)
    if isinstance(one, PackedSlab) or isinstance(other, PackedSlab):
        return False
    # In words: that is several times as fast.
    return one.nbytes == other.nbytes and torch.equal(one.view(torch.int64), other.view(torch.int64))
