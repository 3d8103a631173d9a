"""The layers of a module, with their bytes as they will be once loaded. It reads only, but for `note_dtype`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from ..planning.plan import Layer
from .quantised import is_quantised, plain_tensors
from .slab import SlabLayout, aligned

LEAST_TABLE_BYTES = 8 * 1024**2
"""To look up rows the host waits for their numbers: a small table is better copied with the layers around it."""
_REPLACED = "distorch2_replaced_dtypes"  # attribute of a module: name of a parameter -> dtype of what replaced it


def list_layers(module: torch.nn.Module) -> list[Layer]:
    """The modules with weights of their own, in the order in which they were registered.

    Movable are the leaves that ComfyUI itself can keep off the compute device (its casting operations), since code
    that reads such weights without calling the leaf is written for that. Not movable: a module that holds others, one
    with buffers, and one that shares a tensor with another. A shared tensor is counted for the first that has it.
    """
    modules = dict(module.named_modules())
    owned = {name: own_tensors(child) for name, child in modules.items()}
    uses = Counter(id(tensor) for tensors in owned.values() for tensor in tensors.values())
    layers, seen = [], set()
    for name, child in modules.items():
        tensors = owned[name]
        sizes, bf16_bytes = [], 0
        for tensor_name, tensor in tensors.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                parts = zip(plain_tensors(tensor), loaded_dtypes(child, tensor_name), strict=True)
                of_parts = [(part.numel() * dtype.itemsize, dtype) for part, dtype in parts]
                sizes += [num_bytes for num_bytes, _ in of_parts]
                bf16_bytes += sum(num_bytes for num_bytes, dtype in of_parts if dtype is torch.bfloat16)
        if tensors:
            movable = (
                hasattr(child, "comfy_cast_weights")
                and type(child).forward is not torch.nn.Module.forward  # a container that others read
                and next(child.children(), None) is None
                and next(child.buffers(recurse=False), None) is None
                and all(uses[id(tensor)] == 1 for tensor in tensors.values())
            )
            slab_bytes = sum(map(aligned, sizes)) if movable else 0
            block, unit = _block_of(name, modules), _unit_of(name, modules)
            is_table = movable and sum(sizes) >= LEAST_TABLE_BYTES and _is_table(child)
            is_bf16 = 2 * bf16_bytes > sum(sizes)
            layers.append(Layer(name, sum(sizes), movable, slab_bytes, block, unit, is_table, is_bf16))
    return layers


def _is_table(module: torch.nn.Module) -> bool:
    """Whether a layer only reads rows of its weight, by their numbers."""
    return (
        isinstance(module, torch.nn.Embedding)
        and [*own_tensors(module)] == ["weight"]
        and not is_quantised(module.weight)
        and module.padding_idx is None  # which has to be the number of a row
        and module.max_norm is None  # by which rows are written
    )


def _block_of(name: str, modules: Mapping[str, torch.nn.Module]) -> str:
    """The innermost item of a list of modules that the layer lies in: a block of a transformer, say."""
    while name:
        parent = name.rpartition(".")[0]
        if isinstance(modules[parent], torch.nn.ModuleList):
            return name
        name = parent
    return ""


def _unit_of(name: str, modules: Mapping[str, torch.nn.Module]) -> str:
    """The outermost item of a list of modules that the layer lies in; lists of lists are one. Such items are called one
    after another, so that one of them can run elsewhere: a block of a transformer, a part of a block of a UNet."""
    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    parts, parent = name.split("."), ""
    for part in parts:
        child = f"{parent}.{part}" if parent else part
        if isinstance(modules[parent], lists) and not isinstance(modules[child], lists):
            return child
        parent = child
    return ""


def layout_of(module: torch.nn.Module) -> SlabLayout:
    """The slab of a movable module, with its tensors in the dtypes that they are loaded in."""
    tensors = own_tensors(module)
    return SlabLayout.of(tensors, {name: loaded_dtypes(module, name) for name in tensors})


def own_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the module itself, by name."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def loaded_dtypes(module: torch.nn.Module, name: str) -> list[torch.dtype]:
    """The dtypes in which the plain tensors of a parameter or buffer are loaded.

    ComfyUI notes that of a plain one beside it; quantised ones are loaded as they are, and replaced ones too.
    """
    tensor = getattr(module, name)
    if is_quantised(tensor):
        return [part.dtype for part in plain_tensors(tensor)]
    noted = vars(module).get(_REPLACED, {})
    return [noted.get(name) or getattr(module, f"{name}_comfy_model_dtype", None) or tensor.dtype]


def note_dtype(module: torch.nn.Module, name: str, replacement: torch.Tensor) -> None:
    """Remember the dtype of what takes the place of a parameter, where ComfyUI notes another one."""
    noted = vars(module).setdefault(_REPLACED, {})
    noted.pop(name, None)
    if getattr(module, f"{name}_comfy_model_dtype", None) not in (None, replacement.dtype):
        noted[name] = replacement.dtype
    if not noted:
        delattr(module, _REPLACED)
