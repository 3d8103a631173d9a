"""On one GPU: whether streaming, or switching between two models, has become slower since another commit.

    python3 tools/host.py run benchmarks/commits.py OTHER_CHECKOUT [FOLDER]

OTHER_CHECKOUT is a checkout of that commit; of a copy without its history DISTORCH2_OTHER_COMMIT says which it is. Both
take turns, each time in a process of its own, on the same Flux-sized file: the milliseconds of a step with half of the
model and with all of it on the CPU, the seconds until such a model is on its devices, and the seconds of a switch: 26
GiB of the GPU are free, and two models that are resident run one step in turns. FOLDER (default /dev/shm) needs room
for 23 GiB.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import ROOT, printed_by, write_results

FREE_GIB = 26
TURNS = 2
SWITCHES = 3
"""After the first, in the first turn of each commit."""


def measure(checkout: str, path: str, with_switches: bool) -> dict[str, Any]:
    """With the package and the models of this checkout."""
    sys.path.insert(0, str(Path(checkout) / "benchmarks"))
    os.environ["DISTORCH2_CHECKOUT"] = checkout
    import harness

    harness.start_comfyui(dynamic_vram=False)
    import comfy.model_management as mm
    import models
    import torch

    from allocation_parser import parse_allocation
    from distorch2 import loading

    torch.set_grad_enabled(False)

    def load(text: str) -> Any:
        plain = {"pack_weights": "off"} if hasattr(loading.ComponentRequest, "pack_weights") else {}
        request = loading.ComponentRequest("cuda:0", parse_allocation(text), **plain)
        return loading.load_checkpoint(path, request, request, "cuda:0")[0]

    model = models.FLUX
    found: dict[str, Any] = {"ms a step": {}, "seconds": {}}
    with torch.inference_mode():
        for text in ("cuda:0,50%;cpu,*", "cpu,*"):
            patcher = load(text)
            started = time.perf_counter()
            mm.load_models_gpu([patcher])
            torch.cuda.synchronize()
            found["seconds"][f"placing {text}"] = round(time.perf_counter() - started, 2)
            for case in ("512 px", "1024 px"):
                inputs = model.inputs(case)
                harness.warmed_up(model, patcher, inputs)
                times = harness.steps_ms(model, patcher, inputs, 12)
                found["ms a step"][f"{text}, {case}"] = round(statistics.median(times), 1)
            mm.unload_all_models()
            del patcher
        if not with_switches:
            return found
        ballast_bytes = torch.cuda.mem_get_info()[0] - FREE_GIB * 1024**3
        ballast = torch.empty(ballast_bytes, dtype=torch.uint8, device="cuda")
        pair, inputs = [load("cuda:0,*"), load("cuda:0,*")], model.inputs("512 px")
        switches = []
        for number in range(1 + SWITCHES):
            started = time.perf_counter()
            mm.load_models_gpu([pair[number % 2]])
            model.step(pair[number % 2], inputs)
            torch.cuda.synchronize()
            switches.append(round(time.perf_counter() - started, 2))
        found["seconds"]["switches"] = switches[1:]
        del ballast
    return found


def commit_of(checkout: str) -> str:
    describe = ["git", "-C", checkout, "describe", "--always", "--abbrev=12"]
    named = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return os.environ.get("DISTORCH2_OTHER_COMMIT") or named or checkout


def main(other: str, folder: Path) -> None:
    from harness import saved_model

    found: dict[str, Any] = {"other commit": commit_of(other), "free GiB for the switches": FREE_GIB, "turns": []}
    with saved_model("Flux", folder) as path:
        for turn in range(TURNS):
            for name, checkout in (("other", other), ("this", str(ROOT))):
                switches = ["--switches"] if turn == 0 else []
                for printed in printed_by([sys.executable, __file__, "--measure", checkout, path, *switches]):
                    found["turns"].append({"checkout": name, **printed})
                    print(json.dumps(found["turns"][-1]), file=sys.stderr, flush=True)
                write_results("commits", found)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], "--switches" in sys.argv)))
    else:
        main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "/dev/shm"))
