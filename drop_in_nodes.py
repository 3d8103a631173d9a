"""The loader nodes of ComfyUI-MultiGPU by the same names, with the same inputs, so that its saved workflows run.

Each is a loader of ComfyUI, or of ComfyUI-GGUF, with inputs that say where the weights lie: `_TABLE` says which. What
the loader itself asks for is taken from it as it is in the running ComfyUI. A loader that is missing has no such node,
and where ComfyUI-MultiGPU is installed, its nodes are left alone.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import folder_paths
import torch
from comfy_api.v0_0_2 import io

import nodes as comfyui_nodes

from . import device_utils
from .distorch2 import loading
from .distorch2.comfyui import whole
from .distorch2.plan import ComponentRequest, PlanError, VirtualVram
from .nodes import mistakes_in, placement_of, request_for, selectable_devices

logger = logging.getLogger(__name__)

_CATEGORY = "multigpu"
_SPLIT, _SPLIT_BEFORE, _WHOLE = "DisTorch2MultiGPU", "DisTorchMultiGPU", "MultiGPU"
"""Ends of the names: weights on several devices; the same in the pack's first version; everything on one device."""
_TEXT_ENCODER_FILES = ("clip_name", "clip_name1", "clip_name2", "clip_name3", "clip_name4")


@dataclass(frozen=True)
class _Loader:
    """A loader that is wrapped. `outputs` are the types of what it returns, `device` is the name of the input for the
    device, and `ejects` says whether other models are unloaded by default."""

    name: str
    title: str
    outputs: tuple[str, ...]
    device: str = "compute_device"
    ejects: bool = True
    ends: tuple[str, ...] = (_SPLIT, _WHOLE)


def _clip_loader(name: str, title: str, *ends: str) -> _Loader:
    return _Loader(name, title, ("CLIP",), "device", False, ends or (_SPLIT, _WHOLE))


_ALL_OUTPUTS = ("MODEL", "CLIP", "VAE")
_GGUF_ENDS = (_SPLIT, _SPLIT_BEFORE, _WHOLE)
_TABLE = (
    _Loader("UNETLoader", "Load Diffusion Model", ("MODEL",)),
    _Loader("VAELoader", "Load VAE", ("VAE",)),
    _clip_loader("CLIPLoader", "Load CLIP"),
    _clip_loader("DualCLIPLoader", "Load CLIP (Dual)"),
    _clip_loader("TripleCLIPLoader", "Load CLIP (Triple)"),
    _clip_loader("QuadrupleCLIPLoader", "Load CLIP (Quadruple)"),
    _Loader("CLIPVisionLoader", "Load CLIP Vision", ("CLIP_VISION",), "device", False),
    _Loader("CheckpointLoaderSimple", "Load Checkpoint (simple)", _ALL_OUTPUTS),
    _Loader("DiffusersLoader", "Load Diffusers Model", _ALL_OUTPUTS),
    _Loader("ControlNetLoader", "Load ControlNet Model", ("CONTROL_NET",)),
    _Loader("DiffControlNetLoader", "Load ControlNet Model (diff)", ("CONTROL_NET",)),
    _Loader("UnetLoaderGGUF", "Unet Loader (GGUF)", ("MODEL",), ends=_GGUF_ENDS),
    _Loader("UnetLoaderGGUFAdvanced", "Unet Loader (GGUF/Advanced)", ("MODEL",), ends=_GGUF_ENDS),
    _clip_loader("CLIPLoaderGGUF", "CLIPLoader (GGUF)", *_GGUF_ENDS),
    _clip_loader("DualCLIPLoaderGGUF", "DualCLIPLoader (GGUF)", *_GGUF_ENDS),
    _clip_loader("TripleCLIPLoaderGGUF", "TripleCLIPLoader (GGUF)", *_GGUF_ENDS),
    _clip_loader("QuadrupleCLIPLoaderGGUF", "QuadrupleCLIPLoader (GGUF)", *_GGUF_ENDS),
)
_LABELS = {_SPLIT: "DisTorch2", _SPLIT_BEFORE: "DisTorch, old", _WHOLE: "on a device"}


