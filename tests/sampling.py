"""Run a loaded checkpoint in process: the same latents as ComfyUI's own loader is what most tests ask for."""

from __future__ import annotations

import comfy.model_management as mm
import comfy.sample
import comfy.sd
import torch

PIXELS = 64
# Width of the text conditioning and of the pooled output, for checkpoints whose text encoder is another file.
_CONDITIONING_WIDTHS = {
    "Flux": (4096, 768),
    "SD3": (4096, 2048),
    "SDXL": (2048, 1280),
    "BaseModel": (768, 768),
    "WAN21": (4096, 0),  # the last two take no pooled output
    "QwenImage": (3584, 0),
}
_FRAMES = {"WAN21": (2,), "QwenImage": (1,)}  # of the latents, for models whose latents have that dimension


def conditioning(model, clip, seed):
    """From the checkpoint's own text encoder where it has one, else random numbers of the right shape."""
    if clip is not None:
        return clip.encode_from_tokens_scheduled(clip.tokenize(f"a photograph of thing number {seed}"))
    width, pooled_width = _CONDITIONING_WIDTHS[type(model.model).__name__]
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 77, width, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, pooled_width, generator=generator)}]]


def sample(model, clip, steps=2, seed=7, hooks=None, pixels=PIXELS):
    """Latents [1, C, pixels / 8, pixels / 8] of a short run, or [1, C, frames, pixels / 8, pixels / 8].

    Call it in inference mode, as ComfyUI runs nodes.
    """
    channels = model.model.latent_format.latent_channels
    frames = _FRAMES.get(type(model.model).__name__, ())
    latent = torch.zeros(1, channels, *frames, pixels // 8, pixels // 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    positive, negative = conditioning(model, clip, seed), conditioning(model, clip, seed + 1)
    if hooks is not None:
        positive, negative = ([[text, {**extra, "hooks": hooks}] for text, extra in c] for c in (positive, negative))
    latents = comfy.sample.sample(model, noise, steps, 3.0, "euler", "simple", positive, negative, latent)
    assert torch.isfinite(latents).all()
    assert latents.std() > 0.01
    return latents


def output(patcher, size=(8, 8), is_loaded=False):
    """Of one forward of a model of Flux's kind, with everything that ComfyUI does before it unless it `is_loaded`."""
    device = patcher.load_device
    if not is_loaded:
        mm.load_models_gpu([patcher])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, *size, generator=generator).to(device)
    shapes = {"c_crossattn": (1, 7, 4096), "y": (1, 768), "guidance": (1,)}
    inputs = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
    return patcher.model.apply_model(x, torch.tensor([0.5], device=device), **inputs)


def runs_of_core(checkpoints, run):
    """A function of the kind: `run(model, clip, vae)` of what ComfyUI's own loader returns, made once."""
    made = {}

    def once(kind):
        with torch.inference_mode():
            if not made:
                sample(*core_load(checkpoints(kind))[:2])  # the first forward of a process may take other kernels
            if kind not in made:
                made[kind] = run(*core_load(checkpoints(kind)))
        return made[kind]

    return once


def core_load(path, clip_device=None):
    """(model, clip, vae) as ComfyUI's checkpoint loader node returns them; with the text encoder where asked."""
    options = {"load_device": torch.device(clip_device)} if clip_device else {}
    return comfy.sd.load_checkpoint_guess_config(path, te_model_options=options)[:3]
