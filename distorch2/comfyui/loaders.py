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
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..weights.checkpoint_file import CheckpointError, read_header
from ..weights.devices import CPU
from ..weights.quantised import carries_patches, is_quantised, plain_tensors
from . import core
from .core import ModelPatcher, mm

logger = logging.getLogger(__name__)

_MAY_BE_MISSING = (".logit_scale", ".transformer.text_projection.weight")
"""Parameters of text encoders that files may lack: ComfyUI does not warn of them either."""
_DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Of weights, those that devices may lack."""
_META = torch.device("meta")
_READ_BYTES = 64 * 1024
"""Of a header's tensors, up to this size: markers of quantisation, and what ComfyUI looks at to tell models apart."""
_READ_VOCABULARY_BYTES = 64 * 1024**2
"""The same of those that are one row of bytes: files of text encoders have vocabularies in them (`spiece_model`)."""
_DTYPES_BY_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
"""As the safetensors format names them."""
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


class Built(NamedTuple):
    """Models without memory; None for a part that the file does not have. The text encoder would compute on
    `clip_device`."""

    model: torch.nn.Module
    text_encoder: torch.nn.Module | None
    clip_device: str
    vae: torch.nn.Module | None


def read_shapes(ckpt_path: str) -> Weights:
    """A checkpoint by its header alone: tensors without memory, but for small ones, whose values say what is in it.

    Raises `CheckpointError` as `read_header`.
    """
    stored, metadata = read_header(ckpt_path)
    state_dict: dict[str, torch.Tensor] = {}
    with open(ckpt_path, "rb") as file:
        for name, each in stored.items():
            dtype, num_bytes = _DTYPES_BY_NAME.get(each.dtype), each.end - each.begin
            if dtype is None:
                raise CheckpointError(f"{ckpt_path} has tensors of {each.dtype}; use a file in another format")
            if math.prod(each.shape) * dtype.itemsize != num_bytes:
                raise CheckpointError(
                    f"{ckpt_path} has {num_bytes:,} bytes for {name}, which is not what its shape says"
                )
            is_vocabulary = dtype is torch.uint8 and len(each.shape) == 1
            if num_bytes > (_READ_VOCABULARY_BYTES if is_vocabulary else _READ_BYTES):
                state_dict[name] = torch.empty(each.shape, dtype=dtype, device="meta")
            elif num_bytes:
                file.seek(each.begin)
                state_dict[name] = torch.frombuffer(bytearray(file.read(num_bytes)), dtype=dtype).view(each.shape)
            else:
                state_dict[name] = torch.empty(each.shape, dtype=dtype)
    return Weights(ckpt_path, state_dict, metadata)


def build_without_memory(weights: Weights, unet_device: str, clip_device: str, vae_device: str) -> Built:
    """The models of `read_shapes`, as they would be loaded. Where ComfyUI detects no checkpoint, it may be a diffusion
    model alone. Raises `CheckpointError` for other files."""
    with _refused_as(_not_a_checkpoint(weights.path)):
        detected = _detect(weights)
        if detected.config is None:
            return Built(build_diffusion_model_without_memory(weights, unet_device), None, clip_device, None)
        model = _model_without_memory(detected, unet_device)
        encoder, clip_device = _text_encoder_without_memory(detected, clip_device)
        return Built(model, encoder, clip_device, _vae_without_memory(detected, weights.metadata, vae_device))


