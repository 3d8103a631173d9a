"""Changes to API-format workflows that the demo and the tests share."""

from __future__ import annotations

import copy
from typing import Any

NODE_ID = "CheckpointLoaderAdvancedDisTorch2MultiGPU"
Prompt = dict[str, Any]


def replace_missing_devices(prompt: Prompt, object_info: dict[str, Any]) -> tuple[Prompt, list[str]]:
    """The prompt with every device that this machine lacks replaced by the input's default, and what was replaced."""
    prompt, replaced = copy.deepcopy(prompt), []
    for node in prompt.values():
        if node["class_type"] != NODE_ID:
            continue
        for name, (_, options) in object_info[NODE_ID]["input"]["required"].items():
            value = node["inputs"][name]
            if name.endswith("_device") and value not in options["options"]:
                node["inputs"][name] = options["default"]
                replaced.append(f"{name}: {value} -> {options['default']}")
    return prompt, replaced


def with_core_loader(prompt: Prompt) -> Prompt:
    """The same prompt with ComfyUI's own checkpoint loader in the place of ours."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if node["class_type"] == NODE_ID:
            node["class_type"] = "CheckpointLoaderSimple"
            node["inputs"] = {"ckpt_name": node["inputs"]["ckpt_name"]}
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
