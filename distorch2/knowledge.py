"""What is known of the machine, and of a model that has run, for plans that are to be chosen (`auto`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .comfyui.core import mm
from .comfyui.program import COMFYUI
from .moving.speed import link_bytes_per_second, multiplications_per_second
from .planning.automatic import UNKNOWN, Speeds, computing_part
from .planning.plan import Automatic, ComponentRequest, DeviceMemory
from .serving.distribution import Distribution


def known_link(device: torch.device, may_measure: bool) -> float | None:
    """Bytes per second from page-locked memory; None where there is none, or no memory to measure it."""
    if not COMFYUI.can_pin_for(device):
        return None
    try:
        return link_bytes_per_second(device, may_measure)
    except RuntimeError:
        return None


def memory_beside_activations(
    request: ComponentRequest, memory: Mapping[str, DeviceMemory], placed: Distribution | None
) -> Mapping[str, DeviceMemory]:
    """What the model needed when it ran, where that is more than ComfyUI leaves free for any, is not free for weights
    that are placed automatically."""
    home = request.compute_device
    needed = placed.activation_bytes if placed is not None else None
    free_bytes = memory[home].free_bytes
    if needed is None or free_bytes is None or not isinstance(request.allocation, Automatic):
        return memory
    less = max(0, needed - int(mm.minimum_inference_memory()))
    return {**memory, home: replace(memory[home], free_bytes=max(0, free_bytes - less))}


def speeds_for(
    request: ComponentRequest,
    model_bytes: int,
    memory: Mapping[str, DeviceMemory],
    placed: Distribution | None,
    may_measure: bool,
) -> Speeds:
    """Unknown where they would make no difference: there is room on the compute device, or no other accelerator of its
    kind, or all are the same. Only what is not known is measured."""
    home = torch.device(request.compute_device)
    free_bytes = memory[str(home)].free_bytes
    if not isinstance(request.allocation, Automatic) or free_bytes is None:
        return UNKNOWN
    others = [torch.device(name) for name in request.allocation.devices if torch.device(name).type == home.type]
    devices = list(dict.fromkeys([home, *others]))
    if free_bytes - request.allocation.keep_bytes >= model_bytes or home.type == "cpu" or not _differ(devices):
        return UNKNOWN
    try:
        found = {str(device): multiplications_per_second(device, may_measure) for device in devices}
    except RuntimeError:  # there is no memory for it
        found = {}
    speeds = Speeds(known_link(home, may_measure), {name: each for name, each in found.items() if each is not None})
    return replace(speeds, step_s=_alone(placed, speeds))


def _differ(devices: Sequence[torch.device]) -> bool:
    backend = getattr(torch, devices[0].type)
    return len(devices) > 1 and len({backend.get_device_name(device) for device in devices}) > 1


def _alone(placed: Distribution | None, speeds: Speeds) -> float | None:
    """What the last step would have taken without the devices that relayed."""
    if placed is None or placed.computing_seconds is None:
        return None
    plan = placed.plan
    relayed = {device: plan.bytes_on(device) for device in plan.relays}
    return placed.computing_seconds / computing_part(
        relayed, plan.model_bytes, lambda device: speeds.slowness(device, plan.compute_device)
    )
