"""Checkpoint -> (model, clip, vae), each on its devices. This is the pack's Python API.

ComfyUI loads, and nothing of it is changed: its loader takes devices as options. The diffusion model and the VAE share
one of these options, so the loader is called once for the diffusion model with the text encoder and once for the VAE,
on the same tensors, each time with a dict of its own since the loader consumes keys. The file is read once.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import comfy.model_detection
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch

from .checkpoint_file import CheckpointError, check_file
from .inventory import list_layers
from .plan import GIB, ComponentRequest, DeviceMemory, Placement, Plan, PlanError
from .planner import make_plan
from .report import render_table, rows_of_plan

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_EVERYTHING = 1e32
"""More bytes than any device has: asks ComfyUI to free all it can."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """`clip` and `vae` are None where the file has none; `report` is the table of what was placed where."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP | None
    vae: comfy.sd.VAE | None
    report: str


@dataclass(frozen=True)
class _Weights:
    """What a checkpoint file holds, read once, memory-mapped where ComfyUI does so."""

    path: str
    state_dict: dict[str, Any]
    metadata: dict[str, str] | None


def load_checkpoint(
    ckpt_path: str,
    unet: ComponentRequest,
    clip: ComponentRequest,
    vae_device: str,
    high_precision_loras: bool = True,
    eject_models: bool = False,
    embedding_directory: list[str] | str | None = None,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP | None, comfy.sd.VAE | None]:
    """Load a checkpoint with the diffusion model, the text encoder and the VAE on the devices asked for.

    `eject_models` unloads every other model from the compute device of `unet` first. `high_precision_loras` is for
    weights on donors, and has no effect on resident ones. Parts that the file does not have are None, except that a
    VAE may be an object that raises when it is used, as with ComfyUI's own loader.

    Raises `PlanError` for a request that this machine cannot serve, and `CheckpointError` for a file that is missing,
    damaged or not a checkpoint; nothing stays loaded then.
    """
    loaded = load_components(ckpt_path, unet, clip, vae_device, high_precision_loras, eject_models, embedding_directory)
    return loaded.model, loaded.clip, loaded.vae


def load_components(
    ckpt_path: str,
    unet: ComponentRequest,
    clip: ComponentRequest,
    vae_device: str,
    high_precision_loras: bool = True,
    eject_models: bool = False,
    embedding_directory: list[str] | str | None = None,
) -> LoadedCheckpoint:
    """As `load_checkpoint`, together with the report, which is logged as well."""
    memory = _memory_of((vae_device, *_devices_of(unet), *_devices_of(clip)))
    check_file(ckpt_path)
    if eject_models:
        mm.free_memory(_EVERYTHING, torch.device(unet.compute_device))
    weights = _read(ckpt_path)
    patchers: list[comfy.model_patcher.ModelPatcher] = []
    try:
        model, text_encoder = _load_model_and_clip(
            weights, unet.compute_device, clip.compute_device, embedding_directory
        )
        patchers += [model] if text_encoder is None else [model, text_encoder.patcher]
        mm.throw_exception_if_processing_interrupted()
        vae = _load_vae(weights, vae_device)
        vae_patcher = getattr(vae, "patcher", None)
        patchers += [vae_patcher] if vae_patcher is not None else []
        mm.throw_exception_if_processing_interrupted()

        plans = {"diffusion model": make_plan(list_layers(model.model), unet, memory)}
        if text_encoder is not None:
            plans["text encoder"] = make_plan(list_layers(text_encoder.cond_stage_model), clip, memory)
        _refuse_donors(plans)
    except BaseException:
        _forget(patchers)
        raise

    _register_reload(model, "model", ckpt_path, unet.compute_device, embedding_directory)
    if text_encoder is not None:
        _register_reload(text_encoder.patcher, "clip", ckpt_path, clip.compute_device, embedding_directory)
    if vae_patcher is not None:
        _register_reload(vae_patcher, "vae", ckpt_path, vae_device, embedding_directory)
        plans["VAE"] = _all_on(vae_device, vae.first_stage_model)
    report = _report(os.path.basename(ckpt_path), plans)
    logger.info(report)
    return LoadedCheckpoint(model, text_encoder, vae, report)


