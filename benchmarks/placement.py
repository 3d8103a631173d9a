"""On one GPU: does every weight lie where the plan says, is VRAM used as planned, are the outputs the same bits?

    python3 tools/host.py run benchmarks/placement.py [FOLDER]

Models of full size with random weights are written to FOLDER (default /dev/shm; 27 GiB) and loaded with 0, 25, 50, 90
and 100 % on the CPU, with ComfyUI's DynamicVRAM off and on, each in a process of its own. The reference is the model
that ComfyUI's own loader makes, loaded completely, in the same process and at the same batch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import bytes_by_device, saved_model, start_comfyui
from record import write_results

PERCENTAGES = (0, 25, 50, 90, 100)
CASE = "1024 px"
TIMED_FORWARDS = 3


def run(patcher, inputs) -> dict:
    """Load a patcher and run it; the output, peak VRAM above what was there before, and times."""
    import comfy.model_management as mm
    import torch

    # What is cached from before would hide what this model takes.
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    mm.load_models_gpu([patcher], force_full_load=True)
    torch.cuda.synchronize()
    loaded = time.perf_counter()
    # The first forward of a process is not compared: its bits differ from those of later ones, with ComfyUI alone too.
    patcher.model.apply_model(**inputs)
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_allocated() - before
    milliseconds = []
    for _ in range(TIMED_FORWARDS):
        begun = time.perf_counter()
        output = patcher.model.apply_model(**inputs)
        torch.cuda.synchronize()
        milliseconds.append((time.perf_counter() - begun) * 1000)
    return {
        "output": output.cpu(),
        "peak_bytes": peak_bytes,
        "load_s": loaded - started,
        "forward_ms": statistics.median(milliseconds),
    }


def measure(name: str, path: str, dynamic_vram: bool) -> dict:
    """All rows of one model in this process."""
    start_comfyui(dynamic_vram)
    import comfy.model_management as mm
    import models
    import torch

    from distorch2.planning.plan import GIB, ComponentRequest, VirtualVram

    torch.set_grad_enabled(False)
    model = models.BY_NAME[name]
    device = str(mm.get_torch_device())
    rows = []
    with torch.inference_mode():
        inputs = model.inputs(CASE)
        core = model.core(path)
        reference = run(core, inputs)
        assert torch.isfinite(reference["output"]).all()
        assert reference["output"].float().std() > 1e-3
        mm.unload_all_models()
        del core
        model_bytes = activation_bytes = 0
        for percent in PERCENTAGES:
            request = ComponentRequest(
                device, VirtualVram(model_bytes * percent / 100 / GIB, "cpu"), pack_weights="off"
            )
            started = time.perf_counter()
            patcher = model.distributed(path, request)
            read_s = time.perf_counter() - started
            result = run(patcher, inputs)
            plan = patcher.distribution.plan
            if percent == 0:
                model_bytes = plan.model_bytes
                activation_bytes = result["peak_bytes"] - plan.compute_bytes
            largest = max(placement.layer.num_bytes for placement in plan.placements)
            excess = result["peak_bytes"] - activation_bytes - plan.compute_bytes
            found = bytes_by_device(patcher.model)
            planned = {key: plan.bytes_on(key) for key in plan.devices}
            rows.append(
                {
                    "percent on cpu": percent,
                    "streamed layers": len(plan.streamed),
                    "planned bytes": planned,
                    "found bytes": found,
                    "bytes equal the plan": planned == found,
                    "staging bytes": plan.staging_bytes,
                    "peak VRAM bytes": result["peak_bytes"],
                    "peak less activations and plan, bytes": excess,
                    "at most one layer more": excess <= largest,
                    "bit-identical to ComfyUI's resident model": torch.equal(result["output"], reference["output"]),
                    "page-locked bytes": patcher.distribution.pinned.num_bytes,
                    "read s": round(read_s, 2),
                    "place s": round(result["load_s"], 2),
                    "forward ms": round(result["forward_ms"], 1),
                }
            )
            mm.unload_all_models()
            del patcher
    return {
        "case": CASE,
        "activation bytes of the resident run": activation_bytes,
        "ComfyUI resident forward ms": round(reference["forward_ms"], 1),
        "rows": rows,
    }


def main(folder: Path) -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    results, failed = {}, []
    for name in ("Flux", "SDXL"):
        with saved_model(name, folder) as path:
            for dynamic_vram in (False, True):
                label = f"{name}, DynamicVRAM {'on' if dynamic_vram else 'off'}"
                command = [sys.executable, __file__, "--measure", name, str(path), str(int(dynamic_vram))]
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if result.returncode == 0:
                    results[label] = json.loads(result.stdout.splitlines()[-1])
                else:
                    failed.append(label)
                print(label, json.dumps(results.get(label, "failed"), indent=1), flush=True)
                write_results("placement", {"failed": failed, **results})
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4] == "1")))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"))
