"""Changes to API-format workflows that the demo and the tests share."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "example_workflows"
NODE_ID = "CheckpointLoaderAdvancedDisTorch2MultiGPU"
Prompt = dict[str, Any]


def example(name: str) -> Prompt:
    """The API format of an example workflow."""
    return json.loads((EXAMPLES / "api" / f"{name}.json").read_text())


def replace_missing_devices(
    prompt: Prompt, object_info: dict[str, Any], compute_device: str, donor: str
) -> tuple[Prompt, list[str]]:
    """The prompt for this machine, and what was replaced in it.

    Where a `cuda:N` is not offered, `compute_device` takes its place as a device that computes, and `donor` as one that
    keeps weights. In an allocation string cuda:0 is the one that computes; where that is missing, `donor` also takes
    the place of `cpu`.
    """
    prompt, replaced = copy.deepcopy(prompt), []
    offered = object_info[NODE_ID]["input"]["required"]["unet_compute_device"][1]["options"]

    def for_allocation(device: re.Match[str]) -> str:
        name = device[0]
        if name == "cuda:0":
            return name if name in offered else compute_device
        return name if name in offered and "cuda:0" in offered else donor

    for node_id in nodes_of_class(prompt, NODE_ID):
        inputs = prompt[node_id]["inputs"]
        for name, value in inputs.items():
            if name.endswith("_device") and value not in offered:
                inputs[name] = donor if name.endswith("_donor_device") else compute_device
            elif name.endswith("_allocations"):
                inputs[name] = re.sub(r"cpu|cuda:\d+", for_allocation, value)
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
