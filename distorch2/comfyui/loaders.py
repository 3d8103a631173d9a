"""What imitates ComfyUI's loaders: files to models in host memory.

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..weights.checkpoint_file import CheckpointError
from ..weights.devices import CPU
from ..weights.quantised import is_quantised
from . import core
from .core import ModelPatcher, mm

logger = logging.getLogger(__name__)

_MAY_BE_MISSING = (".logit_scale", ".transformer.text_projection.weight")
"""Parameters of text encoders that files may lack: ComfyUI does not warn of them either."""
_DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Of weights, those that devices may lack."""
NO_SUCH_FORMAT = (AttributeError, KeyError, TypeError, ValueError)
"""What ComfyUI's loaders raise for a file that holds something else."""
NO_SUCH_GGUF = (*NO_SUCH_FORMAT, IndexError, OSError, OverflowError)
"""What ComfyUI-GGUF's loaders raise for a file that is damaged, or that they do not know."""


@dataclass(frozen=True)
class Weights:
    """What a checkpoint file holds, read once, memory-mapped where ComfyUI does so."""

    path: str
    state_dict: dict[str, Any]
    metadata: dict[str, str] | None


@dataclass(frozen=True)
class Detected:
    """What ComfyUI makes of the weights: quantisation markers in today's form, prefix and config of the diffusion
    model; no config where it detects no checkpoint."""

    state_dict: dict[str, Any]
    prefix: str
    config: Any


def clip_type_named(name: str) -> Any:
    """One of ComfyUI's `CLIPType`, by its name in any case. Raises `ValueError` for another name."""
    types = core.sd.CLIPType.__members__
    if name.upper() not in types:
        raise ValueError(f"there is no text encoder type {name!r}; use {', '.join(map(str.lower, types))}")
    return types[name.upper()]


def device_of_encoder(encoder: Any, device: torch.device) -> torch.device:
    """ComfyUI computes a text encoder on the CPU when the device lacks a dtype of it."""
    return device if all(mm.supports_cast(device, dtype) for dtype in encoder.dtypes) else CPU


def no_text_encoder(paths: Sequence[str], clip_type: str) -> CheckpointError:
    return CheckpointError(
        f"{', '.join(paths)}: no text encoder that ComfyUI {core.version} knows as {clip_type.lower()}; choose the "
        "files of a text encoder, and the type of the model that it is for"
    )


def read(ckpt_path: str) -> Weights:
    mm.throw_exception_if_processing_interrupted()
    try:
        state_dict, metadata = core.utils.load_torch_file(ckpt_path, return_metadata=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"cannot read {ckpt_path} ({reason}): it is damaged or no checkpoint; download it again"
        ) from error
    mm.throw_exception_if_processing_interrupted()
    return Weights(ckpt_path, state_dict, metadata)


def detect(weights: Weights) -> Detected:
    """Raises `CheckpointError` when the file holds something else than weights by name."""
    try:
        state_dict = dict(weights.state_dict)
        prefix = core.model_detection.unet_prefix_from_state_dict(state_dict)
        state_dict, metadata = core.utils.convert_old_quants(state_dict, prefix, metadata=weights.metadata)
        config = core.model_detection.model_config_from_unet(state_dict, prefix, metadata=metadata)
    except NO_SUCH_FORMAT as error:
        raise not_a_checkpoint(weights.path) from error
    return Detected(state_dict, prefix, config)


def not_a_checkpoint(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a checkpoint that ComfyUI {core.version} knows; a LoRA, ControlNet, VAE or text "
        "encoder is loaded by its own node, and a new architecture needs a newer ComfyUI"
    )


def cannot_read_gguf(path: str, error: Exception) -> CheckpointError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"ComfyUI-GGUF cannot read {path} ({reason}): if it is cut off or of another kind, download it again; a new "
        "architecture needs a newer ComfyUI-GGUF"
    )


def load_model_and_clip(
    weights: Weights,
    unet_device: str,
    clip_device: str,
    embedding_directory: list[str] | str | None,
    with_model: bool = True,
    with_clip: bool = True,
    disable_dynamic: bool = False,
) -> tuple[ModelPatcher | None, core.sd.CLIP | None]:
    """None for what is not asked for or not in the file. ComfyUI's loader takes out of `weights` what it loads."""
    model_options = {"load_device": torch.device(unet_device), "offload_device": CPU}
    # The text encoder is not to be on its device before a plan says so: ComfyUI moves it there when it is used.
    clip_options = {"load_device": torch.device(clip_device), "offload_device": CPU, "initial_device": CPU}

    detected = detect(weights)
    if detected.config is None:
        return load_diffusion_model_only(weights, model_options, disable_dynamic), None
    dtype, num_parameters = inference_dtype(detected)
    first_device = mm.unet_inital_load_device(num_parameters, dtype)
    model = clip = None
    # Built here is what ComfyUI's loader would copy, or would put on its default GPU, whatever device it is asked for.
    # Where the CPU computes with the diffusion model it may copy: the weights stay in host memory, and the file may be
    # replaced meanwhile.
    would_copy = unet_device != "cpu" and not core.loaders_keep_the_mapping(disable_dynamic)
    if would_copy or first_device != CPU:
        if with_model:
            model = _build_diffusion_model(detected, dtype, model_options, disable_dynamic)
        if with_clip:  # after the diffusion model, of whose weights the config may learn about the text encoder
            clip = build_text_encoder(detected, clip_options, embedding_directory, disable_dynamic)
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


