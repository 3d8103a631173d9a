"""On one GPU: how long a step takes with part of the model on the CPU, against the link and ComfyUI's own ways.

    python3 tools/host.py run benchmarks/streaming.py [--folder FOLDER] [--models MODEL ...] [--percentages PERCENT ...]
                                                      [--fast-disk] [--name NAME]

Models of full size with random weights (Flux, SDXL, T5-XXL) are written to FOLDER (default /dev/shm; 36 GiB). A row is
a percentage on the CPU, a case is a size of the images. The result is written to results/NAME.json. A step is one
forward among others of the same model, timed until its result is there; what it copies ahead for the next step goes on.
Steps of the resident model and of ours take turns, five at a time, of which the first is not counted. The floor is the
longer of the resident step and the copy of the streamed bytes at the speed of the link, which is measured before and
after each case, and the faster counts. How fast slabs can be filled is measured, too, to compare "read s" and "place s"
with. Where weights can be packed, the same steps are timed with packed ones, against the same floor.

ComfyUI's own two ways to run a model that does not fit, classic and DynamicVRAM, then load it once for each row and run
each case but the batch of two (for the time that it takes) on a GPU that has as much memory free as ours took for it by
the driver's count; they decide themselves what they keep there. DynamicVRAM needs a process of its own, and with
--fast-disk runs in one more, in which ComfyUI is started with its own --fast-disk. The forecast is that of
`simulator.py` for the times of the layers in one recorded step.

Each row is printed as soon as it is measured. Where matplotlib is installed, `plot.py` draws the results.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
    warmed_up,
)
from record import printed_by, write_results

FILES_GIB = {"Flux": 22.2, "SDXL": 4.8, "T5-XXL": 8.9}
PERCENTAGES = (0, 10, 25, 50, 75, 90, 100)
MEASURE = "--measure"
"""For a process of its own: with the arguments of `measure_all` as JSON."""
OUT_OF_MEMORY = ("out of memory", "VRAM grow failed", "VBAR allocation failed")
"""What torch and DynamicVRAM say when they do not get by with so little."""
TOLERATED_BYTES = 512 * 1024**2
"""Kernels are loaded when they are first used, and stay."""
PAGE_BYTES = 2 * 1024**2
"""Of torch's allocator on the GPU."""


def filling_gb_per_second(num_bytes: int = 4 * 1024**3) -> dict[str, float]:
    """The parts of filling as fast as they can be: eight threads that copy to new memory, and page-locking it."""
    import torch

    from distorch2.planning.sizing import GROUP_BYTES
    from distorch2.weights.slab import allocate

    source = torch.ones(GROUP_BYTES, dtype=torch.uint8)
    for _ in range(2):  # the first time, the machine may not have given this process the memory yet
        started = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            parts = range(num_bytes // GROUP_BYTES)
            copies = list(pool.map(lambda _: allocate(GROUP_BYTES, source.device).copy_(source), parts))
        copied = time.perf_counter()
        for copy in copies:
            torch.cuda.cudart().cudaHostRegister(copy.data_ptr(), copy.nbytes, 1)
        locked = time.perf_counter()
        for copy in copies:
            torch.cuda.cudart().cudaHostUnregister(copy.data_ptr())
    return {
        "memcpy GB/s": round(num_bytes / (copied - started) / 1e9, 1),
        "page-locking GB/s": round(num_bytes / (locked - copied) / 1e9, 1),
    }


def anonymous_gib() -> float:
    """Memory of this process that is not a file's, in GiB, without what has been freed."""
    ctypes.CDLL(None).malloc_trim(0)  # gives back what has been freed
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024**2, 2)


def free_gpu_bytes() -> int:
    """By the driver's count, after giving back what is not in use."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def check_free(num_bytes: int) -> None:
    """Stops if a model has left so much on the GPU that fewer are free: the next one could use that, too."""
    missing = num_bytes - free_gpu_bytes()
    if missing > TOLERATED_BYTES:
        raise SystemExit(f"{missing >> 20} MiB on the GPU are not free after a model has gone")


def drop_models() -> None:
    """Those of ComfyUI's memory manager."""
    import comfy.memory_management
    import comfy.model_management as mm

    if comfy.memory_management.aimdo_enabled:
        mm.unload_all_models()
    mm.current_loaded_models.clear()  # without DynamicVRAM, to unload them would copy them to the host


