"""DistributedPatcher: ComfyUI's memory manager in front, slabs and streaming behind.

[Note: which methods are overridden] ComfyUI's own versions of `load`, `unpatch_model`, `partially_load` and
`partially_unload` move modules with `.to()`, which would undo a plan. `_load_list` and the pinning methods are only
called by those, or do nothing since nothing is pinned by them. `detach` is inherited: with `unpatch_all=False`, as
ComfyUI calls it when clones are swapped or collected, it touches no weight. What belongs to the weights lives on the
module, which clones share.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import CallbacksMP, ModelPatcher, move_weight_functions, wipe_lowvram_weight

from .distribution import Distribution
from .inventory import list_layers, own_tensors
from .plan import GIB, Plan, PlanError
from .quantised import is_quantised, to_device

_CPU = torch.device("cpu")
_ATTRIBUTE = "distorch2"
_Backup = collections.namedtuple("_Backup", ["weight", "inplace_update"])  # the fields that ComfyUI reads


class DistributedPatcher(ModelPatcher):
    """Serves a module's weights from the devices of a plan. Made by `take_over`."""

    @classmethod
    def take_over(cls, core: ModelPatcher, plan: Plan) -> DistributedPatcher:
        """A patcher in the place of `core`, a freshly loaded one that nothing else uses.

        Every attribute is copied: what a loader set on its patcher is not lost.
        """
        forget([core])
        setattr(core.model, _ATTRIBUTE, {plan.compute_device: Distribution(core.model, plan)})
        patcher = cls(core.model, torch.device(plan.compute_device), _CPU)
        own = {"load_device", "offload_device", "size"}
        patcher.__dict__.update({name: value for name, value in vars(core).items() if name not in own})
        return patcher

    @property
    def distribution(self) -> Distribution:
        """That of the module for this device. One for which nothing was planned gets everything.

        ComfyUI makes clones for another device by setting `load_device`, some with a module of their own.
        """
        device = str(self.load_device)
        distributions = self.model.__dict__.setdefault(_ATTRIBUTE, {})
        if device not in distributions:
            distributions[device] = Distribution(self.model, Plan.all_on(device, list_layers(self.model)))
        return distributions[device]

    def model_size(self) -> int:
        """Bytes that the model takes on its compute device: resident layers and staging buffer."""
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
            self._place()
            self._patch_weights()
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
            try:
                if loaded_uuid is not None and (loaded_uuid != self.patches_uuid or force_patch_weights):
                    self.unpatch_hooks()
                    self._unpatch_weights()
                self.unpatch_model(unpatch_weights=False)  # another clone's object patches
                self._place()
                self.patch_model(load_weights=False)
                if self.model.current_weight_patches_uuid == self.patches_uuid:
                    self._place()  # what object patches brought
                    self.apply_hooks(self.forced_hooks, force_apply=True)
                else:
                    self.load(device_to, lowvram_model_memory=extra_memory, force_patch_weights=force_patch_weights)
            except BaseException as error:
                self.detach()
                if _is_out_of_memory(error):
                    raise PlanError(self._out_of_memory_message(error)) from error
                raise
            return self.loaded_size() - before

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Frees nothing; ComfyUI then unloads the whole model."""
        return 0

    def patch_model(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        load_weights: bool = True,
        force_patch_weights: bool = False,
    ) -> torch.nn.Module:
        if load_weights:
            self._place()  # without object patches: the plan is for the model's own modules
        with self._unserved():
            super().patch_model(device_to, load_weights=False)
            self.eject_model()
        if load_weights:
            self.load(device_to, lowvram_model_memory, force_patch_weights)
        self.inject_model()  # around the forwards that serve weights
        return self.model

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        self.eject_model()
        if unpatch_weights:  # before object patches: a patched weight may be one of theirs
            self.unpatch_hooks()
            if device_to is None:
                self._unpatch_weights()
            else:
                self._release(self.distribution)
        with self._unserved():
            super().unpatch_model(unpatch_weights=False)
        if unpatch_weights and device_to is not None:
            self._release(self.distribution)  # what was hidden by object patches
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
        layer_name, name = _split(key)
        self.distribution.settle()
        self._back_up(key)
        self.distribution.replace({layer_name: {name: self._patched(key, device_to, force_cast)}})
        return None

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter) -> None:
        with self._on_compute_device(key):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter) -> None:
        with self._on_compute_device(key):
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        if self.hook_backup:
            self.distribution.settle()
        super().unpatch_hooks(whitelist_keys_set)

    def model_state_dict_for_saving(self, model: torch.nn.Module | None = None, prefix: str = "") -> dict[str, Any]:
        """As ComfyUI's, with weights on donors in host memory."""
        state_dict = super().model_state_dict_for_saving(model, prefix)
        donors = {torch.device(donor) for donor in self.distribution.plan.donors}
        return {
            name: value.to(_CPU) if getattr(value, "device", _CPU) in donors else value
            for name, value in state_dict.items()
        }

    def _patch_weights(self) -> None:
        """Compute every patched weight once, from the original, on the compute device; ship the bytes to its place."""
        self.distribution.settle()
        by_layer = _by_layer(key for key in self.patches if self._is_patched_by_comfyui(key))
        for batch in self.distribution.batches(by_layer):
            patched = {}
            for layer_name in batch:
                keys = by_layer[layer_name]
                patched[layer_name] = {name: self._patched(key, self.load_device) for name, key in keys.items()}
                for key in keys.values():
                    self._back_up(key)
            self.distribution.replace(patched)

    def _is_patched_by_comfyui(self, key: str) -> bool:
        """Not a buffer, nor a parameter of a module whose children have parameters: those ComfyUI leaves alone."""
        module, name = self._owner(key)
        own = module._parameters
        return name in own and all(child_name in own for child_name, _ in module.named_parameters())

    def _unpatch_weights(self) -> None:
        self.model.current_weight_patches_uuid = None  # first: what fails in the middle is not taken for patched
        self.distribution.settle()
        originals = self._originals()
        for batch in self.distribution.batches(originals):
            self.distribution.replace({layer_name: originals[layer_name] for layer_name in batch})
        self._forget_patches()

    def _release(self, distribution: Distribution) -> None:
        self.model.current_weight_patches_uuid = None
        distribution.release(self._originals())
        self._forget_patches()

    def _originals(self) -> dict[str, dict[str, torch.Tensor]]:
        """Layer name -> name in it -> the weight as it was, for all that are patched."""
        return {
            layer_name: {name: self.backup[key].weight for name, key in keys.items()}
            for layer_name, keys in _by_layer(self.backup).items()
        }

    def _forget_patches(self) -> None:
        self.backup.clear()
        for module in self.model.modules():
            if hasattr(module, "comfy_patched_weights"):
                del module.comfy_patched_weights

    @contextlib.contextmanager
    def _unserved(self) -> Iterator[None]:
        """For object patches to be set or given back: they may be forwards, or modules that are served."""
        self.eject_model()
        if self.object_patches or self.object_patches_backup:
            with self.distribution.unserved():
                yield
        else:
            yield

    def _place(self) -> None:
        """Place the weights as planned for this device, and not for another any more."""
        here = self.distribution  # which a module for another device does not have before it is asked for
        for distribution in vars(self.model)[_ATTRIBUTE].values():
            if distribution is not here and distribution.is_placed:
                self.unpatch_hooks()
                self._release(distribution)
        here.place()

    def _patched(self, key: str, device: torch.device | None, force_cast: bool = False) -> torch.Tensor:
        """The weight with this clone's patches, or the one in place (if quantised, on `device`) where it has none and
        nothing is cast."""
        module, name = self._owner(key)
        in_place = getattr(module, name)
        weight = self.backup[key].weight if key in self.backup else in_place
        if device is not None and is_quantised(weight):
            weight = to_device(weight, device)  # before ComfyUI takes it there in full precision
        with contextlib.nullcontext() if weight is in_place else self._bound_to(key, weight):
            return super().patch_weight_to_device(key, device, return_weight=True, force_cast=force_cast)

    def _back_up(self, key: str) -> None:
        if key not in self.backup:
            module, name = self._owner(key)
            weight = getattr(module, name)
            if not self.distribution.keeps_replaced(_split(key)[0]):
                weight = to_device(weight, _CPU, copy=True)
            self.backup[key] = _Backup(weight, False)

    def _set_casting(self) -> None:
        """What ComfyUI's operations ask of their module, as for a model that is loaded completely."""
        for name, module in self.model.named_modules():
            if not own_tensors(module):
                continue
            wipe_lowvram_weight(module)
            module.comfy_force_cast_weights = self.force_cast_weights
            module.comfy_patched_weights = True  # saving takes what is in place
            if not hasattr(module, "comfy_cast_weights"):
                continue
            if self.force_cast_weights:
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
            module.weight_function.extend(self.weight_wrapper_patches.get(f"{name}.weight", []))
            module.bias_function.extend(self.weight_wrapper_patches.get(f"{name}.bias", []))
            move_weight_functions(module, self.load_device)

    def _owner(self, key: str) -> tuple[torch.nn.Module, str]:
        """The module that has the weight `key`, and the weight's name in it."""
        layer_name, name = _split(key)
        return self.model.get_submodule(layer_name), name

    @contextlib.contextmanager
    def _bound_to(self, key: str, value: torch.Tensor) -> Iterator[None]:
        """The parameter replaced by one with this value."""
        module, name = self._owner(key)
        parameter = module._parameters[name]
        module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        try:
            yield
        finally:
            module._parameters[name] = parameter

    @contextlib.contextmanager
    def _on_compute_device(self, key: str) -> Iterator[None]:
        """A weight on a donor replaced by a copy on the compute device, which is written back."""
        module, name = self._owner(key)
        weight = getattr(module, name)
        if weight.device == self.load_device:
            yield
            return
        self.distribution.settle()
        copy = weight.to(self.load_device, copy=True)
        with self._bound_to(key, copy):
            yield
        weight.data.copy_(copy)

    def _out_of_memory_message(self, error: BaseException) -> str:
        plan = self.distribution.plan
        kept = ", ".join(f"{plan.bytes_on(device) / GIB:.2f} GiB on {device}" for device in plan.devices)
        return (
            f"out of memory while placing {type(self.model).__name__}: the plan keeps {kept}, and streams through "
            f"{plan.staging_bytes / GIB:.2f} GiB on {plan.compute_device}; give the full device less, or unload other "
            f"models ({error})"
        )


def forget(patchers: Iterable[ModelPatcher]) -> None:
    """Unload `patchers` and take them off ComfyUI's list, where a text encoder for the CPU is put as it is built."""
    patchers = list(patchers)
    for loaded in list(mm.current_loaded_models):
        if any(loaded.model is patcher for patcher in patchers):
            loaded.model_unload()
            mm.current_loaded_models.remove(loaded)


def _split(key: str) -> tuple[str, str]:
    """Name of the layer and name of the weight in it."""
    layer_name, _, name = key.rpartition(".")
    return layer_name, name


def _by_layer(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Name of the layer -> name of the weight in it -> key."""
    layers: dict[str, dict[str, str]] = {}
    for key in keys:
        layer_name, name = _split(key)
        layers.setdefault(layer_name, {})[name] = key
    return layers


def _is_out_of_memory(error: BaseException) -> bool:
    """On an accelerator, or on the host, for which torch has no class of its own."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
