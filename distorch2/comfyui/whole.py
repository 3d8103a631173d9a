"""A whole model on a device of its own: a VAE, a ControlNet, a CLIP vision model. Nothing of it is split.

The given model stays usable. The placed one shares its weights in host memory until one of the two is loaded.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ..planning.plan import PlanError
from ..serving.forwards import Forwards
from ..weights.devices import CPU
from .core import ModelPatcher, mm
from .sharing import clone_sharing

_GIVEN_THE_MODEL = ("QwenFunControlNet",)
"""ControlNets that ComfyUI hands the diffusion model."""
_STAND_IN = "distorch2_stand_in"  # of a copy: a weak reference to the parent of all its patchers
_VISITS = "distorch2_visits"  # attribute of a ControlNet's module that has a forward of `_visiting`


def place_vae(vae: Any, device: torch.device) -> Any:
    """A VAE like `vae` on `device`, in the dtype that ComfyUI would choose there.

    Raises `PlanError` for one that has no weights.
    """
    if getattr(vae, "patcher", None) is None:
        raise PlanError("this VAE has no weights; there is none in the file that it was loaded from")
    placed = copy.copy(vae)
    placed.patcher = _on(vae.patcher, device)
    placed.first_stage_model, placed.device = placed.patcher.model, device
    if vae.device.type != device.type:
        placed.vae_dtype = mm.vae_dtype(device, vae.working_dtypes)
    if not placed.patcher.is_dynamic():
        placed.first_stage_model.to(placed.vae_dtype)
    copies = dict(placed.first_stage_model.named_modules())
    names = {id(module): name for name, module in vae.first_stage_model.named_modules()}
    for attribute, value in vars(vae).items():
        if id(value) in names:  # a part of the model that is used by itself
            setattr(placed, attribute, copies[names[id(value)]])
    return placed


def place_clip_vision(clip_vision: Any, device: torch.device) -> Any:
    """A CLIP vision model like `clip_vision` on `device`."""
    placed = copy.copy(clip_vision)
    placed.patcher = _on(clip_vision.patcher, device)
    placed.model, placed.load_device = placed.patcher.model, device
    return placed


def place_control_net(control_net: Any, device: torch.device) -> Any:
    """A ControlNet like `control_net` on `device`, wherever the diffusion model computes.

    Raises `PlanError` for a T2I adapter, and for what computes with weights of the diffusion model.
    """
    patcher = getattr(control_net, "control_model_wrapped", None)
    is_given_the_model = type(control_net).__name__ in _GIVEN_THE_MODEL
    if patcher is None or hasattr(control_net, "control_weights") or is_given_the_model:
        raise PlanError(
            f"a {type(control_net).__name__} computes where the diffusion model does, and cannot be put on {device}; "
            "connect it without this node"
        )
    placed = control_net.copy()
    placed.control_model_wrapped = _on(patcher, device)
    placed.control_model, placed.load_device = placed.control_model_wrapped.model, device
    if _VISITS not in vars(placed.control_model):
        Forwards("another device").set(placed.control_model, _visiting(placed.control_model, device))
        vars(placed.control_model)[_VISITS] = True
    return placed


def _on(patcher: ModelPatcher, device: torch.device) -> ModelPatcher:
    """A patcher like `patcher` for `device`, with a module that is used there only."""
    placed = clone_sharing(patcher, str(device), disable_dynamic=device.type == "cpu")  # dynamic ones are for GPUs
    placed.load_device, placed.offload_device, placed.size = device, CPU, 0
    if placed.is_dynamic():
        placed.register_load_device(device)
    reference = vars(placed.model).get(_STAND_IN, lambda: None)
    placed.parent = reference()
    if placed.parent is None:  # for ComfyUI to unload it, when this one is gone and another is not
        placed.parent = placed.clone()
        placed.parent.parent = None
        vars(placed.model)[_STAND_IN] = weakref.ref(placed.parent)
    return placed


def _visiting(
    module: torch.nn.Module, device: torch.device
) -> Callable[[Callable[..., Any] | None], Callable[..., Any]]:
    """A forward that moves its inputs to `device`, and its outputs to the device of the first input."""

    reference = weakref.ref(module)

    def make(previous: Callable[..., Any] | None) -> Callable[..., Any]:
        def visit(*arguments: Any, **options: Any) -> Any:
            home = next(
                (each.device for each in tree_leaves((arguments, options)) if isinstance(each, torch.Tensor)), device
            )
            arguments, options = _moved((arguments, options), device)
            own: Any = reference()
            output = previous(*arguments, **options) if previous else type(own).forward(own, *arguments, **options)
            return _moved(output, home)

        return visit

    return make


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), values)
