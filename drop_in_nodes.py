"""The loader nodes of ComfyUI-MultiGPU by the same names, with the same inputs, so that its saved workflows run.

Each is a loader of ComfyUI, or of ComfyUI-GGUF, with inputs that say where the weights lie: `_TABLE` says which. What
the loader itself asks for is taken from it as it is in the running ComfyUI. A loader that is missing has no such node,
and where ComfyUI-MultiGPU is installed, its nodes are left alone.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy_api.v0_0_2 import io

import nodes as comfyui_nodes

from . import device_utils
from .distorch2 import components, loading
from .distorch2.comfyui import whole
from .distorch2.comfyui.loaders import NO_SUCH_GGUF, cannot_read_gguf
from .distorch2.planning.plan import ComponentRequest, PlanError, VirtualVram
from .distorch2.weights.checkpoint_file import check_file
from .nodes import mistakes_in, placement_of, request_for, selectable_devices, selectable_donors

logger = logging.getLogger(__name__)

_CATEGORY = "multigpu"
_SPLIT, _SPLIT_LEGACY, _WHOLE = "DisTorch2MultiGPU", "DisTorchMultiGPU", "MultiGPU"
"""Ends of the names: weights on several devices; the same in the pack's first version; everything on one device."""
_FOLDERS = {
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "vae_name": "vae",
    "control_net_name": "controlnet",
}
"""Inputs that name files -> ComfyUI's name of the folder; those of text encoders are told apart by what is loaded."""
TEXT_ENCODER_FILES = ("clip_name", "clip_name1", "clip_name2", "clip_name3", "clip_name4")


@dataclass(frozen=True)
class _Loader:
    """A loader that is wrapped. `outputs` are the types of what it returns."""

    name: str
    title: str
    outputs: tuple[str, ...]

    @property
    def node_class(self) -> Any:
        return comfyui_nodes.NODE_CLASS_MAPPINGS[self.name]

    @property
    def is_of_gguf(self) -> bool:
        return "GGUF" in self.name

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (_SPLIT, _SPLIT_LEGACY, _WHOLE) if self.is_of_gguf else (_SPLIT, _WHOLE)

    @property
    def is_encoder(self) -> bool:
        """Encoders call the input for their device otherwise, and leave other models loaded by default."""
        return self.outputs in (("CLIP",), ("CLIP_VISION",))

    @property
    def can_be_split(self) -> bool:
        return "MODEL" in self.outputs or "CLIP" in self.outputs

    def is_split(self, suffix: str) -> bool:
        return suffix != _WHOLE and self.can_be_split


_COMPONENTS = {"MODEL": components.DIFFUSION_MODEL, "CLIP": components.TEXT_ENCODER}
"""Types of outputs that can be split -> component."""
_ALL_OUTPUTS = ("MODEL", "CLIP", "VAE")
_TABLE = (
    _Loader("UNETLoader", "Load Diffusion Model", ("MODEL",)),
    _Loader("VAELoader", "Load VAE", ("VAE",)),
    _Loader("CLIPLoader", "Load CLIP", ("CLIP",)),
    _Loader("DualCLIPLoader", "Load CLIP (Dual)", ("CLIP",)),
    _Loader("TripleCLIPLoader", "Load CLIP (Triple)", ("CLIP",)),
    _Loader("QuadrupleCLIPLoader", "Load CLIP (Quadruple)", ("CLIP",)),
    _Loader("CLIPVisionLoader", "Load CLIP Vision", ("CLIP_VISION",)),
    _Loader("CheckpointLoaderSimple", "Load Checkpoint (simple)", _ALL_OUTPUTS),
    _Loader("DiffusersLoader", "Load Diffusers Model", _ALL_OUTPUTS),
    _Loader("ControlNetLoader", "Load ControlNet Model", ("CONTROL_NET",)),
    _Loader("DiffControlNetLoader", "Load ControlNet Model (diff)", ("CONTROL_NET",)),
    _Loader("UnetLoaderGGUF", "Unet Loader (GGUF)", ("MODEL",)),
    _Loader("UnetLoaderGGUFAdvanced", "Unet Loader (GGUF/Advanced)", ("MODEL",)),
    _Loader("CLIPLoaderGGUF", "CLIPLoader (GGUF)", ("CLIP",)),
    _Loader("DualCLIPLoaderGGUF", "DualCLIPLoader (GGUF)", ("CLIP",)),
    _Loader("TripleCLIPLoaderGGUF", "TripleCLIPLoader (GGUF)", ("CLIP",)),
    _Loader("QuadrupleCLIPLoaderGGUF", "QuadrupleCLIPLoader (GGUF)", ("CLIP",)),
)
_LABELS = {_SPLIT: "DisTorch2", _SPLIT_LEGACY: "DisTorch, legacy", _WHOLE: "on a device"}


