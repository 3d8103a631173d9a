"""The layers of a module, with their bytes as they will be once loaded. It reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from .plan import Layer
from .slab import SlabLayout


def list_layers(module: torch.nn.Module) -> list[Layer]:
    """The modules with weights of their own, in the order in which they were registered.

    Movable are the leaves that ComfyUI itself can keep off the compute device (its casting operations), since code
    that reads such weights without calling the leaf is written for that. Not movable: a module that holds others, one
    with buffers, one that shares a tensor with another, and one whose weights are quantised (tensor subclasses). A
    shared tensor is counted for the first that has it.
    """
    modules = dict(module.named_modules())
    uses = Counter(id(tensor) for child in modules.values() for tensor in own_tensors(child).values())
    layers, seen = [], set()
    for name, child in modules.items():
        tensors = own_tensors(child)
        sizes = []
        for tensor_name, tensor in tensors.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                sizes += _loaded_bytes(child, tensor_name, tensor)
        if tensors:
            movable = (
                hasattr(child, "comfy_cast_weights")
                and next(child.children(), None) is None
                and next(child.buffers(recurse=False), None) is None
                and all(uses[id(tensor)] == 1 and not is_quantised(tensor) for tensor in tensors.values())
            )
            slab_bytes = layout_of(child).num_bytes if movable else 0
            layers.append(Layer(name, sum(sizes), movable, slab_bytes, _block_of(name, modules)))
    return layers


def _block_of(name: str, modules: Mapping[str, torch.nn.Module]) -> str:
    """The innermost item of a list of modules that the layer lies in: a block of a transformer, say."""
    while name:
        parent = name.rpartition(".")[0]
        if isinstance(modules[parent], torch.nn.ModuleList):
            return name
        name = parent
    return ""


def layout_of(module: torch.nn.Module) -> SlabLayout:
    """The slab of a movable module, with its tensors in the dtypes that they are loaded in."""
    tensors = own_tensors(module)
    return SlabLayout.of(tensors, {name: loaded_dtype(module, name) for name in tensors})


def is_quantised(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold the data of `tensor`: itself, or those inside a quantised one."""
    if not is_quantised(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def own_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the module itself, by name."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def loaded_dtype(module: torch.nn.Module, name: str) -> torch.dtype:
    """The dtype that ComfyUI loads a plain tensor in, which it notes beside it."""
    return getattr(module, f"{name}_comfy_model_dtype", None) or getattr(module, name).dtype


def _loaded_bytes(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> list[int]:
    """Bytes of the plain tensors of a parameter or buffer; quantised ones are loaded as they are."""
    if is_quantised(tensor):
        return [inner.nbytes for inner in plain_tensors(tensor)]
    return [tensor.numel() * loaded_dtype(module, name).itemsize]
