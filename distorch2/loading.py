"""Checkpoint -> (model, clip, vae), each on its devices. This is the pack's Python API.

Nothing of ComfyUI is changed. Its loader copies the tensors of the file, unless DynamicVRAM is on; so the diffusion
model and the text encoder that an accelerator computes with are built here, with ComfyUI's classes, of the file's own
tensors, and only what has another dtype or layout is copied. ComfyUI's loader makes the rest: the VAE, text encoders in
the older scaled fp8, and everything where the CPU computes with the diffusion model. Diffusion model and VAE share its
option for the device, so it is called once for each. The file is read once.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .checkpoint_file import CheckpointError, check_file
from .comfyui import core
from .comfyui.core import ModelPatcher, mm
from .comfyui.patcher import DistributedPatcher
from .comfyui.sharing import clone_sharing, unload
from .planning.plan import GIB, ComponentRequest, DeviceMemory, Plan, PlanError
from .planning.planner import make_plan, relaying_donors
from .report import render_table, rows_of_plan
from .weights.inventory import list_layers, own_tensors
from .weights.quantised import can_be_taken_apart, is_quantised

logger = logging.getLogger(__name__)

DIFFUSION_MODEL, TEXT_ENCODER, VAE = ("diffusion model", "text encoder", "VAE")
_CPU = torch.device("cpu")
_MAY_BE_MISSING = (".logit_scale", ".transformer.text_projection.weight")
"""Parameters of text encoders that files may lack: ComfyUI does not warn of them either."""
_DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Of weights, those that devices may lack."""
_NOT_PAGE_LOCKED = ("xpu", "npu", "mlu")
"""Kinds of accelerators for which ComfyUI page-locks no memory that it has already."""
_NO_SUCH_FORMAT = (AttributeError, KeyError, TypeError, ValueError)
"""What ComfyUI's loaders raise for a file that holds something else."""
_COMPILED = "torch_compile_kwargs"
"""Where ComfyUI's node notes among a model's options that it is compiled."""
_EVERYTHING = 1e32
"""More bytes than any device has: asks ComfyUI to free all it can."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """`clip` is None where the file has none; a VAE that it does not have raises when it is used.

    `report` is the table of what was placed where.
    """

    model: ModelPatcher
    clip: core.sd.CLIP | None
    vae: core.sd.VAE
    report: str


@dataclass(frozen=True)
class _Weights:
    """What a checkpoint file holds, read once, memory-mapped where ComfyUI does so."""

    path: str
    state_dict: dict[str, Any]
    metadata: dict[str, str] | None


@dataclass(frozen=True)
class _Detected:
    """What ComfyUI makes of the weights: quantisation markers in today's form, prefix and config of the diffusion
    model; no config where it detects no checkpoint."""

    state_dict: dict[str, Any]
    prefix: str
    config: Any


def load_checkpoint(
    ckpt_path: str,
    unet: ComponentRequest,
    clip: ComponentRequest,
    vae_device: str,
    high_precision_loras: bool = True,
    eject_models: bool = False,
    embedding_directory: list[str] | str | None = None,
) -> tuple[ModelPatcher, core.sd.CLIP | None, core.sd.VAE]:
    """Load a checkpoint with the diffusion model, the text encoder and the VAE on the devices asked for.

    `eject_models` unloads every other model from the compute device of `unet` first. With `high_precision_loras` a
    weight that is stored in 8 bits or fewer is kept in the dtype of computation while a LoRA patches it, and takes that
    much more memory; otherwise it is rounded to what it is stored in, as ComfyUI does. A text encoder that the file
    does not have is None, and such a VAE is an object that raises when it is used, as with ComfyUI's loader.

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
    memory = _memory_of([unet, clip], vae_device)
    check_file(ckpt_path)
    if eject_models:
        eject(unet.compute_device)
    weights = _read(ckpt_path)
    patchers: dict[str, ModelPatcher] = {}
    try:
        vae = _load_vae(weights, vae_device)
        if getattr(vae, "patcher", None) is not None:
            patchers[VAE] = vae.patcher
        mm.throw_exception_if_processing_interrupted()
        patchers[DIFFUSION_MODEL], text_encoder = _load_model_and_clip(
            weights, unet.compute_device, clip.compute_device, embedding_directory
        )
        if text_encoder is not None:
            patchers[TEXT_ENCODER] = text_encoder.patcher
        mm.throw_exception_if_processing_interrupted()
        plans = _make_plans(patchers, unet, clip, memory)
    except BaseException:
        for patcher in patchers.values():
            unload(patcher.model)
        raise

    for component in (DIFFUSION_MODEL, TEXT_ENCODER):
        if component in patchers:
            patchers[component] = DistributedPatcher.take_over(
                patchers[component], plans[component], high_precision_loras
            )
    if text_encoder is not None:
        text_encoder.patcher = patchers[TEXT_ENCODER]
    for component, patcher in patchers.items():
        arguments = (component, ckpt_path, plans[component].compute_device, embedding_directory)
        patcher.cached_patcher_init = (reload_component, arguments)
    absent = [f"no {component} in this file" for component in (TEXT_ENCODER, VAE) if component not in plans]
    report = report_of(os.path.basename(ckpt_path), plans, absent)
    return LoadedCheckpoint(patchers[DIFFUSION_MODEL], text_encoder, vae, report)


