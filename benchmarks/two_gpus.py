"""On two GPUs: how long a step takes with part of a model on the second one, streamed from there or relayed to it, and
with part of it on the CPU, streamed over the links of both.

    python3 tools/host.py run benchmarks/two_gpus.py [FOLDER] [MODE ...]

A Flux-sized model with random weights is written to FOLDER (default /dev/shm; 23 GiB). Steps of the resident model and
of ours take turns, as in `streaming.py`. The modes are relay, stream, "relay through the host", where nothing is copied
from GPU to GPU directly, and "two links", where the weights are on the CPU and half of them is streamed by way of the
second GPU: its floor is the longer of the resident step and the copy of the streamed bytes at the measured speed of the
two links. Forecasts are those of `simulator.py` for the times of the units in one recorded step.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from pathlib import Path

from harness import (
    bytes_by_device,
    gb_per_second,
    in_turns_ms,
    link_gb_per_second,
    mark,
    require_gpus,
    resident_model,
    saved_model,
    start_comfyui,
    step,
    warmed_up,
)
from record import record_printed_by

MODES = {
    "relay": (10, 50, 90),
    "two links": (50, 90, 100),
    "relay through the host": (10, 50, 90),
    "stream": (10, 50, 90),
}
"""With the percentages of the model on the donor."""
HOME, DONOR = "cuda:0", "cuda:1"


def gpu_link_gb_per_second(num_bytes: int = 1024**3) -> float:
    """Of copies from the donor to the compute device."""
    import torch

    source = torch.ones(num_bytes, dtype=torch.uint8, device=DONOR)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=HOME)
    return gb_per_second(lambda: target.copy_(source, non_blocking=True), num_bytes)


def two_links_gb_per_second(num_bytes: int = 1024**3) -> float:
    """Of two copies at once, from the host to both GPUs."""
    import torch

    streams = [torch.cuda.Stream(device) for device in (HOME, DONOR)]
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).fill_(1)
    targets = [torch.empty(num_bytes, dtype=torch.uint8, device=stream.device) for stream in streams]

    def copy() -> None:
        for stream, target in zip(streams, targets):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    return gb_per_second(copy, 2 * num_bytes)


def megabytes(*numbers: float) -> list[float]:
    return [round(num_bytes / 1e6, 1) for num_bytes in numbers]


def recorded_calls(model, resident, case: str) -> list:
    """The units of the model in one step. Outside inference mode, so that writes are counted."""
    import torch
    from unit_calls import recorded_units

    with torch.inference_mode(False), torch.no_grad():
        inputs = model.inputs(case)
        step(model, resident, inputs)
        with recorded_units(resident.model, mark) as calls:
            step(model, resident, inputs)
    return calls


def measure(path: str, modes: list[str]) -> None:
    """Prints a JSON object after each row: the last one is complete."""
    start_comfyui(dynamic_vram=False)
    import models
    import simulator
    import torch

    from distorch2.planning.plan import GIB, ComponentRequest, VirtualVram

    torch.set_grad_enabled(False)
    model = models.FLUX
    two_links = two_links_gb_per_second()
    result = {
        "GPU link GB/s": round(gpu_link_gb_per_second(), 1),
        "host link GB/s": round(link_gb_per_second(page_locked=True), 1),
        "two host links GB/s": round(two_links, 1),
        "rows": [],
    }
    with torch.inference_mode():
        inputs_of = {case: model.inputs(case) for case in models.IMAGES}
        resident = resident_model(model, path)
        model_bytes = resident.model_size()
        expected = {case: warmed_up(model, resident, inputs) for case, inputs in inputs_of.items()}
        calls: dict[str, list] = {}  # of the cases that are relayed
        for mode, percent in [(name, percent) for name in modes for percent in MODES[name]]:
            gc.collect()
            torch.cuda.empty_cache()
            donor, donor_mode = ("cpu", "stream") if mode == "two links" else (DONOR, mode.partition(" ")[0])
            allocation = VirtualVram(model_bytes * percent / 100 / GIB, donor)
            patcher = model.distributed(path, ComponentRequest(HOME, allocation, donor_mode, pack_weights="off"))
            patcher.patch_model()
            distribution = patcher.distribution
            plan, relay = distribution.plan, distribution.relay
            if mode == "relay through the host":
                for crossing in relay.activations.crossings.values():
                    crossing.is_direct = False
            planned = {device: plan.bytes_on(device) for device in plan.devices}
            row = {
                "mode": mode,
                "percent on the donor": percent,
                "planned bytes": planned,
                "bytes equal the plan": planned == bytes_by_device(patcher.model),
                "relayed units": len(plan.relayed_units),
                "streamed GiB": round(sum(item.layer.num_bytes for item in plan.streamed) / GIB, 2),
                "has a detour": distribution.transfer.detour is not None,
                "at": {},
            }
            copy_ms = sum(group.slab_bytes for group in plan.groups) / two_links / 1e6 if donor == "cpu" else 0.0
            for case, inputs in inputs_of.items():
                if case == models.BATCH_OF_2 and percent != 50:
                    continue
                is_identical = torch.equal(warmed_up(model, patcher, inputs), expected[case])
                resident_ms, ours_ms = map(statistics.median, in_turns_ms(model, resident, patcher, inputs))
                row["at"][case] = {
                    "bit-identical": is_identical,
                    "resident ms": round(resident_ms, 1),
                    "ours ms": round(ours_ms, 1),
                    "ours / resident": round(ours_ms / resident_ms, 3),
                }
                if copy_ms:
                    floor_ms = max(resident_ms, copy_ms)
                    row["at"][case] |= {"floor ms": round(floor_ms, 1), "ours / floor": round(ours_ms / floor_ms, 3)}
                if relay:
                    activations = relay.activations
                    before = activations.bytes_sent, activations.bytes_brought
                    step(model, patcher, inputs)
                    crossed = activations.bytes_sent - before[0], activations.bytes_brought - before[1]
                    link = result["GPU link GB/s"] if mode == "relay" else result["host link GB/s"] / 2  # out, then in
                    if case not in calls:
                        calls[case] = recorded_calls(model, resident, case)
                    forecast = simulator.forecast_relay(calls[case], plan.relayed_units, link * 1e9)
                    row["at"][case] |= {
                        "MB sent and brought in a step": megabytes(*crossed),
                        "forecast MB": megabytes(forecast.bytes_sent, forecast.bytes_brought),
                        "forecast ms": round(forecast.seconds * 1000, 1),
                    }
            patcher.detach()
            del patcher, distribution, relay
            result["rows"].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            print(json.dumps(result), flush=True)


def main(folder: Path, modes: list[str]) -> None:
    require_gpus(2)
    with saved_model("Flux", folder) as path:
        status = record_printed_by("two_gpus", [sys.executable, __file__, "--measure", path, *modes])
    sys.exit(status)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3:])
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"), sys.argv[2:] or list(MODES))
