"""Distribution: puts a module's weights where a plan has them, and takes them back."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping

import comfy.utils
import torch

from .inventory import is_quantised, layout_of, loaded_dtype, own_tensors, plain_tensors
from .pinning import PinnedSlabs
from .plan import Placement, Plan
from .streaming import StreamedLayer, Streamer
from .transfer import Transfer

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


class Distribution:
    """Where the weights of one module lie. Held by the module, so that all who share the module share it."""

    def __init__(self, module: torch.nn.Module, plan: Plan) -> None:
        self.plan = plan
        self.device = torch.device(plan.compute_device)
        self.layers: dict[str, StreamedLayer] = {}
        self.streamer: Streamer | None = None
        self.transfer = Transfer(self.device)
        self.pinned = PinnedSlabs(self.device)
        self._module = weakref.ref(module)
        # A dropped module is not unloaded first.
        weakref.finalize(module, _unpin_all, self.transfer, self.pinned).atexit = False

    @property
    def is_placed(self) -> bool:
        return self.streamer is not None

    def place(self) -> None:
        """Put every layer where the plan has it, one after another, and start serving the streamed ones."""
        if self.is_placed:
            return
        module = self._module()
        _fill_missing(module)
        for placement in self.plan.streamed:
            if placement.layer.name not in self.layers:
                self.layers[placement.layer.name] = _pack(module, placement)
        _move(module, (layer.name for layer in self.plan.layers_on(self.plan.compute_device)), self.device)
        slabs = [layer.slab for layer in self.layers.values()]
        self.streamer = Streamer(self.layers.values(), self.transfer, self.plan.slot_bytes)
        on_host = [slab for slab in slabs if slab.device == _CPU]
        num_pinned = sum([self.pinned.pin(slab) for slab in on_host])
        if num_pinned < len(on_host) and self.device.type != "cpu":
            logger.info(
                "DisTorch2: %d of %d layers on the host are not page-locked, and are copied more slowly",
                len(on_host) - num_pinned,
                len(on_host),
            )

    def release(self) -> None:
        """Take everything back to the host and stop serving. Slabs on the host stay: they hold the weights."""
        if self.streamer is not None:
            self.streamer.detach()
            self.streamer = None
        _unpin_all(self.transfer, self.pinned)
        self.layers = {name: layer for name, layer in self.layers.items() if layer.slab.device == _CPU}
        _move(self._module(), (p.layer.name for p in self.plan.placements if p.layer.name not in self.layers), _CPU)

    def replace(self, layer_name: str, values: Mapping[str, torch.Tensor]) -> None:
        """Give a layer new weights, by their names in it, where its weights lie. Whoever holds the old ones keeps them.

        No copy from the layer's slab may be under way.
        """
        child = self._module().get_submodule(layer_name)
        layer = self._layer(layer_name, child)
        if layer is not None and layer.fits(values):
            self.pinned.unpin(layer.slab)
            layer.replace(values)
            if self.is_placed:
                self.pinned.pin(layer.slab)
            return
        for name, value in values.items():
            device = plain_tensors(getattr(child, name))[0].device
            comfy.utils.set_attr_param(child, name, value.to(device))

    def keeps_replaced(self, layer_name: str) -> bool:
        """Whether weights that `replace` replaces go on lying in host memory, so that they need no copy."""
        layer = self._layer(layer_name, self._module().get_submodule(layer_name))
        return layer is not None and layer.slab.device == _CPU

    def _layer(self, layer_name: str, child: torch.nn.Module) -> StreamedLayer | None:
        """The streamed layer of that name, unless an object patch has put another module in its place."""
        layer = self.layers.get(layer_name)
        return layer if layer is not None and layer.module is child else None


def _unpin_all(transfer: Transfer, pinned: PinnedSlabs) -> None:
    """Memory must not be freed while it is page-locked, nor unlocked while it is copied from."""
    transfer.wait()
    pinned.unpin_all()


def _pack(module: torch.nn.Module, placement: Placement) -> StreamedLayer:
    child = module.get_submodule(placement.layer.name)
    layout = layout_of(child)
    return StreamedLayer(child, layout, layout.packed(own_tensors(child), torch.device(placement.device)))


def _fill_missing(module: torch.nn.Module) -> None:
    """Zeros for weights that the file does not have: with DynamicVRAM they have no memory yet."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_meta:
                zeros = torch.zeros(parameter.shape, dtype=loaded_dtype(child, name))
                child._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)


def _move(module: torch.nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Move the tensors of the named modules, to the dtype they are loaded in.

    As with torch's own `.to()` a tensor stays the same object where it can: others may hold it, and are not to keep
    memory of a device that it has left.
    """
    for name in names:
        child = module.get_submodule(name)
        for tensor_name, tensor in own_tensors(child).items():
            quantised = is_quantised(tensor)
            dtype = tensor.dtype if quantised else loaded_dtype(child, tensor_name)
            if plain_tensors(tensor)[0].device == device and tensor.dtype == dtype:
                continue
            with torch.inference_mode(tensor.is_inference()):
                moved = tensor.detach().to(device=device, dtype=dtype)
                if torch._has_compatible_shallow_copy_type(tensor, moved) and not quantised:
                    tensor.data = moved
                elif tensor_name in child._parameters:
                    child._parameters[tensor_name] = torch.nn.Parameter(moved, requires_grad=False)
                else:
                    child._buffers[tensor_name] = moved
