"""Without a GPU: how long a step of a Flux-sized model with guidance takes on two GPUs, in several ways and over
several links, forecast by `simulator.py`.

    python3 tools/host.py run benchmarks/several_gpus_forecast.py [MILLISECONDS]

The model is built without memory and planned as it would be. MILLISECONDS is what one conditioning takes when all is
resident (default: 181, on an H200 at 1024 px), spread over the layers by their bytes; a batch of two takes twice that.
Packed bytes are 0.70 of the plain ones. What crosses over between two blocks is the image's and the text's data, 27 MB.
A relayed pair is planned with other numbers of rounds, too: how often each GPU comes to its turn.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from harness import start_comfyui
from record import ROOT, write_results

sys.path.append(str(ROOT))  # for the schedule, which the simulator runs

from simulator import LayerTime, UnitCall, forecast, forecast_pair, forecast_relay

from allocation_parser import parse_allocation
from distorch2.planning import planner
from distorch2.planning.plan import RELAY, ComponentRequest, DeviceMemory

LINKS_GB_PER_SECOND = (3, 6, 12, 25, 55)
PACKED_PART = 0.70
CROSSING_BYTES = 27_000_000
ROUNDS = (1, 2, 3, 4, 6)
HOME, OTHER = "cuda:0", "cuda:1"


def layers_of_flux() -> list[Any]:
    import comfy.ldm.flux.model
    import comfy.ops
    import models
    import torch

    from distorch2.weights.inventory import list_layers

    module = comfy.ldm.flux.model.Flux(
        **models.FLUX.config, dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init
    )
    return list(list_layers(module))


def streamed_ms(layers: list[Any], percent: int, step_s: float, bytes_per_s: float) -> float:
    """Of one conditioning, with so many percent of the model on the CPU."""
    request = ComponentRequest(HOME, parse_allocation(f"{HOME},{100 - percent}%;cpu,*"))
    plan = planner.make_plan(layers, request, dict.fromkeys((HOME, "cpu"), DeviceMemory(0)))
    groups = [group for group in plan.groups if group.is_streamed]
    group_of = {layer.name: number for number, group in enumerate(groups) for layer in group.layers}
    streamed = [placement.layer.name for placement in plan.placements if placement.layer.name in group_of]
    times: dict[int, LayerTime] = {}
    for placement in plan.placements:
        seconds = step_s * placement.layer.num_bytes / plan.model_bytes
        if placement.layer.name in group_of:
            times[len(times)] = LayerTime(seconds, 0.0)
        elif times:
            last = times[len(times) - 1]
            times[len(times) - 1] = LayerTime(last.inside_s, last.after_s + seconds)
    numbers = [group_of[name] for name in streamed]
    sizes = [group.slab_bytes for group in groups]
    return 1000 * forecast(numbers, sizes, plan.staging_bytes, times, bytes_per_s).step_s


def pair_devices(layers: list[Any], rounds: int) -> dict[str, int]:
    """Unit -> number of the GPU that runs it, with half of the model on each."""
    request = ComponentRequest(HOME, parse_allocation(f"{HOME},50%;{OTHER},50%"), RELAY)
    asked = planner.make_plan(layers, request, dict.fromkeys((HOME, OTHER, "cpu"), DeviceMemory(0)))
    planner.ROUNDS = rounds
    plan = planner.plan_alternating(asked, layers)
    assert plan is not None
    return {item.layer.unit: int(item.device == OTHER) for item in plan.placements if item.layer.unit}


def unit_calls(layers: list[Any], step_s: float) -> list[UnitCall]:
    model_bytes = sum(layer.num_bytes for layer in layers)
    of_unit: dict[str, int] = {}
    for layer in layers:
        if layer.unit:
            of_unit[layer.unit] = of_unit.get(layer.unit, 0) + layer.num_bytes
    return [
        UnitCall(
            unit, {number: CROSSING_BYTES}, {number + 1: CROSSING_BYTES}, inside_s=step_s * num_bytes / model_bytes
        )
        for number, (unit, num_bytes) in enumerate(of_unit.items())
    ]


def main(milliseconds: float) -> None:
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    start_comfyui(dynamic_vram=False)
    layers, step_s = layers_of_flux(), milliseconds / 1000
    calls = unit_calls(layers, step_s)
    names = [call.unit for call in calls]
    rows: list[dict[str, Any]] = []

    def add(way: str, milliseconds_over: Any) -> None:
        by_link = {f"{link} GB/s": round(milliseconds_over(link * 1e9)) for link in LINKS_GB_PER_SECOND}
        rows.append({"way": way, **by_link})

    add("one GPU, resident, both conditionings", lambda link: 2 * milliseconds)
    add("whole copies on two GPUs", lambda link: milliseconds)
    for percent in (25, 50, 90):
        for what, part in (("", 1.0), (", packed", PACKED_PART)):
            add(
                f"at once, {percent}% streamed from main memory{what}",
                lambda link, percent=percent, part=part: streamed_ms(layers, percent, step_s, link / part),
            )
            add(
                f"one GPU, {percent}% streamed{what}, as a batch of two",
                lambda link, percent=percent, part=part: streamed_ms(layers, percent, 2 * step_s, link / part),
            )
    on_other = dict.fromkeys(names[len(names) // 2 :], OTHER)
    add(
        "relayed 50%, one conditioning after the other",
        lambda link: 2000 * forecast_relay(calls, on_other, link).seconds,
    )
    for rounds in ROUNDS:
        device_of = pair_devices(layers, rounds)
        add(
            f"relayed 50%, as a pair, in {rounds} rounds",
            lambda link, device_of=device_of: 1000 * forecast_pair(calls, device_of, link),
        )
    for row in rows:
        print(row)
    write_results("several_gpus_forecast", {"ms of a resident step": milliseconds, "rows": rows})


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 181.0)
