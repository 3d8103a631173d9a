"""Layers whose weights the module around them reads, without calling the layer.

ComfyUI computes some layers in one kernel with what comes before them: an INT8 linear layer with the activation in
front of it (`comfy.ops.linear_input_act`), the norms of queries and keys with the rotation. Nothing that is set on
the forward of such a layer ever runs. So the module around it serves it: while it runs, the layer has a copy of its
weights, which came ahead by way of the staging buffer.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..moving.program import Program
from .forwards import Forwards

logger = logging.getLogger(__name__)


class _Layer(Protocol):
    """A streamed layer. `stored` are the parameters that its module has outside its forward."""

    name: str
    stored: dict[str, torch.nn.Parameter]

    @property
    def is_alive(self) -> bool: ...

    @property
    def module(self) -> torch.nn.Module: ...

    def is_bound(self) -> bool: ...


class _Streamer(Protocol):
    @property
    def layers(self) -> Sequence[_Layer]: ...

    def copied(self, number: int) -> Mapping[str, torch.nn.Parameter | None]: ...

    def copied_apart(
        self, number: int, parameters: Mapping[str, torch.nn.Parameter | None]
    ) -> Mapping[str, torch.nn.Parameter | None]: ...


class _Watched(dict[str, Any]):
    """The parameters of a layer's module, which note that they are looked up.

    Inside the layer's own forward the module has other parameters than outside. So a look-up tells whether the layer
    was called.
    """

    is_read = is_called = False

    def __init__(self, layer: _Layer, stored: Mapping[str, torch.nn.Parameter | None]) -> None:
        """`stored` are the parameters that the module has outside its forward."""
        super().__init__(layer.module._parameters)
        self._stored = stored
        self._own = layer.module._parameters
        vars(layer.module)["_parameters"] = self

    def end(self, module: torch.nn.Module) -> None:
        """Give the module its own dict again, with what was written meanwhile."""
        for name in self._own.keys() - self.keys():
            del self._own[name]
        self._own.update(self)
        if module._parameters is self:
            vars(module)["_parameters"] = self._own

    def __reduce__(self) -> Any:
        """A copy of the module has a dict of its own."""
        return dict, (dict(self),)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if value is not None:
            if value is self._stored.get(name):
                self.is_read = True
            else:
                self.is_called = True
        return value


class Reading:
    """Serves those layers of `streamer` that are only read, from `attach` to `detach`.

    Which ones these are is seen in the first run of the module around that uses a layer, training apart, where ComfyUI
    calls layers that it reads otherwise. `known` maps a layer's name to whether it is only read. In that first run
    the module's own parameters are read; where it `hides_patches`, copies of the patched weights. The modules are
    looked up in `root`.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        streamer: _Streamer,
        known: Mapping[str, bool],
        program: Program,
        hides_patches: Callable[[torch.nn.Module], bool],
    ) -> None:
        self._program = program
        self._hides_patches = hides_patches
        self._root = weakref.ref(root)
        self._streamer = streamer
        self._only_read = {number for number, layer in enumerate(streamer.layers) if known.get(layer.name)}
        self._undecided = {number for number, layer in enumerate(streamer.layers) if layer.name not in known}
        self._forwards = Forwards("reading")
        self._has_logged = False

    @property
    def known(self) -> dict[str, bool]:
        """Name of a layer -> whether it is read and not called, as far as that is known."""
        layers = enumerate(self._streamer.layers)
        return {layer.name: number in self._only_read for number, layer in layers if number not in self._undecided}

    @property
    def only_read(self) -> list[str]:
        return [name for name, is_only_read in self.known.items() if is_only_read]

    def attach(self) -> None:
        root, by_module = self._root(), dict[torch.nn.Module, list[int]]()
        for number in sorted(self._only_read | self._undecided):
            layer = self._streamer.layers[number]
            if root is not None and layer.is_alive:
                for module in modules_around(root, layer.name):
                    by_module.setdefault(module, []).append(number)
        for module, numbers in by_module.items():
            self._forwards.set(module, functools.partial(self._make_forward, weakref.ref(module), numbers))

    def detach(self) -> None:
        self._forwards.give_back()
        for layer in self._streamer.layers:
            module = layer.module if layer.is_alive else None
            if module is not None and isinstance(module._parameters, _Watched):
                module._parameters.end(module)

    def _make_forward(
        self, around: weakref.ref[torch.nn.Module], numbers: Sequence[int], previous: Callable[..., Any] | None
    ) -> Callable[..., Any]:
        layers = self._streamer.layers

        def serve(*arguments: Any, **options: Any) -> Any:
            module: Any = around()
            bound: list[tuple[_Layer, torch.nn.Module, Mapping[str, Any]]] = []
            watched: list[tuple[int, torch.nn.Module, _Watched]] = []
            try:
                for number in numbers:
                    layer = layers[number]
                    if not (layer.is_alive and layer.is_bound()):
                        continue
                    if number in self._only_read:
                        staged = self._streamer.copied(number)
                        bound.append((layer, layer.module, staged))
                        layer.module._parameters.update(staged)
                    elif (
                        number in self._undecided
                        and not self._program.is_training()
                        and type(layer.module._parameters) is dict
                    ):
                        stored: Mapping[str, Any] = layer.stored
                        if self._hides_patches(layer.module):
                            stored = self._streamer.copied_apart(number, stored)
                            bound.append((layer, layer.module, stored))
                            layer.module._parameters.update(stored)
                        watched.append((number, layer.module, _Watched(layer, stored)))
                if bound:
                    self._log_once()
                if previous is None:
                    result = type(module).forward(module, *arguments, **options)
                else:
                    result = previous(*arguments, **options)
            finally:
                for _, of_layer, seen in watched:
                    seen.end(of_layer)
                for layer, of_layer, staged in bound:
                    _restore(layer, of_layer, staged)
            self._decide(module, numbers, [(number, seen) for number, _, seen in watched])
            return result

        # A compiled model is to call it, and not to trace it.
        return torch.compiler.disable(serve)

    def _decide(self, module: torch.nn.Module, numbers: Sequence[int], watched: Sequence[tuple[int, _Watched]]) -> None:
        """After a whole run of the module around. It is left alone once nothing in it is only read."""
        for number, seen in watched:
            if seen.is_read or seen.is_called:
                self._undecided.discard(number)
            if seen.is_read and not seen.is_called:
                self._only_read.add(number)
        if self._only_read.isdisjoint(numbers) and self._undecided.isdisjoint(numbers):
            self._forwards.give_back(module)

    def _log_once(self) -> None:
        """When the first is served: by then a pass has seen the others."""
        if not self._has_logged:
            self._has_logged = True
            logger.info(
                "DisTorch2: %d streamed layers are read and not called; they are copied before the modules around them "
                "run",
                len(self._only_read),
            )


def _restore(layer: _Layer, module: torch.nn.Module, staged: Mapping[str, Any]) -> None:
    """Give a layer's module the parameters that it has outside, unless it was given others meanwhile."""
    parameters = module._parameters
    for name, parameter in staged.items():
        if parameters.get(name) is parameter:
            parameters[name] = layer.stored[name]


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
        module = getattr(module, "_orig_mod", module)  # of one that is compiled
        if type(module).forward is not torch.nn.Module.forward:
            yield module
            if type(module) is not torch.nn.Sequential:
                return
        parts.pop()