class _DropIn:
    """A wrapped loader. A subclass says which, and how its name ends."""

    LOADER: _Loader
    SUFFIX: str
    FUNCTION = "load"

    @classmethod
    def _device_input(cls) -> str:
        return "device" if cls.LOADER.is_encoder or cls.SUFFIX != _SPLIT else "compute_device"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = {
            kind: copy.deepcopy(dict(of_kind))
            for kind, of_kind in cls.LOADER.node_class.INPUT_TYPES().items()
            if kind in ("required", "optional")
        }
        optional = inputs.pop("optional", {})
        return {**inputs, "optional": optional | cls.own_inputs()}

    @classmethod
    def own_inputs(cls) -> dict[str, Any]:
        devices = list(selectable_devices())
        is_split = cls.LOADER.is_split(cls.SUFFIX)
        where = "Where it computes" + ("." if is_split else ", and where all of it lies.")
        if cls.LOADER.outputs == _ALL_OUTPUTS and is_split:
            where += (
                " The text encoder and the VAE lie here as a whole; virtual VRAM, donor and allocations are for the "
            )
            where += "diffusion model."
        combo = {"default": device_utils.first_accelerator(devices), "tooltip": where}
        own: dict[str, Any] = {cls._device_input(): (devices, combo)}
        if cls.SUFFIX == _WHOLE:
            return own
        own["virtual_vram_gb"] = (
            "FLOAT",
            {
                "default": 4.0,
                "min": 0.0,
                "max": 128.0 if cls.SUFFIX == _SPLIT else 24.0,
                "step": 0.1,
                "tooltip": "How many GB to keep on other devices instead of the one that computes.",
            },
        )
        if cls.SUFFIX == _SPLIT:
            own["donor_device"] = (
                list(selectable_donors()),
                {"default": "cpu", "tooltip": "Where that part is kept. disk: in its file."},
            )
        else:
            own["use_other_vram"] = (
                "BOOLEAN",
                {
                    "default": False,
                    "tooltip": "Off: these GB are kept in main memory. On: equal parts of them are kept on the other "
                    "GPUs; what does not fit there is kept in main memory.",
                },
            )
        own["expert_mode_allocations"] = (
            "STRING",
            {
                "default": "",
                "multiline": False,
                "tooltip": "How much each device keeps, as in cuda:0,70%;cuda:1,30% or cuda:0,4gb;cpu,*; or auto. When "
                "not blank it replaces the inputs above, but for the device that computes.",
            },
        )
        if not cls.LOADER.can_be_split:
            for _, options in [*own.values()][1:]:
                options["tooltip"] = "No effect: this kind of model is never split. Saved workflows have this input."
        if cls.SUFFIX == _SPLIT:
            own["eject_models"] = (
                "BOOLEAN",
                {"default": not cls.LOADER.is_encoder, "tooltip": "Unload all other models from the device first."},
            )
        return own

    @classmethod
    def VALIDATE_INPUTS(cls, expert_mode_allocations: str | None = "") -> bool | str:
        return mistakes_in(expert_mode_allocations=expert_mode_allocations)

    def load(self, **inputs: Any) -> dict[str, Any]:
        """What the loader returns, on the devices that were asked for; with the table for the node."""
        own = {name: inputs.pop(name, options["default"]) for name, (_, options) in self.own_inputs().items()}
        device, gb = own[self._device_input()], own.get("virtual_vram_gb", 0.0)
        expert = own.get("expert_mode_allocations", "")
        others = [other for other in selectable_devices() if other not in (device, "cpu")]
        if own.get("use_other_vram") and others and not expert.strip():
            request = ComponentRequest(device, VirtualVram(gb, others[0], tuple(others[1:])))
        else:
            request = request_for(device, gb, own.get("donor_device", "cpu"), expert)
        loading.check_devices(request)
        for path in _paths_of(self.LOADER, inputs):  # before others are unloaded for a damaged one
            check_file(path)
        if own.get("eject_models"):
            loading.eject(device)
        return _with_placement(self.LOADER, request, inputs)


