"""DistributedPatcher: ComfyUI's memory manager in front, slabs and streaming behind.

[Note: whose methods are overridden] ComfyUI's own versions of `load`, `unpatch_model`, `partially_load` and
`partially_unload` move modules with `.to()`, which would undo a plan. `_load_list` and the pinning methods are only
called by those. `detach` is inherited: with `unpatch_all=False`, as ComfyUI calls it when clones are swapped or
collected, it touches no weight. What belongs to the weights lives on the module, which clones share.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import comfy.lora
import comfy.model_management as mm
import comfy.utils
import torch
from comfy.model_patcher import CallbacksMP, ModelPatcher, move_weight_functions, wipe_lowvram_weight

from .inventory import is_quantised, list_layers, loaded_dtype, own_tensors, plain_tensors
from .plan import GIB, Placement, Plan, PlanError
from .slab import SlabLayout
from .streaming import StreamedLayer, Streamer
from .transfer import Transfer

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_ATTRIBUTE = "distorch2"
_Backup = collections.namedtuple("_Backup", ["weight", "inplace_update"])  # the fields that ComfyUI reads


class Distribution:
    """Where the weights of one module lie. Every clone's patcher finds it on the module."""

    def __init__(self, module: torch.nn.Module, plan: Plan) -> None:
        self.plan = plan
        self.streamed: dict[str, StreamedLayer] = {}
        self.streamer: Streamer | None = None
        self.is_placed = False
        self._pinned: dict[int, torch.Tensor] = {}  # by address
        setattr(module, _ATTRIBUTE, self)
        # A dropped model is not unloaded first, and memory must not be freed while it is registered as page-locked.
        weakref.finalize(module, _unpin, self._pinned, self.device).atexit = False

    @property
    def device(self) -> torch.device:
        return torch.device(self.plan.compute_device)

    def place(self, module: torch.nn.Module) -> None:
        """Put every layer where the plan has it, one after another, and start serving the streamed ones."""
        if self.is_placed:
            return
        _fill_missing(module)
        for placement in self.plan.streamed:
            if placement.layer.name not in self.streamed:
                self.streamed[placement.layer.name] = _pack(module, placement)
        resident = [p.layer.name for p in self.plan.placements if p.device == self.plan.compute_device]
        _move(module, resident, self.device)
        layers = list(self.streamed.values())
        self.streamer = Streamer(layers, self.device, self.plan.slot_bytes)
        self.streamer.attach()
        self.is_placed = True
        self._pin_all(layer.slab for layer in layers)

    def release(self, module: torch.nn.Module) -> None:
        """Take everything back to the host and stop serving. Slabs on the host stay: they hold the weights."""
        self.is_placed = False
        if self.streamer is not None:
            self.streamer.detach()
            self.streamer = None
        _unpin(self._pinned, self.device)
        for name, layer in list(self.streamed.items()):
            if layer.slab.device != _CPU:
                del self.streamed[name]
        _move(module, [p.layer.name for p in self.plan.placements if p.layer.name not in self.streamed], _CPU)

    def replace(self, module: torch.nn.Module, layer_name: str, values: Mapping[str, torch.Tensor]) -> None:
        """Give a layer new weights, by their names in it, where its weights lie. Whoever holds the old ones keeps them.

        No copy from the layer's slab may be under way.
        """
        child = module.get_submodule(layer_name)
        layer = self._layer(layer_name, child)
        if layer is not None and layer.fits(values):
            self._unpin(layer.slab)
            layer.replace(values)
            self._pin(layer.slab)
            return
        for name, value in values.items():
            device = plain_tensors(getattr(child, name))[0].device
            comfy.utils.set_attr_param(child, name, value.to(device))

    def restore(self, module: torch.nn.Module, layer_name: str, originals: Mapping[str, torch.Tensor]) -> None:
        """Undo `replace`, given what was in place before it."""
        if self.keeps_originals(module, layer_name):
            layer = self.streamed[layer_name]
            self._unpin(layer.slab)
            layer.restore()
            self._pin(layer.slab)
        else:
            self.replace(module, layer_name, originals)

    def keeps_originals(self, module: torch.nn.Module, layer_name: str) -> bool:
        """Whether the weights in place stay as they are in memory when they are replaced: then they need no copy."""
        layer = self._layer(layer_name, module.get_submodule(layer_name))
        return layer is not None and layer.slab.device == _CPU

    def _layer(self, layer_name: str, child: torch.nn.Module) -> StreamedLayer | None:
        """The streamed layer of that name, unless an object patch has put another module in its place."""
        layer = self.streamed.get(layer_name)
        return layer if layer is not None and layer.module is child else None

    def _pin_all(self, slabs: Iterable[torch.Tensor]) -> None:
        on_host = [slab for slab in slabs if slab.device == _CPU]
        if mm.is_device_cuda(self.device) and not all(map(self._pin, on_host)):
            logger.info(
                "DisTorch2: %d of %d layers on the host are not page-locked, and are copied more slowly",
                len(on_host) - len(self._pinned),
                len(on_host),
            )

    def _pin(self, slab: torch.Tensor) -> bool:
        """Page-lock a slab on the host as far as ComfyUI's budget goes; its memory is in use already."""
        if not self.is_placed or slab.device != _CPU or not mm.is_device_cuda(self.device):
            return False
        if not (mm.ensure_pin_budget(0) and mm.ensure_pin_registerable(slab.nbytes) and mm.pin_memory(slab)):
            return False
        self._pinned[slab.data_ptr()] = slab
        return True

    def _unpin(self, slab: torch.Tensor) -> None:
        if self._pinned.pop(slab.data_ptr(), None) is not None:
            mm.unpin_memory(slab)


