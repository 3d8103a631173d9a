"""Prompts for a real ComfyUI server with the pack in custom_nodes, and what they give: for the tests over HTTP."""

import copy
import os
import re
import sys
from pathlib import Path

from comfy_server import ComfyServer
from conftest import COMFYUI_PATH, NUM_ACCELERATORS
from host import DEFAULT_VERSION, SDISTS, fetch_comfyui, fetch_newest, fetch_packages
from safetensors.torch import load_file
from workflows import example, nodes_of_class, with_saved_latent, with_small_image

# A ComfyUI of the user's own is tested as it is.
IS_FETCHED = "DISTORCH2_FETCHED_COMFYUI" in os.environ
VERSIONS = sorted(SDISTS) if IS_FETCHED else ["given"]
NEWEST = VERSIONS[-1]
WITH_NEWEST_PACKAGES = f"{DEFAULT_VERSION} with newest packages"
"""The default ComfyUI with later releases of the front end, comfy-kitchen and comfy-aimdo than those that it names."""
ARGUMENTS = () if NUM_ACCELERATORS else ("--cpu",)
DEVICES = ["cpu", *(f"cuda:{index}" for index in range(NUM_ACCELERATORS))]
ACCELERATOR = DEVICES[min(1, NUM_ACCELERATORS)]


def start(version, base, checkpoints, arguments=(), environment=None):
    """A server whose checkpoint folder has every file that the tests ask for."""
    folder = base / "models" / "checkpoints"
    folder.mkdir(parents=True)
    for kind in ("sd3", "sd3_fp8", "sd3_no_clip_weights", "sd15_blocks", "flux", "sd15_ckpt"):
        (folder / Path(checkpoints(kind)).name).symlink_to(checkpoints(kind))
    (base / "models" / "text_encoders").mkdir()
    (base / "models" / "text_encoders" / "clip_l.safetensors").symlink_to(checkpoints("clip_l"))
    arguments = (*ARGUMENTS, *arguments)
    if version == WITH_NEWEST_PACKAGES:
        arguments += newest_front_end()
        environment = with_newest_packages(environment or {})
    is_default = version in ("given", DEFAULT_VERSION, WITH_NEWEST_PACKAGES)
    tree = COMFYUI_PATH if is_default else fetch_comfyui(version, Path(sys.executable))
    return ComfyServer(tree, base, arguments=arguments, environment=environment)


def newest_front_end():
    """ComfyUI's arguments for the newest front end."""
    return _front_end_in(fetch_newest(Path(sys.executable), "comfyui-frontend-package"))


def front_end_of(tree):
    """The same for the front end that a ComfyUI names in its requirements."""
    (pin,) = re.findall(r"^comfyui-frontend-package==\S+", (tree / "requirements.txt").read_text(), re.MULTILINE)
    return _front_end_in(fetch_packages(Path(sys.executable), pin))


def _front_end_in(packages):
    return "--front-end-root", str(packages / "comfyui_frontend_package" / "static")


def with_newest_packages(environment):
    """These variables, and a PYTHONPATH with the newest comfy-kitchen and comfy-aimdo before the installed ones."""
    packages = fetch_newest(Path(sys.executable), "comfy-kitchen", "comfy-aimdo")
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))}


def prompt_for(server, checkpoint, **widgets):
    """The example workflow, small, on what this machine has, with its latent saved."""
    prompt = example("two_cards_by_ratio")
    computing = dict.fromkeys(("unet_compute_device", "clip_compute_device", "vae_device"), ACCELERATOR)
    resident = {"unet_virtual_vram_gb": 0.0, "clip_virtual_vram_gb": 0.0}
    resident |= dict.fromkeys(("unet_expert_mode_allocations", "clip_expert_mode_allocations"), "")
    prompt["1"]["inputs"].update({"ckpt_name": checkpoint, **computing, **resident, **widgets})
    return with_saved_latent(with_small_image(prompt, 64, 2))


def with_text_encoder_of_its_own(prompt):
    """For checkpoints without one: a CLIP-L file, whose SD3 form Flux takes too."""
    prompt = copy.deepcopy(prompt)
    inputs = {"clip_name": "clip_l.safetensors", "type": "sd3"}
    prompt["clip"] = {"class_type": "CLIPLoader", "inputs": inputs}
    for node_id in nodes_of_class(prompt, "CLIPTextEncode"):
        prompt[node_id]["inputs"]["clip"] = ["clip", 0]
    return prompt


def latent_of(server, prompt):
    files = server.output_files(server.run(prompt))
    (latent,) = (file for file in files if file.suffix == ".latent")
    assert any(file.suffix == ".png" for file in files)
    return load_file(latent)["latent_tensor"]
