"""A model split by ComfyUI's MultiGPU CFG Split over simulated accelerators, for tests in process."""

import contextlib
import functools

import comfy.controlnet
import comfy.multigpu
import comfy.sample
import comfy.samplers
import pytest
import torch
from computing import compute_on_sim, sim
from computing import inference_mode as inference_mode
from placing import lora_for, with_hook
from sampling import conditioning, core_load, sample

KINDS = ("flux", "sd3_no_clip_weights", "sd15_blocks_no_clip", "wan")
DEVICES = [f"sim:{index}" for index in range(sim.NUM_DEVICES)]


@pytest.fixture(scope="module", autouse=True)
def one_at_a_time():
    """No two conditionings in a batch, which gives other bits."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(comfy.samplers, "can_concat_cond", lambda one, other: one is other)
        yield


@pytest.fixture(scope="module")
def expected(checkpoints, one_at_a_time):
    """kind -> (latents, latents with a LoRA, latents with a hook)."""
    found = {}
    with torch.inference_mode():
        for kind in KINDS:
            model, clip, _ = core_load(checkpoints(kind))
            sample(model, clip)  # the first forward of a process may take other kernels
            hooked, hooks = with_hook(model)
            latents = [sample(model, clip), sample(lora_for(model), clip), sample(hooked, clip, hooks=hooks)]
            found[kind] = latents
    return found


@pytest.fixture(autouse=True)
def computing(expected, monkeypatch, inference_mode):
    compute_on_sim(monkeypatch)


def split(model, num_devices=sim.NUM_DEVICES):
    """As the node MultiGPU CFG Split."""
    return comfy.multigpu.create_multigpu_deepclones(model, num_devices, reuse_loaded=True)


def on_all(model):
    """The patchers of the model and its copies."""
    return [model, *model.get_additional_models_with_key("multigpu")]


@contextlib.contextmanager
def forwards(model):
    """Counts the forwards of the model on each device."""
    counts = {}

    def count(device, *arguments):
        counts[device] = counts.get(device, 0) + 1

    hooks = [
        patcher.model.diffusion_model.register_forward_hook(functools.partial(count, str(patcher.load_device)))
        for patcher in on_all(model)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def without_guidance(model, clip, cfg=1.0):
    latent = torch.zeros(1, model.model.latent_format.latent_channels, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 7)
    positive, negative = conditioning(model, clip, 7), conditioning(model, clip, 8)
    return comfy.sample.sample(model, noise, 2, cfg, "euler", "simple", positive, negative, latent)


def regions(model, clip):
    latent = torch.zeros(1, model.model.latent_format.latent_channels, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 7)
    positive = []
    for number in range(3):
        ((text, extra),) = conditioning(model, clip, number)
        positive.append([text, {**extra, "area": (8, 4, 0, 2 * number), "strength": 1.0, "set_area_to_bounds": False}])
    negative = conditioning(model, clip, 8)
    return comfy.sample.sample(model, noise, 2, 1.0, "euler", "simple", positive, negative, latent)


class Control(comfy.controlnet.ControlBase):
    """A ControlNet without a model of its own, for Flux: it adds to the image after each double block."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        _, _, height, width = x_noisy.shape
        added = torch.full((1, height * width // 4, 128), 0.05, device=x_noisy.device)
        return {"input": [added * number for number in range(1, 13)], "output": [added]}

    def deepclone_multigpu(self, load_device, autoregister=False):
        copied = Control()
        self.copy_to(copied)
        if autoregister:
            self.multigpu_clones[load_device] = copied
        return copied


def with_control(model, clip):
    """Latents with such a ControlNet on the positive conditioning."""
    latent = torch.zeros(1, model.model.latent_format.latent_channels, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 7)
    ((text, extra),) = conditioning(model, clip, 7)
    control = Control().set_cond_hint(torch.zeros(1, 3, 64, 64))
    positive = [[text, {**extra, "control": control, "control_apply_to_uncond": True}]]
    return comfy.sample.sample(model, noise, 2, 3.0, "euler", "simple", positive, conditioning(model, clip, 8), latent)
