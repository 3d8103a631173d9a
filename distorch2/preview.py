"""What a node's settings will do, told before anything is loaded."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .comfyui.core import mm
from .comfyui.memory import is_started, memory_of
from .comfyui.program import COMFYUI
from .components import COMPONENTS, DIFFUSION_MODEL, TEXT_ENCODER, placed_components
from .knowledge import Files
from .machine import bytes_per_second
from .planning.plan import PACKED, ComponentRequest, DeviceMemory, Plan, size_text
from .plans import (
    Found,
    layers_of_checkpoint,
    layers_of_diffusion_model,
    layers_of_gguf_diffusion_model,
    layers_of_text_encoder,
    make_plans,
    notes_on_speed,
)
from .report import rows_of_plan
from .serving.distribution import Distribution
from .weights.checkpoint_file import CheckpointError, check_file
from .weights.devices import CPU, DISK_NAME

SPLIT_COMPONENTS = DIFFUSION_MODEL, TEXT_ENCODER
_KEPT_READINGS = 8
"""Of as many sources the layers are kept: a preview is asked for each time that a setting changes."""


@dataclass(frozen=True)
class Source:
    """What one loader loads. `read` is a function of `plans.py`: it takes `files`, `options`, and a device for each of
    `components`."""

    files: Files
    components: tuple[str, ...]
    read: Callable[..., dict[str, Found]]
    options: tuple[Any, ...] = ()

    def on(self, devices: Mapping[str, str]) -> Mapping[str, Found]:
        """By component, with the dtypes that suit `devices`. A file that has changed is read again."""
        return _read(self, tuple(map(_version_of, self.files)), tuple(devices[name] for name in self.components))


def checkpoint(path: str) -> Source:
    return Source((path,), COMPONENTS, layers_of_checkpoint)


def diffusion_model(path: str, dtype: torch.dtype | None = None) -> Source:
    """A file that holds nothing else, to be loaded in `dtype`."""
    return Source((path,), (DIFFUSION_MODEL,), layers_of_diffusion_model, (dtype,))


def gguf_diffusion_model(path: str, pack: Any) -> Source:
    """`pack` is as for `build_gguf_without_memory`."""
    return Source((path,), (DIFFUSION_MODEL,), layers_of_gguf_diffusion_model, (pack,))


def text_encoder(files: Files, clip_type: str) -> Source:
    """Files that hold nothing else. `clip_type` is as for `load_text_encoder`."""
    return Source(files, (TEXT_ENCODER,), layers_of_text_encoder, (clip_type,))


def preview_loader(
    source: Source, unet: ComponentRequest, clip: ComponentRequest, vae_device: str, may_measure: bool = True
) -> dict[str, Any]:
    """What a loader with these settings will do, as `_preview_of` has it. Those of what it does not load are ignored.

    Raises as `plan_checkpoint`.
    """
    memory = memory_of([unet, clip], vae_device, may_start=False)
    devices = dict(zip(COMPONENTS, (unet.compute_device, clip.compute_device, vae_device), strict=True))
    return _preview_of(source.files, source.on(devices), unet, clip, memory, may_measure)


def preview_component(
    source: Source, component: str, request: ComponentRequest, may_measure: bool = True
) -> dict[str, Any]:
    """The same for `distribute`, given one of `SPLIT_COMPONENTS` of what ComfyUI's loader has loaded for its default
    device. Raises `CheckpointError` also where the files do not have it."""
    memory, device = memory_of([request], may_start=False), str(mm.get_torch_device())
    found = source.on({**dict.fromkeys(COMPONENTS, device), TEXT_ENCODER: request.compute_device})
    if component not in found:
        raise CheckpointError(f"there is no {component} in {', '.join(source.files)}")
    # A text encoder computes on the CPU where the device lacks its dtype.
    device = found[component].device if component == TEXT_ENCODER else request.compute_device
    moved = {component: found[component]._replace(device=device)}
    return _preview_of(source.files, moved, request, request, memory, may_measure)


def _preview_of(
    files: Files,
    found: Mapping[str, Found],
    unet: ComponentRequest,
    clip: ComponentRequest,
    memory: Mapping[str, DeviceMemory],
    may_measure: bool,
) -> dict[str, Any]:
    """Lists of plain values. `components`: `name`, `bytes`, and `parts`, each with a `device`, how it is `served`,
    `layers`, `bytes`; `now`, the same parts as they lie now, None where the component of these files is not loaded;
    `copied` and `read`, the bytes that are copied from other devices, or read from the disk, in each step;
    `copying_s` and `computing_s`, the seconds that the copies take at the speed of the link, which is measured now if
    it may be, and that it took to compute when it ran last; `hidden`, the bytes that can be copied in that time. None
    where they are not known.

    `devices`: `name`, `total` and `free` bytes, None where that is not known, and `planned`. `warnings` are sentences.
    """
    plans = make_plans(found, unet, clip, memory, files, may_start=False, may_measure=may_measure)
    placed = placed_components(files, {name: plan.compute_device for name, plan in plans.items()})
    components = [
        {
            "name": name,
            "bytes": plan.model_bytes,
            "parts": _rows(name, plan),
            "now": _rows(name, placed[name].plan, placed[name].packed_part) if name in placed else None,
            "copied": sum(plan.copied_bytes_from(donor) for donor in plan.donors if donor != DISK_NAME),
            "read": plan.copied_bytes_from(DISK_NAME),
            **_speed(plan, placed.get(name), may_measure),
        }
        for name, plan in plans.items()
    ]
    planned = Counter[str]()
    for plan in plans.values():
        planned[plan.compute_device] += plan.compute_bytes
        for donor in plan.donors:
            planned[donor] += plan.bytes_on(donor)
    devices = [
        {"name": name, "total": memory[name].total_bytes or None, "free": _free(name), "planned": num_bytes}
        for name, num_bytes in planned.items()
    ]
    notes = [f"{name}: {note}" for name, plan in plans.items() for note in plan.notes]
    notes += [note for name, plan in plans.items() for note in notes_on_speed(name, plan)]
    return {"components": components, "devices": devices, "warnings": [*notes, *_warnings(devices)]}


def _version_of(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        check_file(path)  # which says what to do
        raise
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=_KEPT_READINGS)
def _read(source: Source, versions: tuple[object, ...], devices: tuple[str, ...]) -> Mapping[str, Found]:
    with _unlogged():
        return source.read(source.files, *source.options, *devices)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """ComfyUI logs what it builds, and warns of what is not in the files, as if that was loaded."""
    thread, logger = threading.get_ident(), logging.getLogger()

    def is_kept(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno > logging.WARNING

    logger.addFilter(is_kept)
    try:
        yield
    finally:
        logger.removeFilter(is_kept)


def _speed(plan: Plan, placed: Distribution | None, may_measure: bool) -> dict[str, float | None]:
    """Of copies from main memory, at least: half of it may come another way."""
    num_bytes = plan.copied_bytes_from(str(CPU))
    computing_s = placed.computing_seconds if placed is not None else None
    may_measure = may_measure and is_started(torch.device(plan.compute_device))
    link = bytes_per_second(str(CPU), plan.compute_device, may_measure) if num_bytes else None
    return {
        "copying_s": num_bytes / link if link is not None else None,
        "computing_s": computing_s,
        "hidden": computing_s * link if link is not None and computing_s is not None else None,
    }


def _rows(name: str, plan: Plan, packed_part: float | None = None) -> list[dict[str, Any]]:
    """Those of the report; with what is packed to how much of its size, where that is known."""
    return [
        {
            "device": row.device,
            "served": f"{row.served} to {packed_part:.0%}" if packed_part and PACKED in row.served else row.served,
            "layers": row.num_layers,
            "bytes": row.num_bytes,
        }
        for row in rows_of_plan(name, plan)
    ]


def _free(name: str) -> int | None:
    if name == DISK_NAME or not is_started(device := torch.device(name)):
        return None
    return int(mm.get_free_memory(device))


def _warnings(devices: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for device in devices:
        name, planned, total = device["name"], device["planned"], device["total"]
        if total is not None and planned > total:
            yield f"{name} has {size_text(total)}, and {size_text(planned)} are to lie there"
        elif name == str(CPU) and planned > (spare := COMFYUI.spare_host_memory()):
            yield f"main memory has room for {size_text(max(0, spare))}; the rest is read from the disk in each step"
