"""What patchers share: by module, and by what was asked for."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..planning.plan import Layer, Plan
from ..serving.distribution import Distribution
from ..serving.shared_slabs import SharedSlabs
from ..weights.inventory import list_layers
from .core import ModelPatcher

ATTRIBUTE = "distorch2"
"""Of a module: what its patchers share. It is the key of the wrapper around its forward as well."""


class StandIns(dict[torch.device, ModelPatcher]):
    """By device. All patchers of a module keep them, and they go with the last: the module does not, nor do they keep
    each other."""


@dataclass(eq=False)
class Request:
    """What was asked for a patcher and its clones. Others of the same module may be planned in another way."""

    plan: Plan | None = None
    """None where nothing was: everything on the compute device."""
    high_precision_loras: bool = True
    slabs: SharedSlabs = field(default_factory=SharedSlabs)
    """In main memory, which copies of the module for other devices share."""
    prefers_pair: bool = False
    """Set once copies have been found to be slower than a relayed pair."""


@dataclass(eq=False)
class Shared:
    """What all patchers of a module share; the module holds it. A copy of the module gets one of its own."""

    layers: Sequence[Layer]
    """As they were before any was patched."""
    distributions: weakref.WeakKeyDictionary[Request, dict[tuple[str, tuple[str, ...], bool], Distribution]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    """By compute device, those that run at the same time, and whether it is for a relayed pair; for each plan that a
    patcher still has."""
    placed: Distribution | None = None
    """The one that has the weights, or had them last."""
    carried: dict[str, list[tuple]] = field(default_factory=dict)
    """Weights that have their patches with them, by key, with the patches."""
    private: dict[str, int] = field(default_factory=dict)
    """Weights in host memory that were another module's too, and have been copied to be written into: their keys, and
    the addresses of the copies."""
    stand_ins: weakref.ref[StandIns] | None = None
    has_logged_compilation: bool = False

    def __deepcopy__(self, memo: object) -> Shared:
        return Shared(self.layers)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, (self.layers,)


def shared_of(module: torch.nn.Module) -> Shared:
    if ATTRIBUTE not in vars(module):
        setattr(module, ATTRIBUTE, Shared(list_layers(module)))
    return vars(module)[ATTRIBUTE]


def stand_ins_of(module: torch.nn.Module) -> StandIns:
    shared = shared_of(module)
    stand_ins = shared.stand_ins() if shared.stand_ins is not None else None
    if stand_ins is None:
        stand_ins = StandIns()
        shared.stand_ins = weakref.ref(stand_ins)
    return stand_ins
