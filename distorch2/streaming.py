"""Serving layers from slabs: a layer's weights are on the compute device while its forward runs, and only then.

On demand, with one slot: a layer that is entered has its slab copied into the slot, whatever ran before it. Outside its
forward a layer's parameters are views into its slab, so that state dicts, patches and saving see real weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .slab import SlabLayout, allocate
from .transfer import Transfer


class StreamedLayer:
    """A module whose parameters lie in a slab on a donor.

    Only hook patches rewrite a slab that holds weights, as they rewrite a resident weight. Otherwise new weights come
    in a new slab: others may hold the old ones (a merge, an extraction).
    """

    def __init__(self, module: torch.nn.Module, layout: SlabLayout, slab: torch.Tensor) -> None:
        # Weak: the module reaches this object through its own forward, and a cycle would keep it alive.
        self._module = weakref.ref(module)
        self.layout = layout
        self._bind(slab)

    @property
    def module(self) -> torch.nn.Module:
        return self._module()

    def is_bound(self) -> bool:
        """Whether the module still has the weights in the slab: not after `module.to(...)`, say."""
        bound = self.module._parameters
        return all(
            bound[name] is parameter and parameter.data_ptr() == self._addresses[name]
            for name, parameter in self._parameters.items()
        )

    def fits(self, values: Mapping[str, torch.Tensor]) -> bool:
        """Whether a slab can hold these weights together with the module's others."""
        weights = {**self.module._parameters, **values}
        return all(
            weights[field.name].shape == field.shape
            and (field.name not in values or values[field.name].dtype == field.dtype)
            for field in self.layout.fields
        )

    def replace(self, values: Mapping[str, torch.Tensor]) -> None:
        """Serve these weights, together with the module's others, from a new slab on the same device."""
        self._bind(self.layout.packed({**self.module._parameters, **values}, self.slab.device))

    def _bind(self, slab: torch.Tensor) -> None:
        self.slab = slab
        with torch.inference_mode(False):
            self._parameters = self.layout.parameters(slab)
        self._addresses = {name: parameter.data_ptr() for name, parameter in self._parameters.items()}
        # Not setattr: that costs more, and a compiled module guards on this dict.
        self.module._parameters.update(self._parameters)


class Streamer:
    """Streams layers through one slot of `slot_bytes` on the compute device, until `detach`.

    It replaces the forward of every layer's module by one that binds the weights around it.
    """

    def __init__(self, layers: Iterable[StreamedLayer], transfer: Transfer, slot_bytes: int) -> None:
        self.transfer = transfer
        self.slot = allocate(slot_bytes, transfer.device)
        self._previous_forwards: list[tuple[StreamedLayer, Callable[..., Any] | None]] = []
        for layer in layers:
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
            bound = layer.module._parameters
            outside = dict(bound)
            if layer.is_bound():
                self.transfer.submit(layer.slab, self.slot)
                inside = in_slot
            else:
                inside = {name: _copied(parameter, self.transfer.device) for name, parameter in outside.items()}
            try:
                # An interrupt is a BaseException and may come anywhere in here: nothing but finally sees them all.
                bound.update(inside)
                return forward(*arguments, **options)
            finally:
                bound.update(outside)

        return serve


def _forward_of_class(layer: StreamedLayer) -> Callable[..., Any]:
    """The forward of the module's class, as it is when it is called, without a reference to the module."""

    def forward(*arguments: Any, **options: Any) -> Any:
        module = layer.module
        return type(module).forward(module, *arguments, **options)

    return forward


def _copied(parameter: torch.nn.Parameter | None, device: torch.device) -> torch.nn.Parameter | None:
    return parameter if parameter is None else torch.nn.Parameter(parameter.to(device), requires_grad=False)
