"""On one GPU: a model and a copy of it with a module of its own, served by two threads at once and in turns.

    python3 tools/host.py run benchmarks/two_threads.py [FOLDER]

A Flux-sized model (22.2 GiB, bf16) is written to FOLDER (default /dev/shm). Both have 50% of their weights on the CPU.
Each runs `STEPS` steps of 512 x 512 pixels, `ROUNDS` times in turns and `ROUNDS` times at once. Milliseconds are those
until both are done, for each step of one of them; outputs are compared, bit by bit.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from harness import require_gpus, saved_model, start_comfyui, warmed_up
from record import printed_by, write_results

MODEL = "Flux"
STEPS = 6
ROUNDS = 3


def measure(path: str) -> dict[str, Any]:
    start_comfyui(dynamic_vram=False)
    import models
    import torch

    from allocation_parser import parse_allocation
    from distorch2.planning.plan import ComponentRequest

    torch.set_grad_enabled(False)
    model = models.BY_NAME[MODEL]
    inputs = model.inputs("512 px")
    request = ComponentRequest("cuda:0", parse_allocation("cuda:0,50%;cpu,*"), pack_weights="off")
    original = model.distributed(path, request)
    patchers = [original, original.clone(force_deepcopy=True)]
    for patcher in patchers:
        patcher.patch_model()
    expected = warmed_up(model, patchers[0], inputs)
    warmed_up(model, patchers[1], inputs)
    is_right = []

    def run(patcher: Any) -> None:
        with torch.inference_mode():
            for _ in range(STEPS):
                output = model.step(patcher, inputs)
            is_right.append(torch.equal(output, expected))

    def timed(at_once: bool) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        if at_once:
            threads = [threading.Thread(target=run, args=(patcher,)) for patcher in patchers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            for patcher in patchers:
                run(patcher)
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started) / (len(patchers) * STEPS)

    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for at_once, found in times.items():
            found.append(timed(at_once))
    return {
        "ms in turns": round(statistics.median(times[False]), 1),
        "ms at once": round(statistics.median(times[True]), 1),
        "bit-identical": len(is_right) == 2 * 2 * ROUNDS and all(is_right),
    }


def main(folder: Path) -> None:
    require_gpus(1)
    with saved_model(MODEL, folder) as path:
        for found in printed_by([sys.executable, __file__, "--measure", path]):
            write_results("two_threads", found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])), flush=True)
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"))
