"""LoRA files with random weights that fit the small checkpoints of `checkpoints.py`. Nothing here imports ComfyUI."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from checkpoints import Spec, clip_l, flux, mmdit, unet_sd15
from safetensors.torch import save_file

SPECS: dict[str, Callable[[], Spec]] = {"sd3": mmdit, "sd15": lambda: unet_sd15(12), "flux": flux}
"""Family -> its diffusion model; each computes with the text of a CLIP-L."""
GAIN = 0.3  # of a change against its weight: large enough to show in a latent, small enough to keep it finite


class Form(NamedTuple):
    """How a file names and changes layers."""

    model_prefix: str
    clip_prefix: str | None  # None: the file changes no text encoder
    separator: str
    rank: int
    with_biases: bool  # a file of this kind also adds to the biases, in full


FORMS = {
    "underscores": Form("lora_unet_", "lora_te_", "_", rank=4, with_biases=False),
    "dots": Form("diffusion_model.", "text_encoders.clip_l.transformer.", ".", rank=8, with_biases=True),
    "model_only": Form("diffusion_model.", None, ".", rank=2, with_biases=False),
}


def make_lora(family: str, form: str, path: Path) -> Path:
    """Write a LoRA over every linear layer of the family's diffusion model, and of CLIP-L where the form has it."""
    kind = FORMS[form]
    tensors = dict(_changes(SPECS[family](), kind.model_prefix, kind))
    if kind.clip_prefix is not None:
        layers = {name: draw for name, draw in clip_l().items() if ".layers." in name}
        tensors |= dict(_changes(Spec(layers), kind.clip_prefix, kind))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def _changes(spec: Spec, prefix: str, form: Form) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(zlib.crc32(prefix.encode()))
    for name, (shape, _mean, std) in spec.items():
        layer, _, parameter = name.rpartition(".")
        key = prefix + layer.replace(".", form.separator)
        if parameter == "weight" and len(shape) == 2:
            # The product of the two has GAIN times the standard deviation of the weight.
            up = torch.randn(shape[0], form.rank, generator=generator) * (GAIN * std * form.rank**-0.5)
            yield f"{key}.lora_up.weight", up
            yield f"{key}.lora_down.weight", torch.randn(form.rank, shape[1], generator=generator)
            yield f"{key}.alpha", torch.tensor(float(form.rank))
        elif parameter == "bias" and form.with_biases:
            yield f"{key}.diff_b", torch.randn(shape, generator=generator) * (GAIN * std)
