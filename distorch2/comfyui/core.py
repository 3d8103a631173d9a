"""The names of ComfyUI that the package uses, checked when this file is imported.

No other file of the package imports ComfyUI. `NEEDED` lists the names, private ones too, and `PATCHER_ATTRIBUTES` what
is used of its patchers. Where one is missing, the import fails and says which. What differs between versions of ComfyUI
is decided here.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import threading
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import comfy.cli_args
import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import comfy.utils
import comfy.weight_adapter
import comfyui_version
import folder_paths
import torch

NEEDED: Mapping[str, tuple[str, ...]] = {
    "comfy.cli_args": ("args",),
    "comfy.lora": ("calculate_weight",),
    "comfy.model_detection": ("model_config_from_unet", "unet_prefix_from_state_dict"),
    "comfy.model_management": (
        "cast_to_device",
        "current_loaded_models",
        "ensure_pin_budget",
        "ensure_pin_registerable",
        "free_memory",
        "get_all_torch_devices",
        "get_free_memory",
        "get_torch_device",
        "get_total_memory",
        "in_training",
        "is_device_cuda",
        "is_oom",
        "lora_compute_dtype",
        "minimum_inference_memory",
        "pin_memory",
        "supports_cast",
        "text_encoder_dtype",
        "throw_exception_if_processing_interrupted",
        "unet_dtype",
        "unet_inital_load_device",
        "unet_manual_cast",
        "unpin_memory",
        "vae_dtype",
    ),
    "comfy.model_patcher": (
        "CallbacksMP",
        "CoreModelPatcher",
        "ModelPatcher",
        "get_key_weight",
        "move_weight_functions",
        "wipe_lowvram_weight",
    ),
    "comfy.patcher_extension": ("WrappersMP",),
    "comfy.samplers": ("CFGGuider",),
    "comfy.sd": (
        "CLIP",
        "CLIPType",
        "VAE",
        "load_clip",
        "load_diffusion_model",
        "load_diffusion_model_state_dict",
        "load_state_dict_guess_config",
        "load_text_encoder_state_dicts",
    ),
    "comfy.utils": (
        "ProgressBar",
        "calculate_parameters",
        "convert_old_quants",
        "load_torch_file",
        "state_dict_prefix_replace",
        "weight_dtype",
    ),
    "comfy.weight_adapter": ("WeightAdapterBase",),
    "comfyui_version": ("__version__",),
    "folder_paths": ("get_system_user_directory", "get_temp_directory"),
}
"""Module of ComfyUI -> the names in it that the package uses."""

PATCHER_ATTRIBUTES = tuple(
    """
    add_object_patch add_wrapper_with_key apply_hooks backup cached_patcher_init clone current_hooks detach
    eject_model force_cast_weights forced_hooks get_additional_models_with_key get_all_callbacks
    get_clone_model_override get_model_object hook_backup inject_model injections is_dynamic is_injected load
    load_device loaded_size match_multigpu_clones model model_dtype
    model_options model_patches_models model_size model_state_dict_for_saving object_patches object_patches_backup
    offload_device parent partially_load partially_unload patch_cached_hook_weights patch_hook_weight_to_device
    patch_model patch_weight_to_device patches patches_uuid remove_additional_models remove_wrappers_with_key
    set_additional_models set_model_compute_dtype size unpatch_hooks unpatch_model use_ejected weight_wrapper_patches
    wrappers
    """.split()
)
"""Attributes and methods of a patcher that the package reads, calls or overrides."""

MODEL_ATTRIBUTES = (
    "current_weight_patches_uuid",
    "lowvram_patch_counter",
    "model_loaded_weight_memory",
    "model_lowvram",
    "model_offload_buffer_memory",
)
"""Attributes that a patcher gives to its model, which the package keeps right."""


def missing() -> list[str]:
    """The names above that this ComfyUI lacks."""
    names = [
        f"{module}.{name}"
        for module, names in NEEDED.items()
        for name in names
        if not hasattr(sys.modules[module], name)
    ]
    if not names:
        cpu = torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(torch.nn.Module(), cpu, cpu)
        names += [f"ModelPatcher.{name}" for name in PATCHER_ATTRIBUTES if not hasattr(patcher, name)]
        names += [f"ModelPatcher.model.{name}" for name in MODEL_ATTRIBUTES if not hasattr(patcher.model, name)]
    return names


if _missing := missing():
    raise ImportError(
        f"DisTorch2 does not work with ComfyUI {getattr(comfyui_version, '__version__', '(unknown)')}, which lacks "
        f"{', '.join(_missing)}; update ComfyUI or DisTorch2"
    )

_LEAST_HEADROOM_BYTES = 2 * 1024**3
_PACKAGE = __name__.rpartition(".comfyui.")[0]
_GGUF_PATCHER = "GGUFModelPatcher"
_METHODS_THAT_MOVE_WEIGHTS = ("load", "patch_model", "unpatch_model", "partially_load", "partially_unload", "detach")

# ruff: disable[E402, F401]  they may be missing, and others import them from here
from comfy.model_patcher import CallbacksMP, ModelPatcher, get_key_weight, move_weight_functions, wipe_lowvram_weight
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider
from comfy.weight_adapter import WeightAdapterBase

# ruff: enable[E402, F401]

args, mm = comfy.cli_args.args, comfy.model_management
lora, model_detection, sd, utils = comfy.lora, comfy.model_detection, comfy.sd, comfy.utils
version: str = comfyui_version.__version__


# --- what differs between versions, or with DynamicVRAM


def patcher_class(disable_dynamic: bool) -> type[ModelPatcher]:
    """The class of the patchers that ComfyUI's loaders make: with DynamicVRAM one that leaves weights in the file."""
    return ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher


