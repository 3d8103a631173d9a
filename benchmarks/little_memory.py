"""On one GPU, as root on Linux: models larger than main memory, all of whose weights are planned for it.

    python3 tools/host.py run benchmarks/little_memory.py one|two [FOLDER]

All but 18 GiB of what is available is reserved as huge pages, and given back in the end; of the GPU 4 GiB are free.
`one`: a Flux-sized model (22.2 GiB) runs steps at 1024 px. `two`: two models of 13.9 GiB run two steps each in turns,
as those for high and low noise do. Each setup is a process of its own, with the page cache dropped before it: ours,
with everything on `cpu`, and ComfyUI's DynamicVRAM. The bits are compared with those of the same models all on the GPU.

The limit of a step is what is read from the drive in it, over the speed of the drive, which is measured here in the
same situation: large parts in order, by 8 threads. The least main memory that was available is noted, and the most swap
that was used. FOLDER (default /tmp) is to be on a drive, with room for 28 GiB.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import mmap
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from harness import require_gpus, saved_model, start_comfyui
from record import printed_by, write_results

AVAILABLE_GIB = 18
FREE_GPU_GIB = 4
GIB = 1024**3
CASE = "1024 px"
STEPS = {"ours": 6, "DynamicVRAM": 4, "on the GPU": 1}
TURNS = 2
RESULT_FILES = {1: "little_memory", 2: "little_memory_two_models"}
"""By the number of models."""
_MEDIAN = "seconds a step, median after the first two"
_SLABS = "bytes of slabs, of each model, in the end"
_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
_HUGE_PAGE_BYTES = 2 * 1024**2
_READ_BYTES = 4 * GIB
_PART_BYTES = 8 * 1024**2


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    drop_page_cache()
    num_bytes = psutil.virtual_memory().available - AVAILABLE_GIB * GIB
    _HUGE_PAGES.write_text(str(num_bytes // _HUGE_PAGE_BYTES))
    try:
        left = psutil.virtual_memory().available / GIB
        if abs(left - AVAILABLE_GIB) > 0.5:
            raise SystemExit(f"{left:.1f} GiB are available where {AVAILABLE_GIB} were wanted")
        yield
    finally:
        _HUGE_PAGES.write_text("0")


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def drive_bytes_per_second(path: Path) -> float:
    """Of reading the middle of a file in large parts, from the drive; without the package, which is to be compared."""
    drop_page_cache()
    first = (path.stat().st_size - _READ_BYTES) // 2
    begins, lock = iter(range(first, first + _READ_BYTES, _PART_BYTES)), threading.Lock()

    def read(buffer: mmap.mmap) -> None:
        while True:
            with lock:
                begin = next(begins, None)
            if begin is None:
                return
            assert os.preadv(file, [buffer], begin) == _PART_BYTES

    file = os.open(path, os.O_RDONLY)
    buffers = [mmap.mmap(-1, _PART_BYTES) for _ in range(8)]
    started = time.perf_counter()
    with ThreadPoolExecutor(len(buffers)) as threads:
        list(threads.map(read, buffers))
    seconds = time.perf_counter() - started
    os.close(file)
    return _READ_BYTES / seconds


class MemoryWatch:
    """Notes the least that is available, and the most that is swapped, from `with` to its end."""

    def __enter__(self) -> MemoryWatch:
        self.least_available, self.most_swapped = psutil.virtual_memory().available, psutil.swap_memory().used
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._is_over.wait(0.02):
            self.least_available = min(self.least_available, psutil.virtual_memory().available)
            self.most_swapped = max(self.most_swapped, psutil.swap_memory().used)

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join()

    def found(self) -> dict[str, float]:
        return {
            "least available GiB": round(self.least_available / GIB, 2),
            "most swapped GiB": round(self.most_swapped / GIB, 2),
        }


def load(model: Any, setup: str, path: str) -> Any:
    from distorch2.planning.plan import ComponentRequest, VirtualVram

    if setup == "DynamicVRAM":
        return model.core(path)
    gib = 1000.0 if setup == "ours" else 0.0
    return model.distributed(path, ComponentRequest("cuda:0", VirtualVram(gib, "cpu"), pack_weights="off"))


def measure(setup: str, name: str, paths: list[str]) -> dict[str, Any]:
    """One model: its steps. Several: two steps of each, in turns."""
    start_comfyui(dynamic_vram=setup == "DynamicVRAM")
    import comfy.model_management as mm
    import models
    import torch

    from distorch2.weights.devices import CPU, DISK

    torch.set_grad_enabled(False)
    model = models.BY_NAME[name]
    inputs = model.inputs(CASE)
    if setup != "on the GPU":
        ballast_bytes = torch.cuda.mem_get_info()[0] - FREE_GPU_GIB * GIB
        ballast = torch.empty(ballast_bytes, dtype=torch.uint8, device="cuda")  # noqa: F841 # it stays
    steps, seconds, digests = [], [], set()
    with torch.inference_mode(), MemoryWatch() as watch:
        patchers = [load(model, setup, path) for path in paths]
        num_turns, num_steps = (1, 1 + STEPS[setup]) if len(paths) == 1 else (TURNS, 2)
        for _, patcher in itertools.product(range(num_turns), patchers):
            started = time.perf_counter()
            mm.load_models_gpu([patcher])
            torch.cuda.synchronize()
            loaded = time.perf_counter() - started
            for _ in range(num_steps):
                started_step = time.perf_counter()
                output = model.step(patcher, inputs)
                torch.cuda.synchronize()
                steps.append(round(time.perf_counter() - started_step, 3))
                digests.add(hashlib.sha256(output.cpu().float().numpy().tobytes()).hexdigest())
            seconds.append({"until loaded": round(loaded, 2), "in all": round(time.perf_counter() - started, 2)})
    found = {"seconds of steps": steps, "seconds of turns": seconds, "digests": sorted(digests), **watch.found()}
    if setup == "ours":
        found[_SLABS] = [
            {name: patcher.distribution.bytes_on(device) for name, device in (("cpu", CPU), ("disk", DISK))}
            for patcher in patchers
        ]
    return found


def in_process(setup: str, name: str, paths: list[Path]) -> dict[str, Any]:
    drop_page_cache()
    found: dict[str, Any] = {}
    for found in printed_by([sys.executable, __file__, "--measure", setup, name, *map(str, paths)]):
        print(setup, name, json.dumps(found), file=sys.stderr, flush=True)
    return found


def compare(results: dict[str, Any], name: str, paths: list[Path], expected: list[str]) -> None:
    """Both setups, written to the result file after each."""
    for setup in ("ours", "DynamicVRAM"):
        results[setup] = found = in_process(setup, name, paths)
        found["bit-identical"] = found.pop("digests", None) == expected
        write_results(RESULT_FILES[len(paths)], results)


def measure_one(folder: Path, results: dict[str, Any]) -> None:
    with saved_model("Flux", folder) as path:
        expected = in_process("on the GPU", "Flux", [path])["digests"]
        with little_memory():
            speeds = [drive_bytes_per_second(path)]
            results["drive, GB/s"] = [round(speeds[0] / 1e9, 2)]
            compare(results, "Flux", [path], expected)
            speeds.append(drive_bytes_per_second(path))
            results["drive, GB/s"].append(round(speeds[1] / 1e9, 2))
    for setup in ("ours", "DynamicVRAM"):
        results[setup][_MEDIAN] = statistics.median(results[setup]["seconds of steps"][2:])
    limit = results["ours"][_SLABS][0]["disk"] / statistics.mean(speeds)
    results["limit of ours: seconds to read what is on the disk"] = round(limit, 3)
    results["ours over its limit"] = round(results["ours"][_MEDIAN] / limit, 3)
    write_results(RESULT_FILES[1], results)


def measure_two(folder: Path, results: dict[str, Any]) -> None:
    with saved_model("Flux-14", folder) as path:
        expected = in_process("on the GPU", "Flux-14", [path])["digests"]
        other = Path(shutil.copy(path, path.with_name("distorch2_Flux-14_2.safetensors")))
        try:
            with little_memory():
                compare(results, "Flux-14", [path, other], expected)
        finally:
            other.unlink()


def main(models: str, folder: Path) -> None:
    require_gpus(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and the huge pages are given back
    results = {"available GiB": AVAILABLE_GIB, "free GiB of the GPU": FREE_GPU_GIB}
    {"one": measure_one, "two": measure_two}[models](folder, results)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4:])))
    else:
        main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "/tmp"))
