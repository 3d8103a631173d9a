"""The pack's own nodes: widgets -> request -> loading. No policy here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.v0_0_2 import io

from . import device_utils
from .allocation_parser import DISK_NAME, AllocationError, parse_allocation
from .distorch2 import components, loading
from .distorch2.comfyui import whole
from .distorch2.planning.plan import AUTO, DONOR_MODES, PACK_MODES, Allocation, ComponentRequest, VirtualVram


class CheckpointLoaderAdvancedDisTorch2MultiGPU(io.ComfyNode):
    """Loads a checkpoint with its diffusion model, text encoder and VAE on the devices that the user names."""

    TITLE = "Load Checkpoint (DisTorch2)"

    @classmethod
    def define_schema(cls) -> io.Schema:
        devices = list(selectable_devices())
        accelerator = device_utils.first_accelerator(devices)
        return io.Schema(
            node_id=cls.__name__,
            display_name=cls.TITLE,
            category="multigpu/distorch_2",
            description="Loads a checkpoint and keeps each part of it on the devices that you name.",
            search_aliases=["distorch", "multigpu", "virtual vram", "load checkpoint", "offload", "donor device"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="The checkpoint to load.",
                ),
                *_placement_inputs("unet_", "diffusion model", accelerator, 4.0, devices),
                *_placement_inputs(
                    "clip_",
                    "text encoder",
                    "cpu",
                    2.0,
                    devices,
                    "On cpu a large one (T5-XXL, Qwen, a language model) takes many times as long: choose the GPU.",
                ),
                io.Combo.Input(
                    "vae_device", options=devices, default=accelerator, tooltip="Where the whole VAE lies and computes."
                ),
                _expert_input("unet_", "diffusion model"),
                _expert_input("clip_", "text encoder"),
                _high_precision_input(),
                io.Boolean.Input(
                    "eject_models",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Unload all other models from the diffusion model's compute device first.",
                ),
                _donor_mode_input(),
                _pack_weights_input(),
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
        return mistakes_in(
            unet_expert_mode_allocations=unet_expert_mode_allocations,
            clip_expert_mode_allocations=clip_expert_mode_allocations,
        )

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
        pack_weights: str = AUTO,
    ) -> io.NodeOutput:
        modes = donor_mode, pack_weights
        loaded = loading.load_components(
            folder_paths.get_full_path_or_raise("checkpoints", ckpt_name),
            request_for(
                unet_compute_device, unet_virtual_vram_gb, unet_donor_device, unet_expert_mode_allocations, *modes
            ),
            request_for(
                clip_compute_device, clip_virtual_vram_gb, clip_donor_device, clip_expert_mode_allocations, *modes
            ),
            vae_device,
            high_precision_loras=high_precision_loras,
            eject_models=eject_models,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
        )
        # web/distorch2.js shows it on the node; the progress text of ComfyUI shows two lines, and no columns.
        return io.NodeOutput(loaded.model, loaded.clip, loaded.vae, ui={"distorch2_placement": [loaded.report]})


class _Distribute(io.ComfyNode):
    """Keeps the weights of one component, from any loader, where the user says."""

    TITLE: str
    INPUT: str
    COMPONENT: str
    TYPE: Any
    GB: float

    @classmethod
    def define_schema(cls) -> io.Schema:
        devices = list(selectable_devices())
        # ComfyUI's default too: a text encoder may be small, and memory of the GPU is for the diffusion model.
        first = "cpu" if cls.TYPE is io.Clip else device_utils.first_accelerator(devices)
        return io.Schema(
            node_id=cls.__name__,
            display_name=cls.TITLE,
            category="multigpu/distorch_2",
            description=f"Keeps the weights of a {cls.COMPONENT} from any loader on the devices that you name. LoRAs "
            "may come before it or after it.",
            search_aliases=["distorch", "multigpu", "virtual vram", "offload", "donor device", "gguf"],
            inputs=[
                cls.TYPE.Input(
                    cls.INPUT,
                    tooltip=f"A {cls.COMPONENT} from any loader. The one that comes in stays usable as it is.",
                ),
                *_placement_inputs("", cls.COMPONENT, first, cls.GB, devices),
                _expert_input("", cls.COMPONENT),
                _high_precision_input(),
                _donor_mode_input(),
                _pack_weights_input(),
            ],
            outputs=[cls.TYPE.Output(tooltip=f"The {cls.COMPONENT}, distributed.")],
        )

    @classmethod
    def validate_inputs(cls, expert_mode_allocations: str | None = "") -> bool | str:
        return mistakes_in(expert_mode_allocations=expert_mode_allocations)

    @classmethod
    def execute(
        cls,
        compute_device: str,
        virtual_vram_gb: float,
        donor_device: str,
        expert_mode_allocations: str = "",
        high_precision_loras: bool = True,
        donor_mode: str = AUTO,
        pack_weights: str = AUTO,
        **inputs: Any,
    ) -> io.NodeOutput:
        request = request_for(
            compute_device, virtual_vram_gb, donor_device, expert_mode_allocations, donor_mode, pack_weights
        )
        distribute = loading.distribute_clip if cls.TYPE is io.Clip else loading.distribute
        distributed: Any = distribute(inputs[cls.INPUT], request, high_precision_loras)
        patcher = distributed.patcher if cls.TYPE is io.Clip else distributed
        return io.NodeOutput(distributed, ui=placement_of({cls.COMPONENT: patcher}))


class DistributeModelDisTorch2(_Distribute):
    TITLE = "Distribute Model (DisTorch2)"
    INPUT, COMPONENT, TYPE, GB = "model", components.DIFFUSION_MODEL, io.Model, 4.0


class DistributeCLIPDisTorch2(_Distribute):
    TITLE = "Distribute CLIP (DisTorch2)"
    INPUT, COMPONENT, TYPE, GB = "clip", components.TEXT_ENCODER, io.Clip, 2.0


class _Place(io.ComfyNode):
    """Puts a whole model on a device."""

    TITLE: str
    NAME: str
    INPUT: str
    TYPE: Any
    PLACE: Callable[[Any, torch.device], Any]

    @classmethod
    def define_schema(cls) -> io.Schema:
        devices = list(selectable_devices())
        return io.Schema(
            node_id=cls.__name__,
            display_name=cls.TITLE,
            category="multigpu/distorch_2",
            description=f"Puts a {cls.NAME} on a device of its own, as a whole. The one that comes in stays usable: it "
            "is unloaded now, and loaded again where something uses it.",
            search_aliases=["distorch", "multigpu", "select device", f"{cls.NAME} device"],
            inputs=[
                cls.TYPE.Input(cls.INPUT, tooltip=f"A {cls.NAME} from any loader."),
                io.Combo.Input(
                    "device",
                    options=devices,
                    default=device_utils.first_accelerator(devices),
                    tooltip="Where all of it lies and computes.",
                ),
            ],
            outputs=[cls.TYPE.Output(tooltip="The same, on that device.")],
        )

    @classmethod
    def execute(cls, device: str, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(cls.PLACE(inputs[cls.INPUT], torch.device(device)))


class PlaceVAEDisTorch2(_Place):
    TITLE = "Place VAE (DisTorch2)"
    NAME, INPUT, TYPE = "VAE", "vae", io.Vae
    PLACE = staticmethod(whole.place_vae)


class PlaceControlNetDisTorch2(_Place):
    TITLE = "Place ControlNet (DisTorch2)"
    NAME, INPUT, TYPE = "ControlNet", "control_net", io.ControlNet
    PLACE = staticmethod(whole.place_control_net)


class PlaceCLIPVisionDisTorch2(_Place):
    TITLE = "Place CLIP Vision (DisTorch2)"
    NAME, INPUT, TYPE = "CLIP Vision model", "clip_vision", io.ClipVision
    PLACE = staticmethod(whole.place_clip_vision)


def _placement_inputs(
    prefix: str, component: str, compute_device: str, gb: float, devices: list[str], advice: str = ""
) -> list[io.Input]:
    return [
        io.Combo.Input(
            f"{prefix}compute_device",
            options=devices,
            default=compute_device,
            tooltip=f"Where the {component} computes. {advice}".rstrip(),
        ),
        io.Float.Input(
            f"{prefix}virtual_vram_gb",
            default=gb,
            min=0.0,
            max=128.0,
            step=0.1,
            tooltip=f"How many GB of the {component} to keep on the donor instead of the compute device, 0 to 128.",
        ),
        io.Combo.Input(
            f"{prefix}donor_device",
            options=list(selectable_donors()),
            default="cpu",
            tooltip="Where that part is kept. The same as the compute device: everything stays there. disk: it is read "
            "from the file in every step, which is slow, and takes no main memory.",
        ),
    ]


def _expert_input(prefix: str, component: str) -> io.Input:
    return io.String.Input(
        f"{prefix}expert_mode_allocations",
        default="",
        optional=True,
        advanced=True,
        tooltip=f"How much of the {component} each device keeps, as in cuda:0,70%;cuda:1,30% or cuda:0,4gb;cpu,*; or "
        "auto. When not blank it replaces virtual VRAM and donor.",
    )


def _high_precision_input() -> io.Input:
    return io.Boolean.Input(
        "high_precision_loras",
        default=True,
        optional=True,
        advanced=True,
        tooltip="For weights in fp8 or smaller: one that a LoRA changes is kept in the precision of computation, and "
        "takes two to four times its memory. Off: it is rounded to fp8 again, as ComfyUI does. The image can change "
        "visibly between the two.",
    )


def _donor_mode_input() -> io.Input:
    return _mode_input(
        "donor_mode",
        DONOR_MODES,
        "What happens with weights on a donor. stream: they are copied to the compute device when they are "
        "needed. relay: the donor runs its blocks of the model itself, and only the image's data "
        "travels. auto: accelerators of the compute device's kind relay, and the others are streamed from.",
    )


def _pack_weights_input() -> io.Input:
    return _mode_input(
        "pack_weights",
        PACK_MODES,
        "Whether bf16 weights that are copied to the compute device in every step are packed, without loss, to "
        "about 70% of their size: less to copy, and less main memory. on: from the start, and also what the compute "
        "device has no room for, before it leaves. auto: after a run in which computing waited for copies, or when "
        "main memory is short.",
    )


def _mode_input(name: str, modes: Iterable[str], tooltip: str) -> io.Input:
    return io.Combo.Input(name, options=list(modes), default=AUTO, optional=True, advanced=True, tooltip=tooltip)


def selectable_devices() -> tuple[str, ...]:
    """The devices to choose from: those that ComfyUI manages, which with --cpu are no accelerators."""
    managed = {str(device) for device in comfy.model_management.get_all_torch_devices()}
    return tuple(name for name in device_utils.list_devices() if name == device_utils.HOST_DEVICE or name in managed)


def selectable_donors() -> tuple[str, ...]:
    return (*selectable_devices(), DISK_NAME)


def mistakes_in(**allocations: str | None) -> bool | str:
    """What is wrong with allocation strings, by the name of their inputs; True where nothing is.

    None is a linked input, which has no value before the prompt runs.
    """
    mistakes = []
    for name, text in allocations.items():
        try:
            if text is not None and text.strip():
                parse_allocation(text, selectable_donors())
        except AllocationError as error:
            mistakes.append(f"{name}: {error}")
    return "\n".join(mistakes) or True


def request_for(
    compute_device: str,
    virtual_vram_gb: float,
    donor_device: str,
    expert_text: str = "",
    donor_mode: str = AUTO,
    pack_weights: str = AUTO,
) -> ComponentRequest:
    allocation: Allocation
    if expert_text.strip():
        allocation = parse_allocation(expert_text, selectable_donors())
    else:
        allocation = VirtualVram(virtual_vram_gb, donor_device)
    return ComponentRequest(compute_device, allocation, donor_mode, pack_weights)


def placement_of(patchers: Mapping[str, Any], notes: Iterable[str] = (), title: str = "") -> dict[str, list[str]]:
    """What web/distorch2.js shows on a node: where the components' weights lie, by component. `title` names the files,
    where these are known."""
    plans = {component: patcher.distribution.asked for component, patcher in patchers.items()}
    names = ", ".join(type(patcher.model).__name__ for patcher in patchers.values())
    modules = {component: patcher.model for component, patcher in patchers.items()}
    return {"distorch2_placement": [loading.report_of(title or names, plans, modules, notes)]}


NODES = (
    CheckpointLoaderAdvancedDisTorch2MultiGPU,
    DistributeModelDisTorch2,
    DistributeCLIPDisTorch2,
    PlaceVAEDisTorch2,
    PlaceControlNetDisTorch2,
    PlaceCLIPVisionDisTorch2,
)