def overridden_loading(kind: type[ModelPatcher]) -> list[str]:
    """Which methods that move weights a class of patchers from elsewhere has of its own; none of ComfyUI-GGUF's count,
    which is known."""
    own = [each for each in kind.__mro__ if not each.__module__.startswith("comfy.") and each is not object]
    foreign = [each for each in own if each.__name__ != _GGUF_PATCHER and not each.__module__.startswith(_PACKAGE)]
    return [name for name in _METHODS_THAT_MOVE_WEIGHTS if any(name in vars(each) for each in foreign)]


def loaders_keep_the_mapping(disable_dynamic: bool) -> bool:
    """Whether ComfyUI's loaders build models of the file's own tensors, memory-mapped, and put them on no device."""
    return patcher_class(disable_dynamic) is not ModelPatcher


def set_inference_dtype(
    config: Any, dtype: torch.dtype, manual_cast_dtype: torch.dtype | None, device: torch.device
) -> None:
    """`config.set_inference_dtype(...)`, which takes a device from ComfyUI 0.27 on."""
    takes_device = "device" in inspect.signature(config.set_inference_dtype).parameters
    config.set_inference_dtype(dtype, manual_cast_dtype, **({"device": device} if takes_device else {}))


def spare_host_memory() -> float:
    """Bytes of main memory that may be taken."""
    if getattr(args, "high_ram", False):  # the user's word that there is enough
        return math.inf
    return mm.get_free_memory(torch.device("cpu")) - _headroom_bytes()


def release_host_memory(num_bytes: float) -> None:
    """Have ComfyUI drop results of nodes, of other prompts first, and page-locked weights of models under DynamicVRAM,
    until so many bytes are spare, or there are none to drop."""
    drop_results = getattr(_memory_management(), "extra_ram_release", None)
    if drop_results is not None:
        drop_results(_headroom_bytes() + num_bytes)
    mm.ensure_pin_budget(num_bytes)


def temporary_folder() -> str:
    """It may not be there yet."""
    return folder_paths.get_temp_directory()


def user_folder() -> str:
    """The pack's private folder: its files stay, and the server does not serve them. It may not be there yet."""
    return folder_paths.get_system_user_directory("distorch2")


def _headroom_bytes() -> float:
    """Of main memory, what ComfyUI leaves available when it takes some itself."""
    return max(getattr(_memory_management(), "RAM_CACHE_HEADROOM", 0) / 2, _LEAST_HEADROOM_BYTES)


def _memory_management() -> ModuleType | None:
    return sys.modules.get("comfy.memory_management")


# --- the Comfy Compiler (ComfyUI 0.34 and later, with DynamicVRAM)
#
# While it records or repeats a forward, it serves the allocations of the thread from a plan of the compute device's
# memory, by the handle of the current stream. The default streams of all devices have one handle. So what is allocated
# on another device would get memory of the compute device.

_compiler_lock = threading.Lock()
_num_without_compiler = 0
_is_disabled_by_user = False


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Forwards that begin inside `with` are neither recorded nor repeated, in any thread."""
    global _num_without_compiler, _is_disabled_by_user
    if not hasattr(args, "disable_comfy_compiler"):
        yield
        return
    with _compiler_lock:
        if not _num_without_compiler:
            _is_disabled_by_user = args.disable_comfy_compiler
        _num_without_compiler += 1
        args.disable_comfy_compiler = True
    try:
        yield
    finally:
        with _compiler_lock:
            _num_without_compiler -= 1
            if not _num_without_compiler:
                args.disable_comfy_compiler = _is_disabled_by_user


def is_compiler_active() -> bool:
    """Whether a forward of this thread is being recorded or repeated."""
    graphs = getattr(_prefetch(), "MALLOC_GRAPHS", {})
    return getattr(graphs.get(threading.get_ident()), "_comfy_active", False)


def outside_compiler() -> contextlib.AbstractContextManager[Any]:
    """What is allocated inside `with` is not served from the plan: it may outlive the forward.

    Not to be nested, and for the compute device alone: ComfyUI goes on recording at the end of the innermost one.
    """
    pause = getattr(_prefetch(), "pause_malloc_graph", None)
    return contextlib.nullcontext() if pause is None else pause()


def _prefetch() -> ModuleType | None:
    return sys.modules.get("comfy.model_prefetch")
