"""Random workflows for the small checkpoints: what decides a latent, where weights are kept, and strings with mistakes.

All randomness comes from the `random.Random` that is handed in.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from loras import FORMS
from workflows import NODE_ID, Prompt, example, with_saved_latent, with_small_image

TEXT_ENCODER = "clip_l.safetensors"
LIGHT = "sd3_no_clip_weights.safetensors"
"""Its text encoder has no weights and gives zeros: a run on a CPU takes a tenth of the time of one with CLIP-L."""
EXAMPLE = "two_cards_by_ratio"
SIZE, STEPS = 64, 2
LOADER = "1"
_SAMPLER, _TEXTS, _IMAGE = "5", ("2", "3"), ("6", "7")
UNITS = {"b": 0, "k": 10, "kb": 10, "m": 20, "mb": 20, "g": 30, "gb": 30, "t": 40, "tb": 40}
Widgets = dict[str, Any]


class Model(NamedTuple):
    """A checkpoint's family, and the files whose text encoder it can be used with; None: its own."""

    family: str
    clips: tuple[str | None, ...]


MODELS = {
    "sd3.safetensors": Model("sd3", (None, None, "sd3_fp8.safetensors", TEXT_ENCODER)),
    "sd3_fp8.safetensors": Model("sd3", (None, None, "sd3.safetensors")),
    "sd3_fp8_scaled.safetensors": Model("sd3", (None, None, TEXT_ENCODER)),
    LIGHT: Model("sd3", (None, None, "sd3_fp8.safetensors", TEXT_ENCODER)),
    "sd15_blocks.safetensors": Model("sd15", (None, None, TEXT_ENCODER)),
    "sd15_ckpt.ckpt": Model("sd15", ("sd15_blocks.safetensors", TEXT_ENCODER)),
    "flux.safetensors": Model("flux", (LIGHT, "sd3.safetensors", TEXT_ENCODER)),
}
CLIP_TYPES = {"sd3": "sd3", "sd15": "stable_diffusion", "flux": "sd3"}


@dataclass(frozen=True)
class Devices:
    """Where models compute, and where weights may be kept; that includes the compute device."""

    compute: str
    keeping: tuple[str, ...]

    @property
    def are_simulated(self) -> bool:
        """Where the host computes, the accelerators are simulated ones."""
        return self.compute == "cpu"