def build_of_file(weights: Weights, devices: dict[str, torch.device]) -> ModelPatcher | None:
    """The diffusion model of a file that has no other part, built of the file's own tensors, which ComfyUI would copy.

    None where the file has other names for its tensors than ComfyUI, which converts them.
    """
    detected = detect_alone(weights)
    if detected is None:
        return None
    return _build_diffusion_model(detected, inference_dtype(detected)[0], devices, disable_dynamic=False)


def detect_alone(weights: Weights) -> Detected | None:
    """None where the file has other names for its tensors than ComfyUI."""
    try:
        state_dict, metadata = core.utils.convert_old_quants(dict(weights.state_dict), "", metadata=weights.metadata)
        prefix = core.model_detection.unet_prefix_from_state_dict(state_dict)
        inside = core.utils.state_dict_prefix_replace(dict(state_dict), {prefix: ""}, filter_keys=True)
        if inside:
            state_dict, metadata = core.utils.convert_old_quants(inside, "", metadata=metadata)
        config = core.model_detection.model_config_from_unet(state_dict, "", metadata=metadata)
    except NO_SUCH_FORMAT as error:
        raise not_a_checkpoint(weights.path) from error
    return None if config is None else Detected(state_dict, "", config)


def load_diffusion_model_only(weights: Weights, model_options: dict[str, Any], disable_dynamic: bool) -> ModelPatcher:
    """For a file in which ComfyUI detects no checkpoint: its checkpoint loader would drop the options here."""
    try:
        model = core.sd.load_diffusion_model_state_dict(
            weights.state_dict, model_options, metadata=weights.metadata, disable_dynamic=disable_dynamic
        )
    except NO_SUCH_FORMAT as error:
        raise not_a_checkpoint(weights.path) from error
    if model is None:
        raise not_a_checkpoint(weights.path)
    return model


def load_vae(weights: Weights, device: str) -> core.sd.VAE:
    if detect(weights).config is None:
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
        vae.patcher.offload_device = CPU  # with --gpu-only ComfyUI names its default GPU
    return vae


def inference_dtype(detected: Detected) -> tuple[torch.dtype, int]:
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
    detected: Detected, dtype: torch.dtype, model_options: dict[str, torch.device], disable_dynamic: bool
) -> ModelPatcher:
    """Build the diffusion model of the tensors of the file, memory-mapped where they are, in host memory.

    Only what is not stored in the dtype of the model is copied.
    """
    model = new_diffusion_model(detected, dtype, model_options["load_device"])
    patcher = core.patcher_class(disable_dynamic)(model, **model_options)
    fill_diffusion_model(model, detected, patcher.is_dynamic())
    return patcher


def new_diffusion_model(
    detected: Detected, dtype: torch.dtype, device: torch.device, built_on: torch.device = CPU
) -> torch.nn.Module:
    """One to compute in `dtype` on `device`, with tensors on `built_on` that have no values yet."""
    config = detected.config
    cast_from = None if config.quant_config is not None else dtype
    manual_cast_dtype = mm.unet_manual_cast(cast_from, device, config.supported_inference_dtypes)
    core.set_inference_dtype(config, dtype, manual_cast_dtype, device)
    return config.get_model(detected.state_dict, detected.prefix, device=built_on)


def fill_diffusion_model(model: Any, detected: Detected, is_dynamic: bool = False) -> None:
    """With the tensors of the file themselves, but for those in another dtype."""
    with tensors_as_built(model, is_dynamic):
        model.load_model_weights(detected.state_dict, detected.prefix, assign=True)


def build_text_encoder(
    detected: Detected,
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
    is_copied = device == CPU or not all(mm.supports_cast(device, dtype) for dtype in _DTYPES)
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
    with tensors_as_built(clip.cond_stage_model, clip.patcher.is_dynamic()):
        missing, _ = clip.cond_stage_model.load_state_dict(clip_state_dict, strict=False, assign=True)
    missing = [name for name in missing if not name.endswith(_MAY_BE_MISSING)]
    if missing:
        logger.warning("the text encoder in this file lacks %s", ", ".join(missing))
    return clip


@contextlib.contextmanager
def tensors_as_built(module: torch.nn.Module, is_dynamic: bool = False) -> Iterator[None]:
    """Tensors that are assigned inside `with` get the dtypes and the memory formats that the model was built with:
    ComfyUI transposes some, and lets users ask for channels last. Not with DynamicVRAM, which casts as it goes."""
    built = {name: (tensor.dtype, _memory_format(tensor)) for name, tensor in _tensors_of(module)}
    yield
    if not is_dynamic:
        for name, tensor in _tensors_of(module):
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