def _pack(module: torch.nn.Module, placement: Placement) -> StreamedLayer:
    child = module.get_submodule(placement.layer.name)
    tensors = own_tensors(child)
    layout = SlabLayout.of(tensors, {name: loaded_dtype(child, name) for name in tensors})
    return StreamedLayer(child, layout, layout.packed(tensors, torch.device(placement.device)))


class DistributedPatcher(ModelPatcher):
    """Serves a module's weights from the devices of a plan. Made by `take_over`."""

    @classmethod
    def take_over(cls, core: ModelPatcher, plan: Plan) -> DistributedPatcher:
        """A patcher in the place of `core`, a freshly loaded one that nothing else uses.

        Every attribute is copied: what a loader set on its patcher is not lost.
        """
        forget([core])
        Distribution(core.model, plan)
        patcher = cls(core.model, torch.device(plan.compute_device), _CPU)
        kept = {"load_device", "offload_device", "size"}
        vars(patcher).update({name: value for name, value in vars(core).items() if name not in kept})
        return patcher

    @property
    def distribution(self) -> Distribution:
        distribution = getattr(self.model, _ATTRIBUTE, None)
        device = str(self.load_device)
        if distribution is None or distribution.plan.compute_device != device:
            # ComfyUI gave this clone a module of its own, for another device (MultiGPU work units).
            distribution = Distribution(self.model, Plan.all_on(device, list_layers(self.model)))
        return distribution

    def model_size(self) -> int:
        """Bytes that the model takes on its compute device: resident layers and slot."""
        return self.distribution.plan.compute_bytes

    def loaded_size(self) -> int:
        return self.model_size() if self.distribution.is_placed else 0

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Place the weights and apply this clone's patches to them; `lowvram_model_memory` does not change a plan."""
        with self.use_ejected():
            self.unpatch_hooks()
            try:
                self.distribution.place(self.model)
                self._patch_weights()
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise PlanError(self._out_of_memory_message(error)) from error
            self._set_casting()
            self.model.model_lowvram = False
            self.model.lowvram_patch_counter = 0
            self.model.device = self.load_device
            self.model.model_loaded_weight_memory = self.loaded_size()
            self.model.model_offload_buffer_memory = 0
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Load, whatever `extra_memory`: a plan is served whole. Returns the bytes that this added."""
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            before = self.loaded_size()
            loaded_uuid = self.model.current_weight_patches_uuid
            if loaded_uuid is not None and (loaded_uuid != self.patches_uuid or force_patch_weights):
                self.unpatch_hooks()
                self._unpatch_weights()
            self.unpatch_model(unpatch_weights=False)  # another clone's object patches
            self.patch_model(load_weights=False)
            if self.distribution.is_placed and self.model.current_weight_patches_uuid == self.patches_uuid:
                self.apply_hooks(self.forced_hooks, force_apply=True)
                return 0
            try:
                self.load(device_to, lowvram_model_memory=extra_memory, force_patch_weights=force_patch_weights)
            except BaseException:
                self.detach()
                raise
            return self.loaded_size() - before

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Frees nothing; ComfyUI then unloads the whole model."""
        return 0

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(unpatch_weights=False)  # ejects, and gives object patches back
        if unpatch_weights:
            self.unpatch_hooks()
            self._unpatch_weights()
            if device_to is not None:
                self.distribution.release(self.model)
                self.model.device = device_to
                self.model.model_loaded_weight_memory = 0

    def patch_weight_to_device(
        self,
        key: str,
        device_to: torch.device | None = None,
        inplace_update: bool = False,
        return_weight: bool = False,
        force_cast: bool = False,
    ) -> Any:
        """As ComfyUI's, but always from the original weight, since the one in place may be patched already."""
        if return_weight or key not in self.patches:
            return self._patched(key, device_to, force_cast)
        layer_name, _, name = key.rpartition(".")
        self._settle()
        self._back_up(key)
        self.distribution.replace(self.model, layer_name, {name: self._patched(key, device_to, force_cast)})
        return None

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter) -> None:
        with self._on_compute_device(key):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter) -> None:
        with self._on_compute_device(key):
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        if self.hook_backup:
            self._settle()
        super().unpatch_hooks(whitelist_keys_set)

    def model_state_dict_for_saving(self, model: torch.nn.Module | None = None, prefix: str = "") -> dict[str, Any]:
        """As ComfyUI's, with weights on donors in host memory."""
        state_dict = super().model_state_dict_for_saving(model, prefix)
        donors = {torch.device(donor) for donor in self.distribution.plan.donors}
        on_donor = {name for name, value in state_dict.items() if getattr(value, "device", _CPU) in donors}
        return {name: value.to(_CPU) if name in on_donor else value for name, value in state_dict.items()}

    def _patch_weights(self) -> None:
        """Compute every patched weight once, from the original, on the compute device; ship the bytes to its place."""
        self._settle()
        for layer_name, keys in _by_layer(self.patches).items():
            # A buffer is not patched, nor by ComfyUI.
            parameters = self.model.get_submodule(layer_name)._parameters
            keys = {name: key for name, key in keys.items() if name in parameters}
            patched = {name: self._patched(key, self.load_device) for name, key in keys.items()}
            for key in keys.values():
                self._back_up(key)
            if patched:
                self.distribution.replace(self.model, layer_name, patched)

    def _unpatch_weights(self) -> None:
        self._settle()
        for layer_name, keys in _by_layer(self.backup).items():
            originals = {name: self.backup[key].weight for name, key in keys.items()}
            self.distribution.restore(self.model, layer_name, originals)
        self.backup.clear()
        self.model.current_weight_patches_uuid = None
        for module in self.model.modules():
            if hasattr(module, "comfy_patched_weights"):
                del module.comfy_patched_weights

    def _patched(self, key: str, device: torch.device | None, force_cast: bool = False) -> torch.Tensor:
        """The weight with this clone's patches, or the weight in place where it has none and nothing is cast."""
        with self._bound_to(key, self.backup[key].weight if key in self.backup else None):
            return super().patch_weight_to_device(key, device, return_weight=True, force_cast=force_cast)

    def _back_up(self, key: str) -> None:
        if key not in self.backup:
            weight, _ = self._parameter(key)
            if not self.distribution.keeps_originals(self.model, key.rpartition(".")[0]):
                weight = _copy_to_host(weight)
            self.backup[key] = _Backup(weight, False)

    def _set_casting(self) -> None:
        """What ComfyUI's operations ask of their module, as for a model that is loaded completely."""
        for name, module in self.model.named_modules():
            if not own_tensors(module):
                continue
            wipe_lowvram_weight(module)
            module.comfy_force_cast_weights = self.force_cast_weights
            module.comfy_patched_weights = True  # what is in place is not the original
            if not hasattr(module, "comfy_cast_weights"):
                continue
            if self.force_cast_weights:
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
            module.weight_function.extend(self.weight_wrapper_patches.get(f"{name}.weight", []))
            module.bias_function.extend(self.weight_wrapper_patches.get(f"{name}.bias", []))
            move_weight_functions(module, self.load_device)

    def _parameter(self, key: str) -> tuple[torch.Tensor, torch.nn.Module]:
        """The weight in place, and the module that it belongs to."""
        path, _, name = key.rpartition(".")
        module = self.model.get_submodule(path)
        return getattr(module, name), module

    @contextlib.contextmanager
    def _bound_to(self, key: str, value: torch.Tensor | None) -> Iterator[None]:
        """The parameter replaced by `value`, if any."""
        if value is None:
            yield
            return
        parameter, module = self._parameter(key)
        name = key.rpartition(".")[2]
        module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        try:
            yield
        finally:
            module._parameters[name] = parameter

    @contextlib.contextmanager
    def _on_compute_device(self, key: str) -> Iterator[None]:
        """A streamed parameter replaced by a copy on the compute device, which is written back."""
        if key.rpartition(".")[0] not in self.distribution.streamed:
            yield
            return
        self._settle()
        parameter, module = self._parameter(key)
        name = key.rpartition(".")[2]
        copy = torch.nn.Parameter(parameter.to(self.load_device, copy=True), requires_grad=False)
        module._parameters[name] = copy
        try:
            yield
        finally:
            module._parameters[name] = parameter
        parameter.data.copy_(copy)

    def _settle(self) -> None:
        """Wait for copies that may still read a slab."""
        if self.distribution.streamer is not None:
            self.distribution.streamer.transfer.wait()

    def _out_of_memory_message(self, error: Exception) -> str:
        plan = self.distribution.plan
        kept = ", ".join(f"{plan.bytes_on(device) / GIB:.2f} GiB on {device}" for device in plan.devices)
        return (
            f"out of memory while placing {type(self.model).__name__}: the plan keeps {kept}, and streams through "
            f"{plan.slot_bytes / GIB:.2f} GiB on {plan.compute_device}; give the full device less, or unload other "
            f"models ({error})"
        )


def forget(patchers: Iterable[ModelPatcher]) -> None:
    """Unload `patchers` and take them off ComfyUI's list, where a text encoder for the CPU is put as it is built."""
    patchers = list(patchers)
    for loaded in list(mm.current_loaded_models):
        if any(loaded.model is patcher for patcher in patchers):
            loaded.model_unload()
            mm.current_loaded_models.remove(loaded)


def _by_layer(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Name of the layer -> name of the weight in it -> key."""
    layers: dict[str, dict[str, str]] = {}
    for key in keys:
        layer_name, _, name = key.rpartition(".")
        layers.setdefault(layer_name, {})[name] = key
    return layers


def _unpin(slabs: dict[int, torch.Tensor], device: torch.device) -> None:
    """Give page-locked slabs back, once no copy from them is under way."""
    if slabs:
        Transfer(device).wait()
    while slabs:
        mm.unpin_memory(slabs.popitem()[1])


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On an accelerator, or on the host, for which torch has no class of its own."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(_CPU, copy=True)


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