@dataclass(frozen=True)
class Lora:
    """A LoRA file and its strengths; without one for the text encoder LoraLoaderModelOnly applies it."""

    name: str
    model_strength: float
    clip_strength: float | None


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a latent. `clip` is the file that the text encoder comes from; None: the checkpoint."""

    checkpoint: str
    clip: str | None = None
    loras: tuple[Lora, ...] = ()
    seed: int = 0


def random_recipe(rng: random.Random, checkpoint: str | None = None) -> Recipe:
    checkpoint = checkpoint or rng.choice(list(MODELS))
    return Recipe(checkpoint, rng.choice(MODELS[checkpoint].clips), _random_loras(rng, checkpoint), rng.randrange(1000))


def random_light_recipe(rng: random.Random) -> Recipe:
    """One without the weights of a text encoder."""
    checkpoint, clip = rng.choice(((LIGHT, None), ("flux.safetensors", LIGHT)))
    return Recipe(checkpoint, clip, _random_loras(rng, checkpoint), rng.randrange(1000))


def _random_loras(rng: random.Random, checkpoint: str) -> tuple[Lora, ...]:
    return tuple(random_lora(rng, MODELS[checkpoint].family) for _ in range(rng.choice((0, 0, 1, 1, 2))))


def random_lora(rng: random.Random, family: str) -> Lora:
    clip_strength = rng.choice((None, 0.0, round(rng.uniform(-1, 1), 2)))
    return Lora(lora_name(family, rng.choice(list(FORMS))), round(rng.uniform(-1, 1.5), 2), clip_strength)


def lora_name(family: str, form: str) -> str:
    return f"{family}_{form}.safetensors"


def resident_placement(devices: Devices) -> Widgets:
    """Widgets of the loader node for everything on the compute device."""
    widgets: Widgets = dict.fromkeys(("unet_compute_device", "clip_compute_device", "vae_device"), devices.compute)
    for part in ("unet", "clip"):
        widgets[f"{part}_virtual_vram_gb"] = 0.0
        widgets[f"{part}_donor_device"] = devices.compute
        widgets[f"{part}_expert_mode_allocations"] = ""
    # With high precision a LoRA on fp8 weights gives another latent than ComfyUI, which rounds them.
    return widgets | {
        "eject_models": False,
        "high_precision_loras": False,
        "donor_mode": "auto",
        "pack_weights": "auto",
    }


def random_placement(rng: random.Random, devices: Devices) -> Widgets:
    """The same for a random placement of both components."""
    widgets = resident_placement(devices)
    for part in ("unet", "clip"):
        widgets[f"{part}_virtual_vram_gb"] = rng.choice((0.0, 0.001, 0.1, 4.0, round(rng.uniform(0, 0.7), 3)))
        widgets[f"{part}_donor_device"] = rng.choice(devices.keeping)
        text = random_allocation(rng, devices.keeping) if rng.random() < 0.6 else rng.choice(("", "", " "))
        widgets[f"{part}_expert_mode_allocations"] = text
    # Beside a GPU the host would compute with other kernels, if it were told to.
    mode = rng.choice(["auto", "stream", "relay"] if devices.are_simulated else ["auto", "stream"])
    return widgets | {
        "eject_models": rng.random() < 0.2,
        "donor_mode": mode,
        "pack_weights": rng.choice(["auto", "on", "off"]),
    }


# --- allocation strings


def random_allocation(rng: random.Random, devices: Sequence[str]) -> str:
    """A string that the grammar accepts; every form of it comes up."""
    chosen = rng.sample(devices, rng.randint(1, len(devices)))
    kinds = rng.choice(((_percent,), (_bytes,), (_fraction,), (_percent, _bytes, _fraction)))
    amounts = [rng.choice(kinds)(rng) for _ in chosen]
    if rng.random() < 0.5:
        amounts[rng.randrange(len(amounts))] = rng.choice(("*", _bytes(rng) + "*", _bytes(rng) + " *"))
    text = ";".join(f"{_spelt(rng, device)},{amount}" for device, amount in zip(chosen, amounts))
    text += rng.choice(("", ";"))
    return _with_blanks(rng, text) if rng.random() < 0.3 else text


def _percent(rng: random.Random) -> str:
    return rng.choice((f"{rng.randint(1, 100)}%", f"{rng.uniform(0.001, 100):.3f}%", f"{rng.randint(1, 9)}.%"))


def _bytes(rng: random.Random) -> str:
    """1 KiB to 1 GiB, small and large ones equally often, in any unit."""
    unit, power = rng.choice(list(UNITS.items()))
    count = int(2 ** rng.uniform(10, 30))
    number = f"{count / 2**power:.12f}".rstrip("0").rstrip(".") if power else str(count)
    return number + rng.choice((unit, unit.upper()))


def _fraction(rng: random.Random) -> str:
    return rng.choice(("1", ".5", f"0.{rng.randint(1, 999):03}"))


def _spelt(rng: random.Random, device: str) -> str:
    short = {"cpu": "cpu:0", "cuda:0": "cuda", "sim:0": "sim"}.get(device, device)
    return rng.choice((device, device, device.upper(), short))


def _with_blanks(rng: random.Random, text: str) -> str:
    """Blank around tokens is free."""
    for token in ",;%":
        text = text.replace(token, f"{rng.choice((' ', '', chr(9)))}{token}{rng.choice(('  ', ''))}")
    return f" {text} "


_UNKNOWN_UNITS = ("tib", "gib", "x", "gbb", "bytes")
_UNKNOWN_DEVICES = ("cuda:63", "sim:9", "gpu", "xpu:1", "cpu:1")
_JUNK = (" potatoes", "gb gb", "%%", "gb**", "5.5.5gb")
# Each is a mistake wherever it stands; `device` is one that this machine has.
MISTAKES: dict[str, Callable[[random.Random, str], str]] = {
    "unknown unit": lambda rng, device: f"{device},{rng.randint(1, 9)}{rng.choice(_UNKNOWN_UNITS)}",
    "unknown device": lambda rng, device: f"{rng.choice(_UNKNOWN_DEVICES)},50%;{device},*",
    "no device at all": lambda rng, device: f"{rng.choice(('1cuda', '#', '0', 'cuda-0', 'c p u'))},1gb",
    "a device twice": lambda rng, device: f"{device},1gb;{device.upper()},*",
    "two remainders": lambda rng, device: f"{device},{rng.choice(('*', '5gb*'))};cpu,*",
    "negative": lambda rng, device: f"{device},-{rng.randint(1, 9)}{rng.choice(('gb', '%', ''))}",
    "not a number": lambda rng, device: f"{device},{rng.choice(('nan', 'inf', 'NaN%', '1e3gb', '0x10mb', '٣gb'))}",
    "zero in total": lambda rng, device: f"{device},{rng.choice(('0', '0%', '0gb', '0.000b'))}",
    "no comma": lambda rng, device: f"{device}{rng.choice((' ', ':', '=', ''))}50%",
    "no amount": lambda rng, device: f"{device},",
    "no unit": lambda rng, device: f"{device},{rng.randint(2, 80)}",
    "junk after the number": lambda rng, device: f"{device},4{rng.choice(_JUNK)}",
    "an empty entry": lambda rng, device: f"{device},50%;;",
    "very long": lambda rng, device: f"{device},1b;" * rng.choice((500, 30_000)),
    "noise": lambda rng, device: "".join(rng.choices("#@!&()[]{}<>/\\|\0\x1b é漢🦙", k=rng.randint(1, 300))) + "?",
}


# --- prompts


def prompt_for(recipe: Recipe, placement: Widgets, clip_placement: Widgets | None = None) -> Prompt:
    """The workflow of a recipe in API format, small, which saves its latent and no image.

    `clip_placement` is for the loader of the text encoder, where that is another checkpoint's.
    """
    prompt = with_saved_latent(with_small_image(example(EXAMPLE), SIZE, STEPS))
    for node_id in _IMAGE:
        del prompt[node_id]
    prompt[LOADER]["inputs"].update(placement, ckpt_name=recipe.checkpoint)
    model: list[Any] = [LOADER, 0]  # a link: which output of which node
    clip: list[Any] = [LOADER, 1]
    if recipe.clip == TEXT_ENCODER:
        inputs: Widgets = {"clip_name": recipe.clip, "type": CLIP_TYPES[family_of(recipe.checkpoint)]}
        prompt["clip"] = {"class_type": "CLIPLoader", "inputs": inputs}
        clip = ["clip", 0]
    elif recipe.clip is not None:
        prompt["clip"] = copy.deepcopy(prompt[LOADER])
        prompt["clip"]["inputs"].update(clip_placement or placement, ckpt_name=recipe.clip)
        clip = ["clip", 1]
    for index, lora in enumerate(recipe.loras):
        node_id = f"lora{index}"
        inputs = {"model": model, "lora_name": lora.name, "strength_model": lora.model_strength}
        model = [node_id, 0]
        if lora.clip_strength is None:
            prompt[node_id] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        else:
            inputs |= {"clip": clip, "strength_clip": lora.clip_strength}
            prompt[node_id] = {"class_type": "LoraLoader", "inputs": inputs}
            clip = [node_id, 1]
    prompt[_SAMPLER]["inputs"].update(model=model, seed=recipe.seed)
    for node_id in _TEXTS:
        prompt[node_id]["inputs"]["clip"] = clip
    return prompt


def family_of(checkpoint: str) -> str:
    """The family of one of the checkpoints, or of a file that soaking puts in the place of one: SD3."""
    return MODELS[checkpoint].family if checkpoint in MODELS else "sd3"


def with_image(prompt: Prompt) -> Prompt:
    """The same prompt, decoding and saving the image too."""
    prompt = copy.deepcopy(prompt)
    decoding = example(EXAMPLE)
    return prompt | {node_id: decoding[node_id] for node_id in _IMAGE}


def with_steps(prompt: Prompt, steps: int) -> Prompt:
    """The same prompt, sampling for longer."""
    return with_small_image(prompt, SIZE, steps)


def run_again(prompt: Prompt, class_types: Sequence[str], mark: int) -> Prompt:
    """The same prompt, in which ComfyUI takes no earlier result of nodes of these classes, nor of those after them.

    Its cache compares all inputs that a prompt names; one that the node does not have changes nothing else.
    """
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if node["class_type"] in class_types:
            node["inputs"]["soak"] = mark
    return prompt


FROM_LOADERS = (NODE_ID, "CheckpointLoaderSimple", "CLIPLoader")
FROM_TEXTS = ("CLIPTextEncode", "KSampler")
FROM_SAMPLER = ("KSampler",)
