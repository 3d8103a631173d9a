"""Distribution: puts a module's weights where a plan has them, and takes them back."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import comfy.utils
import torch

from .inventory import layout_of, loaded_dtypes
from .moving import Mover
from .pinning import PinnedSlabs
from .plan import Group, Plan
from .quantised import plain_tensors, to_device
from .streaming import StreamedGroup, StreamedLayer, Streamer
from .transfer import Transfer

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


class Distribution:
    """Where the weights of one module lie. Held by the module, so that all who share the module share it."""

    def __init__(self, module: torch.nn.Module, plan: Plan) -> None:
        self.plan = plan
        self.device = torch.device(plan.compute_device)
        self.groups: dict[Group, StreamedGroup] = {}
        self.streamer: Streamer | None = None
        self.transfer = Transfer(self.device)
        self.pinned = PinnedSlabs(self.device)
        self._module = weakref.ref(module)
        self._served: weakref.WeakKeyDictionary[torch.nn.Module, tuple[StreamedGroup, StreamedLayer]]
        self._served = weakref.WeakKeyDictionary()
        # A dropped module is not unloaded first.
        weakref.finalize(module, _unpin_all, self.transfer, self.pinned).atexit = False

    @property
    def _root(self) -> torch.nn.Module:
        return cast(torch.nn.Module, self._module())

    @property
    def is_placed(self) -> bool:
        return self.streamer is not None

    def place(self) -> None:
        """Put every layer where the plan has it, one after another, and start serving the streamed ones.

        What is on the module but not in the plan, since somebody put it there, goes to the compute device as well.
        """
        module = self._root
        if self.is_placed:
            self._move_the_others(module, self.device)
            return
        _fill_missing(module)
        for group in self.plan.groups:
            if group not in self.groups or not self.groups[group].is_bound():
                modules = [module.get_submodule(layer.name) for layer in group.layers]
                layouts = [layout_of(child) for child in modules]
                self._serve(group, StreamedGroup(modules, layouts, torch.device(group.device)))
        self._move_the_others(module, self.device)
        groups = [self.groups[group] for group in self.plan.groups]
        self.streamer = Streamer(groups, self.transfer, self.plan.staging_bytes)
        self.streamer.attach()
        slabs = [group.slab for group in groups if group.slab.device == _CPU]
        num_pinned = sum([self.pinned.pin(slab) for slab in slabs])
        if num_pinned < len(slabs) and self.device != _CPU:
            logger.info(
                "DisTorch2: %d of %d groups of layers on the host are not page-locked, and are copied more slowly",
                len(slabs) - num_pinned,
                len(slabs),
            )

    def release(self, originals: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take everything back to the host and stop serving. Slabs on the host stay, if they hold the weights.

        `originals` are the weights of patched layers, by layer name and name in it, on the host. Needs no memory of any
        other device.
        """
        module = self._root
        if self.streamer is not None:
            self.streamer.detach()
            self.streamer = None
        _unpin_all(self.transfer, self.pinned)
        for layer_name, values in originals.items():
            child = module.get_submodule(layer_name)
            for name, value in values.items():
                child._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        for key, group in list(self.groups.items()):
            if group.slab.device != _CPU or not group.is_bound():
                del self.groups[key]
                for layer in group.living:
                    self._served.pop(layer.module, None)
        self._move_the_others(module, _CPU)

    @contextlib.contextmanager
    def unserved(self) -> Iterator[None]:
        """For setting forwards or modules: those that are found are the module's own."""
        streamer = self.streamer
        if streamer is not None:
            streamer.detach()
        try:
            yield
        finally:
            if streamer is not None and self.streamer is streamer:
                streamer.attach()

    def settle(self) -> None:
        """Before weights are written: no copy reads a slab any more, and what was copied ahead is not used."""
        self.transfer.wait()
        if self.streamer is not None:
            self.streamer.forget_staged()

    def batches(self, layer_names: Iterable[str]) -> Iterable[list[str]]:
        """The names, with those of a group together: its weights are best replaced all at once."""
        group_of = {layer.name: group for group in self.groups for layer in group.layers}
        batches: dict[object, list[str]] = {}
        for name in layer_names:
            batches.setdefault(group_of.get(name, name), []).append(name)
        return batches.values()

    def replace(self, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Give layers new weights, by layer name and name in it, where theirs lie. To be called after `settle`.

        Whoever holds the old ones keeps them.
        """
        in_slabs: dict[StreamedGroup, dict[StreamedLayer, Mapping[str, torch.Tensor]]] = {}
        for layer_name, values in weights.items():
            child = self._root.get_submodule(layer_name)
            group, layer = self._find(child)
            if group is None or layer is None:
                _set(child, values)
            else:
                in_slabs.setdefault(group, {})[layer] = values
        for group, of_layers in in_slabs.items():
            if not all(layer.fits(of_layers.get(layer, {})) for layer in group.living):
                for layer, values in of_layers.items():
                    _set(layer.module, values)
                continue
            replaced = group.slab
            group.pack(of_layers)
            self.pinned.unpin(replaced)
            if self.is_placed:
                self.pinned.pin(group.slab)

    def keeps_replaced(self, layer_name: str) -> bool:
        """Whether weights that `replace` replaces go on lying in host memory, so that they need no copy."""
        group, _ = self._find(self._root.get_submodule(layer_name))
        return group is not None and group.slab.device == _CPU

    def _serve(self, key: Group, group: StreamedGroup) -> None:
        self.groups[key] = group
        self._served.update({layer.module: (group, layer) for layer in group.living})

    def _move_the_others(self, module: torch.nn.Module, device: torch.device) -> None:
        with Mover(device, self.pinned) as mover:
            for child in module.modules():
                if child not in self._served:
                    mover.move(child)

    def _find(self, child: torch.nn.Module) -> tuple[StreamedGroup, StreamedLayer] | tuple[None, None]:
        """By the module itself: an object patch may have put another in the place of a streamed one."""
        return self._served.get(child, (None, None))


def _unpin_all(transfer: Transfer, pinned: PinnedSlabs) -> None:
    """Memory must not be freed while it is page-locked, nor unlocked while it is copied from."""
    transfer.wait()
    pinned.unpin_all()


def _set(child: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give a module new parameters, on the devices of those that it has."""
    for name, value in values.items():
        device = plain_tensors(getattr(child, name))[0].device
        comfy.utils.set_attr_param(child, name, to_device(value, device))


def _fill_missing(module: torch.nn.Module) -> None:
    """Zeros for weights that the file does not have: with DynamicVRAM they have no memory yet."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_meta:
                (dtype,) = loaded_dtypes(child, name)
                zeros = torch.zeros(parameter.shape, dtype=dtype)
                child._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
