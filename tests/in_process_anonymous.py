"""Anonymous host memory of a model on simulated devices, in a process of its own.

    python tests/in_process_anonymous.py CHECKPOINT ALLOCATION

Prints one JSON object of MiB beyond those before the model was loaded. A LoRA's own matrices are not counted.
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIB = 1024**2


def main(checkpoint: str, allocation: str) -> None:
    sys.path[:0] = [os.environ["COMFYUI_PATH"], str(ROOT / "tests"), str(ROOT)]
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_management as mm
    import simulated_accelerators as sim
    import torch

    sim.tell_comfyui(compute="sim:0")
    from placing import lora_for

    from allocation_parser import parse_allocation
    from distorch2.loading import load_checkpoint
    from distorch2.planning.plan import ComponentRequest

    def anonymous() -> float:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps for later
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        return kib / 1024 - sim.used_bytes[0] / MIB

    with torch.inference_mode():
        before = anonymous()
        request = ComponentRequest("sim:0", parse_allocation(allocation), "stream")
        model, _, _ = load_checkpoint(checkpoint, request, request, "cpu")
        mm.load_models_gpu([model])
        groups = [group.slab_bytes / MIB for group in model.distribution.plan.groups]
        found = {"streamed": sum(groups), "group": max(groups), "placed": anonymous() - before}
        mm.unload_all_models()
        found["unloaded"] = anonymous() - before
        patched = lora_for(model)
        before = anonymous()
        mm.load_models_gpu([patched])
        found["with a LoRA"] = anonymous() - before
        mm.unload_all_models()
        found["unloaded again"] = anonymous() - before
    print(json.dumps({name: round(mib, 1) for name, mib in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
