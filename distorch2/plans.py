"""Plans for components: those of a load, and before it, from files that are not loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from .comfyui.core import mm
from .comfyui.memory import memory_of
from .comfyui.without_memory import (
    build_diffusion_model_without_memory,
    build_gguf_without_memory,
    build_text_encoder_without_memory,
    build_without_memory,
    read_shapes,
)
from .components import DIFFUSION_MODEL, TEXT_ENCODER, VAE, note_runs
from .knowledge import Files, Origin, last_run, memory_beside_activations, speeds_for
from .moving.unpacking import reason_against
from .planning.plan import AUTO, GIB, OFF, ON, ComponentRequest, DeviceMemory, Layer, Plan
from .planning.planner import make_plan
from .weights.inventory import list_layers

logger = logging.getLogger(__name__)

_NOT_PAGE_LOCKED = ("xpu", "npu", "mlu")
"""Kinds of accelerators for which ComfyUI page-locks no memory that it has already."""


def plan_checkpoint(ckpt_path: str, unet: ComponentRequest, clip: ComponentRequest, vae_device: str) -> dict[str, Plan]:
    """The plans that `load_checkpoint` would make now, by component.

    Of a safetensors file only the header is read, and nothing is loaded: it takes about a tenth of a second, and a
    little more the first time that `auto` is planned for cards that differ. Raises as `load_checkpoint`, and
    `CheckpointError` also for a file in another format.
    """
    memory = memory_of([unet, clip], vae_device)
    found = layers_of_checkpoint((ckpt_path,), unet.compute_device, clip.compute_device, vae_device)
    return make_plans(found, unet, clip, memory, (ckpt_path,))


class Found(NamedTuple):
    """The layers of a component, and the device that it would compute on."""

    layers: Sequence[Layer]
    device: str


def layers_of_checkpoint(files: Files, unet_device: str, clip_device: str, vae_device: str) -> dict[str, Found]:
    """By component, of a checkpoint. Of the file only the header is read."""
    built = build_without_memory(read_shapes(*files), unet_device, clip_device, vae_device)
    modules = {
        DIFFUSION_MODEL: (built.model, unet_device),
        TEXT_ENCODER: (built.text_encoder, built.clip_device),
        VAE: (built.vae, vae_device),
    }
    return {
        name: Found(list_layers(module), device) for name, (module, device) in modules.items() if module is not None
    }


def layers_of_diffusion_model(files: Files, dtype: torch.dtype | None, device: str) -> dict[str, Found]:
    """The same of a file that holds a diffusion model alone, in `dtype` where that is asked for."""
    module = build_diffusion_model_without_memory(read_shapes(*files), device, dtype)
    return {DIFFUSION_MODEL: Found(list_layers(module), device)}


def layers_of_gguf_diffusion_model(files: Files, pack: Any, device: str) -> dict[str, Found]:
    """The same of a GGUF file, which is mapped into memory. `pack` is as for `build_gguf_without_memory`."""
    (path,) = files
    return {DIFFUSION_MODEL: Found(list_layers(build_gguf_without_memory(path, pack, device)), device)}


def layers_of_text_encoder(files: Files, clip_type: str, device: str) -> dict[str, Found]:
    """The same of the files of a text encoder. `clip_type` is as for `load_text_encoder`."""
    module, device = build_text_encoder_without_memory([read_shapes(path) for path in files], clip_type, device)
    return {TEXT_ENCODER: Found(list_layers(module), device)}


def make_plans(
    found: Mapping[str, Found],
    unet: ComponentRequest,
    clip: ComponentRequest,
    memory: Mapping[str, DeviceMemory],
    files: Files,
    may_start: bool = True,
    may_measure: bool = True,
) -> dict[str, Plan]:
    """A plan for every component, in the order of the report. What one keeps on donors is not free for the next.

    `auto` takes into account how the components of these files ran last. What it has to know of the machine is measured
    now if it `may_measure`; on devices that are not in use yet only if it `may_start` to use them.
    """
    note_runs()
    plans: dict[str, Plan] = {}
    for component, request in ((DIFFUSION_MODEL, unet), (TEXT_ENCODER, clip)):
        if component in found:
            layers, device = found[component]
            asked = replace(request, compute_device=device)
            plan = plan_component(layers, asked, memory, (component, files), may_start, may_measure)
            memory = {device: _without_donated(room, plan, device) for device, room in memory.items()}
            plans[component] = plan
    if VAE in found:
        plans[VAE] = Plan.all_on(found[VAE].device, found[VAE].layers)
    return plans


def plan_component(
    layers: Sequence[Layer],
    request: ComponentRequest,
    memory: Mapping[str, DeviceMemory],
    origin: Origin | None,
    may_start: bool = True,
    may_measure: bool = True,
) -> Plan:
    """A plan that packs nothing where the compute device cannot unpack it. The rest is as for `make_plans`."""
    run = last_run(origin, request.compute_device) if origin is not None else None
    reason = reason_against(torch.device(request.compute_device).type)
    memory = memory_beside_activations(request, memory, run)
    model_bytes = sum(layer.num_bytes for layer in layers)
    speeds = speeds_for(request, model_bytes, memory, run, may_start, may_measure)
    plan = make_plan(layers, replace(request, pack_weights=OFF) if reason else request, memory, speeds)
    is_missed = request.pack_weights == ON or (request.pack_weights == AUTO and plan.is_worth_packing)
    if reason and is_missed:
        logger.info("DisTorch2: weights are not packed for %s: %s", plan.compute_device, reason)
    return plan


def _without_donated(memory: DeviceMemory, plan: Plan, device: str) -> DeviceMemory:
    if memory.free_bytes is None or device not in plan.donors:
        return memory
    return replace(memory, free_bytes=max(0, memory.free_bytes - plan.bytes_on(device)))


def notes_on_speed(component: str, plan: Plan) -> Iterator[str]:
    """What makes a component slow, and can be chosen otherwise."""
    accelerator = next((str(device) for device in mm.get_all_torch_devices() if device.type != "cpu"), None)
    if component != VAE and plan.compute_device == "cpu" and accelerator and plan.model_bytes >= GIB:
        yield f"{component}: computes on cpu, which is slow for one of its size; choose {accelerator} for speed"
    if torch.device(plan.compute_device).type in _NOT_PAGE_LOCKED and any(
        item.device == "cpu" for item in plan.streamed
    ):
        yield f"{component}: main memory is not page-locked for {plan.compute_device}, and is copied more slowly"
