"""On one GPU: packed weights beside plain ones, on a Flux-sized model of random normal weights.

    python3 tools/host.py run benchmarks/packing.py [FOLDER]

First a group of 64 MiB alone: how small it becomes, and how fast it is packed and unpacked. Then the model on a GPU
with less memory than it takes, where a third of it or all is packed, beside streaming and ComfyUI's own way. Then steps
of it with parts on the CPU, resident, plain, packed, and as `auto` has it, in turns. All in the same process; the
outputs are compared bit by bit. The link is measured in the same run. FOLDER (default /dev/shm) needs room for 23 GiB.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from harness import (
    gb_per_second,
    link_gb_per_second,
    require_gpus,
    resident_model,
    saved_model,
    start_comfyui,
    step,
    steps_ms,
    warmed_up,
)
from record import printed_by, write_results

GIB = 1024**3
PERCENTAGES = (50, 100, 25, 75)
TURNS = 2
STEPS = 5


def measure_a_group() -> dict[str, Any]:
    import torch

    from distorch2.moving.unpacking import Kernels
    from distorch2.planning.sizing import GROUP_BYTES
    from distorch2.weights.packing import pack

    generator = torch.Generator("cuda").manual_seed(0)
    values = torch.randn(GROUP_BYTES // 2, generator=generator, device="cuda").mul_(0.02).bfloat16()
    slab, target = values.view(torch.uint8), torch.empty(GROUP_BYTES, dtype=torch.uint8, device="cuda")
    kernels = Kernels()
    packed = pack(slab, kernels)
    assert packed is not None
    found = {
        "size": round(packed.nbytes / slab.nbytes, 4),
        "bits of a code": packed.layout.width,
        "pack GB/s": round(gb_per_second(lambda: pack(slab, kernels), slab.nbytes), 1),
        "unpack GB/s": round(gb_per_second(lambda: kernels.decode(packed, target), slab.nbytes), 1),
    }
    assert torch.equal(target, slab)
    return found


def placed(
    model: Any, path: str, percent: int, mode: str, inputs: Any, granted: float = 0
) -> tuple[Any, dict[str, float]]:
    """A model with so many percent on the CPU, in up to `granted` bytes of the GPU if that is not 0, after its first
    step, and what that took."""
    import comfy.model_management as mm
    import torch

    from allocation_parser import parse_allocation
    from distorch2.planning.plan import ComponentRequest

    mm.soft_empty_cache()
    before, started = torch.cuda.mem_get_info()[0], time.perf_counter()
    request = ComponentRequest("cuda:0", parse_allocation(f"cuda:0,{100 - percent}%;cpu,*"), pack_weights=mode)
    patcher = model.distributed(path, request)
    patcher.patch_model(lowvram_model_memory=granted)
    step(model, patcher, inputs)
    seconds = time.perf_counter() - started
    mm.soft_empty_cache()
    return patcher, {
        "seconds from the file to the first step": round(seconds, 2),
        "GiB in main memory": round(patcher.distribution.bytes_on(torch.device("cpu")) / GIB, 2),
        "GiB of the GPU": round((before - torch.cuda.mem_get_info()[0]) / GIB, 2),
    }


def measure(path: str) -> dict[str, Any]:
    start_comfyui(dynamic_vram=False)
    import comfy.model_management as mm
    import models
    import torch

    torch.set_grad_enabled(False)
    model = models.FLUX
    found: dict[str, Any] = {"a group of normal weights": measure_a_group()}
    with torch.inference_mode():
        before = torch.cuda.memory_allocated()
        resident = resident_model(model, path)
        inputs = {case: model.inputs(case) for case in model.cases}
        expected = {case: warmed_up(model, resident, inputs[case]) for case in model.cases}
        found["on the GPU"] = measure_on_the_gpu(model, path, resident, inputs, expected, before)
        print(json.dumps(found), flush=True)
        found["rows"] = []
        for percent in PERCENTAGES:
            row: dict[str, Any] = {"percent on cpu": percent, "link GB/s": round(link_gb_per_second(True), 1)}
            patchers = {"resident": resident}
            for name, mode in (("plain", "off"), ("packed", "on")):
                patchers[name], row[name] = placed(model, path, percent, mode, inputs["1024 px"])
            for case in model.cases:
                patchers["auto"], _ = placed(model, path, percent, "auto", inputs[case])
                warmed_up(model, patchers["auto"], inputs[case])
                patchers["auto"].patch_model()  # as the next run does
                row[case] = in_turns(model, patchers, inputs[case], expected[case])
                row[case]["auto has them packed"] = patchers["auto"].distribution.transfer.packed_room_bytes > 0
                patchers.pop("auto").unpatch_model(torch.device("cpu"))
            found["rows"].append(row)
            print(json.dumps(found), flush=True)
            for name in ("plain", "packed"):
                patchers.pop(name).unpatch_model(torch.device("cpu"))
            mm.soft_empty_cache()
    return found


def in_turns(model: Any, patchers: dict[str, Any], inputs: Any, expected: Any) -> dict[str, Any]:
    import torch

    outputs = {name: warmed_up(model, patcher, inputs) for name, patcher in patchers.items()}
    times: dict[str, list[float]] = {name: [] for name in patchers}
    for _ in range(TURNS):
        for name, patcher in patchers.items():
            times[name] += steps_ms(model, patcher, inputs, STEPS)
    found: dict[str, Any] = {f"{name} ms": round(statistics.median(of_one), 1) for name, of_one in times.items()}
    return {**found, "bit-identical": all(torch.equal(each, expected) for each in outputs.values())}


def measure_on_the_gpu(
    model: Any, path: str, resident: Any, inputs: Any, expected: Any, allocated_before: int
) -> list[dict[str, Any]]:
    """What is planned for the GPU, with less memory there than it takes: a third of the model packed, and all of it;
    as much memory without packing; and ComfyUI's own way with what the packed one used at most."""
    import torch
    from streaming import comfyuis_own

    from distorch2.planning.sizing import STAGING_BYTES, packed_bytes

    def peak_bytes(patcher: Any, before: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        step(model, patcher, inputs["1024 px"])
        return torch.cuda.max_memory_allocated() - before

    rows: list[dict[str, Any]] = [
        {"way": "resident", "peak GiB": round(peak_bytes(resident, allocated_before) / GIB, 2)}
    ]
    model_bytes = resident.model_size()
    for packed_part in (1 / 3, 1):
        granted = model_bytes * (1 - packed_part) + packed_bytes(model_bytes * packed_part) + STAGING_BYTES
        peaks = []
        for way, mode in (("packed", "on"), ("streamed", "off")):
            before = torch.cuda.memory_allocated()
            patcher, _ = placed(model, path, 0, mode, inputs["1024 px"], granted)
            peaks.append(peak_bytes(patcher, before))
            row: dict[str, Any] = {"way": way, "granted GiB": round(granted / GIB, 2)}
            row["peak GiB"] = round(peaks[-1] / GIB, 2)
            plan = patcher.distribution.plan
            for served, groups in (("packed", plan.packed_residents), ("evicted", plan.evicted)):
                row[f"part {served}"] = round(sum(group.num_bytes for group in groups) / plan.model_bytes, 3)
            for case in model.cases:
                row[case] = in_turns(model, {"resident": resident, way: patcher}, inputs[case], expected[case])
            rows.append(row)
            print(json.dumps(rows), file=sys.stderr, flush=True)
            patcher.unpatch_model(torch.device("cpu"))
            del patcher
        rows.append({"way": "ComfyUI's own", **comfyuis_own(model, path, dict.fromkeys(model.cases, peaks[0]))})
    return rows


def main(folder: Path) -> None:
    require_gpus(1)
    with saved_model("Flux", folder) as path:
        for found in printed_by([sys.executable, __file__, "--measure", path]):
            print(json.dumps(found), file=sys.stderr, flush=True)
            write_results("packing", found)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"))
