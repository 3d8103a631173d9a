"""`auto` beside the best split that a search by hand finds, with little room on one GPU, and on two.

    python3 tools/host.py run benchmarks/automatic.py [FOLDER] [MODEL ...]

Models of full size with random weights (Flux, SDXL) are written to FOLDER (default /dev/shm; 23 GiB). Memory is taken
away until so much is free on each GPU as `ROOMS` says. Then the model is loaded through ComfyUI's memory manager with
`auto`, and with every split of a grid: so much of the room for weights on each GPU, relayed and streamed, the rest on
the CPU. Packing is left to itself. A way is run once before it is timed, as packing begins with a second run.

Milliseconds are medians of `STEPS` steps of 1024 x 1024 pixels; those of SDXL are bound by the CPU. `auto` and the best
by hand are timed again in turns, and the medians of these are compared: a machine becomes faster or slower for a while.
Outputs are compared, bit by bit, with the model's on the GPU alone.
With one GPU the rooms for one are measured, with two those for two, since `auto` uses every GPU.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from harness import record_models, require_gpus, resident_model, start_comfyui, steps_ms, warmed_up

GIB = 1024**3
CASE = "1024 px"
STEPS = {"Flux": 6, "SDXL": 30}
TURNS = 3
ROOMS = {"Flux": [(13.0,), (13.0, 13.0), (13.0, 7.0)], "SDXL": [(4.0,)]}
"""Model -> GiB free on each GPU."""
PARTS_OF_FIRST = (1.0, 0.9, 0.75, 0.5, 0.0)
PARTS_OF_OTHERS = (1.0, 0.5, 0.0)


def splits(weights_gib: tuple[float, ...]) -> list[tuple[str, str]]:
    """Allocation strings and donor modes, when a GPU has so many GiB for weights."""
    parts = [PARTS_OF_FIRST, *[PARTS_OF_OTHERS] * (len(weights_gib) - 1)]
    if len(parts) > 1:
        parts[0] = (1.0, 0.75, 0.4)
    found = []
    for chosen in itertools.product(*parts):
        entries = [f"cuda:{index},{room * part:.2f}gb" for index, (room, part) in enumerate(zip(weights_gib, chosen))]
        modes = ("auto", "stream") if any(chosen[1:]) else ("auto",)
        found += [(";".join([*entries, "cpu,*"]), mode) for mode in modes]
    return found


def measure(name: str, path: str) -> None:
    """Prints a JSON object after each room: the last one is complete."""
    start_comfyui(dynamic_vram=False)
    import comfy.model_management as mm
    import models
    import torch

    from allocation_parser import parse_allocation
    from distorch2.planning.plan import ComponentRequest

    torch.set_grad_enabled(False)
    model = models.BY_NAME[name]
    inputs = model.inputs(CASE)
    devices = ["cpu", "disk", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]

    def drop() -> None:
        mm.unload_all_models()
        gc.collect()
        mm.soft_empty_cache()

    def timed(text: str, donor_mode: str, expected: Any) -> dict[str, Any]:
        row: dict[str, Any] = {"allocation": text, "donor mode": donor_mode}
        try:
            request = ComponentRequest("cuda:0", parse_allocation(text, devices), donor_mode)
            patcher = model.distributed(path, request)
            needed = model.memory_required(patcher, inputs)
            for _ in range(2):
                mm.load_models_gpu([patcher], memory_required=needed)
                output = warmed_up(model, patcher, inputs)
                torch.cuda.synchronize()
            row["ms"] = round(statistics.median(steps_ms(model, patcher, inputs, STEPS[name])), 1)
            row["bit-identical"] = torch.equal(output, expected)
            plan = patcher.distribution.plan
            row["GiB"] = {device: round(plan.bytes_on(device) / GIB, 2) for device in plan.devices}
        except torch.OutOfMemoryError:
            row["ms"] = None
        finally:
            patcher = output = None
            drop()
        return row

    with torch.inference_mode():
        resident = resident_model(model, path)
        expected = warmed_up(model, resident, inputs).clone()
        found: dict[str, Any] = {
            "resident ms": round(statistics.median(steps_ms(model, resident, inputs, STEPS[name])), 1)
        }
        needed_gib = model.memory_required(resident, inputs) / GIB
        resident.unpatch_model(torch.device("cpu"))
        del resident
        drop()
        found["rooms"] = []
        for rooms in ROOMS[name]:
            if len(rooms) != torch.cuda.device_count():
                continue
            ballast = []
            for index, room in enumerate(rooms):
                torch.zeros(1, device=f"cuda:{index}")
                taken = torch.cuda.mem_get_info(index)[0] - int(room * GIB)
                ballast.append(torch.empty(taken, dtype=torch.uint8, device=f"cuda:{index}"))
            for_weights = tuple(max(0.5, room - needed_gib - 0.7) for room in rooms)
            of_room: dict[str, Any] = {"GiB free": rooms, "auto": timed("auto", "auto", expected), "by hand": []}
            print(json.dumps(of_room["auto"]), file=sys.stderr, flush=True)
            for text, donor_mode in splits(for_weights):
                of_room["by hand"].append(timed(text, donor_mode, expected))
                print(json.dumps(of_room["by hand"][-1]), file=sys.stderr, flush=True)
            best = min((row for row in of_room["by hand"] if row["ms"] is not None), key=lambda row: row["ms"])
            ways = {"best": (best["allocation"], best["donor mode"]), "auto": ("auto", "auto")}
            again: dict[str, list[float]] = {way: [] for way in ways}
            for way, asked in TURNS * [*ways.items()]:
                if (ms := timed(*asked, expected)["ms"]) is not None:
                    again[way].append(ms)
            of_room["in turns"] = {"best by hand": best["allocation"], **again}
            if all(again.values()):
                ours, theirs = (statistics.median(again[way]) for way in ("auto", "best"))
                of_room["auto / best by hand"] = round(ours / theirs, 3)
            found["rooms"].append(of_room)
            print(json.dumps(found), flush=True)
            del ballast
            drop()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        require_gpus(1)
        import torch

        number = torch.cuda.device_count()
        names = [name for name, rooms in ROOMS.items() if any(len(each) == number for each in rooms)]
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm")
        benchmark = "automatic" if number == 1 else "automatic_two_gpus"
        record_models(benchmark, __file__, folder, sys.argv[2:] or names)
