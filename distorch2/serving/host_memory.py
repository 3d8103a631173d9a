"""Main memory, shared by the models that keep slabs there. It is asked before it is taken: where there is too little,
the program drops what it can spare, and models that are not running give slabs up, the one used longest ago first."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from ..moving.file_reader import READ_AHEAD_BYTES
from ..moving.modules import UPLOAD_BYTES
from ..moving.program import Program


class _Keeper(Protocol):
    @property
    def module(self) -> torch.nn.Module | None: ...

    @property
    def host_bytes(self) -> int:
        """Slabs in main memory."""

    @property
    def shared_slabs(self) -> object | None:
        """Where its slabs may be those of other keepers too: the same object for all of them."""

    @property
    def modules(self) -> Sequence[torch.nn.Module]:
        """Those that are served from its slabs now."""

    def give_up_host_memory(self, num_bytes: float) -> None:
        """Take slabs of so many bytes out of main memory, or all that there are."""


_BESIDE_SLABS_BYTES = READ_AHEAD_BYTES + UPLOAD_BYTES + 640 * 1024**2
"""Left as well, where there is too little: for buffers, and for what the first step of a process takes for kernels."""
LEAST_TO_RETURN_BYTES = 2 * 1024**3
"""Room for less is left alone: what is available differs a little from prompt to prompt."""

_keepers: list[weakref.ref[_Keeper]] = []
"""In the order in which they were used last."""


_making_room = threading.RLock()
"""Models that run in threads of their own may be short of it at the same time."""


def note_use(keeper: _Keeper) -> None:
    _keepers[:] = [each for each in _keepers if each() not in (None, keeper)]
    _keepers.append(weakref.ref(keeper))


def make_room(num_bytes: float, module: torch.nn.Module, program: Program, shared_slabs: object | None = None) -> float:
    """Have `num_bytes` of main memory spare for slabs of `module`, which may be among `shared_slabs`. Returns how many
    bytes of them are to lie elsewhere: 0 where there is room. For 0 bytes, how many that are there are to leave it,
    since others have taken some."""
    with _making_room:
        if num_bytes > program.spare_host_memory():
            program.release_host_memory(num_bytes)
            for keeper in _idle_keepers(module, program, shared_slabs):
                lacking = num_bytes - program.spare_host_memory()
                if lacking <= 0:
                    break
                keeper.give_up_host_memory(lacking)
    return _to_leave_out(num_bytes, program.spare_host_memory())


def overflow(num_bytes: int, module: torch.nn.Module, program: Program) -> float:
    """What `make_room` would return, as far as other models go."""
    return _to_leave_out(num_bytes, obtainable(module, program))


def obtainable(module: torch.nn.Module, program: Program, shared_slabs: object | None = None) -> float:
    """What is spare, and what models that are idle can give up."""
    keepers = _idle_keepers(module, program, shared_slabs)
    return program.spare_host_memory() + sum(keeper.host_bytes for keeper in keepers)


def _to_leave_out(num_bytes: float, spare: float) -> float:
    lacking = num_bytes - spare
    return lacking + _BESIDE_SLABS_BYTES if lacking > 0 else 0


def _idle_keepers(module: torch.nn.Module, program: Program, shared_slabs: object | None) -> Iterator[_Keeper]:
    """Not those with which it shares slabs: they run at the same time."""
    for reference in list(_keepers):
        keeper = reference()
        if keeper is None or keeper.module in (None, module):
            continue
        if shared_slabs is not None and keeper.shared_slabs is shared_slabs:
            continue
        if not program.is_running(keeper.module) and not any(map(program.is_running, keeper.modules)):
            yield keeper
