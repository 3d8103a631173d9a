"""For plans that are to be chosen (`auto`): which speeds they need, and how models ran last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .comfyui.core import mm
from .comfyui.memory import is_started
from .machine import bytes_per_second, multiplications_per_second
from .moving.streams import backend_of
from .planning.automatic import UNKNOWN, Speeds, computing_part, of_its_kind, relaying_and_keeping, room_of
from .planning.plan import OVERFLOW_DEVICE, Automatic, ComponentRequest, DeviceMemory
from .serving.distribution import Distribution

Files = tuple[str, ...]
"""The paths of the file, or the files, that a model is loaded from."""
Origin = tuple[str, Files]
"""A component's name, and the files that it is loaded from."""


@dataclass(frozen=True)
class Run:
    """How a model ran last: what it needed beside weights, the most that was seen, and what a step took, without
    waiting for copies, while `relayed` bytes of its `model_bytes` were on these donors. None where it is not known."""

    activation_bytes: int | None
    computing_seconds: float | None
    relayed: Mapping[str, int]
    model_bytes: int


_runs: dict[tuple[Origin, str], Run] = {}
"""By origin and compute device: kept when the model is unloaded."""


def note_run(origin: Origin, placed: Distribution) -> None:
    """Note what is known of a model's last run, if anything is."""
    if placed.activation_bytes is None and placed.computing_seconds is None:
        return
    relayed = Counter[str]()
    for item in placed.plan.placements:
        if placed.plan.is_relayed(item):
            relayed[item.device] += item.layer.num_bytes
    run = Run(placed.activation_bytes, placed.computing_seconds, relayed, placed.plan.model_bytes)
    _runs[origin, str(placed.device)] = run


def last_run(origin: Origin, device: str) -> Run | None:
    return _runs.get((origin, device))


def memory_beside_activations(
    request: ComponentRequest, memory: Mapping[str, DeviceMemory], run: Run | None
) -> Mapping[str, DeviceMemory]:
    """For weights that are placed automatically: what the model needed when it ran, where that is more than ComfyUI
    leaves free for any model, is not free on devices that compute."""
    if run is None or run.activation_bytes is None or not isinstance(request.allocation, Automatic):
        return memory
    less = max(0, run.activation_bytes - int(mm.minimum_inference_memory()))
    found = dict(memory)
    for device in (request.compute_device, *of_its_kind(request)):
        if (free_bytes := memory[device].free_bytes) is not None:
            found[device] = replace(memory[device], free_bytes=max(0, free_bytes - less))
    return found


def speeds_for(
    request: ComponentRequest,
    model_bytes: int,
    memory: Mapping[str, DeviceMemory],
    run: Run | None,
    may_start: bool,
    may_measure: bool,
) -> Speeds:
    """What the choice may depend on: nothing if the model fits on the compute device, how fast cards compute if one
    that may relay is of another model, and links of which one may be chosen. What is not known is measured if it
    `may_measure`, as for `make_plans`."""
    if not isinstance(request.allocation, Automatic):
        return UNKNOWN
    home, room = request.compute_device, room_of(request, memory, model_bytes)
    relaying, keeping = ([name for name in names if room[name]] for names in relaying_and_keeping(request, memory))
    computing = [home, *relaying] if _differ([home, *relaying]) else []
    linked = [*(relaying if len(relaying) > 1 else ()), *keeping]
    if room[home] >= model_bytes or not (computing or linked):
        return UNKNOWN
    used = map(torch.device, (home, *computing, *linked))
    may_measure = may_measure and (may_start or all(map(is_started, used)))
    from_host = [OVERFLOW_DEVICE] if computing or keeping else []
    links = {name: bytes_per_second(name, home, may_measure) for name in (*from_host, *linked)}
    products = {name: multiplications_per_second(name, may_measure) for name in computing}
    speeds = Speeds(
        {name: each for name, each in links.items() if each is not None},
        {name: each for name, each in products.items() if each is not None},
    )
    if run is None or run.computing_seconds is None:
        return speeds
    part = computing_part(run.relayed, run.model_bytes, lambda device: speeds.slowness(device, home))
    return replace(speeds, step_s=run.computing_seconds / part)


def _differ(names: Sequence[str]) -> bool:
    devices = [torch.device(name) for name in names]
    return len(devices) > 1 and len({backend_of(device).get_device_name(device) for device in devices}) > 1
