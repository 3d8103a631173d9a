"""What the benchmarks of models of full size share: ComfyUI without a server, the model's file, and timing on GPUs."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from record import ROOT

WARM_UP_STEPS = 2
TURNS = 4
STEPS_IN_A_TURN = 3


def start_comfyui(dynamic_vram: bool) -> None:
    """Import ComfyUI as its main.py does, with or without DynamicVRAM."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.path.append(str(ROOT))
    if dynamic_vram:
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management as mm
    import comfy.model_patcher

    if dynamic_vram:
        devices = [device.index for device in mm.get_all_torch_devices()]
        try:
            initialised = comfy_aimdo.control.init_devices((index, 0) for index in devices)
        except TypeError:  # before 0.4.10
            initialised = comfy_aimdo.control.init_devices(devices)
        if not initialised:
            raise SystemExit("DynamicVRAM does not work on this machine")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


@contextlib.contextmanager
def saved_model(name: str, folder: Path) -> Iterator[Path]:
    """The checkpoint of a model, for as long as it is needed.

    It is written in a process of its own: this one is not to import ComfyUI.
    """
    path = folder / f"distorch2_{name}.safetensors"
    script = "import sys, harness; harness.start_comfyui(False); import models; from pathlib import Path; "
    script += f"models.BY_NAME[{name!r}].save(Path(sys.argv[1]))"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT / "benchmarks"), *sys.path]))
    try:
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=environment)
        yield path
    finally:
        path.unlink(missing_ok=True)


def warm_up_gpu(dtype) -> None:
    """What the first matrix product of a process takes for good is not counted for a model."""
    import torch

    square = torch.zeros(64, 64, device="cuda", dtype=dtype)
    square @ square
    torch.cuda.synchronize()


def step(model, patcher, inputs):
    import torch

    output = model.step(patcher, inputs)
    torch.cuda.current_stream().synchronize()
    return output


def turn_ms(model, patcher, inputs, num_steps: int = STEPS_IN_A_TURN) -> list[float]:
    """Milliseconds of the steps of one turn but the first."""
    times = []
    for _ in range(num_steps):
        started = time.perf_counter()
        step(model, patcher, inputs)
        times.append((time.perf_counter() - started) * 1000)
    return times[1:]


def in_turns_ms(model, resident, ours, inputs) -> tuple[float, float]:
    """Medians of the milliseconds of a step of two patchers that take turns, a few steps at a time."""
    turns = [(turn_ms(model, resident, inputs), turn_ms(model, ours, inputs)) for _ in range(TURNS)]
    resident_ms, ours_ms = (statistics.median(itertools.chain(*times)) for times in zip(*turns))
    return resident_ms, ours_ms


def mark():
    """An event on the GPU that takes the time."""
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def link_gb_per_second(page_locked: bool, num_bytes: int = 1024**3) -> float:
    """Of copies from the host to the GPU."""
    import torch

    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=page_locked).fill_(1)
    target = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    return gb_per_second(lambda: target.copy_(source, non_blocking=True), num_bytes)


def gb_per_second(copy: Callable[[], object], num_bytes: int) -> float:
    """Median of 5 times `copy`, until all GPUs are done."""
    import torch

    def wait() -> None:
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)

    seconds = []
    for _ in range(6):
        wait()
        started = time.perf_counter()
        copy()
        wait()
        seconds.append(time.perf_counter() - started)
    return num_bytes / statistics.median(seconds[1:]) / 1e9
