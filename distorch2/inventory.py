"""The layers of a module, with their bytes as they will be once loaded. It reads only."""

from __future__ import annotations

import torch

from .plan import Layer


def list_layers(module: torch.nn.Module) -> list[Layer]:
    """The modules with weights of their own, in the order in which they were registered.

    A leaf is movable; a module that holds other modules is not, since its weights are used in code that nothing
    announces. A tensor that several modules share is counted for the first of them.
    """
    layers, seen = [], set()
    for name, child in module.named_modules():
        num_bytes = 0
        tensors = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        for tensor_name, tensor in tensors:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                num_bytes += _loaded_bytes(child, tensor_name, tensor)
        if tensors:
            is_leaf = next(child.children(), None) is None
            layers.append(Layer(name or type(module).__name__, num_bytes, movable=is_leaf))
    return layers


def _loaded_bytes(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> int:
    """Bytes of a tensor in the dtype that ComfyUI loads it in, which it notes beside it; quantised ones as they are."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner_names, _ = tensor.__tensor_flatten__()
        return sum(getattr(tensor, inner).nbytes for inner in inner_names)
    dtype = getattr(module, f"{name}_comfy_model_dtype", None) or tensor.dtype
    return tensor.numel() * dtype.itemsize
