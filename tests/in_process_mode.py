"""One of ComfyUI's memory modes, in a process of its own: short runs of a checkpoint, resident, from the CPU and from
the disk, and of ComfyUI's own model, distributed while it stays in use.

    python tests/in_process_mode.py CHECKPOINT [FLAG ...]

FLAG is one of ComfyUI's command line options, or --dynamic-vram, which starts DynamicVRAM as its main.py does. Prints
one JSON object, in which latents are a digest of their bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(checkpoint: str, *flags: str) -> None:
    sys.path[:0] = [os.environ["COMFYUI_PATH"], str(ROOT / "tests")]
    sys.path += [str(ROOT), str(ROOT / "benchmarks")]
    sys.argv = [sys.argv[0], *(flag for flag in flags if flag != "--dynamic-vram")]
    import comfy.options

    comfy.options.enable_args_parsing()
    import harness

    if "--dynamic-vram" in flags:
        harness.start_comfyui(dynamic_vram=True)
    import comfy.model_management as mm
    import torch
    from sampling import core_load, sample

    from distorch2.loading import distribute, load_checkpoint
    from distorch2.planning.plan import GIB, ComponentRequest, VirtualVram

    device = str(mm.get_torch_device())
    with torch.inference_mode():
        # With some flags ComfyUI itself would run the text encoder on the CPU, and make another conditioning.
        sample(*core_load(checkpoint, clip_device=device)[:2])  # the first forward may take other kernels
        of_core = sample(*core_load(checkpoint, clip_device=device)[:2])
        mm.unload_all_models()
        found, model_gib = [], 0.0
        for part, donor in ((0.0, "cpu"), (0.5, "cpu"), (1000.0, "cpu"), (1000.0, "disk")):
            request = ComponentRequest(device, VirtualVram(part * model_gib, donor))
            model, clip, _ = load_checkpoint(checkpoint, request, request, device)
            latents = sample(model, clip)
            plan = model.distribution.plan
            on_device = harness.bytes_by_device(model.model).get(device, 0)
            model_gib = plan.model_bytes / GIB
            found.append(
                {
                    "latents": digest(latents),
                    "as planned": on_device == plan.bytes_on(device),
                    "streamed": len(model.distribution.asked.streamed),
                    "evicted": len(plan.evicted),
                    "copies": model.distribution.transfer.copies,
                    "groups in the checkpoint": sum(each.slab is None for each in model.distribution.groups.values()),
                }
            )
            mm.unload_all_models()
            del model, clip
        core, clip, _ = core_load(checkpoint, clip_device=device)
        before = sample(core, clip)
        ours = distribute(core, ComponentRequest(device, VirtualVram(model_gib / 2, "cpu")))
        distributed = {"latents": digest(sample(ours, clip)), "copies": ours.distribution.transfer.copies}
        distributed["core's before and after"] = [digest(before), digest(sample(core, clip))]
    patcher = type(core_load(checkpoint)[0]).__name__
    seen = {"core patcher": patcher, "core's latents": digest(of_core), "runs": found, "distributed": distributed}
    print(json.dumps(seen))


def digest(latents) -> str:
    return hashlib.sha256(latents.cpu().numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
