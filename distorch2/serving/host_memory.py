"""Main memory, shared by the models that keep slabs there. It is asked before it is taken: where there is too little,
the program drops what it can spare, and models that are not running give slabs up, the one used longest ago first."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Protocol

import torch

from ..moving.program import Program


class _Keeper(Protocol):
    @property
    def module(self) -> torch.nn.Module | None: ...

    @property
    def host_bytes(self) -> int:
        """Slabs in main memory."""

    def give_up_host_memory(self, num_bytes: float) -> None:
        """Take slabs of so many bytes out of main memory, or all that there are."""


_keepers: list[weakref.ref[_Keeper]] = []
"""In the order in which they were used last."""


def note_use(keeper: _Keeper) -> None:
    _keepers[:] = [each for each in _keepers if each() not in (None, keeper)]
    _keepers.append(weakref.ref(keeper))


def make_room(num_bytes: int, module: torch.nn.Module, program: Program) -> float:
    """Have `num_bytes` of main memory spare for slabs of `module`. Returns how many bytes are still lacking, which may
    be more: with none asked for, what others have taken of that which is to be left."""
    if num_bytes <= program.spare_host_memory():
        return 0
    program.release_host_memory(num_bytes)
    for keeper in _idle_keepers(module, program):
        lacking = num_bytes - program.spare_host_memory()
        if lacking <= 0:
            break
        keeper.give_up_host_memory(lacking)
    return max(0, num_bytes - program.spare_host_memory())


def obtainable(module: torch.nn.Module, program: Program) -> float:
    """Bytes that `make_room` can have spare for slabs of `module`, as far as other models go."""
    return program.spare_host_memory() + sum(keeper.host_bytes for keeper in _idle_keepers(module, program))


def _idle_keepers(module: torch.nn.Module, program: Program) -> Iterator[_Keeper]:
    for reference in list(_keepers):
        keeper = reference()
        if keeper is not None and keeper.module not in (None, module) and not program.is_running(keeper.module):
            yield keeper
