"""A whole model on a device of its own: a VAE, a ControlNet, a CLIP vision model. Nothing of it is split.

What is given stays as it is and usable; the model on the new device shares its weights, as long as neither is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ..forwards import Forwards
from ..plan import PlanError
from . import modules
from .core import ModelPatcher, mm

_CPU = torch.device("cpu")


def place_vae(vae: Any, device: torch.device) -> Any:
    """A VAE like `vae` on `device`, in the dtype that ComfyUI would choose there.

    Raises `PlanError` for one that has no weights.
    """
    if getattr(vae, "patcher", None) is None:
        raise PlanError("this VAE has no weights; there is none in the file that it was loaded from")
    placed = copy.copy(vae)
    placed.patcher = _on(vae.patcher, device)
    placed.first_stage_model, placed.device = placed.patcher.model, device
    dtype = mm.vae_dtype(device, vae.working_dtypes) if vae.device.type != device.type else vae.vae_dtype
    if dtype != vae.vae_dtype and not placed.patcher.is_dynamic():
        placed.first_stage_model.to(dtype)
        placed.vae_dtype = dtype
    return placed


def place_clip_vision(clip_vision: Any, device: torch.device) -> Any:
    """A CLIP vision model like `clip_vision` on `device`."""
    placed = copy.copy(clip_vision)
    placed.patcher = _on(clip_vision.patcher, device)
    placed.model, placed.load_device = placed.patcher.model, device
    return placed


def place_control_net(control_net: Any, device: torch.device) -> Any:
    """A ControlNet like `control_net` on `device`, wherever the diffusion model computes.

    Raises `PlanError` for a ControlLoRA, which computes with weights of the diffusion model, and for a T2I adapter.
    """
    patcher = getattr(control_net, "control_model_wrapped", None)
    if patcher is None or hasattr(control_net, "control_weights"):
        raise PlanError(
            f"a {type(control_net).__name__} computes where the diffusion model does, and cannot be put on {device}; "
            "connect it without this node"
        )
    placed = control_net.copy()
    placed.control_model_wrapped = _on(patcher, device)
    placed.control_model, placed.load_device = placed.control_model_wrapped.model, device
    if "forward" not in vars(placed.control_model):
        Forwards().set(placed.control_model, _visiting(placed.control_model, device))
    return placed


def _on(patcher: ModelPatcher, device: torch.device) -> ModelPatcher:
    """A patcher like `patcher` for `device`, with a module that is used there only."""
    # A dynamic patcher is for GPUs only.
    is_static = patcher.is_dynamic() and device.type == "cpu"
    placed = patcher.clone(disable_dynamic=is_static, model_override=modules.sharing(patcher, str(device)))
    placed.parent = None
    placed.load_device, placed.offload_device, placed.size = device, _CPU, 0
    if placed.is_dynamic():
        placed.register_load_device(device)
    return placed


def _visiting(
    module: torch.nn.Module, device: torch.device
) -> Callable[[Callable[..., Any] | None], Callable[..., Any]]:
    """A forward that takes what it is given to `device`, and what it returns home."""

    def make(previous: Callable[..., Any] | None) -> Callable[..., Any]:
        forward = previous or type(module).forward

        def visit(*arguments: Any, **options: Any) -> Any:
            home = next((leaf.device for leaf in tree_leaves((arguments, options)) if _is_tensor(leaf)), device)
            arguments, options = _moved((arguments, options), device)
            own = arguments if previous else (module, *arguments)
            return _moved(forward(*own, **options), home)

        return visit

    return make


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), values)
