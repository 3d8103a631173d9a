"""On one GPU: how long a forward takes with part of the model on the CPU, against what the link allows.

    python3 tools/host.py run benchmarks/streaming.py [FOLDER] [MODEL ...]

Models of full size with random weights (Flux, SDXL) are written to FOLDER (default /dev/shm; 27 GiB). The floor of a
row is the longer of the resident forward and the copy of the streamed bytes at the measured speed of the link. Resident
and streamed forwards take turns, so that both see the same machine. ComfyUI's own ways to run a model that does not fit
run in processes of their own, on a GPU that has no more memory free than ours used.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from placement import save_model, start_comfyui
from record import write_results

PERCENTAGES = (0, 10, 25, 50, 75, 90, 100)
EQUAL_MEMORY_PERCENTAGES = (50,)
PIXELS = (512, 1024)
WARM_UP_FORWARDS = 3
TIMED_FORWARDS = 8


def link_gb_per_second(page_locked: bool, num_bytes: int = 1024**3) -> float:
    """Median of 5 copies from the host to the GPU."""
    import torch

    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=page_locked).fill_(1)
    target = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return num_bytes / statistics.median(seconds[1:]) / 1e9


def milliseconds(patcher, inputs) -> float:
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    patcher.model.apply_model(**inputs)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000


def measure(name: str, path: str) -> dict:
    start_comfyui(dynamic_vram=False)
    import comfy.model_management as mm
    import comfy.sd
    import models
    import torch

    from distorch2.loading import load_checkpoint
    from distorch2.plan import GIB, ComponentRequest, VirtualVram

    torch.set_grad_enabled(False)
    model = {"Flux": models.FLUX, "SDXL": models.SDXL}[name]
    device = str(mm.get_torch_device())
    link = link_gb_per_second(page_locked=True)
    rows = []
    with torch.inference_mode():
        inputs = {pixels: model.inputs(pixels) for pixels in PIXELS}
        resident = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
        mm.load_models_gpu([resident], force_full_load=True)
        expected = {}
        for pixels in PIXELS:
            for _ in range(WARM_UP_FORWARDS):
                expected[pixels] = resident.model.apply_model(**inputs[pixels])
        model_bytes = resident.model_size()
        for percent in PERCENTAGES:
            request = ComponentRequest(device, VirtualVram(model_bytes * percent / 100 / GIB, "cpu"))
            started = time.perf_counter()
            patcher = load_checkpoint(path, request, request, device)[0]
            patcher.patch_model()
            load_s = time.perf_counter() - started
            plan = patcher.distribution.plan
            streamed_bytes = sum(group.slab_bytes for group in plan.groups)
            for pixels in PIXELS:
                for _ in range(WARM_UP_FORWARDS):
                    output = patcher.model.apply_model(**inputs[pixels])
                torch.cuda.synchronize()
                same = torch.equal(output, expected[pixels])
                del output
                turns = [
                    (milliseconds(resident, inputs[pixels]), milliseconds(patcher, inputs[pixels]))
                    for _ in range(TIMED_FORWARDS)
                ]
                resident_ms, ours_ms = (statistics.median(values) for values in zip(*turns))
                copy_ms = streamed_bytes / link / 1e6
                floor_ms = max(resident_ms, copy_ms)
                rows.append(
                    {
                        "pixels": pixels,
                        "percent on cpu": percent,
                        "streamed GiB": round(streamed_bytes / GIB, 2),
                        "groups": len(plan.groups),
                        "staging MiB": plan.staging_bytes >> 20,
                        "resident ms": round(resident_ms, 1),
                        "ours ms": round(ours_ms, 1),
                        "floor ms": round(floor_ms, 1),
                        "ours / floor": round(ours_ms / floor_ms, 3),
                        "percent of link": round(100 * copy_ms / ours_ms, 1),
                        "bit-identical": same,
                        "load s": round(load_s, 2),
                    }
                )
                print(name, json.dumps(rows[-1]), file=sys.stderr, flush=True)
            patcher.detach()
            del patcher
    return {"pinned link GB/s": round(link, 1), "pageable link GB/s": round(link_gb_per_second(False), 1), "rows": rows}


def with_limited_memory(mode: str, name: str, path: str, percent: int, free_bytes: int) -> dict:
    """One of "ours", "classic" and "dynamic" in a process of its own, on a GPU with `free_bytes` free (0: all of it).

    Classic and dynamic are ComfyUI's own ways to run a model that does not fit, with DynamicVRAM off and on, and they
    decide themselves what they keep on the GPU. Memory is what the driver counts.
    """
    start_comfyui(dynamic_vram=mode == "dynamic")
    import comfy.model_management as mm
    import comfy.sd
    import models
    import torch

    from distorch2.loading import load_checkpoint
    from distorch2.plan import GIB, ComponentRequest, VirtualVram

    torch.set_grad_enabled(False)
    model = {"Flux": models.FLUX, "SDXL": models.SDXL}[name]
    device = mm.get_torch_device()
    inputs = {pixels: model.inputs(pixels) for pixels in PIXELS}
    torch.zeros(64, 64, device=device, dtype=model.dtype) @ torch.zeros(64, 64, device=device, dtype=model.dtype)
    torch.cuda.synchronize()
    free_at_start = torch.cuda.mem_get_info()[0]
    ballast = torch.empty(free_at_start - free_bytes, dtype=torch.uint8, device=device) if free_bytes else None
    result = {"mode": mode}
    with torch.inference_mode():
        if mode == "ours":
            model_bytes = os.path.getsize(path)
            request = ComponentRequest(str(device), VirtualVram(model_bytes * percent / 100 / GIB, "cpu"))
            patcher = load_checkpoint(path, request, request, str(device))[0]
        else:
            patcher = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
        started = time.perf_counter()
        for pixels in PIXELS:
            needed = patcher.memory_required([2, *inputs[pixels]["x"].shape[1:]])
            mm.load_models_gpu([patcher], memory_required=needed)
            result.setdefault("place s", round(time.perf_counter() - started, 2))
            for _ in range(WARM_UP_FORWARDS):
                patcher.model.apply_model(**inputs[pixels])
            result[f"ms at {pixels} px"] = round(
                statistics.median(milliseconds(patcher, inputs[pixels]) for _ in range(TIMED_FORWARDS)), 1
            )
    result["used bytes"] = (free_bytes or free_at_start) - torch.cuda.mem_get_info()[0]
    del ballast
    return result


def equal_memory(name: str, path: str, percent: int) -> list[dict]:
    """Ours, then ComfyUI's own two ways on a GPU that has no more free than ours used."""
    rows, free_bytes = [], 0
    for mode in ("ours", "classic", "dynamic"):
        command = [sys.executable, __file__, "--limited", mode, name, path, str(percent), str(free_bytes)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        row = json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else {"mode": mode, "failed": True}
        rows.append({"percent on cpu": percent, **row})
        print(name, json.dumps(rows[-1]), file=sys.stderr, flush=True)
        free_bytes = free_bytes or row.get("used bytes", 0)
    return rows


def main(folder: Path, names: list[str]) -> None:
    results = {}
    for name in names:
        path = save_model(name, folder)
        try:
            equal = [row for percent in EQUAL_MEMORY_PERCENTAGES for row in equal_memory(name, str(path), percent)]
            results[name] = {"at equal memory": equal}
            write_results("streaming", results)
            command = [sys.executable, __file__, "--measure", name, str(path)]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[name] |= json.loads(result.stdout.splitlines()[-1])
            write_results("streaming", results)
        finally:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    elif sys.argv[1:2] == ["--limited"]:
        print(json.dumps(with_limited_memory(*sys.argv[2:5], int(sys.argv[5]), int(sys.argv[6]))))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"), sys.argv[2:] or ["Flux", "SDXL"])
