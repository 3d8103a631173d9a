"""On two GPUs: how long a step takes with part of a model on the second one, streamed from there or relayed to it.

    python3 tools/host.py run benchmarks/two_gpus.py [FOLDER] [MODE ...]

A Flux-sized model with random weights is written to FOLDER (default /dev/shm; 23 GiB). Steps of the resident model and
of ours take turns, as in `streaming.py`. The modes are stream, relay, and "relay through the host", where nothing is
copied from GPU to GPU directly.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

from placement import bytes_by_device, saved_model, start_comfyui
from record import record_printed_by
from streaming import TURNS, WARM_UP_STEPS, step, turn_ms, warm_up_gpu

PERCENTAGES = (10, 50, 90)
MODES = ("stream", "relay", "relay through the host")
HOME, DONOR = "cuda:0", "cuda:1"


def gpu_link_gb_per_second(num_bytes: int = 1024**3) -> float:
    """Median of 5 copies from the donor to the compute device."""
    import torch

    source = torch.ones(num_bytes, dtype=torch.uint8, device=DONOR)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=HOME)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize(DONOR)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(DONOR)
        torch.cuda.synchronize(HOME)
        seconds.append(time.perf_counter() - started)
    return num_bytes / statistics.median(seconds[1:]) / 1e9


def repeated(inputs: dict, batch: int) -> dict:
    """The same image so many times."""
    return {name: value.repeat(batch, *[1] * (value.dim() - 1)) for name, value in inputs.items()}


def measure(path: str, modes: list[str]) -> None:
    """Prints a JSON object after each row: the last one is complete."""
    start_comfyui(dynamic_vram=False)
    import models
    import torch

    from distorch2.plan import GIB, ComponentRequest, VirtualVram

    torch.set_grad_enabled(False)
    model = models.FLUX
    result = {"GPU link GB/s": round(gpu_link_gb_per_second(), 1), "rows": []}
    with torch.inference_mode():
        cases = {f"{size} {model.unit}": model.inputs(size) for size in model.sizes}
        cases["1024 px, batch of 2"] = repeated(model.inputs(1024), 2)
        warm_up_gpu(model.dtype)
        resident = model.core(path)
        model_bytes = resident.model_size()
        resident.patch_model(resident.load_device)
        expected = {}
        for case, inputs in cases.items():
            for _ in range(WARM_UP_STEPS):
                expected[case] = step(model, resident, inputs)
        for percent, mode in itertools.product(PERCENTAGES, modes):
            gc.collect()
            torch.cuda.empty_cache()
            allocation = VirtualVram(model_bytes * percent / 100 / GIB, DONOR)
            patcher = model.distributed(path, ComponentRequest(HOME, allocation, mode.partition(" ")[0]))
            patcher.patch_model()
            distribution = patcher.distribution
            plan, relay = distribution.plan, distribution.relay
            if mode == MODES[2]:
                for crossing in relay.crossings.values():
                    crossing.is_direct = False
            planned = {device: plan.bytes_on(device) for device in plan.devices}
            row = {
                "percent on the other GPU": percent,
                "mode": mode,
                "planned bytes": planned,
                "bytes equal the plan": planned == bytes_by_device(patcher.model),
                "relayed units": len(plan.relayed_units),
                "streamed GiB": round(sum(item.layer.num_bytes for item in plan.streamed) / GIB, 2),
                "at": {},
            }
            for case, inputs in cases.items():
                if case.endswith("batch of 2") and percent != 50:
                    continue
                for _ in range(WARM_UP_STEPS):
                    output = step(model, patcher, inputs)
                crossed = (relay.bytes_sent, relay.bytes_brought) if relay else (0, 0)
                turns = [(turn_ms(model, resident, inputs), turn_ms(model, patcher, inputs)) for _ in range(TURNS)]
                resident_ms, ours_ms = (statistics.median(itertools.chain(*times)) for times in zip(*turns))
                row["at"][case] = {
                    "bit-identical": torch.equal(output, expected[case]),
                    "resident ms": round(resident_ms, 1),
                    "ours ms": round(ours_ms, 1),
                    "ours / resident": round(ours_ms / resident_ms, 3),
                }
                if relay:
                    num_steps = sum(len(turn) + 1 for _, turn in turns)
                    sent, brought = relay.bytes_sent - crossed[0], relay.bytes_brought - crossed[1]
                    row["at"][case]["MB sent and brought in a step"] = [
                        round(num_bytes / num_steps / 1e6, 1) for num_bytes in (sent, brought)
                    ]
            patcher.detach()
            del patcher, distribution, relay
            result["rows"].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            print(json.dumps(result), flush=True)


def main(folder: Path, modes: list[str]) -> None:
    with saved_model("Flux", folder) as path:
        status = record_printed_by("two_gpus", [sys.executable, __file__, "--measure", path, *modes])
    sys.exit(status)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3:])
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"), sys.argv[2:] or list(MODES))