def distribute(
    patcher: ModelPatcher, request: ComponentRequest, high_precision_loras: bool = True, is_new: bool = False
) -> DistributedPatcher:
    """A patcher like `patcher`, which any loader may have made, with its patches, but with its weights as requested.

    `high_precision_loras` is as for `load_checkpoint`. `is_new` says that nothing else uses the model, so that its own
    module can be served.

    Otherwise `patcher` stays usable: the new one serves a copy of the module that shares its weights, and so does the
    next of the same module. See [Note: whose module is served] in `comfyui/sharing.py`. Of a patcher that is
    distributed already, a clone gets the new plan. For a text encoder there is `distribute_clip`.

    Raises `PlanError` for a request that this machine cannot serve, and for a model that cannot be served.
    """
    memory = _memory_of([request])
    _refuse_what_cannot_be_served(patcher)
    taken = patcher if is_new or isinstance(patcher, DistributedPatcher) else clone_sharing(patcher)
    plan = make_plan(DistributedPatcher.layers_of(taken.model), request, memory)
    if isinstance(taken, DistributedPatcher):
        distributed = taken.with_plan(plan, high_precision_loras)
    else:
        distributed = DistributedPatcher.take_over(taken, plan, high_precision_loras)
    if distributed.load_device != patcher.load_device:
        _compute_in_what_the_device_has(distributed)
    return distributed


def _compute_in_what_the_device_has(patcher: DistributedPatcher) -> None:
    """The loader chose the dtype of computation for another device. What a node has chosen since stays."""
    model = patcher.model
    patcher.drop_device_dtype()
    if not hasattr(model, "manual_cast_dtype") or "manual_cast_dtype" in patcher.object_patches:
        return
    config = model.model_config
    stored = None if config.quant_config is not None else patcher.model_dtype()
    dtype = mm.unet_manual_cast(stored, patcher.load_device, config.supported_inference_dtypes)
    if dtype != model.manual_cast_dtype:
        patcher.set_device_dtype(dtype)