def _paths_of(loader: _Loader, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The files that the inputs name; names that stand for more than a file are left out."""
    of_clip = "clip_vision" if loader.outputs == ("CLIP_VISION",) else "text_encoders"
    folders = {**_FOLDERS, **dict.fromkeys(TEXT_ENCODER_FILES, of_clip)}
    found = (folder_paths.get_full_path(folders[name], file) for name, file in inputs.items() if name in folders)
    return tuple(path for path in found if path is not None)


def _with_placement(loader: _Loader, request: ComponentRequest, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a node returns to ComfyUI.

    Files of checkpoints, diffusion models and text encoders are loaded by the pack, which keeps ComfyUI from copying
    them, and from putting them on a device of its own choice meanwhile. Where a loader has an input that is not known
    here, and in all other cases, it is called.
    """
    if {*inputs} == {"ckpt_name"}:
        return _loaded_checkpoint(
            inputs["ckpt_name"], request, _resident(request.compute_device), request.compute_device
        )
    if loader.outputs == ("CLIP",) and not loader.is_of_gguf and {*inputs} <= {*TEXT_ENCODER_FILES, "type"}:
        return _loaded_text_encoder(inputs, request)
    if (
        loader.name == "UNETLoader"
        and {*inputs} == {"unet_name", "weight_dtype"}
        and inputs["weight_dtype"] == "default"
    ):
        path = folder_paths.get_full_path_or_raise("diffusion_models", inputs["unet_name"])
        model = loading.load_diffusion_model(path, request)
        return {"ui": placement_of({components.DIFFUSION_MODEL: model}, title=_title((path,))), "result": (model,)}
    device = torch.device(request.compute_device)
    served: dict[str, Any] = {}
    notes, result = [], []
    for number, (kind, output) in enumerate(zip(loader.outputs, _outputs_of(loader, inputs), strict=False)):
        if output is not None and kind in _COMPONENTS:
            _note_origin(loader, inputs, number, output)
        if kind == "MODEL":
            output = served[components.DIFFUSION_MODEL] = loading.distribute(output, request, is_new=True)
        elif kind == "CLIP" and output is not None:
            of_clip = request if loader.outputs == ("CLIP",) else _resident(request.compute_device)
            output = loading.distribute_clip(output, of_clip, is_new=True)
            served[components.TEXT_ENCODER] = output.patcher
        elif output is not None:
            output, note = _placed_whole(kind, output, device)
            notes.append(note)
        result.append(output)
    return {"ui": placement_of(served, notes, _title(_paths_of(loader, inputs))), "result": tuple(result)}


def _title(files: Sequence[str]) -> str:
    return ", ".join(map(os.path.basename, files))


def _loaded_checkpoint(name: str, unet: ComponentRequest, clip: ComponentRequest, vae_device: str) -> dict[str, Any]:
    loaded = loading.load_components(
        folder_paths.get_full_path_or_raise("checkpoints", name),
        unet,
        clip,
        vae_device,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
    )
    return {"ui": {"distorch2_placement": [loaded.report]}, "result": (loaded.model, loaded.clip, loaded.vae)}


def _loaded_text_encoder(inputs: Mapping[str, Any], request: ComponentRequest) -> dict[str, Any]:
    names = [inputs[name] for name in TEXT_ENCODER_FILES if name in inputs]
    clip = loading.load_text_encoder(
        [folder_paths.get_full_path_or_raise("text_encoders", name) for name in names],
        clip_type_of(inputs.get("type", "")),
        request,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
    )
    return {"ui": placement_of({components.TEXT_ENCODER: clip.patcher}, title=_title(names)), "result": (clip,)}


def clip_type_of(name: str) -> str:
    """The type as ComfyUI's loaders take it: `sdxl`, say, has none of its own, and some loaders have no such input."""
    return name if name.upper() in comfy.sd.CLIPType.__members__ else "stable_diffusion"


def gguf_pack() -> Any | None:
    """The module of ComfyUI-GGUF that has its loaders; None where it is not installed, or has none by these names."""
    node = comfyui_nodes.NODE_CLASS_MAPPINGS.get("UnetLoaderGGUF")
    module = sys.modules.get(node.__module__) if node is not None else None
    return module if hasattr(module, "gguf_sd_loader") and hasattr(module, "GGMLOps") else None


def _resident(device: str) -> ComponentRequest:
    return request_for(device, 0.0, device)


def _placed_whole(kind: str, output: Any, device: torch.device) -> tuple[Any, str]:
    place: Callable[[Any, torch.device], Any] = {
        "VAE": whole.place_vae,
        "CLIP_VISION": whole.place_clip_vision,
        "CONTROL_NET": whole.place_control_net,
    }[kind]
    name = {"VAE": "VAE", "CLIP_VISION": "CLIP Vision", "CONTROL_NET": "ControlNet"}[kind]
    try:
        return place(output, device), f"{name}: whole, on {device}; it is never split"
    except PlanError as error:
        return output, f"{name}: as it was loaded, since {error}"


def _outputs_of(loader: _Loader, inputs: Mapping[str, Any]) -> Sequence[Any]:
    """Raises `CheckpointError` for a GGUF file that cannot be read, which ComfyUI-GGUF does not name."""
    try:
        return _run(loader.node_class, inputs)
    except NO_SUCH_GGUF as error:
        if not loader.is_of_gguf:
            raise
        raise cannot_read_gguf(", ".join(_paths_of(loader, inputs)), error) from error


def _note_origin(loader: _Loader, inputs: Mapping[str, Any], number: int, output: Any) -> None:
    """For loaders that do not say how to load a model again (ComfyUI-GGUF's): then several devices can use it at once,
    and what is known of its runs is found by its files."""

    def load() -> Any:
        return _outputs_of(loader, inputs)[number]

    patcher = getattr(output, "patcher", output)
    if patcher.cached_patcher_init is None:
        arguments = (_COMPONENTS[loader.outputs[number]], _paths_of(loader, inputs), load)
        patcher.cached_patcher_init = (components.load_again, arguments)


def _run(node: Any, inputs: Mapping[str, Any]) -> Sequence[Any]:
    """The outputs of a node class of either of ComfyUI's two kinds."""
    if issubclass(node, io.ComfyNode):
        return node.execute(**inputs).result
    output = getattr(node(), node.FUNCTION)(**inputs)
    return output["result"] if isinstance(output, dict) else output


class CheckpointLoaderAdvancedMultiGPU:
    """The parts of a checkpoint, each as a whole on a device."""

    TITLE = "Load Checkpoint (a device for each part)"
    DESCRIPTION = "Loads a checkpoint and puts each part of it, as a whole, on the device that you name."
    RETURN_TYPES = RETURN_NAMES = _ALL_OUTPUTS
    CATEGORY, FUNCTION = _CATEGORY, "load"
    SEARCH_ALIASES = ("distorch", "multigpu", "load checkpoint")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        devices = list(selectable_devices())
        defaults = {"unet": (first := device_utils.first_accelerator(devices)), "clip": "cpu", "vae": first}
        names = {"unet": "diffusion model", "clip": "text encoder", "vae": "VAE"}
        files = (folder_paths.get_filename_list("checkpoints"), {"tooltip": "The checkpoint to load."})
        return {
            "required": {
                "ckpt_name": files,
                **{
                    f"{part}_device": (
                        devices,
                        {"default": defaults[part], "tooltip": f"Where the {name} lies and computes."},
                    )
                    for part, name in names.items()
                },
            }
        }

    def load(self, ckpt_name: str, unet_device: str, clip_device: str, vae_device: str) -> dict[str, Any]:
        return _loaded_checkpoint(ckpt_name, _resident(unet_device), _resident(clip_device), vae_device)


class DeviceSelectorMultiGPU:
    """A device for nodes that take one of ComfyUI-MultiGPU's type."""

    TITLE = "Select Device (MultiGPU)"
    DESCRIPTION = "Gives a device to nodes with an input of type MULTIGPUDEVICE. Saved workflows have it."
    RETURN_TYPES, RETURN_NAMES = ("MULTIGPUDEVICE",), ("device",)
    CATEGORY, FUNCTION = _CATEGORY, "select"
    SEARCH_ALIASES = ("multigpu", "device")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "device": (list(selectable_devices()), {"tooltip": "The device that the connected nodes use."})
            }
        }

    def select(self, device: str) -> tuple[str]:
        return (device,)


