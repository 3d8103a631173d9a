"""Loading with weights on a donor, for tests in process.

On a machine without an accelerator the CPU computes and simulated accelerators lend memory; with one, it computes and
the CPU lends; with two, the first computes and the second lends. (Simulated ones cannot be registered beside real ones:
torch then takes them for the machine's own.)
"""

import gc

import comfy.hooks
import comfy.lora
import comfy.lora_convert
import comfy.model_management as mm
import pytest
import torch

from allocation_parser import parse_allocation
from distorch2.loading import load_checkpoint
from distorch2.planning.plan import ComponentRequest, VirtualVram
from distorch2.weights.quantised import plain_tensors

COMPUTE = str(mm.get_torch_device())
HAS_SIMULATED = COMPUTE == "cpu"
DONOR = "sim:0" if HAS_SIMULATED else "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
RESIDENT = ComponentRequest(COMPUTE, VirtualVram(0.0, DONOR))
if HAS_SIMULATED:
    import simulated_accelerators as sim


@pytest.fixture(autouse=True, scope="module")
def devices_known_to_comfyui():
    with pytest.MonkeyPatch.context() as patches:
        if HAS_SIMULATED:
            sim.tell_comfyui(patches.setattr)
        yield


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield
    if HAS_SIMULATED:
        gc.collect()
        assert sim.used_bytes == [0, 0]


@pytest.fixture
def built_on_the_host(monkeypatch):
    """Where ComfyUI builds its models: with more memory free on a GPU than on the host it would build them there."""
    monkeypatch.setattr(mm, "unet_inital_load_device", lambda parameters, dtype: torch.device("cpu"))


def partly_on_donor(percent):
    return ComponentRequest(COMPUTE, parse_allocation(f"{COMPUTE},{100 - percent}%;{DONOR},*"), "stream")


def on_donor(checkpoints, kind="sd3_no_clip_weights", percent=50):
    """A checkpoint with `percent` of its diffusion model on the donor; LoRAs are rounded as ComfyUI rounds them."""
    return load_checkpoint(checkpoints(kind), partly_on_donor(percent), RESIDENT, COMPUTE, high_precision_loras=False)


def lora_weights(patcher, rank=4):
    """A LoRA on every Linear of the diffusion model, as it is stored, with random numbers."""
    generator = torch.Generator().manual_seed(3)
    state_dict = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        if type(module).__name__ == "Linear":  # quantised ones have a class of their own
            rows, columns = module.weight.shape
            state_dict[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
            state_dict[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(rank, columns, generator=generator)
    return state_dict


def lora_patches(patcher, rank=4):
    """Such a LoRA as ComfyUI's loader makes patches of it."""
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(lora_weights(patcher, rank)), keys)
    assert patches
    return patches


def lora_for(patcher, strength=1.0, rank=4):
    """The patcher with such a LoRA."""
    patches = lora_patches(patcher, rank)
    patched = patcher.clone()
    assert set(patched.add_patches(patches, strength)) == set(patches)
    return patched


def with_hook(patcher):
    """(The patcher with such a LoRA as a hook, which is written into weights in place; the hooks to sample with)."""
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.weights, hook.need_weight_init = lora_patches(patcher), False
    hooks = comfy.hooks.HookGroup()
    hooks.add(hook)
    patched = patcher.clone()
    patched.add_hook_patches(hook, hook.weights, 1.0)
    return patched, hooks


def bytes_on(module, device):
    """Of its parameters and buffers."""
    plain = (part for tensor in [*module.parameters(), *module.buffers()] for part in plain_tensors(tensor))
    return sum(tensor.nbytes for tensor in plain if str(tensor.device) == device)
