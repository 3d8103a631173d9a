"""Checkpoints of full size with random weights: Flux-dev-sized (22.2 GiB, bf16) and SDXL-sized (4.8 GiB, fp16).

Names and shapes are read off ComfyUI's own classes, built without memory; the values are drawn on the accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import comfy.ldm.flux.model
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import torch
from safetensors.torch import save_file

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


@dataclass(frozen=True)
class Model:
    """A model to measure: `inputs(pixels)` are arguments of ComfyUI's `apply_model` for one square image."""

    name: str
    module_class: type
    config: dict
    dtype: torch.dtype

    def shapes(self) -> dict[str, torch.Size]:
        module = self.module_class(
            **self.config, dtype=self.dtype, device="meta", operations=comfy.ops.disable_weight_init
        )
        return {name: tensor.shape for name, tensor in module.state_dict().items()}

    def save(self, path: Path, device: str = "cuda") -> None:
        """Write a checkpoint whose activations stay finite: norms at one, the others at 1/sqrt(fan in)."""
        generator = torch.Generator(device).manual_seed(0)
        tensors = {}
        for name, shape in self.shapes().items():
            if len(shape) == 1:
                value = torch.full(shape, 1.0 if name.endswith(("scale", "norm.weight")) else 0.01, dtype=self.dtype)
            else:
                value = torch.randn(shape, generator=generator, device=device, dtype=self.dtype)
                value = value.div_(shape[1:].numel() ** 0.5).cpu()
            tensors[f"model.diffusion_model.{name}"] = value
        save_file(tensors, path)

    def inputs(self, pixels: int, device: str = "cuda") -> dict[str, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(1)
        side = pixels // 8
        if self.name == "Flux":
            shapes = {"x": (1, 16, side, side), "c_crossattn": (1, 256, 4096), "y": (1, 768)}
        else:
            shapes = {"x": (1, 4, side, side), "c_crossattn": (1, 77, 2048), "y": (1, 2816)}
        inputs = {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}
        inputs["t"] = torch.full((1,), 0.5 if self.name == "Flux" else 1.0, device=device)
        if self.name == "Flux":
            inputs["guidance"] = torch.full((1,), 3.5, device=device)
        return inputs


FLUX = Model("Flux", comfy.ldm.flux.model.Flux, _FLUX_DEV, torch.bfloat16)
SDXL = Model("SDXL", comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel, _SDXL, torch.float16)
BY_NAME = {model.name: model for model in (FLUX, SDXL)}