def comfyuis_own(model, path: str, free_bytes: dict[str, int]) -> dict:
    """ComfyUI's checkpoint loader and memory manager, in the mode that this process runs in, with so many bytes free on
    the GPU, by case."""
    import comfy.model_management as mm
    import torch

    row: dict = {}
    patcher = ballast = None
    free_before = free_gpu_bytes()
    for case, num_bytes in free_bytes.items():
        inputs = model.inputs(case)
        ballast = None
        free_gpu_bytes()
        # Whole pages: another tensor in the rest of the last one would keep all of it from being given back.
        ballast_bytes = max(0, free_before - num_bytes) // PAGE_BYTES * PAGE_BYTES
        ballast = torch.empty(ballast_bytes, dtype=torch.uint8, device="cuda")
        started = time.perf_counter()
        try:
            patcher = patcher or model.core(path)
            mm.load_models_gpu([patcher], memory_required=model.memory_required(patcher, inputs))
            step(model, patcher, inputs)
            row.setdefault("load to first step s", round(time.perf_counter() - started, 2))
            times = steps_ms(model, patcher, inputs, TIMED_STEPS)
            row[f"ms at {case}"] = round(statistics.median(times), 1)
            row[f"ms at {case}, each step"] = [round(each, 1) for each in times]
            row[f"VRAM GiB at {case}"] = round((num_bytes - torch.cuda.mem_get_info()[0]) / 1024**3, 2)
        except (RuntimeError, MemoryError) as error:
            if not any(text in str(error) for text in OUT_OF_MEMORY):
                raise
            row[f"failed at {case}"] = str(error).partition("\n")[0]
            patcher = None
            drop_models()
    drop_models()
    del patcher, ballast
    check_free(free_before)
    return row


def timed(model, resident, patcher, inputs, expected, free_before: int) -> dict:
    """Steps of both in turns, against the link, which is measured before and after them; the faster counts.

    `expected` is the resident model's output, `free_before` are the GPU's free bytes without ours.
    """
    import torch

    links = [link_gb_per_second(page_locked=True)]
    torch.cuda.empty_cache()  # of the link's buffers
    is_identical = torch.equal(warmed_up(model, patcher, inputs), expected)
    resident_times, times = in_turns_ms(model, resident, patcher, inputs)
    used_bytes = free_before - torch.cuda.mem_get_info()[0]
    links.append(link_gb_per_second(page_locked=True))
    link = max(links)
    resident_ms, ours_ms = statistics.median(resident_times), statistics.median(times)
    streamed = (group.slab_bytes for group in patcher.distribution.plan.groups if group.is_streamed)
    copy_ms = sum(streamed) / link / 1e6
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


def recorded_step(model, patcher, inputs, link_bytes_per_s: float) -> dict:
    """One more step, in which the times of the layers are recorded, and the forecast from them."""
    from layer_times import recorded_layers

    with recorded_layers(patcher.distribution, mark) as recorded:
        begin = time.perf_counter()
        step(model, patcher, inputs)
        end = time.perf_counter()
    return {
        "recorded step ms": round((end - begin) * 1000, 1),
        "exposed stall ms": round(recorded.stall_s * 1000, 1),
        "forecast ms": round(recorded.forecast(link_bytes_per_s).step_s * 1000, 1),
    }


def measure(model, path: str, percentages: list[int]) -> Iterator[dict]:
    """Resident, ours and classic, in this process. Yields the result so far: in each row before classic, and after."""
    import comfy.model_management as mm
    import models
    import torch

    from distorch2.planning.plan import GIB, ComponentRequest, VirtualVram

    device = str(mm.get_torch_device())
    rows: list[dict] = []
    result = {
        "pageable link GB/s": round(link_gb_per_second(page_locked=False), 1),
        **filling_gb_per_second(),
        "rows": rows,
    }
    inputs = {case: model.inputs(case) for case in model.cases}
    resident = resident_model(model, path)
    model_bytes = resident.model_size()
    expected = {case: warmed_up(model, resident, inputs[case]) for case in model.cases}
    for percent in percentages:
        free_before = free_gpu_bytes()
        request = ComponentRequest(device, VirtualVram(model_bytes * percent / 100 / GIB, "cpu"), pack_weights="off")
        started = time.perf_counter()
        patcher = model.distributed(path, request)
        read = time.perf_counter()
        patcher.patch_model()
        torch.cuda.synchronize()
        placed = time.perf_counter()
        step(model, patcher, inputs[model.cases[0]])
        stepped = time.perf_counter()
        plan = patcher.distribution.plan
        at = {}
        for case in model.cases:
            at[case] = timed(model, resident, patcher, inputs[case], expected[case], free_before)
            if plan.groups:
                at[case] |= recorded_step(model, patcher, inputs[case], at[case]["pinned link GB/s"] * 1e9)
        row = {
            "percent on cpu": percent,
            "streamed GiB": round(sum(group.slab_bytes for group in plan.groups if group.is_streamed) / GIB, 2),
            "streamed layers": len(plan.streamed),
            "groups": len(plan.groups),
            "staging MiB": plan.staging_bytes >> 20,
            "host memory GiB": anonymous_gib(),
            "read s": round(read - started, 2),
            "place s": round(placed - read, 2),
            "load to first step s": round(stepped - started, 2),
            "at": at,
            "free bytes for ComfyUI": {
                case: measured["used bytes"] for case, measured in at.items() if case != models.BATCH_OF_2
            },
        }
        rows.append(row)
        yield result
        del patcher
        check_free(free_before)
        if plan.is_worth_packing:
            packed = model.distributed(path, replace(request, pack_weights="on"))
            packed.patch_model()
            for case in model.cases:
                at[case]["packed"] = timed(model, resident, packed, inputs[case], expected[case], free_before)
            del packed
            check_free(free_before)
        if plan.groups:
            row["classic at equal VRAM"] = comfyuis_own(model, path, row["free bytes for ComfyUI"])
        print(model.name, json.dumps(row), file=sys.stderr, flush=True)
        yield result