class _DropIn:
    """A wrapped loader. A subclass says which, and how its name ends."""

    LOADER: _Loader
    END: str
    FUNCTION = "load"

    @classmethod
    def _wrapped(cls) -> Any:
        return comfyui_nodes.NODE_CLASS_MAPPINGS[cls.LOADER.name]

    @classmethod
    def _device_input(cls) -> str:
        return cls.LOADER.device if cls.END == _SPLIT else "device"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = {
            kind: copy.deepcopy(dict(of_kind))
            for kind, of_kind in cls._wrapped().INPUT_TYPES().items()
            if kind in ("required", "optional")
        }
        optional = inputs.pop("optional", {})
        return {**inputs, "optional": optional | cls.own_inputs()}

    @classmethod
    def own_inputs(cls) -> dict[str, Any]:
        devices = list(selectable_devices())
        what = "it" if cls._is_whole() else "the model"
        combo = {
            "default": device_utils.first_accelerator(devices),
            "tooltip": f"Where {what} computes" + (", and where all of it lies." if cls._is_whole() else "."),
        }
        own: dict[str, Any] = {cls._device_input(): (devices, combo)}
        if cls.END == _WHOLE:
            return own
        kept = " This kind of model is always kept whole: it is not used." if cls._is_whole() else ""
        own["virtual_vram_gb"] = (
            "FLOAT",
            {
                "default": 4.0,
                "min": 0.0,
                "max": 128.0 if cls.END == _SPLIT else 24.0,
                "step": 0.1,
                "tooltip": "How many GB to keep on other devices instead of the one that computes." + kept,
            },
        )
        if cls.END == _SPLIT:
            own["donor_device"] = (devices, {"default": "cpu", "tooltip": "Where that part is kept." + kept})
        else:
            own["use_other_vram"] = (
                "BOOLEAN",
                {"default": False, "tooltip": "Keep that part on the other GPUs first, and on the CPU what is left."},
            )
        own["expert_mode_allocations"] = (
            "STRING",
            {
                "default": "",
                "multiline": False,
                "tooltip": "How much each device keeps, as in cuda:0,70%;cuda:1,30% or cuda:0,4gb;cpu,*. When not "
                "blank it replaces virtual VRAM and donor." + kept,
            },
        )
        if cls.END == _SPLIT:
            own["eject_models"] = (
                "BOOLEAN",
                {"default": cls.LOADER.ejects, "tooltip": "Unload all other models from the device first."},
            )
        return own

    @classmethod
    def _is_whole(cls) -> bool:
        return not {"MODEL", "CLIP"} & {*cls.LOADER.outputs}

    @classmethod
    def VALIDATE_INPUTS(cls, expert_mode_allocations: str | None = "") -> bool | str:
        return mistakes_in(expert_mode_allocations=expert_mode_allocations)

    def load(
        self,
        virtual_vram_gb: float = 0.0,
        donor_device: str = "cpu",
        use_other_vram: bool = False,
        expert_mode_allocations: str = "",
        eject_models: bool = False,
        **inputs: Any,
    ) -> dict[str, Any]:
        """What the loader returns, on the devices that were asked for; with the table for the node."""
        device = inputs.pop(self._device_input(), None) or device_utils.first_accelerator(selectable_devices())
        if use_other_vram:
            others = [other for other in selectable_devices() if other not in (device, "cpu")]
            donor_device, *more = others or ["cpu"]
            request = ComponentRequest(device, VirtualVram(virtual_vram_gb, donor_device, tuple(more)))
        else:
            request = request_for(device, virtual_vram_gb, donor_device)
        if expert_mode_allocations.strip():
            request = request_for(device, 0.0, device, expert_mode_allocations)
        if eject_models:
            loading.eject(device)
        return _with_placement(self.LOADER, request, inputs)


