"""Serving layers from slabs: a layer's weights are on the compute device while its forward runs, and only then.

On demand, with one slot: a layer that is entered has its slab copied into the slot, whatever ran before it. Outside its
forward a layer's parameters are views into its slab, so that state dicts, patches and saving see real weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from .slab import SlabLayout, allocate
from .transfer import Transfer


class StreamedLayer:
    """A module whose parameters lie in a slab on a donor."""

    def __init__(self, module: torch.nn.Module, layout: SlabLayout, slab: torch.Tensor) -> None:
        # Weak: the module reaches this object through its own forward, and a cycle would keep it alive.
        self._module = weakref.ref(module)
        self.layout = layout
        self.slab = slab
        with torch.inference_mode(False):
            self.parameters = layout.parameters(slab)
        self.bind(self.parameters)

    @property
    def module(self) -> torch.nn.Module:
        return self._module()

    def bind(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        # Not setattr: that costs more, and a compiled module guards on this dict.
        self.module._parameters.update(parameters)


class Streamer:
    """Streams layers through one slot of `slot_bytes` on `device`, from `attach` to `detach`."""

    def __init__(self, layers: list[StreamedLayer], device: torch.device, slot_bytes: int) -> None:
        self.layers = layers
        self.transfer = Transfer(device)
        self.slot = allocate(slot_bytes, device)
        self._previous_forwards: list[tuple[StreamedLayer, Callable[..., Any] | None]] = []

    def attach(self) -> None:
        """Replace the forward of every layer's module by one that binds the weights around it."""
        for layer in self.layers:
            previous = vars(layer.module).get("forward")
            layer.module.forward = self._serving(layer, previous or _forward_of_class(layer))
            self._previous_forwards.append((layer, previous))

    def detach(self) -> None:
        """Give every module back the forward that it had, and free the slot."""
        self.transfer.wait()
        for layer, previous in self._previous_forwards:
            if previous is None:
                del layer.module.forward
            else:
                layer.module.forward = previous
        self._previous_forwards.clear()
        self.slot = None

    def _serving(self, layer: StreamedLayer, forward: Callable[..., Any]) -> Callable[..., Any]:
        with torch.inference_mode(False):
            in_slot = layer.layout.parameters(self.slot)

        def serve(*arguments: Any, **options: Any) -> Any:
            self.transfer.submit(layer.slab, self.slot)
            try:
                # An interrupt is a BaseException and may come anywhere in here: nothing but finally sees them all.
                layer.bind(in_slot)
                return forward(*arguments, **options)
            finally:
                layer.bind(layer.parameters)

        return serve


def _forward_of_class(layer: StreamedLayer) -> Callable[..., Any]:
    """The forward of the module's class, as it is when it is called, without a reference to the module."""

    def forward(*arguments: Any, **options: Any) -> Any:
        module = layer.module
        return type(module).forward(module, *arguments, **options)

    return forward
