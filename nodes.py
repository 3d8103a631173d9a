"""The nodes: widgets -> request -> loading. No policy here."""

from __future__ import annotations

import os

import comfy.model_management
import folder_paths
from comfy_api.v0_0_2 import io

from . import device_utils
from .allocation_parser import AllocationError, parse_allocation
from .distorch2.loading import load_components
from .distorch2.plan import AUTO, DONOR_MODES, ComponentRequest, VirtualVram

NODE_ID = "CheckpointLoaderAdvancedDisTorch2MultiGPU"
DISPLAY_NAME = "Load Checkpoint (DisTorch2)"


class CheckpointLoaderAdvancedDisTorch2MultiGPU(io.ComfyNode):
    """Loads a checkpoint with its diffusion model, text encoder and VAE on the devices that the user names."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        devices = list(_selectable_devices())
        accelerator = device_utils.first_accelerator(devices)
        return io.Schema(
            node_id=NODE_ID,
            display_name=DISPLAY_NAME,
            category="multigpu/distorch_2",
            description="Loads a checkpoint and keeps each part of it on the devices that you name.",
            search_aliases=["distorch", "multigpu", "virtual vram", "load checkpoint", "offload", "donor device"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="The checkpoint to load.",
                ),
                *_component_inputs("unet", "diffusion model", accelerator, 4.0, devices),
                *_component_inputs(
                    "clip",
                    "text encoder",
                    "cpu",
                    2.0,
                    devices,
                    "On cpu a large one (T5-XXL, Qwen, a language model) takes many times as long: choose the GPU.",
                ),
                io.Combo.Input(
                    "vae_device", options=devices, default=accelerator, tooltip="Where the whole VAE lies and computes."
                ),
                _expert_input("unet", "diffusion model"),
                _expert_input("clip", "text encoder"),
                io.Boolean.Input(
                    "high_precision_loras",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="For checkpoints in fp8 or smaller: a weight that a LoRA changes is kept in the precision "
                    "of computation, and takes two to four times its memory. Off: it is rounded to fp8 again, as "
                    "ComfyUI does. The image can change visibly between the two.",
                ),
                io.Boolean.Input(
                    "eject_models",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Unload all other models from the diffusion model's compute device first.",
                ),
                io.Combo.Input(
                    "donor_mode",
                    options=list(DONOR_MODES),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="What happens with weights on a donor. stream: they are copied to the compute device when "
                    "they are needed. relay: the donor runs its blocks of the model itself, and only the image's data "
                    "travels. auto: accelerators of the compute device's kind relay, and the others are streamed from.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model."),
                io.Clip.Output(tooltip="The text encoder, if the checkpoint has one."),
                io.Vae.Output(tooltip="The VAE, if the checkpoint has one."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, unet_expert_mode_allocations: str | None = "", clip_expert_mode_allocations: str | None = ""
    ) -> bool | str:
        mistakes = []
        # None is a linked input, which has no value before the prompt runs.
        for name, text in (
            ("unet_expert_mode_allocations", unet_expert_mode_allocations),
            ("clip_expert_mode_allocations", clip_expert_mode_allocations),
        ):
            try:
                if text is not None and text.strip():
                    parse_allocation(text, _selectable_devices())
            except AllocationError as error:
                mistakes.append(f"{name}: {error}")
        return "\n".join(mistakes) or True

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str | None, **_widgets: object) -> tuple[int, int] | None:
        """Load again when the file was replaced; a linked name is not known yet."""
        path = folder_paths.get_full_path("checkpoints", ckpt_name) if ckpt_name is not None else None
        if path is None:
            return None
        status = os.stat(path)
        return status.st_mtime_ns, status.st_size

    @classmethod
    def execute(
        cls,
        ckpt_name: str,
        unet_compute_device: str,
        unet_virtual_vram_gb: float,
        unet_donor_device: str,
        clip_compute_device: str,
        clip_virtual_vram_gb: float,
        clip_donor_device: str,
        vae_device: str,
        unet_expert_mode_allocations: str = "",
        clip_expert_mode_allocations: str = "",
        high_precision_loras: bool = True,
        eject_models: bool = False,
        donor_mode: str = AUTO,
    ) -> io.NodeOutput:
        loaded = load_components(
            folder_paths.get_full_path_or_raise("checkpoints", ckpt_name),
            _request(
                unet_compute_device, unet_virtual_vram_gb, unet_donor_device, unet_expert_mode_allocations, donor_mode
            ),
            _request(
                clip_compute_device, clip_virtual_vram_gb, clip_donor_device, clip_expert_mode_allocations, donor_mode
            ),
            vae_device,
            high_precision_loras=high_precision_loras,
            eject_models=eject_models,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
        )
        # web/distorch2.js shows it on the node; the progress text of ComfyUI shows two lines, and no columns.
        return io.NodeOutput(loaded.model, loaded.clip, loaded.vae, ui={"distorch2_placement": [loaded.report]})


def _component_inputs(
    prefix: str, component: str, compute_device: str, gb: float, devices: list[str], advice: str = ""
) -> list[io.Input]:
    return [
        io.Combo.Input(
            f"{prefix}_compute_device",
            options=devices,
            default=compute_device,
            tooltip=f"Where the {component} computes. {advice}".rstrip(),
        ),
        io.Float.Input(
            f"{prefix}_virtual_vram_gb",
            default=gb,
            min=0.0,
            max=128.0,
            step=0.1,
            tooltip=f"How many GB of the {component} to keep on the donor instead of the compute device, 0 to 128.",
        ),
        io.Combo.Input(
            f"{prefix}_donor_device",
            options=devices,
            default="cpu",
            tooltip="Where that part is kept. The same as the compute device: everything stays there.",
        ),
    ]


def _expert_input(prefix: str, component: str) -> io.Input:
    return io.String.Input(
        f"{prefix}_expert_mode_allocations",
        default="",
        optional=True,
        advanced=True,
        tooltip=f"How much of the {component} each device keeps, as in cuda:0,70%;cuda:1,30% or cuda:0,4gb;cpu,*. "
        "When not blank it replaces virtual VRAM and donor.",
    )


def _selectable_devices() -> tuple[str, ...]:
    """The devices to choose from: those that ComfyUI manages, which with --cpu are no accelerators."""
    managed = {str(device) for device in comfy.model_management.get_all_torch_devices()}
    return tuple(name for name in device_utils.list_devices() if name == device_utils.HOST_DEVICE or name in managed)


def _request(
    compute_device: str, virtual_vram_gb: float, donor_device: str, expert_text: str, donor_mode: str
) -> ComponentRequest:
    if expert_text.strip():
        return ComponentRequest(compute_device, parse_allocation(expert_text, _selectable_devices()), donor_mode)
    return ComponentRequest(compute_device, VirtualVram(virtual_vram_gb, donor_device), donor_mode)


NODE_CLASS_MAPPINGS = {NODE_ID: CheckpointLoaderAdvancedDisTorch2MultiGPU}
NODE_DISPLAY_NAME_MAPPINGS = {NODE_ID: DISPLAY_NAME}