def _category(loader: _Loader, suffix: str) -> str:
    if suffix == _SPLIT:
        return f"{_CATEGORY}/distorch_2"
    return f"{_CATEGORY}/legacy" if suffix == _SPLIT_LEGACY and "MODEL" in loader.outputs else _CATEGORY


def _drop_in(loader: _Loader, suffix: str) -> type:
    where = "keeps its weights on the devices" if loader.is_split(suffix) else "puts all of it on the device"
    elsewhere = " ControlLoRAs, T2I adapters and Qwen Fun ControlNets stay where the diffusion model computes."
    attributes = {
        "LOADER": loader,
        "SUFFIX": suffix,
        "CATEGORY": _category(loader, suffix),
        "RETURN_TYPES": loader.outputs,
        "RETURN_NAMES": loader.outputs,
        "TITLE": f"{loader.title} ({_LABELS[suffix]})",
        "DESCRIPTION": f"Does what {loader.title} does, and {where} that you name."
        + (elsewhere if "CONTROL_NET" in loader.outputs else ""),
        "SEARCH_ALIASES": ["distorch", "multigpu", loader.title, loader.name],
    }
    return type(f"{loader.name}{suffix}", (_DropIn,), attributes)


def all_nodes() -> list[Any]:
    """The node classes, those included whose loaders are missing."""
    wrapped = [_drop_in(loader, suffix) for loader in _TABLE for suffix in loader.suffixes]
    return [*wrapped, CheckpointLoaderAdvancedMultiGPU, DeviceSelectorMultiGPU]


