"""Layers whose weights the module around them reads, without calling the layer.

ComfyUI computes some layers in one kernel with what comes before them: an INT8 linear layer with the activation in
front of it (`comfy.ops.linear_input_act`), the norms of queries and keys with the rotation. Nothing that is set on
the forward of such a layer ever runs.

In the first pass, and a part of the second, a `Watch` notes which layers these are. From then on they are bound while
the module around them runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch


class _Layer(Protocol):
    """A streamed layer. `outside` are the parameters that its module has outside its forward."""

    @property
    def is_alive(self) -> bool: ...

    @property
    def module(self) -> torch.nn.Module: ...

    @property
    def outside(self) -> Mapping[str, torch.nn.Parameter]: ...


class _Watched(dict[str, Any]):
    """The parameters of a layer's module, which note that they are looked up.

    Inside the layer's own forward the module has other parameters than outside. So a look-up tells whether the layer
    was called.
    """

    num_uses = 0
    """In a row they count as one: code looks a weight up several times for one use."""
    is_called = False

    def __init__(self, layer: _Layer, last_used: list[int]) -> None:
        super().__init__()
        self.layer = layer
        self._last_used = last_used  # one id, not the object: a cycle would keep weights alive

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if value is not None:
            self.is_called |= value is not self.layer.outside.get(name)
            if self._last_used != [id(self)]:
                self._last_used[:] = [id(self)]
                self.num_uses += 1
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class Watch:
    """Watches `layers` from `attach` to `detach`, as often as needed. Reading a parameter takes longer meanwhile."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        last_used: list[int] = []
        self._watched = [_Watched(layer, last_used) for layer in layers]

    def attach(self) -> None:
        for watched in self._watched:
            if watched.layer.is_alive:
                module = watched.layer.module
                watched.clear()
                watched.update(module._parameters)
                vars(module)["_parameters"] = watched

    def detach(self) -> None:
        """Give the modules plain parameters again."""
        for watched in self._watched:
            if watched.layer.is_alive and watched.layer.module._parameters is watched:
                vars(watched.layer.module)["_parameters"] = dict(watched)
            watched.clear()

    @property
    def has_seen_a_pass(self) -> bool:
        """Whether most of the layers that are used at all were used twice. Some may come once in a run, or often in
        one pass."""
        uses = [watched.num_uses for watched in self._watched if watched.num_uses]
        return sum(num > 1 for num in uses) > len(uses) // 2

    @property
    def only_read(self) -> list[int]:
        """The numbers of the layers that were read and not called."""
        return [number for number, watched in enumerate(self._watched) if watched.num_uses and not watched.is_called]


def modules_around(root: torch.nn.Module, layer_name: str) -> Iterator[torch.nn.Module]:
    """The modules that may read the weights of a layer, the innermost first.

    That is the first module around the layer that computes something itself. A `Sequential` may be called or only be
    indexed, so the search goes on outside it.
    """
    parts = layer_name.split(".")[:-1]
    while parts:
        try:
            module = root.get_submodule(".".join(parts))
        except AttributeError:  # an object patch has taken the place of a module around
            return
        if type(module).forward is not torch.nn.Module.forward:
            yield module
            if type(module) is not torch.nn.Sequential:
                return
        parts.pop()
