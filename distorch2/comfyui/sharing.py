"""A second module that shares the tensors of the first.

[Note: whose module is served] ComfyUI's own patchers move a module's weights, so a module that they may still be used
for cannot be served from elsewhere. What a loader has just made, and nothing else uses, is served itself. Otherwise a
copy of the module is made that has the same tensors; repeated calls for the same use get the same copy while it exists.
With DynamicVRAM weights are in ComfyUI's own allocator: there the model is loaded again by the factory that its loader
left in `cached_patcher_init`, which maps the same file.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from ..planning.plan import PlanError
from ..serving.forwards import drop_copied_forwards
from ..weights.devices import CPU
from ..weights.quantised import unpatched_parameter
from .core import ModelPatcher, mm

SERVED = ""
"""The use of the copy that is served; that of others is the name of a device that they are on as a whole."""
_COPIES = "distorch2_copies"  # attribute of a module: use -> weak reference to the copy
_CLONE_STATE = "distorch2_clone_state"  # of a copy: what `get_clone_model_override` returned for it
_HOOK_BACKUP = "distorch2_hook_backup"  # of a copy: that of all its patchers
_ORIGINAL = "distorch2_original"  # of a copy: a weak reference to the module whose tensors it has
_CONTAINERS = (dict, list, tuple, set)
_COPIED = (torch.nn.Module, torch.Tensor, types.MethodType, *_CONTAINERS)
"""Kinds of attributes that may lead to modules. Others, such as ComfyUI's configuration of a model, are shared."""


def clone_sharing(patcher: ModelPatcher, use: str = SERVED, disable_dynamic: bool = False) -> ModelPatcher:
    """A clone of `patcher`, which stays usable, for a module that shares the tensors of its own.

    All patchers of both modules are unloaded: then no weight is patched, and all of them are on the host. Raises
    `PlanError`, and changes nothing, for a model that DynamicVRAM has in use and whose loader does not say how to load
    it again, and for one with compiled modules.
    """
    original = patcher.model
    _refuse_what_cannot_be_copied(patcher)
    copied, state = _copy_for(patcher, use)
    clone = patcher.clone(disable_dynamic=disable_dynamic, model_override=(copied, state))
    # What belongs to the module of `patcher`.
    clone.parent = None
    clone.hook_backup, clone.current_hooks, clone.is_injected = vars(copied)[_HOOK_BACKUP], None, False
    clone.remove_additional_models("multigpu")
    clone.object_patches = _for_copy(clone.object_patches, original, copied)
    return clone


def is_shared(module: torch.nn.Module) -> bool:
    """Whether it has tensors of another module, which nothing may write into."""
    return _ORIGINAL in vars(module)


def unhook_original(module: torch.nn.Module) -> None:
    """Have the hooks taken back that patchers of the module's original have written into the tensors of both."""
    original = vars(module).get(_ORIGINAL, lambda: None)()
    for loaded in mm.current_loaded_models:
        if original is not None and loaded.model is not None and loaded.model.model is original:
            loaded.model.unpatch_hooks()


def _refuse_what_cannot_be_copied(patcher: ModelPatcher) -> None:
    module = patcher.model
    own = {id(each) for each in module.modules()}
    for name, value in patcher.object_patches.items():
        if id(getattr(value, "_orig_mod", None)) in own:  # of a compiled module
            raise PlanError(f"{name} is compiled already: put the node that compiles it after this one")
    is_in_use = patcher.is_dynamic() and getattr(module, "dynamic_vbars", None)
    if is_in_use and patcher.cached_patcher_init is None:
        raise PlanError(
            f"this {type(module).__name__} is in use by DynamicVRAM, and its loader does not say how to load it again: "
            "put this node right after the loader, or start ComfyUI with --disable-dynamic-vram"
        )


def _for_copy(patches: Mapping[str, Any], original: torch.nn.Module, copied: torch.nn.Module) -> dict[str, Any]:
    """Object patches for the copy: what is a module of the original, or a method of one, is that of the copy."""
    copies = dict(copied.named_modules())
    counterparts = {id(module): copies[name] for name, module in original.named_modules() if name in copies}
    found = {}
    for name, value in patches.items():
        if isinstance(value, types.MethodType) and id(value.__self__) in counterparts:
            value = types.MethodType(value.__func__, counterparts[id(value.__self__)])
        found[name] = counterparts.get(id(value), value)
    return found


def unload(module: torch.nn.Module) -> None:
    """Unload the patchers of `module`, and take them off ComfyUI's list, where a text encoder for the CPU is put as it
    is built."""
    for loaded in list(mm.current_loaded_models):
        if loaded.model is not None and loaded.model.model is module:
            loaded.model_unload()
        elif loaded.model is not None or loaded.real_model is None or loaded.real_model() is not module:
            continue
        # Not `remove`: entries whose patchers are gone are equal.
        mm.current_loaded_models[:] = [each for each in mm.current_loaded_models if each is not loaded]


def _copy_for(patcher: ModelPatcher, use: str) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """The copy, and the containers in which clones keep what belongs to it, as `ModelPatcher.clone` wants them."""
    module = patcher.model
    unload(module)
    reference = vars(module).setdefault(_COPIES, {}).get(use)
    copied = reference() if reference is not None else None
    if copied is None:
        copied = _loaded_again(patcher) if patcher.is_dynamic() else _copy(module)
        _, vars(copied)[_CLONE_STATE] = ModelPatcher(copied, CPU, CPU).get_clone_model_override()
        vars(copied)[_HOOK_BACKUP], vars(copied)[_ORIGINAL] = {}, weakref.ref(module)
        vars(module)[_COPIES][use] = weakref.ref(copied)
    else:
        unload(copied)
    return copied, vars(copied)[_CLONE_STATE]


def _loaded_again(patcher: ModelPatcher) -> torch.nn.Module:
    if patcher.cached_patcher_init is not None:
        factory, arguments, *index = patcher.cached_patcher_init
        fresh = factory(*arguments)
        for position in index:
            fresh = fresh[position]
        unload(fresh.model)
        return fresh.model
    return _copy(patcher.model)


def _copy(module: torch.nn.Module) -> torch.nn.Module:
    if any(parameter.device.type not in ("cpu", "meta") for parameter in module.parameters()):
        module.to("cpu")  # ComfyUI builds models on its default GPU where it has more memory free than the host
    memo: dict[int, object] = {}
    for child in module.modules():
        _share_leaves(vars(child), memo)
    with torch.inference_mode(False):
        for parameter in module.parameters():
            memo[id(parameter)] = unpatched_parameter(parameter)
        for buffer in module.buffers():
            memo[id(buffer)] = buffer.detach()
        copied = copy.deepcopy(module, memo)
    drop_copied_forwards(copied)
    for name in [name for name in vars(copied) if name.startswith(("distorch2", "dynamic_"))]:
        del vars(copied)[name]  # of a served module; of DynamicVRAM, which makes them anew
    if hasattr(copied, "current_patcher"):  # of the last prompt
        copied.current_patcher = None
    return copied


def _share_leaves(value: object, memo: dict[int, object]) -> None:
    """Have what is in `value`, apart from modules, tensors and containers, not copied.

    Records are copied, but not what is in them: an object patch may set a field.
    """
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, (list, tuple, set)):
        for each in value:
            _share_leaves(each, memo)
    elif not isinstance(value, _COPIED):
        is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
        memo[id(value)] = copy.copy(value) if is_record else value
