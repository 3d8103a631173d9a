"""The components of a model: the files that each comes from, how it is loaded again, and where it lies now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .comfyui.core import ModelPatcher, mm
from .comfyui.loaders import load_model_and_clip, load_vae, read
from .comfyui.patcher import DistributedPatcher
from .knowledge import Files, Origin, note_run
from .serving.distribution import Distribution

DIFFUSION_MODEL, TEXT_ENCODER, VAE = COMPONENTS = ("diffusion model", "text encoder", "VAE")


def reload_component(
    component: str,
    ckpt_path: str,
    device: str,
    embedding_directory: list[str] | str | None = None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """ComfyUI's own patcher of one component, loaded anew; ComfyUI calls it to clone a model for another device.

    `component` is one of `COMPONENTS`.
    """
    weights = read(ckpt_path)
    if component == VAE:
        return load_vae(weights, device).patcher
    model, clip = load_model_and_clip(
        weights,
        device,
        device,
        embedding_directory,
        with_model=component == DIFFUSION_MODEL,
        with_clip=component == TEXT_ENCODER,
        disable_dynamic=disable_dynamic,
    )
    return model if clip is None else clip.patcher


def load_again(component: str, files: Files, load: Callable[[], Any], disable_dynamic: bool = False) -> ModelPatcher:
    """The patcher of what `load` returns.

    It is for `cached_patcher_init` of a model whose loader sets none: ComfyUI calls it to clone the model for another
    device, and `origin_of` has `component` and `files` from its arguments. Whether the patcher is one of DynamicVRAM is
    up to that loader, whatever `disable_dynamic` says.
    """
    loaded = load()
    return getattr(loaded, "patcher", loaded)


def origin_of(patcher: ModelPatcher) -> Origin | None:
    """None where it is not known which files, or which part of them, the pack, ComfyUI or another pack has loaded."""
    if patcher.cached_patcher_init is None:
        return None
    factory, arguments, *_ = patcher.cached_patcher_init
    if factory in (reload_component, load_again):
        component, paths, *_ = arguments
    else:
        # Those of ComfyUI: `load_clip_model_patcher`, `load_diffusion_model` and so on.
        component = TEXT_ENCODER if "clip" in getattr(factory, "__name__", "") else DIFFUSION_MODEL
        paths = arguments[0] if arguments else ()
    files = paths if isinstance(paths, (list, tuple)) else [paths]
    return (component, tuple(files)) if files and all(isinstance(each, str) for each in files) else None


def placed_components(files: Files, devices: Mapping[str, str]) -> dict[str, Distribution]:
    """By component, of these files, as far as they are on their devices now, and compute on those `devices`: not copies
    for others."""
    found: dict[str, Distribution] = {}
    for (component, of_files), placed in _placed():
        if of_files == files and str(placed.device) == devices.get(component):
            found.setdefault(component, placed)
    return found


def note_runs() -> None:
    """Note how what is on its devices now has run, for plans that are to be chosen."""
    for origin, placed in _placed():
        note_run(origin, placed)


def _placed() -> Iterator[tuple[Origin, Distribution]]:
    """What is on its devices now, and where its weights lie; the newest first."""
    for loaded in list(mm.current_loaded_models):
        patcher = loaded.model
        placed = patcher.placed if isinstance(patcher, DistributedPatcher) else None
        if placed is not None and (origin := origin_of(patcher)) is not None:
            yield origin, placed
