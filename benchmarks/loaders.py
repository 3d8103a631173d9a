"""On one GPU: a Flux-sized diffusion model by each way into the pack, half of it on the CPU; bf16, and GGUF Q8_0.

    COMFYUI_GGUF_PATH=... python3 tools/host.py run benchmarks/loaders.py [FOLDER]

The bf16 model comes by the checkpoint node's loader, by that of the pack's node for diffusion models
(`UNETLoaderDisTorch2MultiGPU`), and by ComfyUI's loader with Distribute behind it. All three are loaded
at once, and take turns: with DynamicVRAM in this order and in the other, without it in this one. Anonymous host memory
is what the process has besides the mapped file, after each step of the way.

The GGUF model is loaded by ComfyUI-GGUF, if COMFYUI_GGUF_PATH names it, and distributed; beside it ComfyUI-GGUF's own
offloading with as many bytes of weights on the GPU, and its model all on the GPU. FOLDER (default /dev/shm) needs room
for 37 GiB.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import require_gpus, saved_model, start_comfyui, steps_ms, warmed_up
from record import printed_by, write_results

CASE = "1024 px"
TURNS = 4


def request_for(gib: float) -> Any:
    from distorch2.planning.plan import ComponentRequest, VirtualVram

    return ComponentRequest("cuda:0", VirtualVram(gib, "cpu"), pack_weights="off")


def anonymous_gib() -> float:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20, 2)


def in_turns(model: Any, patchers: dict[str, Any], inputs: Any) -> dict[str, float]:
    """Median milliseconds of a step."""
    times: dict[str, list[float]] = {name: [] for name in patchers}
    for _ in range(TURNS):
        for name, patcher in patchers.items():
            times[name] += steps_ms(model, patcher, inputs, 6)
    return {name: round(statistics.median(found), 1) for name, found in times.items()}


def measure_bf16(path: str, dynamic_vram: bool, last_first: bool) -> dict[str, Any]:
    start_comfyui(dynamic_vram)
    import comfy.model_management as mm
    import comfy.sd
    import models
    import torch

    from distorch2.loading import distribute, load_checkpoint, load_diffusion_model
    from distorch2.planning.plan import GIB

    torch.set_grad_enabled(False)
    model, inputs = models.FLUX, models.FLUX.inputs(CASE)
    request = request_for(Path(path).stat().st_size / GIB / 2)

    def loaded_by_core() -> Any:
        cores.append(comfy.sd.load_diffusion_model(path))
        return cores[0]

    cores: list[Any] = []
    loaders = {
        "checkpoint node": lambda: load_checkpoint(path, request, request, "cuda:0")[0],
        "UNETLoaderDisTorch2MultiGPU": lambda: load_diffusion_model(path, request),
        "Distribute": lambda: distribute(loaded_by_core(), request),
    }
    memory = {"at first": anonymous_gib()}
    patchers = {}
    with torch.inference_mode():
        for name in reversed(loaders) if last_first else loaders:
            patchers[name] = loaders[name]()
            memory[f"{name}: loaded"] = anonymous_gib()
            mm.load_models_gpu([patchers[name]])
            memory[f"{name}: on its devices"] = anonymous_gib()
        outputs = {name: warmed_up(model, patcher, inputs) for name, patcher in patchers.items()}
        expected = outputs["checkpoint node"]
        found = {
            "ms": in_turns(model, patchers, inputs),
            "bit-identical": all(torch.equal(output, expected) for output in outputs.values()),
            "GiB of anonymous host memory": memory,
        }
        memory["all three after their steps"] = anonymous_gib()
        second = distribute(cores[0], request_for(5.0))
        mm.load_models_gpu([second])  # which unloads the first, whose module it shares
        found["a second Distribute shares the module"] = second.model is patchers["Distribute"].model
        memory["a second Distribute with another plan: on its devices"] = anonymous_gib()
        return found


def write_gguf(path: Path) -> None:
    """A Flux whose matrices are of random Q8_0 blocks, and whose other weights are F32."""
    start_comfyui(False)
    import comfy.ops
    import gguf
    import models
    import numpy
    import torch

    config = models.FLUX
    with torch.device("meta"):
        module = config.module_class(**config.config, dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
    writer = gguf.GGUFWriter(str(path), "flux")
    generator = torch.Generator("cuda").manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.dim() < 2 or tensor.shape[1] % 32:
            writer.add_tensor(name, numpy.full(tuple(tensor.shape), 1.0 if "norm" in name else 0.01, numpy.float32))
            continue
        rows, columns = tensor.shape
        blocks = torch.randint(0, 256, (rows, columns // 32, 34), generator=generator, device="cuda", dtype=torch.uint8)
        scale = torch.tensor([columns**-0.5 / 74], dtype=torch.float16, device="cuda")  # 74 is that of int8's
        blocks[:, :, :2] = scale.view(torch.uint8)
        quantised = blocks.view(rows, -1).cpu().numpy()
        writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure_gguf(path: str) -> dict[str, Any]:
    start_comfyui(False)
    import comfy.model_management as mm
    import folder_paths
    import models
    import torch

    from distorch2.loading import distribute
    from distorch2.planning.plan import GIB

    torch.set_grad_enabled(False)
    spec = importlib.util.spec_from_file_location("comfyui_gguf", Path(os.environ["COMFYUI_GGUF_PATH"], "__init__.py"))
    assert spec is not None and spec.loader is not None
    pack: Any = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_gguf"] = pack
    spec.loader.exec_module(pack)
    folder_paths.add_model_folder_path("diffusion_models", str(Path(path).parent))

    def load() -> Any:
        return pack.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(Path(path).name)[0]

    model, inputs = models.FLUX, models.FLUX.inputs(CASE)
    found: dict[str, Any] = {"GiB of the file": round(Path(path).stat().st_size / GIB, 2)}
    with torch.inference_mode():
        ours = distribute(load(), request_for(Path(path).stat().st_size / GIB / 2), is_new=True)
        mm.load_models_gpu([ours])
        resident = load()
        resident.patch_model(resident.load_device)
        offloaded = load()
        offloaded.patch_model(offloaded.load_device, lowvram_model_memory=ours.model_size())
        patchers = {"ours": ours, "ComfyUI-GGUF": offloaded, "all on the GPU": resident}
        outputs = {name: warmed_up(model, patcher, inputs) for name, patcher in patchers.items()}
        found["bit-identical"] = torch.equal(outputs["ours"], outputs["all on the GPU"])
        found["GiB on the GPU"] = {
            name: round(patcher.loaded_size() / GIB, 2)
            for name, patcher in patchers.items()
            if name != "all on the GPU"
        }
        found["ms"] = in_turns(model, patchers, inputs)
    return found


def main(folder: Path) -> None:
    require_gpus(1)
    results: dict[str, Any] = {}

    def measured(name: str, *arguments: str | Path) -> None:
        for printed in printed_by([sys.executable, __file__, *arguments]):
            results[name] = printed
            write_results("loaders", results)
            print(name, printed, flush=True)

    gguf = folder / "distorch2_flux_q8_0.gguf"
    has_gguf = "COMFYUI_GGUF_PATH" in os.environ
    try:
        written = [subprocess.Popen([sys.executable, __file__, "--write-gguf", gguf])] if has_gguf else []
        with saved_model("Flux", folder) as path:
            for process in written:
                process.wait()
            if has_gguf:
                measured("GGUF Q8_0", "--gguf", gguf)
                gguf.unlink()
            measured("bf16, DynamicVRAM", "--bf16", path, "dynamic")
            measured("bf16, DynamicVRAM, loaded in the other order", "--bf16", path, "dynamic", "last first")
            measured("bf16, without DynamicVRAM", "--bf16", path)
    finally:
        gguf.unlink(missing_ok=True)


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or [""]
    if what == "--bf16":
        print(json.dumps(measure_bf16(rest[0], "dynamic" in rest, "last first" in rest)), flush=True)
    elif what == "--write-gguf":
        write_gguf(Path(rest[0]))
    elif what == "--gguf":
        print(json.dumps(measure_gguf(rest[0])), flush=True)
    else:
        main(Path(what or "/dev/shm"))
