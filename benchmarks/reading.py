"""On one GPU: INT8 layers that ComfyUI reads and does not call, served ahead and not.

    python3 tools/host.py run benchmarks/reading.py [FOLDER]

A model of MiniMax-H3's kind and width with 16 of its 50 blocks, random INT8 weights (about 6 GiB), a part of it on the
CPU. ComfyUI computes the second layer of each feed forward, a fifth of a block, together with the activation before it.
"Before" is the same code without what serves such layers, as the package was before. Each step is
one forward of the blocks. The floor is the longer of the resident step and the copy of the streamed bytes at the speed
of the link, measured in the same run. FOLDER (default /dev/shm) needs room for the file.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import link_gb_per_second, require_gpus, start_comfyui, step, steps_ms, warmed_up
from record import record_printed_by

NUM_BLOCKS = 16
HIDDEN, HEADS, HEAD, FFN, TIME, TIME_GRID = 5376, 56, 128, 14336, 64, 512
ROWS = 1024
"""Tokens in the packed sequence, about: a short clip."""


def save(path: Path) -> None:
    """The file, with the shapes of the real model's blocks."""
    import comfy.ldm.minimax.model
    import comfy.ops
    import torch
    from safetensors.torch import save_file

    with torch.device("meta"):
        module = comfy.ldm.minimax.model.MiniMaxH3Model(
            hidden_size=HIDDEN, num_layers=NUM_BLOCKS, token_refiner_num_layers=1, num_attention_heads=HEADS,
            attention_head_dim=HEAD, ffn_hidden_size=FFN, time_embed_dim=TIME, adaln_curve_grid=TIME_GRID,
            dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init,
        )  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = {}
    for name, meta in module.state_dict().items():
        key = f"model.diffusion_model.{name}"
        if meta.dim() == 1:
            tensors[key] = torch.full(meta.shape, 1.0 if "norm" in name else 0.01, dtype=meta.dtype)
            continue
        weight = torch.randn(meta.shape, generator=generator, device="cuda").div_(meta.shape[1] ** 0.5)
        if ".blocks." not in f".{name}" or "adaln" in name:
            tensors[key] = weight.to(meta.dtype).cpu()
            continue
        scale = weight.abs().max() / 127
        tensors[key] = (weight / scale).round_().to(torch.int8).cpu()
        layer = key.removesuffix(".weight")
        tensors[f"{layer}.weight_scale"] = scale.cpu()
        tensors[f"{layer}.comfy_quant"] = torch.tensor([*b'{"format": "int8_tensorwise"}'], dtype=torch.uint8)
    save_file(tensors, path)


class Model:
    """For the harness: `step` is one forward of the diffusion model."""

    def step(self, patcher: Any, inputs: Any) -> Any:
        return patcher.model.diffusion_model(*inputs)[0]


def inputs() -> Any:
    import torch

    generator = torch.Generator("cuda").manual_seed(1)
    frames, side = ROWS // 32**2 or 1, 64  # 2 x 2 patches
    shapes = ((1, 24, frames, side, side), (1, 32, 2, 40), (1, 256, 5120))
    video, audio, text = (torch.randn(shape, generator=generator, device="cuda") for shape in shapes)
    return [video, audio], torch.tensor([500.0], device="cuda"), text.bfloat16()


@contextlib.contextmanager
def saved(folder: Path) -> Iterator[Path]:
    """The file, for as long as it is needed. It is written in a process of its own, without DynamicVRAM: with it,
    ComfyUI's modules have no weights before they are loaded."""
    require_gpus(1)
    path = folder / "distorch2_reading.safetensors"
    try:
        subprocess.run([sys.executable, __file__, "--save", path], check=True)
        yield path
    finally:
        path.unlink(missing_ok=True)


def measure(path: Path) -> dict[str, Any]:
    start_comfyui(dynamic_vram=False)
    import comfy.model_management as mm
    import comfy.sd
    import torch

    from distorch2.loading import load_checkpoint
    from distorch2.planning.plan import GIB, ComponentRequest, VirtualVram
    from distorch2.serving.reading import Reading

    torch.set_grad_enabled(False)
    attach = Reading.attach
    model, arguments = Model(), inputs()
    with torch.inference_mode():
        core = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
        mm.load_models_gpu([core])
        expected = warmed_up(model, core, arguments)
        is_steady = torch.equal(step(model, core, arguments), expected)
        resident_ms = statistics.median(steps_ms(model, core, arguments, 8))
        model_bytes = core.model_size()
        mm.unload_all_models()
        del core
        rows = []
        for percent in (50, 75, 100):
            row: dict[str, Any] = {"percent on cpu": percent}
            for name, method in (("before", lambda reading: None), ("now", attach)):
                Reading.attach = method
                request = ComponentRequest(
                    "cuda:0", VirtualVram(model_bytes * percent / 100 / GIB, "cpu"), pack_weights="off"
                )
                patcher = load_checkpoint(str(path), request, request, "cuda:0")[0]
                mm.load_models_gpu([patcher])
                outputs = [step(model, patcher, arguments) for _ in range(4)]
                times = steps_ms(model, patcher, arguments, 8)
                groups = [group for group in patcher.distribution.plan.groups if group.is_streamed]
                copies = patcher.distribution.transfer.copies
                step(model, patcher, arguments)
                row[name] = {
                    "bit-identical": all(torch.equal(output, expected) for output in outputs),
                    "ms": round(statistics.median(times), 1),
                    "ms, each step": [round(each, 1) for each in times],
                    "groups": len(groups),
                    "groups copied in a step": patcher.distribution.transfer.copies - copies,
                    "layers only read": len(patcher.distribution.reading.only_read),
                }
                streamed_bytes = sum(group.slab_bytes for group in groups)
                mm.unload_all_models()
                del patcher, outputs
            link = link_gb_per_second(page_locked=True)
            row["streamed GiB"] = round(streamed_bytes / GIB, 2)
            row["link GB/s"] = round(link, 1)
            row["resident ms"] = round(resident_ms, 1)
            row["floor ms"] = round(max(resident_ms, streamed_bytes / link / 1e6), 1)
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return {"model GiB": round(model_bytes / GIB, 2), "ComfyUI's own repeats its bits": is_steady, "rows": rows}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--save"]:
        start_comfyui(dynamic_vram=False)
        save(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        with saved(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm")) as file:
            sys.exit(record_printed_by("reading", [sys.executable, __file__, "--measure", file]))
