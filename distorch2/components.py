"""The components of a checkpoint: the files that they are loaded from, and again, and where they lie now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .comfyui.core import ModelPatcher, mm
from .comfyui.loaders import load_model_and_clip, load_vae, read
from .comfyui.patcher import DistributedPatcher
from .knowledge import Files, note_run
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

    `component` is one of the names in this module.
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


def load_again(component: str, files: Files, load: Callable[[], Any]) -> ModelPatcher:
    """The patcher of what `load` returns: of these files, by another pack's loader, which does not say how.

    With it and its arguments as a patcher's `cached_patcher_init`, ComfyUI can clone the model for another device.
    """
    loaded = load()
    return getattr(loaded, "patcher", loaded)


def origin_of(patcher: ModelPatcher) -> tuple[str, Files] | None:
    """The component that a patcher has, and the files that it was loaded from, by the pack or by ComfyUI; None where
    that is not known."""
    if patcher.cached_patcher_init is None:
        return None
    factory, arguments, *_ = patcher.cached_patcher_init
    if factory in (reload_component, load_again):
        component, paths, *_ = arguments
    else:
        component = TEXT_ENCODER if "clip" in getattr(factory, "__name__", "") else DIFFUSION_MODEL
        paths = (arguments or [()])[0]
    files = paths if isinstance(paths, (list, tuple)) else [paths]
    return (component, tuple(files)) if files and all(isinstance(each, str) for each in files) else None


def placed_components(files: Files, devices: Mapping[str, str]) -> dict[str, Distribution]:
    """By component, of these files, as far as they are on their devices now, and compute on those `devices`: not copies
    for others."""
    found: dict[str, Distribution] = {}
    for component, origin, placed in _placed():
        if origin == files and str(placed.device) == devices.get(component):
            found.setdefault(component, placed)
    return found


def note_runs() -> None:
    """Note how what is on its devices now has run, for plans that are to be chosen."""
    for component, files, placed in _placed():
        note_run(files, component, placed)


def _placed() -> Iterator[tuple[str, Files, Distribution]]:
    """Component, files, and where its weights lie now; the newest first."""
    for loaded in list(mm.current_loaded_models):
        patcher = loaded.model
        placed = patcher.placed if isinstance(patcher, DistributedPatcher) else None
        if placed is not None and (origin := origin_of(patcher)) is not None:
            yield *origin, placed