def measure_dynamic(model, path: str, free_bytes: list[dict[str, int]]) -> Iterator[list[dict]]:
    """DynamicVRAM on a GPU with so much free, row by row. Yields the rows so far after each."""
    import comfy.model_management as mm

    patcher = model.core(path)  # once without a limit: the kernels' memory is not to be counted for the first row
    mm.load_models_gpu([patcher])
    step(model, patcher, model.inputs(model.cases[0]))
    del patcher
    drop_models()
    rows = []
    for of_row in free_bytes:
        rows.append(comfyuis_own(model, path, of_row))
        print(model.name, "DynamicVRAM", json.dumps(rows[-1]), file=sys.stderr, flush=True)
        yield rows


def measure_all(
    folder: Path,
    names: list[str],
    percentages: list[int],
    free_bytes: dict[str, list[dict[str, int]]] | None = None,
    fast_disk: bool = False,
) -> None:
    """DynamicVRAM where `free_bytes` are given; else the others, for which it also writes the models' files.

    Prints what it has of all the models so far, as a JSON object, after each row.
    """
    start_comfyui(dynamic_vram=free_bytes is not None)
    import comfy.cli_args

    comfy.cli_args.args.fast_disk = fast_disk
    import models
    import torch

    torch.set_grad_enabled(False)
    gc.freeze()  # all that was imported: looking through it for garbage would take a fifth of a second each time
    found: dict = {}
    for name in names:
        model, path = models.BY_NAME[name], folder / f"{name}.safetensors"
        measured: Iterator
        if free_bytes is None:
            model.save(path)
            measured = measure(model, str(path), percentages)
        else:
            measured = measure_dynamic(model, str(path), free_bytes[name])
        with torch.inference_mode():
            for so_far in measured:
                found[name] = so_far
                print(json.dumps({"models": found}), flush=True)


def main(folder: Path, names: list[str], percentages: list[int], fast_disk: bool, result_name: str) -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # or half of the weights might come by way of another GPU
    require_gpus(1)
    if not folder.is_dir():
        sys.exit(f"{folder} is not a folder; the models' files are written there")
    model_folder = folder / "distorch2_streaming"
    shutil.rmtree(model_folder, ignore_errors=True)  # of an earlier run that was killed
    needed_gib, room_gib = sum(FILES_GIB[name] for name in names), shutil.disk_usage(folder).free / 1024**3
    if room_gib < needed_gib:
        sys.exit(f"{folder} has room for {room_gib:.1f} GiB, the files of {', '.join(names)} take {needed_gib:.1f} GiB")
    started = time.monotonic()
    results: dict = {"models": {}}

    def write() -> Path:
        results["minutes"] = round((time.monotonic() - started) / 60, 2)
        return write_results(result_name, results)

    model_folder.mkdir()
    try:
        arguments = json.dumps([str(model_folder), names, percentages])
        for printed in printed_by([sys.executable, __file__, MEASURE, arguments]):
            results |= printed
            write()
        limited = {name: [row for row in model["rows"] if row["groups"]] for name, model in results["models"].items()}
        free_bytes = {name: [row["free bytes for ComfyUI"] for row in rows] for name, rows in limited.items()}
        for is_fast_disk in (False, True)[: 1 + fast_disk]:
            arguments = json.dumps([str(model_folder), names, percentages, free_bytes, is_fast_disk])
            title = "DynamicVRAM with --fast-disk at equal VRAM" if is_fast_disk else "DynamicVRAM at equal VRAM"
            for printed in printed_by([sys.executable, __file__, MEASURE, arguments]):
                for name, dynamic_rows in printed.pop("models", {}).items():
                    for row, dynamic_row in zip(limited[name], dynamic_rows):
                        row[title] = dynamic_row  # of `results`, whose rows these are
                results |= printed  # that it broke off, if it did
                write()
    finally:
        shutil.rmtree(model_folder)
    result_path = write()
    if "broke off with status" in results:
        sys.exit("a measurement broke off")
    if importlib.util.find_spec("matplotlib"):
        subprocess.run([sys.executable, Path(__file__).with_name("plot.py"), result_path], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        model_files, *others = json.loads(sys.argv[2])
        measure_all(Path(model_files), *others)
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
        parser.add_argument("--models", nargs="+", choices=list(FILES_GIB), default=list(FILES_GIB))
        parser.add_argument("--percentages", nargs="+", type=int, default=list(PERCENTAGES))
        parser.add_argument("--fast-disk", action="store_true")
        parser.add_argument("--name", default="streaming")
        options = parser.parse_args()
        main(options.folder, options.models, options.percentages, options.fast_disk, options.name)
