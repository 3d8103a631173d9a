"""What ComfyUI has to be told of the simulated devices. It patches ComfyUI, which only a test may do."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from . import devices
from .tensor import counters

counters |= {"diffusion_forwards": 0, "clip_forwards": 0}


def tell_comfyui(
    setattr: Callable[[Any, str, Any], None] = setattr,
    compute: str | None = os.environ.get("SIMULATED_COMPUTE") or None,
    inference_bytes: int = int(os.environ.get("SIMULATED_INFERENCE_MB", "64")) * 1024**2,
) -> None:
    """Make ComfyUI's memory manager know the devices, and count forward passes; `setattr` does the patching.

    With `compute` (one of them; default: what SIMULATED_COMPUTE says) that is where ComfyUI computes, as on a GPU:
    models are loaded there, wholly or in part, and evicted. Of a device, `inference_bytes` are kept free of weights, in
    the place of the 1.2 GiB of ComfyUI. Dtypes are chosen as for the CPU, so that results are the same bits.
    """
    import comfy.model_base
    import comfy.model_management as mm
    import comfy.sd1_clip

    def extended(function, for_device):
        def with_simulated(dev=None, *flags, **options):
            device = mm.get_torch_device() if dev is None else dev
            if getattr(device, "type", None) == devices.NAME:
                index = devices.index_of(device)
                # With torch_free_too or torch_total_too it also asks for what torch has cached, which is nothing.
                return (for_device(index), 0) if any((*flags, *options.values())) else for_device(index)
            return function(device, *flags, **options)

        return with_simulated

    def counted(function, counter):
        def with_count(*arguments, **options):
            counters[counter] += 1
            return function(*arguments, **options)

        return with_count

    setattr(mm, "get_free_memory", extended(mm.get_free_memory, devices.free_bytes))
    setattr(mm, "get_total_memory", extended(mm.get_total_memory, lambda index: devices.mem_get_info(index)[1]))
    base_model, clip_model = comfy.model_base.BaseModel, comfy.sd1_clip.SDClipModel
    setattr(base_model, "_apply_model", counted(base_model._apply_model, "diffusion_forwards"))
    setattr(clip_model, "forward", counted(clip_model.forward, "clip_forwards"))

    simulated = [torch.device(devices.NAME, index) for index in range(devices.NUM_DEVICES)]
    if compute is None:
        host_devices = mm.get_all_torch_devices
        setattr(mm, "get_all_torch_devices", lambda *a, **options: [*host_devices(*a, **options), *simulated])
        return
    main = torch.device(compute)

    def all_devices(exclude_current=False):
        return [device for device in simulated if device != main or not exclude_current]

    def synchronize():
        for index in range(devices.NUM_DEVICES):
            devices.synchronize(index)

    weights_on_host = mm.maximum_vram_for_weights
    setattr(mm, "get_torch_device", lambda: main)
    setattr(mm, "get_all_torch_devices", all_devices)
    setattr(mm, "text_encoder_device", lambda: main)
    setattr(mm, "synchronize", synchronize)
    setattr(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)  # with --cpu nothing would ever be loaded in part
    setattr(mm, "MIN_WEIGHT_MEMORY_RATIO", 0.0)  # as for CUDA
    setattr(mm, "EXTRA_RESERVED_VRAM", 0)
    setattr(mm, "minimum_inference_memory", lambda: inference_bytes)
    # By this it keeps fp8 weights, where they would not fit in fp16.
    setattr(mm, "maximum_vram_for_weights", lambda device=None: weights_on_host(torch.device("cpu")))


def serve_routes() -> None:
    """GET /simulated_accelerators: the counters, and what each device holds."""
    from aiohttp import web
    from server import PromptServer

    @PromptServer.instance.routes.get("/simulated_accelerators")
    async def get_counters(_request):
        held = {"used_bytes": devices.used_bytes, "capacity_bytes": devices.capacity_bytes}
        return web.json_response({**counters, **held})