def distribute_clip(
    clip: core.sd.CLIP, request: ComponentRequest, high_precision_loras: bool = True, is_new: bool = False
) -> core.sd.CLIP:
    """`distribute` for a text encoder as ComfyUI's nodes pass it on: one like `clip`, with its weights as requested.

    As with ComfyUI's own loaders the CPU computes where the device asked for lacks a dtype of the text encoder.
    """
    check_devices(request)
    device = torch.device(request.compute_device)
    if not all(mm.supports_cast(device, dtype) for dtype in clip.cond_stage_model.dtypes):
        logger.warning("DisTorch2: %s lacks a dtype of the text encoder, which computes on the CPU", device)
        request = replace(request, compute_device="cpu")
    patcher = distribute(clip.patcher, request, high_precision_loras, is_new)
    distributed = clip.clone()
    distributed.patcher, distributed.cond_stage_model = patcher, patcher.model
    return distributed


def load_diffusion_model(
    path: str,
    request: ComponentRequest,
    high_precision_loras: bool = True,
    model_options: Mapping[str, Any] | None = None,
) -> DistributedPatcher:
    """Load a file that holds a diffusion model alone. `model_options` are as ComfyUI's loader has them (`dtype`, say).

    Raises as `load_checkpoint`.
    """
    check_devices(request)
    check_file(path)
    devices = {"load_device": torch.device(request.compute_device), "offload_device": _CPU}
    options = {**(model_options or {}), **devices}
    weights = _read(path)
    patcher = None
    if not model_options and request.compute_device != "cpu" and not core.loaders_keep_the_mapping(False):
        patcher = _build_of_file(weights, devices)
    if patcher is None:
        patcher = _load_diffusion_model_only(weights, dict(options), disable_dynamic=False)
    patcher.cached_patcher_init = (core.sd.load_diffusion_model, (path, options))
    return distribute(patcher, request, high_precision_loras, is_new=True)


def load_text_encoder(
    paths: Sequence[str],
    clip_type: str,
    request: ComponentRequest,
    high_precision_loras: bool = True,
    embedding_directory: list[str] | str | None = None,
) -> core.sd.CLIP:
    """Load a text encoder of one file or several. `clip_type` is a name of ComfyUI's `CLIPType` in any case, as its
    nodes have it: `flux`, `wan` and so on.

    Raises as `load_checkpoint`, and `ValueError` for another type.
    """
    check_devices(request)
    for path in paths:
        check_file(path)
    types = core.sd.CLIPType.__members__
    if clip_type.upper() not in types:
        raise ValueError(f"there is no text encoder type {clip_type!r}; use {', '.join(map(str.lower, types))}")
    devices = {"load_device": torch.device(request.compute_device), "offload_device": _CPU, "initial_device": _CPU}
    try:
        clip = core.sd.load_clip(
            list(paths),
            embedding_directory=embedding_directory,
            clip_type=types[clip_type.upper()],
            model_options=devices,
        )
    except _NO_SUCH_FORMAT as error:
        raise CheckpointError(
            f"{', '.join(paths)}: no text encoder that ComfyUI {core.version} knows ({error})"
        ) from error
    return distribute_clip(clip, request, high_precision_loras, is_new=True)


def check_devices(request: ComponentRequest) -> None:
    """Raise `PlanError` when this machine lacks a device of the request."""
    _memory_of([request])


def eject(device: str) -> None:
    """Unload all models from a device."""
    mm.free_memory(_EVERYTHING, torch.device(device))


def _refuse_what_cannot_be_served(patcher: ModelPatcher) -> None:
    name = type(patcher.model).__name__
    if not isinstance(patcher, DistributedPatcher) and _COMPILED in patcher.model_options:
        raise PlanError(f"{name} is compiled already: put the node that compiles it after this one")
    if patcher.injections:
        raise PlanError(f"{name} has injections (a bypass LoRA, say), which cannot be distributed; inject afterwards")
    if own := core.overridden_loading(type(patcher)):
        raise PlanError(
            f"{name} comes from a loader that moves its weights in its own way ({type(patcher).__name__} has its own "
            f"{', '.join(own)}); use that loader's settings, or load the model with another one"
        )
    for child_name, child in patcher.model.named_modules():
        for tensor in own_tensors(child).values():
            if not can_be_taken_apart(tensor):
                raise PlanError(
                    f"{name} has weights of the class {type(tensor).__name__} ({child_name}), whose bytes DisTorch2 "
                    "does not know; load the model in another format"
                )