def _with_placement(loader: _Loader, request: ComponentRequest, inputs: Mapping[str, Any]) -> dict[str, Any]:
    if loader.outputs == ("CLIP",) and (paths := _text_encoder_files(loader, inputs)):
        clip = loading.load_text_encoder(
            paths, inputs.get("type", "stable_diffusion"), request, embedding_directory=_embeddings()
        )
        return {"ui": placement_of({loading.TEXT_ENCODER: clip.patcher}), "result": (clip,)}
    if {*inputs} == {"ckpt_name"}:
        components = loading.load_components(
            folder_paths.get_full_path_or_raise("checkpoints", inputs["ckpt_name"]),
            request,
            _resident(request),
            request.compute_device,
            embedding_directory=_embeddings(),
        )
        return _of_checkpoint(components)
    loaded = _run(comfyui_nodes.NODE_CLASS_MAPPINGS[loader.name], inputs)
    device, placed, notes, result = torch.device(request.compute_device), {}, [], []
    for kind, output in zip(loader.outputs, loaded, strict=False):
        if output is None:
            pass
        elif kind == "MODEL":
            output = placed[loading.DIFFUSION_MODEL] = loading.distribute(output, request, is_new=True)
        elif kind == "CLIP":
            is_only = loader.outputs == ("CLIP",)
            output = loading.distribute_clip(output, request if is_only else _resident(request), is_new=True)
            placed[loading.TEXT_ENCODER] = output.patcher
        else:
            output, note = _placed_whole(kind, output, device)
            notes.append(note)
        result.append(output)
    return {"ui": placement_of(placed, notes), "result": tuple(result)}


def _resident(request: ComponentRequest) -> ComponentRequest:
    return request_for(request.compute_device, 0.0, request.compute_device)


def _of_checkpoint(loaded: loading.LoadedCheckpoint) -> dict[str, Any]:
    return {"ui": {"distorch2_placement": [loaded.report]}, "result": (loaded.model, loaded.clip, loaded.vae)}


def _placed_whole(kind: str, output: Any, device: torch.device) -> tuple[Any, str]:
    place: Callable[[Any, torch.device], Any] = {
        "VAE": whole.place_vae,
        "CLIP_VISION": whole.place_clip_vision,
        "CONTROL_NET": whole.place_control_net,
    }[kind]
    name = kind.lower().replace("_", " ")
    try:
        return place(output, device), f"{name}: whole, on {device}"
    except PlanError as error:
        return output, f"{name}: as it was loaded, since {error}"


def _run(loader: Any, inputs: Mapping[str, Any]) -> Sequence[Any]:
    """The outputs of a node class of either of ComfyUI's two kinds."""
    if issubclass(loader, io.ComfyNode):
        return loader.execute(**inputs).result
    output = getattr(loader(), loader.FUNCTION)(**inputs)
    return output["result"] if isinstance(output, dict) else output


def _text_encoder_files(loader: _Loader, inputs: Mapping[str, Any]) -> list[str]:
    """Paths of the files, where the loader is one of ComfyUI's and has no inputs that are not known here."""
    if loader.name.endswith("GGUF") or not {*inputs} <= {*_TEXT_ENCODER_FILES, "type"}:
        return []
    return [
        folder_paths.get_full_path_or_raise("text_encoders", inputs[name])
        for name in _TEXT_ENCODER_FILES
        if name in inputs
    ]


def _embeddings() -> list[str]:
    return folder_paths.get_folder_paths("embeddings")


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
        first = {"default": device_utils.first_accelerator(devices), "tooltip": "Where it lies and computes."}
        files = (folder_paths.get_filename_list("checkpoints"), {"tooltip": "The checkpoint to load."})
        return {
            "required": {
                "ckpt_name": files,
                "unet_device": (devices, first),
                "clip_device": (devices, {**first, "default": "cpu"}),
                "vae_device": (devices, first),
            }
        }

    def load(self, ckpt_name: str, unet_device: str, clip_device: str, vae_device: str) -> dict[str, Any]:
        loaded = loading.load_components(
            folder_paths.get_full_path_or_raise("checkpoints", ckpt_name),
            request_for(unet_device, 0.0, unet_device),
            request_for(clip_device, 0.0, clip_device),
            vae_device,
            embedding_directory=_embeddings(),
        )
        return _of_checkpoint(loaded)