def reload_component(
    component: str,
    ckpt_path: str,
    device: str,
    embedding_directory: list[str] | str | None = None,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """The patcher of "model", "clip" or "vae", loaded anew; ComfyUI calls it to clone a model for another device."""
    weights = _read(ckpt_path)
    if component == "vae":
        return _load_vae(weights, device).patcher
    model, clip = _load_model_and_clip(
        weights,
        device,
        device,
        embedding_directory,
        with_model=component == "model",
        with_clip=component == "clip",
        disable_dynamic=disable_dynamic,
    )
    return model if component == "model" else clip.patcher


def _devices_of(request: ComponentRequest) -> tuple[str, ...]:
    return (request.compute_device, *request.allocation.devices)


def _memory_of(devices: Iterable[str]) -> dict[str, DeviceMemory]:
    """Memory of each of `devices`, with `cpu` always among them; free means free or held by an evictable model."""
    present = list(dict.fromkeys(["cpu", *(str(device) for device in mm.get_all_torch_devices())]))
    memory = {"cpu": DeviceMemory(int(mm.get_total_memory(_CPU)))}
    for name in dict.fromkeys(devices):
        if name not in present:
            raise PlanError(f"there is no device {name!r}; this machine has {', '.join(present)}")
        if name not in memory:
            device = torch.device(name)
            held = sum(
                loaded.model_loaded_memory()
                for loaded in mm.current_loaded_models
                if loaded.device == device and loaded.model is not None
            )
            free_bytes = mm.get_free_memory(device) + held - mm.minimum_inference_memory()
            memory[name] = DeviceMemory(int(mm.get_total_memory(device)), max(0, int(free_bytes)))
    return memory


def _read(ckpt_path: str) -> _Weights:
    mm.throw_exception_if_processing_interrupted()
    try:
        state_dict, metadata = comfy.utils.load_torch_file(ckpt_path, return_metadata=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot read {ckpt_path}: {reason}; if it is damaged, download it again") from error
    if not isinstance(state_dict, dict) or not any(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise CheckpointError(f"{ckpt_path} is not a checkpoint: there are no weights in it")
    mm.throw_exception_if_processing_interrupted()
    return _Weights(ckpt_path, state_dict, metadata)


def _detect(weights: _Weights) -> tuple[dict[str, Any], str, Any]:
    """The state dict with quantisation markers in today's form, the diffusion model's prefix, its config or None."""
    state_dict = dict(weights.state_dict)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state_dict)
    state_dict, metadata = comfy.utils.convert_old_quants(state_dict, prefix, metadata=weights.metadata)
    return state_dict, prefix, comfy.model_detection.model_config_from_unet(state_dict, prefix, metadata=metadata)


def _load_model_and_clip(
    weights: _Weights,
    unet_device: str,
    clip_device: str,
    embedding_directory: list[str] | str | None,
    with_model: bool = True,
    with_clip: bool = True,
    disable_dynamic: bool = False,
) -> tuple[comfy.model_patcher.ModelPatcher | None, comfy.sd.CLIP | None]:
    model_options = {"load_device": torch.device(unet_device), "offload_device": _CPU}
    # The text encoder is not to be on its device before a plan says so: ComfyUI moves it there when it is used.
    clip_options = {"load_device": torch.device(clip_device), "offload_device": _CPU, "initial_device": _CPU}

    state_dict, prefix, config = _detect(weights)
    if config is None:
        # ComfyUI's checkpoint loader would drop the options here.
        model = comfy.sd.load_diffusion_model_state_dict(
            dict(weights.state_dict), model_options, metadata=weights.metadata, disable_dynamic=disable_dynamic
        )
        if model is None:
            raise CheckpointError(
                f"{weights.path} is not a checkpoint that ComfyUI {_comfyui_version()} knows; a LoRA, ControlNet, VAE "
                "or text encoder is loaded by its own node, and a new architecture needs a newer ComfyUI"
            )
        return model, None

    model = None
    if with_model and _first_device(state_dict, prefix, config) not in (_CPU, model_options["load_device"]):
        model = _build_diffusion_model(state_dict, prefix, config, model_options, disable_dynamic)
    core_model, clip, *_ = comfy.sd.load_state_dict_guess_config(
        dict(weights.state_dict),
        output_vae=False,
        output_clip=with_clip,
        embedding_directory=embedding_directory,
        output_model=with_model and model is None,
        model_options=model_options,
        te_model_options=clip_options,
        metadata=weights.metadata,
        disable_dynamic=disable_dynamic,
    )
    return model or core_model, clip


def _load_vae(weights: _Weights, device: str) -> comfy.sd.VAE | None:
    _, _, config = _detect(weights)
    if config is None:
        return comfy.sd.VAE(sd={})  # raises when it is used, as with ComfyUI's loader
    return comfy.sd.load_state_dict_guess_config(
        dict(weights.state_dict),
        output_clip=False,
        output_model=False,
        model_options={"load_device": torch.device(device)},
        metadata=weights.metadata,
    )[2]


def _inference_dtype(state_dict: dict[str, Any], prefix: str, config: Any) -> tuple[torch.dtype, int]:
    """The dtype that ComfyUI would load the diffusion model in, and its number of parameters."""
    num_parameters = comfy.utils.calculate_parameters(state_dict, prefix)
    weight_dtype = None if config.quant_config is not None else comfy.utils.weight_dtype(state_dict, prefix)
    dtype = mm.unet_dtype(
        model_params=num_parameters,
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=weight_dtype,
    )
    return dtype, num_parameters


def _first_device(state_dict: dict[str, Any], prefix: str, config: Any) -> torch.device:
    """Where ComfyUI would build the diffusion model, whatever device it is asked to load it on."""
    dtype, num_parameters = _inference_dtype(state_dict, prefix, config)
    return mm.unet_inital_load_device(num_parameters, dtype)


def _build_diffusion_model(
    state_dict: dict[str, Any], prefix: str, config: Any, model_options: dict[str, torch.device], disable_dynamic: bool
) -> comfy.model_patcher.ModelPatcher:
    """Build the diffusion model in host memory, for when ComfyUI would put it on a GPU that is to stay free of it."""
    device = model_options["load_device"]
    dtype, _ = _inference_dtype(state_dict, prefix, config)
    cast_from = None if config.quant_config is not None else dtype
    manual_cast_dtype = mm.unet_manual_cast(cast_from, device, config.supported_inference_dtypes)
    # ComfyUI before 0.27 takes no device here.
    takes_device = "device" in inspect.signature(config.set_inference_dtype).parameters
    config.set_inference_dtype(dtype, manual_cast_dtype, **({"device": device} if takes_device else {}))
    model = config.get_model(state_dict, prefix, device=_CPU)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, **model_options)
    model.load_model_weights(state_dict, prefix, assign=patcher.is_dynamic())
    return patcher


def _refuse_donors(plans: dict[str, Plan]) -> None:
    for component, plan in plans.items():
        for donor in plan.donors:
            compute = plan.compute_device
            raise PlanError(
                f"{component}: {plan.bytes_on(donor) / GIB:.2f} GiB would lie on {donor}, and this version keeps all "
                f"weights on the compute device; set virtual VRAM to 0, or the expert allocation to {compute},*"
            )


def _forget(patchers: Iterable[comfy.model_patcher.ModelPatcher]) -> None:
    """Unload `patchers` and take them off ComfyUI's list, where a text encoder for the CPU is put as it is built."""
    for loaded in list(mm.current_loaded_models):
        if any(loaded.model is patcher for patcher in patchers):
            loaded.model_unload()
            mm.current_loaded_models.remove(loaded)


def _register_reload(
    patcher: comfy.model_patcher.ModelPatcher,
    component: str,
    ckpt_path: str,
    device: str,
    embedding_directory: list[str] | str | None,
) -> None:
    patcher.cached_patcher_init = (reload_component, (component, ckpt_path, device, embedding_directory))


def _all_on(device: str, module: torch.nn.Module) -> Plan:
    return Plan(device, tuple(Placement(layer, device) for layer in list_layers(module)))


def _report(filename: str, plans: dict[str, Plan]) -> str:
    rows = [row for component, plan in plans.items() for row in rows_of_plan(component, plan)]
    notes = [f"{component}: {note}" for component, plan in plans.items() for note in plan.notes]
    notes += [f"no {component} in this file" for component in ("text encoder", "VAE") if component not in plans]
    return render_table(f"DisTorch2: {filename}", rows, notes)


def _comfyui_version() -> str:
    import comfyui_version

    return comfyui_version.__version__
