"""On one GPU with 24 GiB free: what a workflow loses where our diffusion model runs beside ComfyUI's dynamic models.

    python3 tools/host.py run benchmarks/beside_dynamic.py [FOLDER]

A prompt is what a workflow with a new text does: the text encoder (T5-XXL-sized) encodes it, the diffusion model
(Flux-sized) runs four steps at 1024 px, the VAE decodes. Each is loaded by ComfyUI's memory manager when its turn
comes. Whose model each is differs from setup to setup; each runs in a process of its own. Seconds are medians of the
prompts after the first two. What ComfyUI takes from a loaded model to load another is counted by what the model says
that it has on the GPU before and after. FOLDER (default /dev/shm) needs room for 32 GiB.
"""

from __future__ import annotations

import collections
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from harness import require_gpus, saved_model, start_comfyui
from record import printed_by, write_results

FREE_GIB = 24
NUM_PROMPTS, NUM_STEPS = 6, 4
# name -> (DynamicVRAM, whose diffusion model, whose text encoder); the VAE is ComfyUI's own.
SETUPS = {
    "all ComfyUI's, dynamic": (True, "core", "core"),
    "our diffusion model, the others dynamic": (True, "ours", "core"),
    "our diffusion model and text encoder, dynamic VAE": (True, "ours", "ours"),
    "all ComfyUI's, without DynamicVRAM": (False, "core", "core"),
    "our diffusion model, without DynamicVRAM": (False, "ours", "core"),
}


def vae() -> Any:
    """Flux's, with random weights."""
    import comfy.ldm.models.autoencoder
    import comfy.ops
    import comfy.sd
    import torch

    config = {
        "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    with torch.device("meta"):
        module = comfy.ldm.models.autoencoder.AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": config},
            decoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Decoder", "params": config},
        )
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
        for name, shape in shapes.items()
    }
    return comfy.sd.VAE(sd=weights)


def measure(setup: str, folder: Path) -> dict[str, Any]:
    dynamic_vram, whose_model, whose_encoder = SETUPS[setup]
    start_comfyui(dynamic_vram)
    import comfy.model_management as mm
    import models
    import torch

    from distorch2.planning.plan import ComponentRequest, VirtualVram

    torch.set_grad_enabled(False)
    ballast_bytes = torch.cuda.mem_get_info()[0] - FREE_GIB * 1024**3
    ballast = torch.empty(ballast_bytes, dtype=torch.uint8, device="cuda")
    taken: collections.Counter[str] = collections.Counter()

    unload = mm.LoadedModel.model_unload

    def counted(loaded: Any, *arguments: Any, **options: Any) -> bool:
        name, patcher = type(loaded.model.model).__name__, loaded.model
        before = patcher.loaded_size()
        is_gone = unload(loaded, *arguments, **options)
        taken[name] += before - patcher.loaded_size()
        return is_gone

    mm.LoadedModel.model_unload = counted
    flux, t5 = models.FLUX, models.T5_XXL
    flux_path, t5_path = str(folder / "distorch2_Flux.safetensors"), str(folder / "distorch2_T5-XXL.safetensors")
    half = ComponentRequest("cuda:0", VirtualVram(11.1, "cpu"), pack_weights="off")
    all_there = ComponentRequest("cuda:0", VirtualVram(0.0, "cpu"), pack_weights="off")
    with torch.inference_mode():
        model = flux.core(flux_path) if whose_model == "core" else flux.distributed(flux_path, half)
        encoder = t5.core(t5_path) if whose_encoder == "core" else t5.distributed(t5_path, all_there)
        decoder = vae()
        tokens, inputs = t5.inputs("256 tokens"), flux.inputs("1024 px")
        latent = torch.randn(1, 16, 128, 128)
        phases: dict[str, list[float]] = collections.defaultdict(list)
        taken_by_prompt = []
        for _ in range(NUM_PROMPTS):
            taken.clear()
            marks = [time.perf_counter()]
            mm.load_models_gpu([encoder])
            t5.step(encoder, tokens)
            torch.cuda.synchronize()
            marks.append(time.perf_counter())
            mm.load_models_gpu([model], memory_required=flux.memory_required(model, inputs))
            for _ in range(NUM_STEPS):
                flux.step(model, inputs)
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            decoder.decode(latent)
            torch.cuda.synchronize()
            marks.append(time.perf_counter())
            for phase, begin, end in zip(("encode", "sample", "decode"), marks, marks[1:]):
                phases[phase].append(end - begin)
            phases["prompt"].append(marks[-1] - marks[0])
            taken_by_prompt.append({name: round(num_bytes / 1024**3, 2) for name, num_bytes in taken.items()})
    del ballast
    return {
        "seconds": {phase: round(statistics.median(seconds[2:]), 2) for phase, seconds in phases.items()},
        "seconds, each prompt": {phase: [round(each, 2) for each in seconds] for phase, seconds in phases.items()},
        "GiB taken from loaded models, each prompt": taken_by_prompt,
    }


def main(folder: Path) -> None:
    require_gpus(1)
    found: dict[str, Any] = {"free GiB": FREE_GIB, "setups": {}}
    with saved_model("Flux", folder), saved_model("T5-XXL", folder):
        for setup in SETUPS:
            for printed in printed_by([sys.executable, __file__, "--measure", setup, folder]):
                found["setups"][setup] = printed
            print(setup, json.dumps(found["setups"][setup]), file=sys.stderr, flush=True)
            write_results("beside_dynamic", found)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"))
