"""Models as ComfyUI would build them of a file, of which only the header is read: without memory.

They are for previews, which plan for them what a load would plan.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..weights.checkpoint_file import CheckpointError, read_header
from ..weights.devices import CPU
from ..weights.quantised import carries_patches, plain_tensors
from . import core
from .core import mm
from .loaders import (
    NO_SUCH_FORMAT,
    NO_SUCH_GGUF,
    Detected,
    Weights,
    cannot_read_gguf,
    clip_type_named,
    detect,
    detect_alone,
    device_of_encoder,
    fill_diffusion_model,
    inference_dtype,
    new_diffusion_model,
    no_text_encoder,
    not_a_checkpoint,
    tensors_as_built,
)

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
    with _refused_as(not_a_checkpoint(weights.path)):
        detected = detect(weights)
        if detected.config is None:
            return Built(build_diffusion_model_without_memory(weights, unet_device), None, clip_device, None)
        model = _model_without_memory(detected, unet_device)
        encoder, clip_device = _text_encoder_without_memory(detected, clip_device)
        return Built(model, encoder, clip_device, _vae_without_memory(detected, weights.metadata, vae_device))


def build_diffusion_model_without_memory(
    weights: Weights, device: str, dtype: torch.dtype | None = None, operations: Any = None
) -> torch.nn.Module:
    """The same for a file that has no other part; with its weights in `dtype`, and with layers of `operations`, where
    that is asked for. Raises `CheckpointError` also where ComfyUI converts the names of its tensors."""
    with _refused_as(not_a_checkpoint(weights.path)):
        detected = detect_alone(weights)
        if detected is None:
            raise not_a_checkpoint(weights.path)
        if operations is not None:
            detected.config.custom_operations = operations
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
    return build_diffusion_model_without_memory(weights, device, operations=pack.GGMLOps())


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


def _without_values(weights: Weights) -> dict[str, Any]:
    """With quantisation markers in today's form. Floating-point tensors have no values: torch warns of each that is
    copied to a tensor without memory."""
    state_dict, _ = core.utils.convert_old_quants(dict(weights.state_dict), "", metadata=weights.metadata)
    return {name: value.to(_META) if value.is_floating_point() else value for name, value in state_dict.items()}


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
    if dtype is None:
        dtype, _ = inference_dtype(detected)
    with _Undrawn():
        model = new_diffusion_model(detected, dtype, torch.device(device), built_on=_META)
    fill_diffusion_model(model, detected)
    return model


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
    with tensors_as_built(encoder):
        encoder.load_state_dict(state_dict, strict=False, assign=True)
    return encoder, str(device_of_encoder(encoder, device))


class _Undrawn(TorchDispatchMode):
    """Inside `with` random tensors are all zeros, and tensors are not filled with random numbers, but for those of a
    generator of their own.

    Some models draw their first weights on the CPU while they are built. That advances torch's global generator, and
    would change the noise of a prompt that runs in another thread. Functions that are told no device (`bernoulli`,
    `multinomial`, `normal` of tensors) still draw: no model does that while it is built.
    """

    # With both, torch before 2.10 compiles what another thread calls meanwhile.
    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = options or {}
        is_drawn = torch.Tag.nondeterministic_seeded in function.tags and options.get("generator") is None
        if is_drawn and function._schema.is_mutable:
            return options["out"] if "out" in options else arguments[0]
        if is_drawn and any(each.name == "device" for each in function._schema.arguments):
            like = next((each.device for each in arguments if isinstance(each, torch.Tensor)), CPU)
            shape = function(*arguments, **{**options, "device": _META})
            return torch.zeros_like(shape, device=options.get("device") or like)
        return function(*arguments, **options)
