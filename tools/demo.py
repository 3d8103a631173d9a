"""The main job, for real: a ComfyUI server, a small real checkpoint, the example workflow, the image.

Run it with `make demo`. The weights are random, so the image is a texture; the path it takes is the one of any model.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import torch
from checkpoints import ensure_checkpoint
from comfy_server import ROOT, ComfyServer
from safetensors.torch import load_file
from workflows import example, replace_missing_devices, with_core_loader, with_saved_latent, with_small_image

sys.path.append(str(ROOT))

from device_utils import HOST_DEVICE, first_accelerator, list_devices

EXAMPLE = "two_cards_by_ratio"  # in percent, and so for a model of any size
FOLDER = ROOT / ".host" / "demo"
IMAGE_PIXELS = 256
STEPS = 4


def main() -> None:
    started = time.monotonic()
    comfyui_path = Path(os.environ["COMFYUI_PATH"])
    print(f"ComfyUI: {comfyui_path}")
    checkpoint = ensure_checkpoint("sd3", ROOT / ".host" / "checkpoints")
    megabytes = checkpoint.stat().st_size / 1e6
    print(f"checkpoint: {checkpoint.name}, {megabytes:.0f} MB, SD3 with CLIP-L and a VAE, random weights")
    shutil.rmtree(FOLDER, ignore_errors=True)
    models = FOLDER / "models" / "checkpoints"
    models.mkdir(parents=True)
    (models / checkpoint.name).symlink_to(checkpoint)

    accelerator = first_accelerator(list_devices())
    has_accelerator = accelerator != HOST_DEVICE
    if has_accelerator:
        print(f"starting ComfyUI on {accelerator} ...", flush=True)
    else:
        print(
            "no accelerator found: ComfyUI computes on the CPU, and simulated accelerators lend memory ...", flush=True
        )
        (FOLDER / "custom_nodes").mkdir()
        (FOLDER / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    with ComfyServer(comfyui_path, FOLDER, arguments=() if has_accelerator else ("--cpu",)) as server:
        prompt = example(EXAMPLE)
        prompt["1"]["inputs"]["ckpt_name"] = checkpoint.name
        host = "sim:0" if accelerator == HOST_DEVICE else HOST_DEVICE
        prompt, replaced = replace_missing_devices(prompt, server.get("/object_info"), accelerator, host)
        for replacement in replaced:
            print(f"replaced, since this machine has other devices: {replacement}")
        prompt = with_saved_latent(with_small_image(prompt, IMAGE_PIXELS, STEPS))

        print(f"queueing the example {EXAMPLE} at {IMAGE_PIXELS}x{IMAGE_PIXELS} px, {STEPS} steps", flush=True)
        files = server.output_files(server.run(prompt))
        print(f"\n{_table(server.log)}\n")
        core_files = server.output_files(server.run(with_core_loader(prompt)))

    image = _with_suffix(files, ".png")
    latent, core_latent = (load_file(_with_suffix(f, ".latent"))["latent_tensor"] for f in (files, core_files))
    same = torch.equal(latent, core_latent)
    print(f"image: {image} (noise, since the weights are random)")
    print(f"latent bit-identical to ComfyUI's own loader: {'yes' if same else 'NO'}")
    print(f"done in {time.monotonic() - started:.0f} s")
    if not same:
        sys.exit("the latent differs from that of ComfyUI's own loader")


def _table(log: str) -> str:
    """The last placement table in the server's log."""
    lines = log.splitlines()
    first = max(i for i, line in enumerate(lines) if "DisTorch2: " in line)
    last = next((i for i in range(first + 1, len(lines)) if not lines[i].startswith("  ")), len(lines))
    title = lines[first][lines[first].index("DisTorch2: ") :]  # without the log level before it
    return "\n".join([title, *lines[first + 1 : last]])


def _with_suffix(files: list[Path], suffix: str) -> Path:
    return next(file for file in files if file.suffix == suffix)


if __name__ == "__main__":
    main()
