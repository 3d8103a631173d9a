"""Quantised weights (ComfyUI's `QuantizedTensor`, any tensor subclass that torch can take apart) as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def is_quantised(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold the data of `tensor`: itself, or those inside a quantised one."""
    if not is_quantised(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def description(tensor: torch.Tensor) -> object:
    """What a quantised tensor is beside its plain tensors: equal for those that can take each other's place."""
    return (type(tensor), tensor.__tensor_flatten__()) if is_quantised(tensor) else None


def rebuilder(tensor: torch.Tensor) -> Callable[[Sequence[torch.Tensor]], torch.nn.Parameter]:
    """A function that makes a parameter like `tensor` of other plain tensors, which it refers to and does not copy."""
    if not is_quantised(tensor):
        return lambda parts: torch.nn.Parameter(parts[0], requires_grad=False)
    kind, (names, context), shape, stride = type(tensor), tensor.__tensor_flatten__(), tensor.shape, tensor.stride()

    def rebuild(parts: Sequence[torch.Tensor]) -> torch.nn.Parameter:
        whole = kind.__tensor_unflatten__(dict(zip(names, parts, strict=True)), context, shape, stride)
        # The mark of a parameter, without `Parameter(whole)`, which would copy the scales.
        whole._is_param = True
        return whole

    return rebuild


def as_parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    """A parameter with the data of `tensor`, which it does not copy."""
    return rebuilder(tensor)([plain.detach() for plain in plain_tensors(tensor)])


def to_device(tensor: torch.Tensor, device: torch.device, copy: bool = False) -> torch.nn.Parameter:
    """A parameter on `device`, quantised if `tensor` is: torch's own `.to(...)` may give it in full precision."""
    return rebuilder(tensor)([plain.detach().to(device, copy=copy) for plain in plain_tensors(tensor)])
