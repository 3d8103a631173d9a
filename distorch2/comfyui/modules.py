"""Modules of ComfyUI's models: a second one that shares the tensors of the first.

ComfyUI's own patchers move a module's weights, so a module that they may still be used for cannot be served. Instead of
reading the file once more, a copy of the module is made that has the same tensors.
"""

from __future__ import annotations

import copy
import types
import weakref
from typing import Any

import torch

from ..plan import PlanError
from ..quantised import as_parameter, is_gguf
from .core import ModelPatcher, mm

_CPU = torch.device("cpu")
_SHARING = "distorch2_sharing"  # attribute of a module: purpose -> weak reference to the module that shares its tensors
_STATE = "distorch2_state"  # of such a module: the containers in which ComfyUI's clones keep what belongs to it
_COPIED = (torch.nn.Module, torch.Tensor, dict, list, tuple, set, types.MethodType)
"""Kinds of attributes that may lead to modules. Others, such as ComfyUI's configuration of a model, are shared."""


def sharing(patcher: ModelPatcher, purpose: str = "") -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """A module that shares the tensors of the patcher's, with the containers that `ModelPatcher.clone` wants with it.

    While it is in use, whoever asks for the same purpose gets the same. All patchers of both are unloaded: then no
    weight is patched, and all of them are on the host.

    With DynamicVRAM weights are in ComfyUI's own allocator. There the model is loaded again by the factory that its
    loader left in `cached_patcher_init`. Raises `PlanError` where that is missing and the model has been used.
    """
    module = patcher.model
    unload(module)
    reference = vars(module).setdefault(_SHARING, {}).get(purpose)
    other = reference() if reference is not None else None
    if other is None:
        other = _loaded_again(patcher) if patcher.is_dynamic() else _copy(module)
        _, vars(other)[_STATE] = ModelPatcher(other, _CPU, _CPU).get_clone_model_override()
        vars(module)[_SHARING][purpose] = weakref.ref(other)
    else:
        unload(other)
    return other, vars(other)[_STATE]


def unload(module: torch.nn.Module) -> None:
    """Unload the patchers of `module` that are loaded, and take them off ComfyUI's list."""
    for loaded in list(mm.current_loaded_models):
        if loaded.model is not None and loaded.model.model is module:
            loaded.model_unload()
            mm.current_loaded_models.remove(loaded)


def _loaded_again(patcher: ModelPatcher) -> torch.nn.Module:
    if patcher.cached_patcher_init is not None:
        factory, arguments, *index = patcher.cached_patcher_init
        fresh = factory(*arguments)
        for position in index:
            fresh = fresh[position]
        unload(fresh.model)
        return fresh.model
    if getattr(patcher.model, "dynamic_vbars", None):
        raise PlanError(
            f"this {type(patcher.model).__name__} is in use by DynamicVRAM, and its loader does not say how to load it "
            "again: put this node right after the loader, or start ComfyUI with --disable-dynamic-vram"
        )
    return _copy(patcher.model)


def _copy(module: torch.nn.Module) -> torch.nn.Module:
    if any(parameter.device.type not in ("cpu", "meta") for parameter in module.parameters()):
        module.to("cpu")  # ComfyUI builds models on its default GPU where it has more memory free than the host
    memo: dict[int, object] = {}
    for child in module.modules():
        memo |= {id(value): value for value in vars(child).values() if not isinstance(value, _COPIED)}
    with torch.inference_mode(False):
        for parameter in module.parameters():
            memo[id(parameter)] = shared = as_parameter(parameter)
            if is_gguf(shared):
                vars(shared)["patches"] = []  # those of the first are not its own
        for buffer in module.buffers():
            memo[id(buffer)] = buffer.detach()
        other = copy.deepcopy(module, memo)
    vars(other).pop(_SHARING, None)
    if hasattr(other, "current_patcher"):  # of the last prompt
        other.current_patcher = None
    return other
