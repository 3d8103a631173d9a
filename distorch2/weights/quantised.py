"""Quantised weights as plain tensors.

Two kinds are known: ComfyUI's `QuantizedTensor`, or any tensor subclass that torch can take apart, and the tensors of
ComfyUI-GGUF (or packs that follow it). Those hold the blocks of a GGUF file as bytes, know the weight's shape, and
carry patches with them, which are applied each time they are dequantised. Weights in F16 and F32 are of that class too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_GGUF_ATTRIBUTES = ("tensor_type", "tensor_shape")
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_GGUF_NOT_QUANTISED = ("F32", "F16")


class _Carried(list):
    """Patches of a GGUF weight. `copy` returns the same list, so that a change reaches every tensor of the weight:
    ComfyUI-GGUF copies the list with each tensor."""

    def copy(self) -> _Carried:
        return self


def is_gguf(tensor: torch.Tensor) -> bool:
    return all(hasattr(tensor, name) for name in _GGUF_ATTRIBUTES)


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether it has to be taken apart before its data can be moved."""
    return hasattr(tensor, "__tensor_flatten__") or is_gguf(tensor)


def can_be_taken_apart(tensor: torch.Tensor) -> bool:
    return is_quantised(tensor) or type(tensor) in _PLAIN_TYPES


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold the data of `tensor`: itself, or those inside a quantised one."""
    if is_gguf(tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return [tensor.as_subclass(torch.Tensor)]
    if not is_quantised(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def description(tensor: torch.Tensor) -> object:
    """What a quantised tensor is beside its plain tensors: equal for those that can take each other's place."""
    if is_gguf(tensor):
        return type(tensor), *(getattr(tensor, name) for name in _GGUF_ATTRIBUTES)
    return (type(tensor), tensor.__tensor_flatten__()) if is_quantised(tensor) else None


def rebuilder(tensor: torch.Tensor) -> Callable[[Sequence[torch.Tensor]], torch.nn.Parameter]:
    """A function that makes a parameter like `tensor` of other plain tensors, which it refers to and does not copy.

    Patches that a GGUF tensor carries become a list that it shares with the parameters.
    """
    if is_gguf(tensor):
        return _gguf_rebuilder(tensor)
    if not is_quantised(tensor):
        return lambda parts: torch.nn.Parameter(parts[0], requires_grad=False)
    kind, (names, context), shape, stride = type(tensor), tensor.__tensor_flatten__(), tensor.shape, tensor.stride()

    def rebuild(parts: Sequence[torch.Tensor]) -> torch.nn.Parameter:
        whole = kind.__tensor_unflatten__(dict(zip(names, parts, strict=True)), context, shape, stride)
        # The mark of a parameter, without `Parameter(whole)`, which would copy the scales.
        whole._is_param = True
        return whole

    return rebuild


def _gguf_rebuilder(tensor: Any) -> Callable[[Sequence[torch.Tensor]], torch.nn.Parameter]:
    kind = type(tensor)
    if not isinstance(tensor.patches, _Carried):
        tensor.patches = _Carried(tensor.patches)
    attributes = {name: getattr(tensor, name) for name in (*_GGUF_ATTRIBUTES, "patches")} | {"_is_param": True}

    def rebuild(parts: Sequence[torch.Tensor]) -> torch.nn.Parameter:
        whole: Any = parts[0].as_subclass(kind)
        vars(whole).update(attributes)
        return whole

    return rebuild


def carries_patches(tensor: torch.Tensor) -> bool:
    """Whether patches of this weight go with it, and its data stays as it is."""
    return is_gguf(tensor) and getattr(tensor.tensor_type, "name", None) not in (None, *_GGUF_NOT_QUANTISED)


def carry(tensor: Any, patches: Sequence[tuple]) -> None:
    """Replace the patches of `tensor`, and of the parameters that `rebuilder` has made of it: they share one list."""
    if not isinstance(tensor.patches, _Carried):  # ComfyUI-GGUF may give all tensors the same list
        tensor.patches = _Carried()
    tensor.patches[:] = patches


def as_parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    """A parameter with the data of `tensor`, which it does not copy."""
    return rebuilder(tensor)([plain.detach() for plain in plain_tensors(tensor)])


def unpatched_parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    """As `as_parameter`, but patches that `tensor` carries, now or later, are not its own."""
    parameter = as_parameter(tensor)
    if is_gguf(parameter):
        vars(parameter)["patches"] = []
    return parameter


def to_device(tensor: torch.Tensor, device: torch.device, copy: bool = False) -> torch.nn.Parameter:
    """A parameter on `device`, quantised if `tensor` is: torch's own `.to(...)` may give it in full precision."""
    return rebuilder(tensor)([plain.detach().to(device, copy=copy) for plain in plain_tensors(tensor)])