def build_diffusion_model_without_memory(
    weights: Weights, device: str, dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """The same for a file that has no other part; with its weights in `dtype`, where that is asked for. Raises
    `CheckpointError` also where ComfyUI converts the names of its tensors."""
    with _refused_as(_not_a_checkpoint(weights.path)):
        detected = _detect_alone(weights)
        if detected is None:
            raise _not_a_checkpoint(weights.path)
        return _model_without_memory(detected, device, dtype)


def build_gguf_without_memory(path: str, pack: Any, device: str) -> torch.nn.Module:
    """The diffusion model of a GGUF file, which is mapped into memory, and of which only the header is read.

    `pack` is the module of ComfyUI-GGUF that has its loaders. Raises `CheckpointError` for other files.
    """
    try:
        found = pack.gguf_sd_loader(path)
    except NO_SUCH_GGUF as error:
        raise cannot_read_gguf(path, error) from error
    state_dict, *more = found if isinstance(found, tuple) else (found,)  # newer ones return metadata as well
    shapes = {name: _as_loaded(tensor) for name, tensor in state_dict.items()}
    weights = Weights(path, shapes, more[0].get("metadata") if more else None)
    with _refused_as(_not_a_checkpoint(path)):
        detected = _detect_alone(weights)
        if detected is None:
            raise _not_a_checkpoint(path)
        detected.config.custom_operations = pack.GGMLOps()
        return _model_without_memory(detected, device)


def _as_loaded(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a GGUF file without memory. ComfyUI keeps quantised ones as they are in the file. With DynamicVRAM it
    keeps the others too; without, it copies them."""
    if carries_patches(tensor) or core.loaders_keep_the_mapping(disable_dynamic=False):
        return tensor.to(_META)
    (plain,) = plain_tensors(tensor)
    return torch.empty_like(plain, device=_META)


def build_text_encoder_without_memory(
    files: Sequence[Weights], clip_type: str, device: str
) -> tuple[torch.nn.Module, str]:
    """The text encoder of files of its own, as `read_shapes` has them, and the device that it would compute on.

    Raises `ValueError` as `clip_type_named`, and `CheckpointError` for other files.
    """
    type_of_clip, asked = clip_type_named(clip_type), torch.device(device)
    # With `asked` as the device to load on, ComfyUI would move it to the CPU where that lacks a dtype of it.
    options = {
        "dtype": mm.text_encoder_dtype(asked),
        "load_device": CPU,
        "offload_device": CPU,
        "initial_device": _META,
    }
    with _refused_as(no_text_encoder([weights.path for weights in files], clip_type)):
        state_dicts = [_without_values(weights) for weights in files]
        with _META, _Undrawn():  # some layers are built on the default device
            clip = core.sd.load_text_encoder_state_dicts(
                state_dicts, clip_type=type_of_clip, model_options=options, disable_dynamic=True
            )
    return clip.cond_stage_model, str(device_of_encoder(clip.cond_stage_model, asked))


def clip_type_named(name: str) -> Any:
    """One of ComfyUI's `CLIPType`, by its name in any case. Raises `ValueError` for another name."""
    types = core.sd.CLIPType.__members__
    if name.upper() not in types:
        raise ValueError(f"there is no text encoder type {name!r}; use {', '.join(map(str.lower, types))}")
    return types[name.upper()]


def _without_values(weights: Weights) -> dict[str, Any]:
    """With quantisation markers in today's form. Floating-point tensors have no values: torch warns of each that is
    copied to a tensor without memory."""
    state_dict, _ = core.utils.convert_old_quants(dict(weights.state_dict), "", metadata=weights.metadata)
    return {name: value.to(_META) if value.is_floating_point() else value for name, value in state_dict.items()}


def device_of_encoder(encoder: Any, device: torch.device) -> torch.device:
    """ComfyUI computes a text encoder on the CPU when the device lacks a dtype of it."""
    return device if all(mm.supports_cast(device, dtype) for dtype in encoder.dtypes) else CPU


def no_text_encoder(paths: Sequence[str], clip_type: str) -> CheckpointError:
    return CheckpointError(
        f"{', '.join(paths)}: no text encoder that ComfyUI {core.version} knows as {clip_type.lower()}; choose the "
        "files of a text encoder, and the type of the model that it is for"
    )


@contextlib.contextmanager
def _refused_as(mistake: CheckpointError) -> Iterator[None]:
    """What ComfyUI raises for a file that holds something else, as this error."""
    try:
        yield
    except CheckpointError:
        raise
    except (*NO_SUCH_FORMAT, AssertionError, IndexError, RuntimeError) as error:
        raise mistake from error


def _model_without_memory(detected: Detected, device: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    options = {"load_device": torch.device(device), "offload_device": CPU}
    if dtype is None:
        dtype, _ = _inference_dtype(detected)
    return _build_diffusion_model(detected, dtype, options, disable_dynamic=True, built_on=_META).model


def _vae_without_memory(detected: Detected, metadata: dict[str, str] | None, device: str) -> torch.nn.Module | None:
    prefixes = dict.fromkeys(detected.config.vae_key_prefix, "")
    state_dict = core.utils.state_dict_prefix_replace(dict(detected.state_dict), prefixes, filter_keys=True)
    shapes = {name: value.to(_META) for name, value in detected.config.process_vae_state_dict(state_dict).items()}
    try:
        with _META, _Undrawn():
            return core.sd.VAE(sd=shapes, metadata=metadata, device=torch.device(device)).first_stage_model
    except RuntimeError:  # that of ACE-Step and that of Cosmos look at numbers while they are built
        return None


def _text_encoder_without_memory(detected: Detected, clip_device: str) -> tuple[torch.nn.Module | None, str]:
    target = detected.config.clip_target(state_dict=detected.state_dict)
    state_dict = detected.config.process_clip_state_dict(detected.state_dict)
    if target is None or not state_dict:
        return None, clip_device
    device = torch.device(clip_device)
    given = {"dtype": mm.text_encoder_dtype(device), "device": _META, "model_options": {}}
    with _Undrawn():
        encoder = target.clip(**{**target.params, **given})
    with _tensors_as_built(encoder):
        encoder.load_state_dict(state_dict, strict=False, assign=True)
    return encoder, str(device_of_encoder(encoder, device))


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


def _detect(weights: Weights) -> Detected:
    """Raises `CheckpointError` when the file holds something else than weights by name."""
    try:
        state_dict = dict(weights.state_dict)
        prefix = core.model_detection.unet_prefix_from_state_dict(state_dict)
        state_dict, metadata = core.utils.convert_old_quants(state_dict, prefix, metadata=weights.metadata)
        config = core.model_detection.model_config_from_unet(state_dict, prefix, metadata=metadata)
    except NO_SUCH_FORMAT as error:
        raise _not_a_checkpoint(weights.path) from error
    return Detected(state_dict, prefix, config)


def _not_a_checkpoint(path: str) -> CheckpointError:
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

    detected = _detect(weights)
    if detected.config is None:
        return load_diffusion_model_only(weights, model_options, disable_dynamic), None
    dtype, num_parameters = _inference_dtype(detected)
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
    detected = _detect_alone(weights)
    if detected is None:
        return None
    return _build_diffusion_model(detected, _inference_dtype(detected)[0], devices, disable_dynamic=False)


def _detect_alone(weights: Weights) -> Detected | None:
    """None where the file has other names for its tensors than ComfyUI."""
    try:
        state_dict, metadata = core.utils.convert_old_quants(dict(weights.state_dict), "", metadata=weights.metadata)
        prefix = core.model_detection.unet_prefix_from_state_dict(state_dict)
        inside = core.utils.state_dict_prefix_replace(dict(state_dict), {prefix: ""}, filter_keys=True)
        if inside:
            state_dict, metadata = core.utils.convert_old_quants(inside, "", metadata=metadata)
        config = core.model_detection.model_config_from_unet(state_dict, "", metadata=metadata)
    except NO_SUCH_FORMAT as error:
        raise _not_a_checkpoint(weights.path) from error
    return None if config is None else Detected(state_dict, "", config)


def load_diffusion_model_only(weights: Weights, model_options: dict[str, Any], disable_dynamic: bool) -> ModelPatcher:
    """For a file in which ComfyUI detects no checkpoint: its checkpoint loader would drop the options here."""
    try:
        model = core.sd.load_diffusion_model_state_dict(
            weights.state_dict, model_options, metadata=weights.metadata, disable_dynamic=disable_dynamic
        )
    except NO_SUCH_FORMAT as error:
        raise _not_a_checkpoint(weights.path) from error
    if model is None:
        raise _not_a_checkpoint(weights.path)
    return model


def load_vae(weights: Weights, device: str) -> core.sd.VAE:
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
        vae.patcher.offload_device = CPU  # with --gpu-only ComfyUI names its default GPU
    return vae


def _inference_dtype(detected: Detected) -> tuple[torch.dtype, int]:
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
    detected: Detected,
    dtype: torch.dtype,
    model_options: dict[str, torch.device],
    disable_dynamic: bool,
    built_on: torch.device = CPU,
) -> ModelPatcher:
    """Build the diffusion model of the tensors of the file, memory-mapped where they are, in host memory.

    Only what is not stored in the dtype of the model is copied.
    """
    config, device = detected.config, model_options["load_device"]
    cast_from = None if config.quant_config is not None else dtype
    manual_cast_dtype = mm.unet_manual_cast(cast_from, device, config.supported_inference_dtypes)
    core.set_inference_dtype(config, dtype, manual_cast_dtype, device)
    with _Undrawn() if built_on == _META else contextlib.nullcontext():
        model = config.get_model(detected.state_dict, detected.prefix, device=built_on)
    patcher = core.patcher_class(disable_dynamic)(model, **model_options)
    with _tensors_as_built(model, patcher.is_dynamic()):
        model.load_model_weights(detected.state_dict, detected.prefix, assign=True)
    return patcher


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
    with _tensors_as_built(clip.cond_stage_model, clip.patcher.is_dynamic()):
        missing, _ = clip.cond_stage_model.load_state_dict(clip_state_dict, strict=False, assign=True)
    missing = [name for name in missing if not name.endswith(_MAY_BE_MISSING)]
    if missing:
        logger.warning("the text encoder in this file lacks %s", ", ".join(missing))
    return clip


class _Undrawn(TorchDispatchMode):
    """Inside `with` random tensors are all zeros, and tensors are not filled with random numbers, but for those of a
    generator of their own.

    Some models draw their first weights on the CPU while they are built. That advances torch's global generator, and
    would change the noise of a prompt that runs in another thread.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = options or {}
        is_drawn = torch.Tag.nondeterministic_seeded in function.tags and options.get("generator") is None
        if is_drawn and function._schema.is_mutable:
            return arguments[0]
        if is_drawn and any(each.name == "device" for each in function._schema.arguments):
            like = next((each.device for each in arguments if isinstance(each, torch.Tensor)), CPU)
            shape = function(*arguments, **{**options, "device": _META})
            return torch.zeros_like(shape, device=options.get("device") or like)
        return function(*arguments, **options)


@contextlib.contextmanager
def _tensors_as_built(module: torch.nn.Module, is_dynamic: bool = False) -> Iterator[None]:
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