class DeviceSelectorMultiGPU:
    """A device for the inputs of other nodes."""

    TITLE = "Select Device (MultiGPU)"
    DESCRIPTION = "Chooses a device once, for the device inputs of several nodes."
    RETURN_TYPES, RETURN_NAMES = ("MULTIGPUDEVICE",), ("device",)
    CATEGORY, FUNCTION = _CATEGORY, "select"
    SEARCH_ALIASES = ("multigpu", "device")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"device": (list(selectable_devices()), {"tooltip": "The device."})}}

    def select(self, device: str) -> tuple[str]:
        return (device,)


def _category(loader: _Loader, end: str) -> str:
    if end == _SPLIT:
        return f"{_CATEGORY}/distorch_2"
    return f"{_CATEGORY}/legacy" if end == _SPLIT_BEFORE and "MODEL" in loader.outputs else _CATEGORY


def _drop_in(loader: _Loader, end: str) -> type:
    is_split = end != _WHOLE and {"MODEL", "CLIP"} & {*loader.outputs}
    where = "keeps its weights on the devices" if is_split else "puts all of it on the device"
    attributes = {
        "LOADER": loader,
        "END": end,
        "CATEGORY": _category(loader, end),
        "RETURN_TYPES": loader.outputs,
        "RETURN_NAMES": loader.outputs,
        "TITLE": f"{loader.title} ({_LABELS[end]})",
        "DESCRIPTION": f"Does what {loader.title} does, and {where} that you name.",
        "SEARCH_ALIASES": ["distorch", "multigpu", loader.title, loader.name],
    }
    return type(f"{loader.name}{end}", (_DropIn,), attributes)


def all_nodes() -> list[Any]:
    """The node classes, those included whose loaders are missing."""
    wrapped = [_drop_in(loader, end) for loader in _TABLE for end in loader.ends]
    return [*wrapped, CheckpointLoaderAdvancedMultiGPU, DeviceSelectorMultiGPU]


def _is_there(node: Any) -> bool:
    """Whether the loader that a node wraps is there."""
    return not issubclass(node, _DropIn) or node.LOADER.name in comfyui_nodes.NODE_CLASS_MAPPINGS


def register(classes: dict[str, type], titles: dict[str, str]) -> None:
    """Add the nodes whose loaders are there to what the pack registers; those of packs that ComfyUI loads later follow
    when it has loaded all. Where ComfyUI-MultiGPU is there, its nodes keep their names."""
    if _other_pack_is_there():
        for name in [name for name in classes if name in comfyui_nodes.NODE_CLASS_MAPPINGS]:
            del classes[name]
        return
    server = sys.modules.get("server")
    prompt_server = getattr(getattr(server, "PromptServer", None), "instance", None)
    if prompt_server is not None:
        prompt_server.app.on_startup.append(_add_the_rest)
    for node in filter(_is_there, all_nodes()):
        classes[node.__name__], titles[node.__name__] = node, node.TITLE


async def _add_the_rest(_: object) -> None:
    if _other_pack_is_there():
        return
    mappings = comfyui_nodes.NODE_CLASS_MAPPINGS
    module = mappings["DeviceSelectorMultiGPU"].RELATIVE_PYTHON_MODULE
    for node in filter(_is_there, all_nodes()):
        if node.__name__ not in mappings:
            node.RELATIVE_PYTHON_MODULE = module
            mappings[node.__name__] = node
            comfyui_nodes.NODE_DISPLAY_NAME_MAPPINGS[node.__name__] = node.TITLE


def _other_pack_is_there() -> bool:
    other = comfyui_nodes.NODE_CLASS_MAPPINGS.get("DeviceSelectorMultiGPU")
    if other is None or other is DeviceSelectorMultiGPU:
        return False
    logger.warning("DisTorch2: ComfyUI-MultiGPU is installed too; the nodes that both have are its own")
    return True
