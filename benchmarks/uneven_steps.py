"""On one GPU: streaming where steps differ, where a model is unloaded between prompts, and where a table is large.

    python3 tools/host.py run benchmarks/uneven_steps.py [FOLDER] [--beside CHECKOUT]

Models of full size with random weights (Flux, SDXL, T5-XXL) are written to FOLDER (default /dev/shm), one at a time;
22.2 GiB at most. With `--beside` another checkout's package is measured in the same run, in turns with this one.

- Flux at 1024 px and SDXL, partly on the CPU, in patterns of full steps and of short ones, as step caches and skipped
  layers have them. A short step of Flux runs the first four and the last four blocks, one of SDXL no transformer blocks
  on its way out.
- T5-XXL, all on the CPU: the first prompt after an unload, and the next.
- An encoder of UMT5-XXL's size, all on the CPU: the GPU's memory that it takes, and the bytes that a prompt copies.

The floor is the longer of the resident model's full step and the copy of what is streamed, as in `streaming.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import link_gb_per_second, require_gpus, resident_model, saved_model, start_comfyui, step, warmed_up
from record import ROOT, write_results

PATTERNS = {"all full": "F", "every second short": "FS", "three of four short": "FSSS"}
PERCENTAGES = {"Flux": (50, 100), "SDXL": (50,), "T5-XXL": (100,)}
TIMED_FULL_STEPS = 8
UNTIMED_STEPS = 8
"""Before each pattern: what it needs to be learnt."""
CASES = {"Flux": "1024 px", "SDXL": "1024 px", "T5-XXL": "256 tokens"}
UMT5_XXL = {
    "d_ff": 10240, "d_kv": 64, "d_model": 4096, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True,
    "layer_norm_epsilon": 1e-06, "model_type": "umt5", "num_heads": 64, "num_layers": 24, "vocab_size": 256384,
}  # fmt: skip


@contextlib.contextmanager
def shortened(name: str, diffusion_model) -> Iterator[None]:
    """The model without most of its layers."""
    import torch

    if name == "Flux":
        lists = {"double_blocks": slice(0, 4), "single_blocks": slice(-4, None)}
        whole = {attribute: getattr(diffusion_model, attribute) for attribute in lists}
        for attribute, part in lists.items():
            setattr(diffusion_model, attribute, torch.nn.ModuleList(list(whole[attribute])[part]))
        yield
        for attribute, blocks in whole.items():
            setattr(diffusion_model, attribute, blocks)
        return
    skipped = [m for m in diffusion_model.output_blocks.modules() if type(m).__name__ == "SpatialTransformer"]
    for module in skipped:
        module.forward = lambda x, *arguments, **options: x
    yield
    for module in skipped:
        del module.forward


def full_steps_ms(model, patcher, inputs, pattern: str) -> list[float]:
    """Milliseconds of each full step among steps in this pattern, F full and S short."""
    times: list[float] = []
    number = 0
    while len(times) < TIMED_FULL_STEPS:
        is_full = pattern[number % len(pattern)] == "F"
        with contextlib.nullcontext() if is_full else shortened(model.name, patcher.model.diffusion_model):
            started = time.perf_counter()
            step(model, patcher, inputs)
        if is_full and number >= UNTIMED_STEPS:
            times.append((time.perf_counter() - started) * 1000)
        number += 1
    return times


def against_floor(times: list[float], resident_ms: float, copy_ms: float) -> dict:
    ours_ms, floor_ms = statistics.median(times), max(resident_ms, copy_ms)
    return {
        "ms": round(ours_ms, 1),
        "ms, each": [round(each, 1) for each in times],
        "floor ms": round(floor_ms, 1),
        "of the floor": round(ours_ms / floor_ms, 3),
    }


def streamed_bytes(plan) -> int:
    """A checkout that is measured beside this one may know no tables."""
    return sum(g.slab_bytes for g in plan.groups if not (g.is_relayed or getattr(g, "is_table", False)))


def copy_ms_of(plan, link: float) -> float:
    return streamed_bytes(plan) / link / 1e6


def request_for(device: str, model_bytes: int, percent: int):
    from distorch2.planning.plan import GIB, ComponentRequest, VirtualVram

    return ComponentRequest(device, VirtualVram(model_bytes * percent / 100 / GIB, "cpu"), "stream", pack_weights="off")


def measure_steps(model, path: str, device: str) -> list[dict]:
    """A diffusion model in each pattern, against the resident one."""
    import torch

    inputs = model.inputs(CASES[model.name])
    resident = resident_model(model, path)
    expected = warmed_up(model, resident, inputs)
    resident_ms = statistics.median(full_steps_ms(model, resident, inputs, "F"))
    with shortened(model.name, resident.model.diffusion_model):
        expected_short = step(model, resident, inputs)
    model_bytes = resident.model_size()
    del resident
    torch.cuda.empty_cache()
    rows = []
    for percent in PERCENTAGES[model.name]:
        link = link_gb_per_second(page_locked=True)
        torch.cuda.empty_cache()
        patcher = model.distributed(path, request_for(device, model_bytes, percent))
        patcher.patch_model()
        is_identical = torch.equal(warmed_up(model, patcher, inputs), expected)
        with shortened(model.name, patcher.model.diffusion_model):
            is_identical &= torch.equal(step(model, patcher, inputs), expected_short)
        copy_ms = copy_ms_of(patcher.distribution.plan, link)
        at = {
            name: against_floor(full_steps_ms(model, patcher, inputs, pattern), resident_ms, copy_ms)
            for name, pattern in PATTERNS.items()
        }
        is_identical &= torch.equal(step(model, patcher, inputs), expected)
        rows.append({"percent on cpu": percent, "link GB/s": round(link, 1), "bit-identical": is_identical, **at})
        patcher.detach()
        del patcher
    return rows


def measure_reload(model, path: str, device: str) -> dict:
    """A text encoder that ComfyUI unloads after each prompt: its first prompt, and the next one."""
    import comfy.model_management as mm
    import torch

    inputs = model.inputs(CASES[model.name])
    resident = resident_model(model, path)
    expected = warmed_up(model, resident, inputs)
    times = []
    for _ in range(TIMED_FULL_STEPS):
        started = time.perf_counter()
        step(model, resident, inputs)
        times.append((time.perf_counter() - started) * 1000)
    resident_ms, model_bytes = statistics.median(times), resident.model_size()
    del resident
    torch.cuda.empty_cache()
    link = link_gb_per_second(page_locked=True)
    torch.cuda.empty_cache()
    patcher = model.distributed(path, request_for(device, model_bytes, 100))
    first, second, is_identical = [], [], True
    for _ in range(6):
        mm.load_models_gpu([patcher])
        for found in (first, second):
            started = time.perf_counter()
            is_identical &= torch.equal(step(model, patcher, inputs), expected)
            found.append((time.perf_counter() - started) * 1000)
        copy_ms = copy_ms_of(patcher.distribution.plan, link)
        mm.unload_all_models()
    return {
        "link GB/s": round(link, 1),
        "bit-identical": is_identical,
        "first after loading": against_floor(first[:1], resident_ms, copy_ms),
        "first after an unload": against_floor(first[1:], resident_ms, copy_ms),
        "next": against_floor(second[1:], resident_ms, copy_ms),
    }


def measure_table(device: str) -> dict:
    """An encoder with a table of 256,384 rows."""
    import comfy.model_management as mm
    import comfy.ops
    import comfy.text_encoders.t5
    import torch
    from comfy.model_patcher import ModelPatcher

    from distorch2.loading import distribute

    cpu, on = torch.device("cpu"), torch.device(device)
    with torch.inference_mode(False), torch.no_grad():
        module = comfy.text_encoders.t5.T5(UMT5_XXL, torch.float16, cpu, comfy.ops.manual_cast)
        for parameter in module.parameters():
            value = torch.randn(parameter.shape, device=on, dtype=torch.float16)
            parameter.copy_(value.div_(parameter.shape[-1] ** 0.5) if parameter.dim() > 1 else value.fill_(1.0))
    del value
    torch.cuda.empty_cache()
    tokens = torch.arange(1, 257, device=on)[None]
    core = ModelPatcher(module, on, cpu)
    patcher = distribute(core, request_for(device, core.model_size(), 100))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mm.load_models_gpu([patcher])
    held = torch.cuda.memory_allocated() - before
    times = []
    for _ in range(4):
        started = time.perf_counter()
        output = module(tokens, None, dtype=torch.float16)[0]
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1000)
    plan = patcher.distribution.plan
    result = {
        "model GiB": round(plan.model_bytes / 1024**3, 2),
        "staging MiB": plan.staging_bytes >> 20,
        "VRAM held GiB": round(held / 1024**3, 2),
        "VRAM GiB at its peak, with activations": round((torch.cuda.max_memory_allocated() - before) / 1024**3, 2),
        "streamed GiB a prompt": round(streamed_bytes(plan) / 1024**3, 2),
        "ms, each prompt": [round(each, 1) for each in times],
    }
    mm.unload_all_models()
    module.to(on)
    result["bit-identical"] = torch.equal(module(tokens, None, dtype=torch.float16)[0], output)
    return result


def measure(name: str, path: str) -> dict:
    start_comfyui(dynamic_vram=False)
    import comfy.model_management as mm
    import models
    import torch

    torch.set_grad_enabled(False)
    device = str(mm.get_torch_device())
    with torch.inference_mode():
        if name == "UMT5-XXL":
            return measure_table(device)
        model = models.BY_NAME[name]
        if name == "T5-XXL":
            return measure_reload(model, path, device)
        return {"rows": measure_steps(model, path, device)}


def measured_by(checkout: Path, name: str, path: Path) -> dict[str, Any]:
    """In a process of its own, with the package of that checkout."""
    environment = dict(os.environ, DISTORCH2_CHECKOUT=str(checkout))
    command = [sys.executable, __file__, "--measure", name, str(path)]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        return {"broke off with status": result.returncode}
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--beside", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    require_gpus(1)
    results: dict[str, Any] = {}
    for name in ("Flux", "T5-XXL", "SDXL", "UMT5-XXL"):
        with contextlib.ExitStack() as stack:
            path = Path() if name == "UMT5-XXL" else stack.enter_context(saved_model(name, options.folder))
            results[name] = {"this": measured_by(ROOT, name, path)}
            if options.beside:
                results[name]["beside"] = measured_by(options.beside.resolve(), name, path)
                if name == "Flux":
                    results[name]["this again"] = measured_by(ROOT, name, path)
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
        write_results("uneven_steps", results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main()
