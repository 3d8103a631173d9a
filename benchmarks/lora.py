"""On one GPU: what it costs to change the strength of a LoRA, with part of the model on the CPU.

    python3 tools/host.py run benchmarks/lora.py [FOLDER]

The Flux-sized model of `streaming.py` with a LoRA of rank 32 on every linear layer: seconds from one strength to
another, until the GPU is done, for ComfyUI's own model, completely on the GPU, and for ours, in turns; with weights
packed, too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from harness import saved_model, start_comfyui
from record import record_printed_by, summary

RANK = 32
PLACEMENTS = ((0, "off"), (50, "off"), (50, "on"))
"""Percent on the CPU, and whether they are packed."""
STRENGTHS = (0.5, 0.8, 0.3, 0.6)  # the first is not a change


def lora_patches(patcher) -> dict:
    """As ComfyUI's LoRA loader makes them, of random numbers."""
    import comfy.lora
    import torch

    generator = torch.Generator("cuda").manual_seed(2)
    state_dict = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            for part, shape in (("up", (module.out_features, RANK)), ("down", (RANK, module.in_features))):
                values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) * 0.01
                state_dict[f"diffusion_model.{name}.lora_{part}.weight"] = values.cpu()
    return comfy.lora.load_lora(state_dict, comfy.lora.model_lora_keys_unet(patcher.model, {}))


def measure(path: str) -> None:
    start_comfyui(dynamic_vram=False)
    import comfy.model_management as mm
    import models
    import torch

    from distorch2.planning.plan import GIB, ComponentRequest, VirtualVram

    torch.set_grad_enabled(False)
    with torch.inference_mode():
        core = models.FLUX.core(path)
        model_bytes = core.model_size()
        patchers = {"ComfyUI, all on the GPU": core}
        for percent, mode in PLACEMENTS:
            virtual_vram = VirtualVram(model_bytes * percent / 100 / GIB, "cpu")
            request = ComponentRequest("cuda:0", virtual_vram, pack_weights=mode)
            name = f"ours, {percent} % on the CPU" + (", packed" if mode == "on" else "")
            patchers[name] = models.FLUX.distributed(path, request)
        patches = lora_patches(core)
        seconds: dict[str, list[float]] = {name: [] for name in patchers}
        for strength in STRENGTHS:
            for name, patcher in patchers.items():
                patched = patcher.clone()
                patched.add_patches(patches, strength)
                torch.cuda.synchronize()
                started = time.perf_counter()
                mm.load_models_gpu([patched], force_full_load=True)
                torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - started)
    result = {name: summary([round(value, 3) for value in values[1:]]) for name, values in seconds.items()}
    reference, *others = result.values()
    result["patched weights"] = len(patches)
    result["ours / ComfyUI"] = [round(each["median"] / reference["median"], 2) for each in others]
    result["packed / plain"] = round(others[-1]["median"] / others[-2]["median"], 2)
    print(json.dumps(result))


def main(folder: Path) -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # or half of the weights might come by way of another GPU
    with saved_model("Flux", folder) as path:
        status = record_printed_by("lora", [sys.executable, __file__, "--measure", path])
    sys.exit(status)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"))
