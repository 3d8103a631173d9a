"""Slabs in main memory from which several modules with the same weights are served: they are there once."""

from __future__ import annotations

import threading
import weakref
from typing import TypeVar

import torch

from ..planning.plan import Group
from ..weights.packing import PackedSlab

Slab = TypeVar("Slab", torch.Tensor, PackedSlab, torch.Tensor | PackedSlab)


class SharedSlabs:
    """The slabs of each group that modules are served from.

    Copies of a module for other devices are filled from the same file and patched in the same way; that their bytes are
    the same is seen by comparing them. A slab goes with the last that is served from it, and is not written into.
    Several threads may call the methods.
    """

    def __init__(self) -> None:
        self.is_packing = False
        """Set once one of the modules has what it streams packed; the others then start as well."""
        self._slabs: dict[Group, list[weakref.ref[torch.Tensor | PackedSlab]]] = {}
        self._lock = threading.Lock()

    def share(self, key: Group, slab: Slab) -> Slab:
        """The slab of another module with these bytes; where there is none, this one, which is known from now on."""
        for known in self._known(key):
            if _are_the_same(known, slab):
                return known  # type: ignore[return-value] # of the same kind
        with self._lock:
            self._slabs[key] = [*map(weakref.ref, self._known(key)), weakref.ref(slab)]
        return slab

    def has_any(self, key: Group) -> bool:
        """Whether there is a slab of the group, which is likely to be that of the next module too."""
        return bool(self._known(key))

    def has(self, key: Group, slab: torch.Tensor) -> bool:
        return any(known is slab for known in self._known(key))

    def _known(self, key: Group) -> list[torch.Tensor | PackedSlab]:
        return [slab for slab in (reference() for reference in self._slabs.get(key, ())) if slab is not None]


def _are_the_same(one: torch.Tensor | PackedSlab, other: torch.Tensor | PackedSlab) -> bool:
    if isinstance(one, PackedSlab) and isinstance(other, PackedSlab):
        return one.layout == other.layout and _are_the_same(one.buffer, other.buffer)
    if isinstance(one, PackedSlab) or isinstance(other, PackedSlab):
        return False
    # In words: that is several times as fast.
    return one.nbytes == other.nbytes and torch.equal(one.view(torch.int64), other.view(torch.int64))
