"""Serving layers from slabs: a layer's weights are on the compute device while its forward runs, and only then.

Groups of layers are copied into a staging buffer ahead of their use, as a `Schedule` says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..moving.transfer import Copy, Transfer
from ..moving.unpacking import unpacked_on
from ..planning.schedule import Schedule
from ..weights.quantised import to_device
from ..weights.slab import allocate
from .forwards import Forwards
from .groups import StoredGroup, StoredLayer


class Streamer:
    """Streams groups through a staging buffer of `staging_bytes` on the compute device, from `attach` to `detach`.

    Meanwhile the forward of every layer's module is one that binds the weights around the module's own. `order` says in
    which order the layers run, as far as that is known. The buffer is there from the start. With `allocate_later`, a
    function of bytes and device, it comes with the first layer that runs.
    """

    def __init__(
        self,
        groups: Sequence[StoredGroup],
        transfer: Transfer,
        staging_bytes: int,
        order: Sequence[int] | None = None,
        allocate_later: Callable[[int, torch.device], torch.Tensor] | None = None,
    ) -> None:
        self.groups = groups
        self.layers = [layer for group in groups for layer in group.layers]
        self._transfer = transfer
        self._capacity = staging_bytes
        self._allocate_later = allocate_later
        self.staging = allocate(0 if allocate_later else staging_bytes, transfer.device)
        self._group_of = [index for index, group in enumerate(groups) for _ in group.layers]
        self._schedule = Schedule(self._group_of, [group.slab_bytes for group in groups], staging_bytes, order)
        self._schedule_version = 0
        self._copies: list[Copy] = []
        self._staged: list[dict[str, torch.nn.Parameter]] = []
        self._forwards = Forwards("streaming")

    @property
    def order(self) -> Sequence[int] | None:
        """In which order the layers run, by their numbers in `groups`, as far as that is known; None before any has."""
        return self._schedule.order

    def attach(self) -> None:
        for index, layer in enumerate(self.layers):
            if layer.is_alive:
                self._forwards.set(layer.module, functools.partial(self._make_forward, index, layer))

    def detach(self) -> None:
        self._transfer.wait()
        self._forwards.give_back()

    def forget_staged(self) -> None:
        """Fetch everything anew: slabs were replaced or rewritten. No copy may be under way."""
        self._schedule.forget_staged()
        self._schedule_version = 0
        self._copies, self._staged = [], []  # they hold the slabs that were replaced

    def give_up_staging(self) -> None:
        """Until the next layer runs; for one with `allocate_later`."""
        if self.staging.nbytes:
            self._transfer.wait()
            self.forget_staged()
            self.staging = allocate(0, self._transfer.device)

    def _make_forward(self, index: int, layer: StoredLayer, previous: Callable[..., Any] | None) -> Callable[..., Any]:
        """A forward for the layer's module. It runs once for every layer in every step: little is done, and inline."""
        schedule, transfer, group = self._schedule, self._transfer, self._group_of[index]

        def serve(*arguments: Any, **options: Any) -> Any:
            module = layer.module
            parameters = module._parameters
            is_for_backward = torch.is_grad_enabled()
            if not is_for_backward and (to_fetch := schedule.enter(index)):
                self._fetch(to_fetch)
            staged: Mapping[str, torch.nn.Parameter | None]
            stored: Mapping[str, torch.nn.Parameter | None]
            if not is_for_backward and layer.is_bound():
                transfer.use(self._copies[group])
                staged, stored = self._staged[index], layer.stored
            else:
                # Autograd may keep weights until the backward pass, when others are in the staging buffer.
                stored = dict(parameters)
                staged = self.copied_apart(index, stored)
            try:
                # An interrupt is a BaseException and may come anywhere in here: nothing but finally sees them all.
                parameters.update(staged)
                if previous is None:
                    result = type(module).forward(module, *arguments, **options)
                else:
                    result = previous(*arguments, **options)
            finally:
                parameters.update(stored)
            if not is_for_backward and (to_fetch := schedule.leave(index)):
                self._fetch(to_fetch)
            return result

        # A compiled model is to call it, and not to trace it: what it does differs from layer to layer.
        return torch.compiler.disable(serve)

    def copied(self, number: int) -> Mapping[str, torch.nn.Parameter | None]:
        """Copies on the compute device of a layer's parameters, which came by way of the staging buffer."""
        layer, device = self.layers[number], self._transfer.device
        if torch.is_grad_enabled():
            return self.copied_apart(number, layer.stored)
        if to_fetch := self._schedule.enter(number):
            self._fetch(to_fetch)
        self._transfer.use(self._copies[self._group_of[number]])
        with torch.inference_mode(False):
            copies = {name: to_device(parameter, device, copy=True) for name, parameter in self._staged[number].items()}
        if to_fetch := self._schedule.leave(number):
            self._fetch(to_fetch)
        return copies

    def copied_apart(
        self, number: int, parameters: Mapping[str, torch.nn.Parameter | None]
    ) -> dict[str, torch.nn.Parameter | None]:
        """Copies on the compute device that stay when the staging buffer is used again: of `parameters`, or of what is
        served, if the group is packed (see [Note: hidden patches]) and the layer's module has its own parameters."""
        layer, packed, device = self.layers[number], self.groups[self._group_of[number]].packed, self._transfer.device
        if packed is not None and layer.has_own():
            for parameter in layer.stored.values():
                refuse_training(parameter)
            views = layer.views(unpacked_on(device, packed))
            with torch.inference_mode(False):
                return {name: to_device(view, device, copy=True) for name, view in views.items()}
        return {name: copied_by_host(parameter, device) for name, parameter in parameters.items()}

    def _fetch(self, groups: Sequence[int]) -> None:
        try:
            if self._schedule_version != self._schedule.version:
                self._lay_out()
            self._transfer.submit([self._copies[group] for group in groups])
        except BaseException:
            self.forget_staged()  # the schedule takes what it asked for to be there
            raise

    def _lay_out(self) -> None:
        """Where each group goes in the staging buffer, and the parameters of its layers there."""
        # A copy that is under way would write where another group is now.
        self._transfer.wait()
        if self._allocate_later is not None and self.staging.nbytes < self._capacity:
            self.staging = self._allocate_later(self._capacity, self._transfer.device)
        self._copies, self._staged = [], []
        for index, group in enumerate(self.groups):
            begin = self._schedule.offsets[index]
            target = self.staging[begin : begin + group.slab_bytes]
            self._copies.append(Copy(group.source, target))
            self._staged += [layer.views(target) for layer in group.layers]
        order = self._schedule.order or range(len(self.layers))
        self._transfer.expect([self._copies[group] for group in dict.fromkeys(self._group_of[each] for each in order)])
        self._schedule_version = self._schedule.version


def copied_by_host(parameter: torch.nn.Parameter | None, device: torch.device) -> torch.nn.Parameter | None:
    """A copy on `device`, by way of the host: accelerators may say that they can reach each other when they cannot."""
    if parameter is None:
        return None
    refuse_training(parameter)
    if parameter.device != device:  # else another pack has moved it there, and it is taken as it is
        parameter = to_device(parameter, torch.device("cpu"))
    return to_device(parameter, device)


def refuse_training(parameter: torch.nn.Parameter) -> None:
    """Copies get no gradient."""
    if parameter.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "a weight that is kept on a donor cannot be trained itself; train a LoRA, or keep the model on one device"
        )