def report_of(title: str, plans: Mapping[str, Plan], notes: Iterable[str] = ()) -> str:
    """The table of what lies where, by component, with more notes below it. It is logged, too."""
    rows = [row for component, plan in plans.items() for row in rows_of_plan(component, plan)]
    of_plans = [f"{component}: {note}" for component, plan in plans.items() for note in plan.notes]
    of_plans += [note for component, plan in plans.items() for note in _notes_on_speed(component, plan)]
    report = render_table(f"DisTorch2: {title}", rows, [*of_plans, *notes])
    logger.info(report)
    return report


def reload_component(
    component: str,
    ckpt_path: str,
    device: str,
    embedding_directory: list[str] | str | None = None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """ComfyUI's own patcher of one component, loaded anew; ComfyUI calls it to clone a model for another device.

    `component` is one of the names in this module.
    """
    weights = _read(ckpt_path)
    if component == VAE:
        return _load_vae(weights, device).patcher
    model, clip = _load_model_and_clip(
        weights,
        device,
        device,
        embedding_directory,
        with_model=component == DIFFUSION_MODEL,
        with_clip=component == TEXT_ENCODER,
        disable_dynamic=disable_dynamic,
    )
    return model if clip is None else clip.patcher


def _make_plans(
    patchers: Mapping[str, ModelPatcher],
    unet: ComponentRequest,
    clip: ComponentRequest,
    memory: Mapping[str, DeviceMemory],
) -> dict[str, Plan]:
    """A plan for every component, in the order of the report. What one keeps on donors is not free for the next."""
    plans: dict[str, Plan] = {}
    for component, request in ((DIFFUSION_MODEL, unet), (TEXT_ENCODER, clip)):
        if component in patchers:
            # ComfyUI computes a text encoder on the CPU when the device asked for lacks its dtype.
            request = replace(request, compute_device=str(patchers[component].load_device))
            plan = make_plan(list_layers(patchers[component].model), request, memory)
            memory = {device: _without_donated(room, plan, device) for device, room in memory.items()}
            plans[component] = plan
    if VAE in patchers:
        plans[VAE] = Plan.all_on(str(patchers[VAE].load_device), list_layers(patchers[VAE].model))
    return plans


def _without_donated(memory: DeviceMemory, plan: Plan, device: str) -> DeviceMemory:
    if memory.free_bytes is None or device not in plan.donors:
        return memory
    return replace(memory, free_bytes=max(0, memory.free_bytes - plan.bytes_on(device)))


def _memory_of(requests: Sequence[ComponentRequest], *others: str) -> dict[str, DeviceMemory]:
    """Memory of the devices of these requests and of others that compute, with `cpu` always among them.

    Of a device that computes, what models hold that ComfyUI can evict counts as free, and the room that it leaves for
    inference does not. What models hold on a device that only keeps weights does not count as free.
    """
    homes = {*others, *(request.compute_device for request in requests)}
    computing = {
        *homes,
        *(donor for request in requests for donor in relaying_donors(request, request.allocation.devices)),
    }
    keeping = {device for request in requests for device in request.allocation.devices}
    present = list(dict.fromkeys(["cpu", *(str(device) for device in mm.get_all_torch_devices())]))
    named = sorted((computing | keeping) - {"cpu"})
    for name in named:
        if name not in present:
            raise PlanError(f"there is no device {name!r}; this machine has {', '.join(present)}")
        if not hasattr(torch, torch.device(name).type):  # torch.mps and torch.cpu exist; what they lack is not used
            raise PlanError(
                f"{name} is of a kind that torch has no streams and events for (DirectML, say): nothing can be kept "
                "elsewhere for it, or on it for others; use ComfyUI's own loader there"
            )
    memory = {"cpu": DeviceMemory(int(mm.get_total_memory(_CPU)))}
    for name in named:
        device = torch.device(name)
        free_bytes = int(mm.get_free_memory(device))
        if name in computing:
            loaded = (item for item in mm.current_loaded_models if item.device == device and item.model is not None)
            free_bytes += int(sum(item.model_loaded_memory() for item in loaded) - mm.minimum_inference_memory())
        can_compute = all(_supports_all_of(name, home) for home in homes)
        memory[name] = DeviceMemory(int(mm.get_total_memory(device)), max(0, free_bytes), can_compute)
    return memory


def _supports_all_of(device: str, other: str) -> bool:
    """Whether `device` has the dtypes and kernels of `other`. Of CUDA's it is known by their compute capability."""
    if not device.startswith("cuda") or not other.startswith("cuda"):
        return True
    return torch.cuda.get_device_capability(device) >= torch.cuda.get_device_capability(other)


def _read(ckpt_path: str) -> _Weights:
    mm.throw_exception_if_processing_interrupted()
    try:
        state_dict, metadata = core.utils.load_torch_file(ckpt_path, return_metadata=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"cannot read {ckpt_path} ({reason}): it is damaged or no checkpoint; download it again"
        ) from error
    mm.throw_exception_if_processing_interrupted()
    return _Weights(ckpt_path, state_dict, metadata)


def _detect(weights: _Weights) -> _Detected:
    """Raises `CheckpointError` when the file holds something else than weights by name."""
    try:
        state_dict = dict(weights.state_dict)
        prefix = core.model_detection.unet_prefix_from_state_dict(state_dict)
        state_dict, metadata = core.utils.convert_old_quants(state_dict, prefix, metadata=weights.metadata)
        config = core.model_detection.model_config_from_unet(state_dict, prefix, metadata=metadata)
    except _NO_SUCH_FORMAT as error:
        raise _not_a_checkpoint(weights.path) from error
    return _Detected(state_dict, prefix, config)


def _not_a_checkpoint(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a checkpoint that ComfyUI {core.version} knows; a LoRA, ControlNet, VAE or text "
        "encoder is loaded by its own node, and a new architecture needs a newer ComfyUI"
    )


def _load_model_and_clip(
    weights: _Weights,
    unet_device: str,
    clip_device: str,
    embedding_directory: list[str] | str | None,
    with_model: bool = True,
    with_clip: bool = True,
    disable_dynamic: bool = False,
) -> tuple[ModelPatcher | None, core.sd.CLIP | None]:
    """None for what is not asked for or not in the file. ComfyUI's loader takes out of `weights` what it loads."""
    model_options = {"load_device": torch.device(unet_device), "offload_device": _CPU}
    # The text encoder is not to be on its device before a plan says so: ComfyUI moves it there when it is used.
    clip_options = {"load_device": torch.device(clip_device), "offload_device": _CPU, "initial_device": _CPU}

    detected = _detect(weights)
    if detected.config is None:
        return _load_diffusion_model_only(weights, model_options, disable_dynamic), None
    dtype, num_parameters = _inference_dtype(detected)
    first_device = mm.unet_inital_load_device(num_parameters, dtype)
    model = clip = None
    # Built here is what ComfyUI's loader would copy, or would put on its default GPU, whatever device it is asked for.
    # Where the CPU computes with the diffusion model it may copy: the weights stay in host memory, and the file may be
    # replaced meanwhile.
    would_copy = unet_device != "cpu" and not core.loaders_keep_the_mapping(disable_dynamic)
    if would_copy or first_device != _CPU:
        if with_model:
            model = _build_diffusion_model(detected, dtype, model_options, disable_dynamic)
        if with_clip:  # after the diffusion model, of whose weights the config may learn about the text encoder
            clip = _build_text_encoder(detected, clip_options, embedding_directory, disable_dynamic)
    del detected
    model_is_left, clip_is_left = with_model and model is None, with_clip and clip is None
    if model_is_left or clip_is_left:
        core_model, core_clip, *_ = core.sd.load_state_dict_guess_config(
            weights.state_dict,
            output_vae=False,
            output_clip=clip_is_left,
            embedding_directory=embedding_directory,
            output_model=model_is_left,
            model_options=model_options,
            te_model_options=clip_options,
            metadata=weights.metadata,
            disable_dynamic=disable_dynamic,
        )
        model, clip = model or core_model, clip or core_clip
    return model, clip


def _build_of_file(weights: _Weights, devices: dict[str, torch.device]) -> ModelPatcher | None:
    """The diffusion model of a file that has no other part, built of the file's own tensors, which ComfyUI would copy.

    None where the file has other names for its tensors than ComfyUI, which converts them.
    """
    try:
        state_dict, metadata = core.utils.convert_old_quants(dict(weights.state_dict), "", metadata=weights.metadata)
        prefix = core.model_detection.unet_prefix_from_state_dict(state_dict)
        inside = core.utils.state_dict_prefix_replace(dict(state_dict), {prefix: ""}, filter_keys=True)
        if inside:
            state_dict, metadata = core.utils.convert_old_quants(inside, "", metadata=metadata)
        config = core.model_detection.model_config_from_unet(state_dict, "", metadata=metadata)
    except _NO_SUCH_FORMAT as error:
        raise _not_a_checkpoint(weights.path) from error
    if config is None:
        return None
    detected = _Detected(state_dict, "", config)
    return _build_diffusion_model(detected, _inference_dtype(detected)[0], devices, disable_dynamic=False)


def _load_diffusion_model_only(weights: _Weights, model_options: dict[str, Any], disable_dynamic: bool) -> ModelPatcher:
    """For a file in which ComfyUI detects no checkpoint: its checkpoint loader would drop the options here."""
    try:
        model = core.sd.load_diffusion_model_state_dict(
            weights.state_dict, model_options, metadata=weights.metadata, disable_dynamic=disable_dynamic
        )
    except _NO_SUCH_FORMAT as error:
        raise _not_a_checkpoint(weights.path) from error
    if model is None:
        raise _not_a_checkpoint(weights.path)
    return model


def _load_vae(weights: _Weights, device: str) -> core.sd.VAE:
    if _detect(weights).config is None:
        # ComfyUI's checkpoint loader would load a diffusion model here. This VAE raises when it is used.
        return core.sd.VAE(sd={})
    vae = core.sd.load_state_dict_guess_config(
        dict(weights.state_dict),
        output_clip=False,
        output_model=False,
        model_options={"load_device": torch.device(device)},
        metadata=weights.metadata,
    )[2]
    if getattr(vae, "patcher", None) is not None:
        vae.patcher.offload_device = _CPU  # with --gpu-only ComfyUI names its default GPU
    return vae


def _inference_dtype(detected: _Detected) -> tuple[torch.dtype, int]:
    """The dtype that ComfyUI would load the diffusion model in, and its number of parameters."""
    state_dict, prefix, config = detected.state_dict, detected.prefix, detected.config
    num_parameters = core.utils.calculate_parameters(state_dict, prefix)
    weight_dtype = None if config.quant_config is not None else core.utils.weight_dtype(state_dict, prefix)
    dtype = mm.unet_dtype(
        model_params=num_parameters,
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=weight_dtype,
    )
    return dtype, num_parameters


def _build_diffusion_model(
    detected: _Detected, dtype: torch.dtype, model_options: dict[str, torch.device], disable_dynamic: bool
) -> ModelPatcher:
    """Build the diffusion model of the tensors of the file, memory-mapped where they are, in host memory.

    Only what is not stored in the dtype of the model is copied.
    """
    config, device = detected.config, model_options["load_device"]
    cast_from = None if config.quant_config is not None else dtype
    manual_cast_dtype = mm.unet_manual_cast(cast_from, device, config.supported_inference_dtypes)
    core.set_inference_dtype(config, dtype, manual_cast_dtype, device)
    model = config.get_model(detected.state_dict, detected.prefix, device=_CPU)
    patcher = core.patcher_class(disable_dynamic)(model, **model_options)
    with _tensors_as_built(patcher):
        model.load_model_weights(detected.state_dict, detected.prefix, assign=True)
    return patcher


def _build_text_encoder(
    detected: _Detected,
    clip_options: dict[str, torch.device],
    embedding_directory: list[str] | str | None,
    disable_dynamic: bool,
) -> core.sd.CLIP | None:
    """Build the text encoder of the file's own tensors; where the CPU may compute with it, of copies, as ComfyUI does.

    None where the file has none, or has it in the older scaled fp8, which ComfyUI's loader converts.
    """
    state_dict, config = detected.state_dict, detected.config
    if any(name.endswith(".scaled_fp8") for name in state_dict):
        return None
    target = config.clip_target(state_dict=state_dict)
    clip_state_dict = config.process_clip_state_dict(state_dict)
    if target is None or not clip_state_dict:
        return None
    device = clip_options["load_device"]
    # ComfyUI computes a text encoder on the CPU when its device lacks a dtype of it, which is known when it is built.
    is_copied = device == _CPU or not all(mm.supports_cast(device, dtype) for dtype in _DTYPES)
    clip = core.sd.CLIP(
        target,
        embedding_directory=embedding_directory,
        tokenizer_data=clip_state_dict,
        state_dict=clip_state_dict if is_copied else [],
        model_options=clip_options,
        disable_dynamic=disable_dynamic,
    )
    if is_copied:
        return clip
    with _tensors_as_built(clip.patcher):
        missing, _ = clip.cond_stage_model.load_state_dict(clip_state_dict, strict=False, assign=True)
    missing = [name for name in missing if not name.endswith(_MAY_BE_MISSING)]
    if missing:
        logger.warning("the text encoder in this file lacks %s", ", ".join(missing))
    return clip


@contextlib.contextmanager
def _tensors_as_built(patcher: ModelPatcher) -> Iterator[None]:
    """Tensors that are assigned inside `with` get the dtypes and the memory formats that the model was built with:
    ComfyUI transposes some, and lets users ask for channels last. Not with DynamicVRAM, which casts as it goes."""
    built = {name: (tensor.dtype, _memory_format(tensor)) for name, tensor in _tensors_of(patcher.model)}
    yield
    if not patcher.is_dynamic():
        for name, tensor in _tensors_of(patcher.model):
            if name in built and not is_quantised(tensor):
                dtype, memory_format = built[name]
                tensor.data = tensor.to(dtype).contiguous(memory_format=memory_format)


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    for memory_format, num_dimensions in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        is_so = tensor.dim() == num_dimensions and tensor.is_contiguous(memory_format=memory_format)
        if is_so and not tensor.is_contiguous():
            return memory_format
    return torch.contiguous_format


def _tensors_of(module: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


def _notes_on_speed(component: str, plan: Plan) -> Iterator[str]:
    """What makes a component slow, and can be chosen otherwise."""
    accelerator = next((str(device) for device in mm.get_all_torch_devices() if device.type != "cpu"), None)
    if component != VAE and plan.compute_device == "cpu" and accelerator and plan.model_bytes >= GIB:
        yield f"{component}: computes on cpu, which is slow for one of its size; choose {accelerator} for speed"
    if torch.device(plan.compute_device).type in _NOT_PAGE_LOCKED and any(
        item.device == "cpu" for item in plan.streamed
    ):
        yield f"{component}: main memory is not page-locked for {plan.compute_device}, and is copied more slowly"
