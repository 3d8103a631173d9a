"""What a node's settings will do, told from the header of its file before anything is loaded."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from . import loading
from .comfyui.core import mm
from .comfyui.memory import memory_of
from .comfyui.patcher import DistributedPatcher
from .comfyui.program import COMFYUI
from .planning.plan import ComponentRequest, DeviceMemory, Layer, Plan, size_text
from .report import rows_of_plan
from .weights.checkpoint_file import CheckpointError
from .weights.devices import CPU, DISK_NAME

SPLIT_COMPONENTS = loading.DIFFUSION_MODEL, loading.TEXT_ENCODER
_KEPT_FILES = 8
"""Of as many files the layers are kept: a preview is asked for each time that a setting changes."""

_Parts = tuple[Mapping[str, Sequence[Layer]], Mapping[str, str]]
_kept: OrderedDict[tuple[Any, ...], _Parts] = OrderedDict()
_lock = threading.Lock()


def preview_checkpoint(
    ckpt_path: str, unet: ComponentRequest, clip: ComponentRequest, vae_device: str
) -> dict[str, Any]:
    """As `preview_of`, for `load_checkpoint`. Raises as `plan_checkpoint`."""
    memory = memory_of([unet, clip], vae_device)
    devices = unet.compute_device, clip.compute_device, vae_device
    layers, computing = _parts_of(ckpt_path, loading.layers_of_checkpoint, devices)
    return preview_of(ckpt_path, loading.make_plans(layers, computing, unet, clip, memory), memory)


def preview_diffusion_model(path: str, request: ComponentRequest) -> dict[str, Any]:
    """The same for `load_diffusion_model`."""
    memory = memory_of([request])
    layers, computing = _parts_of(path, loading.layers_of_diffusion_model, (request.compute_device,))
    return preview_of(path, loading.make_plans(layers, computing, request, request, memory), memory)


def preview_component(path: str, is_checkpoint: bool, component: str, request: ComponentRequest) -> dict[str, Any]:
    """The same for `distribute`, given one of `SPLIT_COMPONENTS` of a file that ComfyUI's loader has loaded for its
    default device. Raises `CheckpointError` also where the file does not have it."""
    memory, device = memory_of([request]), str(mm.get_torch_device())
    if is_checkpoint:
        layers, _ = _parts_of(path, loading.layers_of_checkpoint, (device,) * 3)
    else:
        layers, _ = _parts_of(path, loading.layers_of_diffusion_model, (device,))
    if component not in layers:
        raise CheckpointError(f"there is no {component} in {path}")
    of_component = {component: layers[component]}
    plans = loading.make_plans(of_component, {component: request.compute_device}, request, request, memory)
    return preview_of(path, plans, memory)


def preview_of(path: str, plans: Mapping[str, Plan], memory: Mapping[str, DeviceMemory]) -> dict[str, Any]:
    """Lists of plain values. `components`: `name`, `bytes`, and `parts`, each with a `device`, how it is `served`,
    `layers`, `bytes`; `now`, the same parts as they lie now, None where the component of this file is not loaded;
    `copied` and `read`, the bytes that are copied from other devices, or read from the disk, each time it runs.
    `devices`: `name`, `total` and `free` bytes, None where that is not known, and `planned`. `warnings` are sentences.
    """
    placed = _placed_plans(path)
    components = [
        {
            "name": name,
            "bytes": plan.model_bytes,
            "parts": _parts(name, plan),
            "now": _parts(name, placed[name]) if name in placed else None,
            "copied": sum(group.slab_bytes for group in plan.groups if _is_copied(group, plan) and not _on_disk(group)),
            "read": sum(group.slab_bytes for group in plan.groups if _on_disk(group) and not group.is_table),
        }
        for name, plan in plans.items()
    ]
    planned: dict[str, int] = {}
    for plan in plans.values():
        for device in dict.fromkeys((plan.compute_device, *plan.devices)):
            on_device = plan.compute_bytes if device == plan.compute_device else plan.bytes_on(device)
            planned[device] = planned.get(device, 0) + on_device
    devices = [
        {"name": name, "total": _total(name, memory), "free": _free(name), "planned": num_bytes}
        for name, num_bytes in planned.items()
    ]
    notes = [f"{name}: {note}" for name, plan in plans.items() for note in plan.notes]
    return {"components": components, "devices": devices, "warnings": [*notes, *_warnings(devices)]}


def _parts_of(path: str, read: Callable[..., _Parts], devices: Sequence[str]) -> _Parts:
    """Kept as long as the file is the same. The kind of a device decides what a model is loaded as."""
    status = os.stat(path) if os.path.exists(path) else None
    key = path, status and (status.st_mtime_ns, status.st_size), read.__name__, *devices
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    with _unlogged():
        parts = read(path, *devices)
    with _lock:
        _kept[key] = parts
        while len(_kept) > _KEPT_FILES:
            _kept.popitem(last=False)
    return parts


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """ComfyUI logs what it builds, as if that was loaded."""
    thread, logger = threading.get_ident(), logging.getLogger()

    def is_kept(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno > logging.INFO

    logger.addFilter(is_kept)
    try:
        yield
    finally:
        logger.removeFilter(is_kept)


def _placed_plans(path: str) -> dict[str, Plan]:
    """By component, of this file, as far as they are loaded now."""
    found = {}
    for loaded in list(mm.current_loaded_models):
        patcher = loaded.model
        if isinstance(patcher, DistributedPatcher) and patcher.cached_patcher_init is not None:
            arguments, plan = patcher.cached_patcher_init[1], patcher.placed_plan
            if plan is not None and path in arguments:
                found[arguments[0] if arguments[0] in loading.COMPONENTS else loading.DIFFUSION_MODEL] = plan
    return found


def _parts(name: str, plan: Plan) -> list[dict[str, Any]]:
    return [
        {"device": row.device, "served": row.served, "layers": row.num_layers, "bytes": row.num_bytes}
        for row in rows_of_plan(name, plan)
    ]


def _is_copied(group: Any, plan: Plan) -> bool:
    return group.is_streamed and group.device != plan.compute_device


def _on_disk(group: Any) -> bool:
    return group.device == DISK_NAME


def _total(name: str, memory: Mapping[str, DeviceMemory]) -> int | None:
    return memory[name].total_bytes or None if name in memory else None


def _free(name: str) -> int | None:
    return None if name == DISK_NAME else int(mm.get_free_memory(torch.device(name)))


def _warnings(devices: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for device in devices:
        name, planned, total = device["name"], device["planned"], device["total"]
        if total is not None and planned > total:
            yield f"{name} has {size_text(total)}, and {size_text(planned)} are to lie there"
        elif name == str(CPU) and planned > (spare := COMFYUI.spare_host_memory()):
            yield f"main memory has room for {size_text(max(0, spare))}; the rest is read from the disk in each step"
