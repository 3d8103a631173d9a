"""On one GPU: how long a step takes with part of the model on the CPU, against the link and ComfyUI's own ways.

    python3 tools/host.py run benchmarks/streaming.py [FOLDER] [MODEL ...]

Models of full size with random weights (Flux, SDXL, T5-XXL) are written to FOLDER (default /dev/shm; 36 GiB). A step is
one forward among others of the same model, timed until its result is there; what it copies ahead for the next step goes
on. Steps of the resident model and of ours take turns, five at a time, of which the first is not counted. The floor is
the longer of the resident step and the copy of the streamed bytes at the link's speed, which is measured for each case.

ComfyUI's own two ways to run a model that does not fit, classic and DynamicVRAM, then load it once for each row and run
each case but the batch of two on a GPU that has as much memory free as ours took for it by the driver's count; they
decide themselves what they keep there. DynamicVRAM needs a process of its own. The forecast is that of `simulator.py`
for the times of the layers in one recorded step.

Where matplotlib is installed, `plot.py` draws the results.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import (
    TIMED_STEPS,
    in_turns_ms,
    link_gb_per_second,
    mark,
    require_gpus,
    resident_model,
    start_comfyui,
    step,
    steps_ms,
    warm_up_gpu,
    warmed_up,
)
from record import printed_by, write_results

PERCENTAGES = (0, 10, 25, 50, 75, 90, 100)
OUT_OF_MEMORY = ("out of memory", "VRAM grow failed", "VBAR allocation failed")
"""What torch and DynamicVRAM say when they do not get by with so little."""
KEPT_BY_DRIVER_BYTES = 512 * 1024**2
"""For kernels, from when they are first used."""


def packing_gb_per_second(num_bytes: int = 4 * 1024**3) -> dict[str, float]:
    """The parts of packing as fast as they can be: eight threads that copy to new memory, and page-locking it."""
    import torch

    from distorch2.plan import GROUP_BYTES
    from distorch2.slab import allocate

    part = GROUP_BYTES
    source = torch.ones(part, dtype=torch.uint8)
    result = {}
    for _ in range(2):  # the first time, the machine may not have given this process the memory yet
        started = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            copies = list(pool.map(lambda _: allocate(part, source.device).copy_(source), range(num_bytes // part)))
        copied = time.perf_counter()
        for copy in copies:
            torch.cuda.cudart().cudaHostRegister(copy.data_ptr(), part, 1)
        locked = time.perf_counter()
        for copy in copies:
            torch.cuda.cudart().cudaHostUnregister(copy.data_ptr())
        result = {
            "memcpy GB/s": num_bytes / (copied - started) / 1e9,
            "page-locking GB/s": num_bytes / (locked - copied) / 1e9,
        }
    return {name: round(value, 1) for name, value in result.items()}


def anonymous_gib() -> float:
    """Memory of this process that is not a file's, in GiB, without what has been freed."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024**2, 2)


def free_gpu_bytes() -> int:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def check_that_are_free(num_bytes: int) -> None:
    """On the GPU: what a model left behind there would be memory that the next one has beside its own."""
    missing = num_bytes - free_gpu_bytes()
    if missing > KEPT_BY_DRIVER_BYTES:
        raise SystemExit(f"{missing >> 20} MiB on the GPU are not free after a model has gone")


