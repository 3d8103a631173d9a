"""What the benchmarks of models of full size share: ComfyUI without a server, the model's file, and timing on GPUs."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from record import ROOT, printed_by, write_results

_WARM_UP_STEPS = 2
_TURNS = 2
_TIMED_STEPS_IN_A_TURN = 4
TIMED_STEPS = _TURNS * _TIMED_STEPS_IN_A_TURN


def start_comfyui(dynamic_vram: bool, disable_cuda_malloc: bool = False) -> None:
    """Import ComfyUI as its main.py does, with or without DynamicVRAM, and with its choice of torch's allocator or, as
    with --disable-cuda-malloc, torch's own.

    The package is that of this checkout, or of the one that DISTORCH2_CHECKOUT names.
    """
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.path.append(os.environ.get("DISTORCH2_CHECKOUT") or str(ROOT))
    import comfy.cli_args

    if disable_cuda_malloc:
        comfy.cli_args.args.disable_cuda_malloc = True
    import cuda_malloc  # noqa: F401  before torch

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


def bytes_by_device(module) -> dict[str, int]:
    """Bytes of all parameters and buffers, by the device on which they are found."""
    from distorch2.weights.quantised import plain_tensors

    found: dict[str, int] = {}
    for tensor in {id(t): t for t in [*module.parameters(), *module.buffers()]}.values():
        for plain in plain_tensors(tensor):
            found[str(plain.device)] = found.get(str(plain.device), 0) + plain.nbytes
    return found


def require_gpus(number: int) -> None:
    import torch

    if torch.cuda.device_count() < number:
        raise SystemExit(f"this benchmark needs {number} CUDA GPU(s); torch sees {torch.cuda.device_count()}")


@contextlib.contextmanager
def saved_model(name: str, folder: Path) -> Iterator[Path]:
    """The checkpoint of a model, for as long as it is needed.

    It is written in a process of its own: this one is not to import ComfyUI.
    """
    require_gpus(1)
    path = folder / f"distorch2_{name}.safetensors"
    script = "import sys, harness; harness.start_comfyui(False); import models; from pathlib import Path; "
    script += f"models.BY_NAME[{name!r}].save(Path(sys.argv[1]))"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT / "benchmarks"), *sys.path]))
    try:
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=environment)
        yield path
    finally:
        path.unlink(missing_ok=True)


def record_models(benchmark: str, script: str, folder: Path, names: Sequence[str]) -> None:
    """Write what `script --measure MODEL FILE` prints for each model, each time it prints, by model."""
    found: dict[str, Any] = {}
    for name in names:
        with saved_model(name, folder) as path:
            for of_model in printed_by([sys.executable, script, "--measure", name, path]):
                found[name] = of_model
                write_results(benchmark, found)


def resident_model(model, path: str):
    """A patcher of ComfyUI's own, completely on the GPU. ComfyUI's memory manager does not know it."""
    import comfy.model_management as mm

    patcher = model.core(path)
    mm.unload_all_models()  # some are loaded as soon as they are made
    patcher.patch_model(patcher.load_device)
    return patcher


def step(model, patcher, inputs):
    """The output of a step, when it is there."""
    import torch

    output = model.step(patcher, inputs)
    torch.cuda.current_stream().synchronize()
    return output


def warmed_up(model, patcher, inputs):
    """The output after a few steps that are not timed."""
    for _ in range(_WARM_UP_STEPS):
        output = step(model, patcher, inputs)
    return output


def steps_ms(model, patcher, inputs, num_timed: int) -> list[float]:
    """Milliseconds of each of so many steps, after one that is not counted."""
    step(model, patcher, inputs)
    times = []
    for _ in range(num_timed):
        started = time.perf_counter()
        step(model, patcher, inputs)
        times.append((time.perf_counter() - started) * 1000)
    return times


def in_turns_ms(model, resident, ours, inputs) -> tuple[list[float], list[float]]:
    """Milliseconds of `TIMED_STEPS` steps of each of two patchers that take turns, a few steps at a time."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_TURNS):
        for patcher, found in zip((resident, ours), times):
            found += steps_ms(model, patcher, inputs, _TIMED_STEPS_IN_A_TURN)
    return times


def mark():
    """An event on the GPU that takes the time."""
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def link_gb_per_second(page_locked: bool, num_bytes: int = 1024**3) -> float:
    """Of copies from the host to the GPU."""
    import torch

    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=page_locked)
    if not page_locked:
        source.fill_(1)  # or it might have no memory yet
    target = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    return gb_per_second(lambda: target.copy_(source, non_blocking=True), num_bytes)


def gb_per_second(copy: Callable[[], object], num_bytes: int) -> float:
    """Of `copy`, which copies `num_bytes`: the median of 5 runs after a first one, each until all GPUs are done."""
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
