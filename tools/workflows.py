"""Changes to API-format workflows that the demo and the tests share."""

from __future__ import annotations

import copy
from typing import Any

NODE_ID = "CheckpointLoaderAdvancedDisTorch2MultiGPU"
Prompt = dict[str, Any]


def replace_missing_devices(
    prompt: Prompt, object_info: dict[str, Any], compute_device: str, donor: str
) -> tuple[Prompt, list[str]]:
    """The prompt for this machine, and what was replaced in it.

    Where `cuda:0` is not offered, `compute_device` takes its place and `donor` that of `cpu` in allocation strings.
    """
    prompt, replaced = copy.deepcopy(prompt), []
    offered = object_info[NODE_ID]["input"]["required"]["unet_compute_device"][1]["options"]
    if "cuda:0" in offered:
        return prompt, replaced
    for node_id in nodes_of_class(prompt, NODE_ID):
        inputs = prompt[node_id]["inputs"]
        for name, value in inputs.items():
            if name.endswith("_device"):
                inputs[name] = value.replace("cuda:0", compute_device)
            elif name.endswith("_allocations"):
                inputs[name] = value.replace("cpu", donor).replace("cuda:0", compute_device)
            if inputs[name] != value:
                replaced.append(f"{name}: {value} -> {inputs[name]}")
    return prompt, replaced


def with_core_loader(prompt: Prompt) -> Prompt:
    """The same prompt with ComfyUI's own checkpoint loader in the place of ours."""
    prompt = copy.deepcopy(prompt)
    for node_id in nodes_of_class(prompt, NODE_ID):
        inputs = {"ckpt_name": prompt[node_id]["inputs"]["ckpt_name"]}
        prompt[node_id] = {"class_type": "CheckpointLoaderSimple", "inputs": inputs}
    return prompt


def nodes_of_class(prompt: Prompt, class_type: str) -> list[str]:
    """Ids of the nodes of a class."""
    return [node_id for node_id, node in prompt.items() if node["class_type"] == class_type]


def with_small_image(prompt: Prompt, size: int, steps: int) -> Prompt:
    """The same prompt for an image of `size` x `size` px in `steps` steps."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if "width" in node["inputs"]:
            node["inputs"].update(width=size, height=size)
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    return prompt


def with_saved_latent(prompt: Prompt) -> Prompt:
    """The same prompt, also saving the sampler's latent as a file."""
    prompt = copy.deepcopy(prompt)
    (sampler,) = nodes_of_class(prompt, "KSampler")
    prompt["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "latent"}}
    return prompt
