"""The pack's Python API: files and requests to models on their devices, and any loader's model distributed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .comfyui import core
from .comfyui.core import ModelPatcher, mm
from .comfyui.loaders import (
    NO_SUCH_FORMAT,
    build_of_file,
    clip_type_named,
    device_of_encoder,
    load_diffusion_model_only,
    load_model_and_clip,
    load_vae,
    no_text_encoder,
    read,
)
from .comfyui.memory import memory_of
from .comfyui.patcher import DistributedPatcher
from .comfyui.program import COMFYUI
from .comfyui.sharing import clone_sharing, unload
from .components import DIFFUSION_MODEL, TEXT_ENCODER, VAE, note_runs, origin_of, reload_component
from .moving.file_reader import bytes_per_second
from .planning.plan import GIB, ComponentRequest, Plan, PlanError, size_text
from .plans import Found, make_plans, notes_on_speed, plan_component
from .report import render_table, rows_of_plan
from .serving import host_memory
from .weights.checkpoint_file import check_file
from .weights.devices import CPU, DISK_NAME
from .weights.inventory import list_layers, own_tensors
from .weights.quantised import can_be_taken_apart
from .weights.sources import file_of

logger = logging.getLogger(__name__)

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
    memory = memory_of([unet, clip], vae_device)
    check_file(ckpt_path)
    note_runs()  # before models are unloaded
    if eject_models:
        eject(unet.compute_device)
    weights = read(ckpt_path)
    patchers: dict[str, ModelPatcher] = {}
    try:
        vae = load_vae(weights, vae_device)
        if getattr(vae, "patcher", None) is not None:
            patchers[VAE] = vae.patcher
        mm.throw_exception_if_processing_interrupted()
        patchers[DIFFUSION_MODEL], text_encoder = load_model_and_clip(
            weights, unet.compute_device, clip.compute_device, embedding_directory
        )
        if text_encoder is not None:
            patchers[TEXT_ENCODER] = text_encoder.patcher
        mm.throw_exception_if_processing_interrupted()
        # ComfyUI computes a text encoder on the CPU when the device asked for lacks its dtype.
        found = {name: Found(list_layers(each.model), str(each.load_device)) for name, each in patchers.items()}
        plans = make_plans(found, unet, clip, memory, (ckpt_path,))
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
    modules = {component: patchers[component].model for component in plans if component != VAE}
    report = report_of(os.path.basename(ckpt_path), plans, modules, absent)
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
    memory = memory_of([request])
    _refuse_what_cannot_be_served(patcher)
    note_runs()  # before models are unloaded
    taken = patcher if is_new or isinstance(patcher, DistributedPatcher) else clone_sharing(patcher)
    plan = plan_component(DistributedPatcher.layers_of(taken.model), request, memory, origin_of(patcher))
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
    if device_of_encoder(clip.cond_stage_model, device) != device:
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
    devices = {"load_device": torch.device(request.compute_device), "offload_device": CPU}
    options = {**(model_options or {}), **devices}
    weights = read(path)
    patcher = None
    if not model_options and request.compute_device != "cpu" and not core.loaders_keep_the_mapping(False):
        patcher = build_of_file(weights, devices)
    if patcher is None:
        patcher = load_diffusion_model_only(weights, dict(options), disable_dynamic=False)
    patcher.cached_patcher_init = (core.sd.load_diffusion_model, (path, options))
    return distribute(patcher, request, high_precision_loras, is_new=True)


def load_text_encoder(
    paths: Sequence[str],
    clip_type: str,
    request: ComponentRequest,
    high_precision_loras: bool = True,
    embedding_directory: list[str] | str | None = None,
) -> core.sd.CLIP:
    """Load a text encoder of the files at `paths`, one or several. `clip_type` is a name of ComfyUI's `CLIPType` in any
    case, as its nodes have it: `flux`, `wan` and so on.

    Raises as `load_checkpoint`, and `ValueError` for another type.
    """
    check_devices(request)
    for path in paths:
        check_file(path)
    type_of_clip = clip_type_named(clip_type)
    devices = {"load_device": torch.device(request.compute_device), "offload_device": CPU, "initial_device": CPU}
    try:
        clip = core.sd.load_clip(
            list(paths),
            embedding_directory=embedding_directory,
            clip_type=type_of_clip,
            model_options=devices,
        )
    except NO_SUCH_FORMAT as error:
        raise no_text_encoder(paths, clip_type) from error
    except RuntimeError as error:
        if "size mismatch" in str(error):  # of `load_state_dict`; running out of memory is another
            raise no_text_encoder(paths, clip_type) from error
        raise
    return distribute_clip(clip, request, high_precision_loras, is_new=True)


def check_devices(request: ComponentRequest) -> None:
    """Raise `PlanError` when this machine lacks a device of the request."""
    memory_of([request])


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


def report_of(
    title: str, plans: Mapping[str, Plan], modules: Mapping[str, torch.nn.Module], notes: Iterable[str] = ()
) -> str:
    """The table of what lies where, by component, with more notes below it. It is logged, too. `modules` are
    those of the components that may lie on donors."""
    rows = [row for component, plan in plans.items() for row in rows_of_plan(component, plan)]
    of_plans = [f"{component}: {note}" for component, plan in plans.items() for note in plan.notes]
    of_plans += [note for component, plan in plans.items() for note in notes_on_speed(component, plan)]
    for component, module in modules.items():
        of_plans += _notes_on_disk(component, plans[component], module)
    report = render_table(f"DisTorch2: {title}", rows, [*of_plans, *notes])
    logger.info(report)
    return report


def _notes_on_disk(component: str, plan: Plan, module: torch.nn.Module) -> Iterator[str]:
    """How much is read from the disk while the component runs, and how long that takes. Each may have all that others
    have in main memory, since these give it up while they do not run."""
    in_memory = sum(key.slab_bytes for key in plan.groups if key.device == str(CPU))
    on_disk = sum(key.slab_bytes for key in plan.groups if key.device == DISK_NAME and not key.is_table)
    overflow = min(in_memory, int(host_memory.overflow(in_memory, module, COMFYUI)))
    if overflow:
        on_disk += overflow
        yield (
            f"{component}: main memory has room for {size_text(in_memory - overflow)} of the {size_text(in_memory)} "
            "planned for cpu; the rest is read from the disk"
        )
    if on_disk:
        file = file_of(module)
        speed = bytes_per_second(file) if file is not None else None
        takes = "" if speed is None else f", about {on_disk / speed:.1f} s at the {speed / GIB:.1f} GiB/s of its drive"
        yield f"{component}: {size_text(on_disk)} are read from the disk each time it runs{takes}"
