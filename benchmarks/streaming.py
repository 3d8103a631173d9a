"""On one GPU: how long a forward takes with part of the model on the CPU, against what the link allows.

    python3 tools/host.py run benchmarks/streaming.py [FOLDER] [MODEL ...]

Models of full size with random weights (Flux, SDXL) are written to FOLDER (default /dev/shm; 27 GiB). The floor of a
row is the longer of the resident forward and the copy of the streamed bytes at the measured speed of the link. Resident
and streamed forwards take turns, so that both see the same machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from placement import start_comfyui
from record import ROOT, write_results

PERCENTAGES = (0, 10, 25, 50, 75, 90, 100)
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
                started = time.perf_counter()
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


def main(folder: Path, names: list[str]) -> None:
    results = {}
    for name in names:
        path = folder / f"distorch2_{name}.safetensors"
        script = "import sys, placement; placement.start_comfyui(False); import models; from pathlib import Path; "
        script += f"models.{name.upper()}.save(Path(sys.argv[1]))"
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT / "benchmarks"), *sys.path]))
        if not path.exists():
            subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=environment)
        command = [sys.executable, __file__, "--measure", name, str(path)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if result.returncode == 0:
            results[name] = json.loads(result.stdout.splitlines()[-1])
            write_results("streaming", results)
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"), sys.argv[2:] or ["Flux", "SDXL"])
