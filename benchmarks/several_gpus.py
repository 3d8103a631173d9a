"""On two GPUs: a step with guidance, both conditionings at once by ComfyUI's MultiGPU CFG Split, the weights split.

    python3 tools/host.py run benchmarks/several_gpus.py [FOLDER] [MODEL ...]

Models of full size with random weights (Flux, SDXL) are written to FOLDER (default /dev/shm; 23 GiB). Each way samples
1024 x 1024 pixels twice with ComfyUI's own sampler; a step of the second time is timed from one preview to the next,
when both GPUs are done. Latents are compared, bit by bit, with those of the ways before, ComfyUI's own among them. GiB
of a GPU are what torch had allocated there at most; GiB in main memory are slabs, each counted once.

For Flux follow forecasts by `simulator.py` from the times of one recorded step, for slower links too: what is streamed,
plain or packed, and what is relayed, one conditioning after the other or as a pair.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from harness import link_gb_per_second, mark, record_models, require_gpus, start_comfyui

GIB = 1024**3
STEPS = 13
UNTIMED_STEPS = 3
HOME, OTHER = "cuda:0", "cuda:1"
WAYS = {
    "Flux": [(percent, mode) for percent in (50, 25, 90) for mode in ("off", "on")],
    "SDXL": [(0, "off"), (50, "off")],
}
"""Model -> percent that is streamed from the CPU, and whether it is packed."""
LINKS_GB_PER_SECOND = (3, 6, 12, 25)
PACKED_PART = 0.70


def conditionings(model: Any) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    text, pooled = ((256, 4096), 768) if model.name == "Flux" else ((77, 2048), 1280)
    return [
        [[torch.randn(1, *text, generator=generator), {"pooled_output": torch.randn(1, pooled, generator=generator)}]]
        for _ in range(2)
    ]


def sampled(model: Any, patcher: Any, cfg: float = 3.0) -> tuple[Any, float]:
    """The latents, and milliseconds of a step."""
    import comfy.sample
    import torch

    channels = patcher.model.latent_format.latent_channels
    latent = torch.zeros(1, channels, 128, 128)
    noise = comfy.sample.prepare_noise(latent, 7)
    ends: list[float] = []

    def note(*arguments: Any) -> None:
        for index in range(2):
            torch.cuda.synchronize(index)
        ends.append(time.perf_counter())

    positive, negative = conditionings(model)
    latents = comfy.sample.sample(
        patcher, noise, STEPS, cfg, "euler", "simple", positive, negative, latent, callback=note, disable_pbar=True
    )
    times = [1000 * (end - begin) for begin, end in zip(ends[UNTIMED_STEPS:], ends[UNTIMED_STEPS + 1 :])]
    return latents, statistics.median(times)


def slabs_gib(patchers: list[Any]) -> float:
    slabs = [group.host_slab for each in patchers for group in each.distribution.groups.values()]
    return sum({slab.data_ptr(): slab.nbytes for slab in slabs if slab is not None}.values()) / GIB


def measure(name: str, path: str) -> None:
    """Prints a JSON object after each row: the last one is complete."""
    start_comfyui(dynamic_vram=False)
    import comfy.model_management as mm
    import comfy.multigpu
    import comfy.samplers
    import models
    import torch

    from allocation_parser import parse_allocation
    from distorch2.planning.plan import ComponentRequest

    torch.set_grad_enabled(False)
    model = models.BY_NAME[name]
    rows: list[dict[str, Any]] = []
    found = {"link GB/s": round(link_gb_per_second(True), 1), "rows": rows}
    expected: dict[str, Any] = {}

    def add(way: str, patcher: Any, cfg: float = 3.0) -> None:
        for index in range(2):
            torch.cuda.reset_peak_memory_stats(index)
        sampled(model, patcher, cfg)
        latents, milliseconds = sampled(model, patcher, cfg)
        row = {"way": way, "ms": round(milliseconds, 1)}
        row["GiB of each GPU"] = [round(torch.cuda.max_memory_allocated(index) / GIB, 2) for index in range(2)]
        patchers = [patcher, *patcher.get_additional_models_with_key("multigpu")]
        if all(hasattr(each, "distribution") for each in patchers):
            row["GiB in main memory"] = round(slabs_gib(patchers), 2)
        if cfg != 1.0:
            row["bit-identical to"] = [of for of, each in expected.items() if torch.equal(latents, each)]
            expected.setdefault(way, latents)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        print(json.dumps(found), flush=True)

    def drop() -> None:
        mm.unload_all_models()
        gc.collect()
        mm.soft_empty_cache()

    def split(patcher: Any) -> Any:
        return comfy.multigpu.create_multigpu_deepclones(patcher, 2, reuse_loaded=True)

    def distributed(text: str, mode: str = "off", donor_mode: str = "auto") -> Any:
        return model.distributed(path, ComponentRequest(HOME, parse_allocation(text), donor_mode, mode))

    with torch.inference_mode():
        patcher = model.core(path)
        batched = comfy.samplers.can_concat_cond
        comfy.samplers.can_concat_cond = lambda one, other: one is other
        add("one GPU, resident, one after the other", patcher)
        comfy.samplers.can_concat_cond = batched
        add("one GPU, resident, as a batch of two", patcher)
        patcher = split(patcher)
        add("ComfyUI's MultiGPU CFG Split: whole copies", patcher)
        del patcher
        drop()
        for percent, mode in WAYS[name]:
            text = f"{HOME},{100 - percent}%;cpu,*" if percent else f"{HOME},*"
            patcher = split(distributed(text, mode))
            add(f"at once, {percent}% streamed" + (", packed" if mode == "on" else ""), patcher)
            del patcher
            drop()
        relayed = distributed(f"{HOME},50%;{OTHER},50%")
        add("relayed 50%, as a batch of two", relayed)
        add("relayed 50%, without guidance", relayed, cfg=1.0)
        patcher = split(relayed)
        add("the same behind MultiGPU CFG Split, without guidance", patcher, cfg=1.0)
        del patcher, relayed
        drop()
        patcher = split(distributed(f"{HOME},50%;{OTHER},50%", donor_mode="relay"))
        add("relayed 50%, as a pair", patcher)
        del patcher
        drop()
        if name == "Flux":
            found["forecasts"] = forecasts(model, path, found["link GB/s"])
            print(json.dumps(found), flush=True)


def forecasts(model: Any, path: str, measured_link: float) -> list[dict[str, Any]]:
    """Milliseconds of a step with two conditionings, by link in GB/s."""
    import simulator
    from layer_times import recorded_layers
    from two_gpus import recorded_calls

    from allocation_parser import parse_allocation
    from distorch2.planning.plan import RELAY, ComponentRequest, DeviceMemory
    from distorch2.planning.planner import make_plan, plan_alternating
    from distorch2.weights.inventory import list_layers

    inputs, rows = model.inputs("1024 px"), []
    links = (*LINKS_GB_PER_SECOND, measured_link)
    for percent in (50, 25, 90):
        request = ComponentRequest(HOME, parse_allocation(f"{HOME},{100 - percent}%;cpu,*"), pack_weights="off")
        patcher = model.distributed(path, request)
        patcher.patch_model()
        for _ in range(3):
            model.step(patcher, inputs)
        with recorded_layers(patcher.distribution, mark) as recorded:
            model.step(patcher, inputs)
        for what, part in (("", 1.0), (", packed", PACKED_PART)):
            row: dict[str, Any] = {"way": f"at once, {percent}% streamed{what}"}
            for link in links:
                row[f"{link} GB/s"] = round(recorded.forecast(link * 1e9 / part).step_s * 1000)
            rows.append(row)
        patcher.detach()
        del patcher
        gc.collect()
    resident = model.core(path)
    resident.patch_model(resident.load_device)
    calls = recorded_calls(model, resident, "1024 px")
    names = list(dict.fromkeys(call.unit for call in calls))
    on_other = dict.fromkeys(names[len(names) // 2 :], OTHER)
    row = {"way": "relayed 50%, one after the other"}
    for link in links:
        row[f"{link} GB/s"] = round(2000 * simulator.forecast_relay(calls, on_other, link * 1e9).seconds)
    rows.append(row)
    layers, halves = list_layers(resident.model), parse_allocation(f"{HOME},50%;{OTHER},50%")
    memory = dict.fromkeys((HOME, OTHER, "cpu"), DeviceMemory(0))
    asked = make_plan(layers, ComponentRequest(HOME, halves, RELAY), memory)
    device_of = {item.layer.unit: int(item.device == OTHER) for item in plan_alternating(asked, layers).placements}
    row = {"way": "relayed 50%, as a pair"}
    for link in links:
        row[f"{link} GB/s"] = round(1000 * simulator.forecast_pair(calls, device_of, link * 1e9))
    rows.append(row)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        require_gpus(2)
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm")
        record_models("several_gpus", __file__, folder, sys.argv[2:] or list(WAYS))
