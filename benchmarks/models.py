"""Checkpoints of full size with random weights: Flux-dev-sized (22.2 GiB, bf16), SDXL-sized (4.8 GiB, fp16) and one
with a T5-XXL-sized text encoder (8.9 GiB, fp16).

Names and shapes are read off ComfyUI's own classes, built without memory; the values are drawn on the accelerator.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import comfy.sd
import comfy.text_encoders.t5
import torch
from record import ROOT
from safetensors.torch import save_file

from distorch2.loading import load_checkpoint
from distorch2.planning.plan import ComponentRequest, VirtualVram

BATCH_OF_2 = "1024 px, batch of 2"
IMAGES = {"512 px": (512, 1), "1024 px": (1024, 1), BATCH_OF_2: (1024, 2)}
"""Pixels of a side and the batch, which is two for one image with guidance: both conditionings at once."""
TOKENS = {"256 tokens": 256}
"""Of a prompt."""

_FLUX_DEV = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
    "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip
_SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_linear_in_transformer": True,
    "use_spatial_transformer": True, "context_dim": 2048, "num_head_channels": 64, "num_classes": "sequential",
    "adm_in_channels": 2816, "legacy": False,
}  # fmt: skip
_T5_XXL = {
    "d_ff": 10240, "d_kv": 64, "d_model": 4096, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
}  # fmt: skip


def _random_tensors(shapes: dict[str, torch.Size], prefix: str, dtype: torch.dtype) -> dict:
    """Such that activations stay finite: norms at one, the others at 1/sqrt(fan in)."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            value = torch.full(shape, 1.0 if "norm" in name or name.endswith("scale") else 0.01, dtype=dtype)
        else:
            value = torch.randn(shape, generator=generator, device="cuda", dtype=dtype)
            value = value.div_(shape[1:].numel() ** 0.5).cpu()
        tensors[prefix + name] = value
    return tensors


@dataclass(frozen=True)
class DiffusionModel:
    """`inputs(case)` are arguments of ComfyUI's `apply_model` for square images; `cases` are those to be measured."""

    name: str
    module_class: type
    config: dict
    dtype: torch.dtype
    cases: Sequence[str]

    def save(self, path: Path) -> None:
        module = self.module_class(
            **self.config, dtype=self.dtype, device="meta", operations=comfy.ops.disable_weight_init
        )
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        save_file(_random_tensors(shapes, "model.diffusion_model.", self.dtype), path)

    def core(self, path: str) -> Any:
        return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]

    def distributed(self, path: str, request: ComponentRequest) -> Any:
        return load_checkpoint(path, request, request, request.compute_device)[0]

    def inputs(self, case: str) -> dict[str, torch.Tensor]:
        pixels, batch = IMAGES[case]
        generator = torch.Generator("cuda").manual_seed(1)
        side = pixels // 8
        is_flux = self.module_class is comfy.ldm.flux.model.Flux
        if is_flux:
            shapes = {"x": (1, 16, side, side), "c_crossattn": (1, 256, 4096), "y": (1, 768)}
        else:
            shapes = {"x": (1, 4, side, side), "c_crossattn": (1, 77, 2048), "y": (1, 2816)}
        inputs = {name: torch.randn(shape, generator=generator, device="cuda") for name, shape in shapes.items()}
        inputs["t"] = torch.full((1,), 0.5 if is_flux else 1.0, device="cuda")
        if is_flux:
            inputs["guidance"] = torch.full((1,), 3.5, device="cuda")
        return {name: value.repeat(batch, *[1] * (value.dim() - 1)) for name, value in inputs.items()}

    def memory_required(self, patcher: Any, inputs: dict[str, torch.Tensor]) -> float:
        """What ComfyUI asks for a step beside the weights."""
        return patcher.memory_required([2, *inputs["x"].shape[1:]])  # both conditionings, whatever the inputs are

    def step(self, patcher: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        distribution = getattr(patcher, "distribution", None)
        with distribution.running() if distribution is not None else contextlib.nullcontext():
            return patcher.model.apply_model(**inputs)


@dataclass(frozen=True)
class TextEncoder:
    """In a checkpoint with a tiny diffusion model; `inputs(case)` is one prompt."""

    name: str
    config: dict
    dtype: torch.dtype
    cases: Sequence[str]

    def save(self, path: Path) -> None:
        sys.path.append(str(ROOT / "tools"))
        from checkpoints import sd3_model

        module = comfy.text_encoders.t5.T5(self.config, self.dtype, "meta", comfy.ops.disable_weight_init)
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        tensors = _random_tensors(shapes, "text_encoders.t5xxl.transformer.", self.dtype)
        save_file(sd3_model(0) | tensors, path)

    def core(self, path: str) -> Any:
        return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_model=False)[1].patcher

    def distributed(self, path: str, request: ComponentRequest) -> Any:
        resident = ComponentRequest(request.compute_device, VirtualVram(0.0, "cpu"))
        return load_checkpoint(path, resident, request, request.compute_device)[1].patcher

    def inputs(self, case: str) -> dict[str, list]:
        return {"l": [], "g": [], "t5xxl": [[(token, 1.0) for token in range(1, TOKENS[case] + 1)]]}

    def memory_required(self, patcher: Any, inputs: dict[str, list]) -> float:
        return 0

    def step(self, patcher: Any, inputs: dict[str, list]) -> torch.Tensor:
        # As ComfyUI's CLIP does; otherwise it runs where its embedding lies.
        patcher.model.set_clip_options({"execution_device": patcher.load_device})
        return patcher.model.encode_token_weights(inputs)[0]


FLUX = DiffusionModel("Flux", comfy.ldm.flux.model.Flux, _FLUX_DEV, torch.bfloat16, ("512 px", "1024 px"))
SDXL = DiffusionModel(
    "SDXL", comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel, _SDXL, torch.float16, tuple(IMAGES)
)
T5_XXL = TextEncoder("T5-XXL", _T5_XXL, torch.float16, tuple(TOKENS))
FLUX_14 = DiffusionModel(
    "Flux-14", comfy.ldm.flux.model.Flux, {**_FLUX_DEV, "depth": 12, "depth_single_blocks": 24}, torch.bfloat16, ()
)
"""With fewer blocks, of 14 GiB."""
BY_NAME = {model.name: model for model in (FLUX, SDXL, T5_XXL, FLUX_14)}