def ballast_bytes(num_bytes: int) -> int:
    """So many, or a little less: whole pages of torch's allocator. Another tensor might be in the rest of one, and
    nothing of it would be given back as long as that lives."""
    page = 2 * 1024**2
    return max(0, num_bytes // page * page)


def drop_models() -> None:
    """Those of ComfyUI's memory manager."""
    import comfy.memory_management
    import comfy.model_management as mm

    if comfy.memory_management.aimdo_enabled:
        mm.unload_all_models()
    mm.current_loaded_models.clear()  # without DynamicVRAM, to unload them would copy them to the host


def used_bytes(row: dict) -> list[int]:
    """What ours took on the GPU, for each case."""
    return [measured["used bytes"] for measured in row["at"].values()]


def comfyuis_own(model, path: str, free_bytes: list[int]) -> dict:
    """ComfyUI's checkpoint loader and memory manager, in the mode that this process runs in; the bytes are by case."""
    import comfy.model_management as mm
    import models
    import torch

    row: dict = {}
    patcher = ballast = None
    free_before = free_gpu_bytes()
    for case, num_bytes in zip(model.cases, free_bytes, strict=True):
        if case == models.BATCH_OF_2:
            continue
        inputs = model.inputs(case)
        ballast = None
        torch.cuda.empty_cache()
        ballast = torch.empty(ballast_bytes(free_before - num_bytes), dtype=torch.uint8, device="cuda")
        started = time.perf_counter()
        try:
            patcher = patcher or model.core(path)
            mm.load_models_gpu([patcher], memory_required=model.memory_required(patcher, inputs))
            step(model, patcher, inputs)
            row.setdefault("load to first step s", round(time.perf_counter() - started, 2))
            times = steps_ms(model, patcher, inputs, 1 + TIMED_STEPS)
            row[f"ms at {case}"] = round(statistics.median(times), 1)
            row[f"VRAM GiB at {case}"] = round((num_bytes - torch.cuda.mem_get_info()[0]) / 1024**3, 2)
        except (RuntimeError, MemoryError) as error:
            if not any(text in str(error) for text in OUT_OF_MEMORY):
                raise
            row[f"failed at {case}"] = str(error).partition("\n")[0]
            patcher = None
            drop_models()
    drop_models()
    del patcher, ballast
    check_that_are_free(free_before)
    return row


def timed(model, resident, patcher, inputs, expected, free_before: int) -> dict:
    """Steps of both in turns, against the link: the faster of before and after them.

    `expected` is the resident model's output, `free_before` are the GPU's free bytes without ours.
    """
    import torch

    links = [link_gb_per_second(page_locked=True)]
    torch.cuda.empty_cache()  # of what that took
    is_identical = torch.equal(warmed_up(model, patcher, inputs), expected)
    resident_times, times = in_turns_ms(model, resident, patcher, inputs)
    used_bytes = free_before - torch.cuda.mem_get_info()[0]
    links.append(link_gb_per_second(page_locked=True))
    link = max(links)
    resident_ms, ours_ms = statistics.median(resident_times), statistics.median(times)
    copy_ms = sum(group.slab_bytes for group in patcher.distribution.plan.groups) / link / 1e6
    floor_ms = max(resident_ms, copy_ms)
    return {
        "bit-identical": is_identical,
        "pinned link GB/s": round(link, 1),
        "pinned link GB/s, before and after": [round(each, 1) for each in links],
        "resident ms": round(resident_ms, 1),
        "resident ms, each step": [round(each, 1) for each in resident_times],
        "ours ms": round(ours_ms, 1),
        "ours ms, each step": [round(each, 1) for each in times],
        "floor ms": round(floor_ms, 1),
        "ours / floor": round(ours_ms / floor_ms, 3),
        "percent of link": round(100 * copy_ms / ours_ms, 1),
        "used bytes": used_bytes,
        "VRAM GiB": round(used_bytes / 1024**3, 2),
    }


def measure(name: str, path: str) -> Iterator[dict]:
    """Resident, ours and classic, in this process: the same result after each row, with one more."""
    import comfy.model_management as mm
    import models
    import torch
    from layer_times import recorded_layers

    from distorch2.plan import GIB, ComponentRequest, VirtualVram

    model, device = models.BY_NAME[name], str(mm.get_torch_device())
    result = {
        "pageable link GB/s": round(link_gb_per_second(page_locked=False), 1),
        **packing_gb_per_second(),
        "rows": [],
    }
    inputs = {case: model.inputs(case) for case in model.cases}
    warm_up_gpu(model.dtype)
    resident = resident_model(model, path)
    model_bytes = resident.model_size()
    expected = {case: warmed_up(model, resident, inputs[case]) for case in model.cases}
    for percent in PERCENTAGES:
        free_before = free_gpu_bytes()
        request = ComponentRequest(device, VirtualVram(model_bytes * percent / 100 / GIB, "cpu"))
        started = time.perf_counter()
        patcher = model.distributed(path, request)
        read = time.perf_counter()
        patcher.patch_model()
        torch.cuda.synchronize()
        placed = time.perf_counter()
        step(model, patcher, inputs[next(iter(model.cases))])
        stepped = time.perf_counter()
        plan = patcher.distribution.plan
        at = {}
        for case in model.cases:
            at[case] = timed(model, resident, patcher, inputs[case], expected[case], free_before)
            if plan.groups:
                with recorded_layers(patcher.distribution, mark) as recorded:
                    begin = time.perf_counter()
                    step(model, patcher, inputs[case])
                    end = time.perf_counter()
                at[case] |= {
                    "recorded step ms": round((end - begin) * 1000, 1),
                    "exposed stall ms": round(recorded.stall_s * 1000, 1),
                    "forecast ms": round(recorded.forecast(at[case]["pinned link GB/s"] * 1e9).step_s * 1000, 1),
                }
        facts = {
            "percent on cpu": percent,
            "streamed GiB": round(sum(group.slab_bytes for group in plan.groups) / GIB, 2),
            "streamed layers": len(plan.streamed),
            "groups": len(plan.groups),
            "staging MiB": plan.staging_bytes >> 20,
            "host memory GiB": anonymous_gib(),
            "read s": round(read - started, 2),
            "place s": round(placed - read, 2),
            "load to first step s": round(stepped - started, 2),
        }
        del patcher
        check_that_are_free(free_before)
        row = {**facts, "at": at}
        if percent:
            row["classic at equal VRAM"] = comfyuis_own(model, path, used_bytes(row))
        result["rows"].append(row)
        yield result


def measure_dynamic(name: str, path: str, free_bytes: list[list[int]]) -> Iterator[list[dict]]:
    """DynamicVRAM on a GPU with so much free, one row after another: the same list after each, with one more."""
    import models

    warm_up_gpu(models.BY_NAME[name].dtype)
    rows = []
    for of_row in free_bytes:
        rows.append(comfyuis_own(models.BY_NAME[name], path, of_row))
        yield rows


def measure_all(folder: Path, free_bytes: dict[str, list[list[int]]] | None, names: list[str]) -> None:
    """What one process measures: DynamicVRAM where `free_bytes` are given, else the others, and it writes the models'
    files. Prints a JSON object after each row, by the name of the model; the last one is complete."""
    start_comfyui(dynamic_vram=free_bytes is not None)
    import models
    import torch

    torch.set_grad_enabled(False)
    found: dict = {}
    for name in names:
        path = folder / f"{name}.safetensors"
        if free_bytes is None:
            models.BY_NAME[name].save(path)
            measured: Iterator = measure(name, str(path))
        else:
            measured = measure_dynamic(name, str(path), free_bytes[name])
        with torch.inference_mode():
            for found[name] in measured:
                print(json.dumps(found), flush=True)


def main(folder: Path, names: list[str]) -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # or half of the weights might come by way of another GPU
    require_gpus(1)
    started = time.monotonic()
    results: dict = {"models": {}}

    def measured_by(*arguments: str) -> Iterator[dict]:
        for measured in printed_by([sys.executable, __file__, "--measure", *arguments]):
            if status := measured.pop("broke off with status", 0):
                results["broke off with status"] = status
            yield measured
            results["minutes"] = round((time.monotonic() - started) / 60, 2)
            write_results("streaming", results)

    with tempfile.TemporaryDirectory(dir=folder, prefix="distorch2_") as models:
        for results["models"] in measured_by(models, "null", *names):
            pass
        limited = {
            name: [row for row in model["rows"] if row["streamed GiB"]] for name, model in results["models"].items()
        }
        free_bytes = {name: [used_bytes(row) for row in rows] for name, rows in limited.items()}
        for dynamic in measured_by(models, json.dumps(free_bytes), *limited):
            for name, rows in dynamic.items():
                for row, dynamic_row in zip(limited[name], rows):
                    row["DynamicVRAM at equal VRAM"] = dynamic_row
    result_path = write_results("streaming", results)
    if importlib.util.find_spec("matplotlib"):
        subprocess.run([sys.executable, Path(__file__).with_name("plot.py"), result_path], check=True)
    sys.exit("a measurement broke off" if "broke off with status" in results else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure_all(Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:])
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"), sys.argv[2:] or ["Flux", "SDXL", "T5-XXL"])
