"""A custom node pack for tests: two accelerators `sim:0` and `sim:1` that only lend memory.

A simulated tensor holds real memory of the host, and refuses every operation but allocation, views and copies, as a
CUDA tensor refuses to be mixed with one of the host. Each device has a capacity (environment variable
SIMULATED_CAPACITY_MB, default 1024) and counts what it holds and what was copied from it. As a pack it also tells
ComfyUI's memory manager about the devices, and counts the forward passes of diffusion models and of CLIP: it patches
ComfyUI, which only a test may do.
"""

from __future__ import annotations

import os
import types
import weakref

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NUM_DEVICES = 2
capacity_bytes = [int(os.environ.get("SIMULATED_CAPACITY_MB", "1024")) * 1024**2] * NUM_DEVICES
used_bytes = [0] * NUM_DEVICES
counters = {"copies": 0, "bytes": 0, "diffusion_forwards": 0, "clip_forwards": 0}


class _Memory(bytearray):
    """Host memory that a simulated device lends; a class of its own since a plain bytearray has no weak references."""


def _allocate(num_bytes: int, index: int) -> torch.Tensor:
    if used_bytes[index] + num_bytes > capacity_bytes[index]:
        raise torch.OutOfMemoryError(
            f"sim:{index} out of memory: {num_bytes} bytes asked, {capacity_bytes[index] - used_bytes[index]} free"
        )
    memory = _Memory(max(1, num_bytes))
    used_bytes[index] += num_bytes
    weakref.finalize(memory, _release, num_bytes, index)
    return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]


def _release(num_bytes: int, index: int) -> None:
    used_bytes[index] -= num_bytes


class SimulatedTensor(torch.Tensor):
    """A tensor on `sim:index`; `memory` is the host tensor behind it, of the same shape, strides and dtype."""

    @staticmethod
    def __new__(cls, memory: torch.Tensor, index: int) -> SimulatedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=torch.device("sim", index),
        )
        tensor.memory = memory
        tensor.index = index
        return tensor

    def __repr__(self, **_options) -> str:
        return f"SimulatedTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _VIEWS:
            with torch.inference_mode(args[0].is_inference()):  # a view is of its base's kind, as elsewhere
                return SimulatedTensor(func(args[0].memory, *args[1:], **kwargs), args[0].index)
        if name == "copy_":
            target, source = args[:2]
            _host(target).copy_(_host(source))
            if isinstance(source, SimulatedTensor) and not isinstance(target, SimulatedTensor):
                counters["copies"] += 1
                counters["bytes"] += source.nbytes
            return target
        if name in ("_to_copy", "to", "clone"):
            return _to(func, name, args, kwargs)
        if name == "empty_like":
            options = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            return torch.empty(args[0].shape, dtype=options["dtype"], device=options["device"])
        if name in ("is_pinned", "_has_compatible_shallow_copy_type"):
            return False
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, sim and cpu! ({func})"
        )


_VIEWS = {"view", "_unsafe_view", "detach", "alias", "slice", "narrow", "as_strided", "_reshape_alias", "unsqueeze"}


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.memory if isinstance(tensor, SimulatedTensor) else tensor


def _to(func, name: str, args, kwargs):
    """A copy on the device asked for, or `args[0]` where nothing changes and no copy is asked for."""
    source = args[0]
    options = dict(kwargs)
    if name == "to":
        for argument in args[1:]:
            if isinstance(argument, (torch.device, str)):
                options["device"] = argument
            elif isinstance(argument, torch.dtype):
                options["dtype"] = argument
    device = torch.device(options.get("device") or source.device)
    dtype = options.get("dtype") or source.dtype
    if name == "to" and device == source.device and dtype == source.dtype and not options.get("copy"):
        return source
    target = torch.empty(source.shape, dtype=dtype, device=device)
    return target.copy_(source)


def _empty(size, dtype=None, device=None, **_options):
    dtype = dtype or torch.get_default_dtype()
    index = (device.index if device is not None else None) or 0
    num_bytes = torch.Size(size).numel() * dtype.itemsize
    return SimulatedTensor(_allocate(num_bytes, index).view(dtype).view(size), index)


def _empty_strided(size, stride, dtype=None, device=None, **_options):
    return _empty(size, dtype=dtype, device=device)


def _device_module() -> types.SimpleNamespace:
    """What torch offers of a backend as `torch.<name>`."""
    return types.SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: NUM_DEVICES,
        current_device=lambda: 0,
        mem_get_info=lambda index: (capacity_bytes[index] - used_bytes[index], capacity_bytes[index]),
        memory_reserved=lambda index: 0,
        memory_allocated=lambda index: 0,
        synchronize=lambda device=None: None,
        manual_seed_all=lambda seed: None,
        _is_in_bad_fork=lambda: False,
    )


def _install() -> None:
    if hasattr(torch, "sim"):
        return
    _setup_privateuseone_for_python_backend("sim")
    torch.sim = _device_module()
    global _library  # what is registered lasts as long as this object
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")


def tell_comfyui(setattr=setattr) -> None:
    """Make ComfyUI's memory manager know the devices, and count forward passes; `setattr` does the patching."""
    import comfy.model_base
    import comfy.model_management as mm
    import comfy.sd1_clip

    devices = [torch.device("sim", index) for index in range(NUM_DEVICES)]

    def extended(function, for_device):
        def with_simulated(device=None, *flags, **options):
            if getattr(device, "type", None) == "sim":
                # With torch_free_too or torch_total_too it also asks for what torch has cached, which is nothing.
                return (for_device(device.index), 0) if any((*flags, *options.values())) else for_device(device.index)
            return function(device, *flags, **options)

        return with_simulated

    def counted(function, counter):
        def with_count(*arguments, **options):
            counters[counter] += 1
            return function(*arguments, **options)

        return with_count

    all_devices = mm.get_all_torch_devices
    base_model, clip_model = comfy.model_base.BaseModel, comfy.sd1_clip.SDClipModel
    setattr(mm, "get_all_torch_devices", lambda *a, **options: [*all_devices(*a, **options), *devices])
    setattr(mm, "get_free_memory", extended(mm.get_free_memory, lambda i: capacity_bytes[i] - used_bytes[i]))
    setattr(mm, "get_total_memory", extended(mm.get_total_memory, lambda i: capacity_bytes[i]))
    setattr(base_model, "_apply_model", counted(base_model._apply_model, "diffusion_forwards"))
    setattr(clip_model, "forward", counted(clip_model.forward, "clip_forwards"))


def _serve_counters() -> None:
    """GET /simulated_accelerators: the counters, and what each device holds."""
    from aiohttp import web
    from server import PromptServer

    @PromptServer.instance.routes.get("/simulated_accelerators")
    async def get_counters(_request):
        return web.json_response({**counters, "used_bytes": used_bytes, "capacity_bytes": capacity_bytes})


_install()
NODE_CLASS_MAPPINGS: dict[str, type] = {}
if __name__ != "simulated_accelerators":  # imported by ComfyUI as a pack, under its own name for it
    tell_comfyui()
    _serve_counters()