def available() -> dict[str, Any]:
    """Classes by name, of the nodes whose loaders are there; none where ComfyUI-MultiGPU has nodes by these names."""
    if _other_pack_is_there():
        logger.warning("DisTorch2: ComfyUI-MultiGPU is installed too; the nodes that both have are its own")
        return {}
    there = comfyui_nodes.NODE_CLASS_MAPPINGS
    return {node.__name__: node for node in all_nodes() if not issubclass(node, _DropIn) or node.LOADER.name in there}


def add_later_ones() -> None:
    """Have the nodes added whose loaders are of packs that ComfyUI loads after this one, when it has loaded all."""
    server = sys.modules.get("server")
    prompt_server = getattr(getattr(server, "PromptServer", None), "instance", None)
    if prompt_server is not None:
        prompt_server.app.on_startup.append(_add_missing)


async def _add_missing(_: object) -> None:
    mappings = comfyui_nodes.NODE_CLASS_MAPPINGS
    for name, node in available().items():
        if name not in mappings:
            node.RELATIVE_PYTHON_MODULE = mappings["DeviceSelectorMultiGPU"].RELATIVE_PYTHON_MODULE
            mappings[name] = node
            comfyui_nodes.NODE_DISPLAY_NAME_MAPPINGS[name] = node.TITLE


def _other_pack_is_there() -> bool:
    other = comfyui_nodes.NODE_CLASS_MAPPINGS.get("DeviceSelectorMultiGPU")
    return other is not None and other is not DeviceSelectorMultiGPU
