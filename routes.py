"""The route from which web/distorch2.js has what it shows on a node before that runs. It only reads."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import folder_paths
import torch

from .allocation_parser import AllocationError
from .distorch2 import preview
from .distorch2.planning.plan import AUTO, PlanError
from .distorch2.weights.checkpoint_file import CheckpointError
from .drop_in_nodes import TEXT_ENCODER_FILES, clip_type_of, gguf_pack
from .nodes import request_for, selectable_devices, selectable_donors

logger = logging.getLogger(__name__)

PATH = "/distorch2/preview"
_MOST_WAITING = 16
"""More are refused, and the page asks again."""

_GGUF_FOLDER = "unet_gguf"
"""ComfyUI-GGUF's list of the GGUF files in the folders of `diffusion_models`."""
_DTYPES = {
    "default": None,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""`weight_dtype` of ComfyUI's loader -> the dtype that is asked for."""
_Widgets = Mapping[str, str]


class Mistake(ValueError):
    """`name` is the input that is wrong."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def add_routes() -> None:
    """To ComfyUI's server, where there is one: scripts have none."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web

    previews = _Previews(server.prompt_queue)

    @server.routes.get(PATH)
    async def answer(request: web.Request) -> web.Response:
        status, found = await previews.of(dict(request.query.items()))
        return web.json_response(found, status=status)


class _Previews:
    """Made in a thread of their own, one after another. `queue` is ComfyUI's."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._thread = ThreadPoolExecutor(1, "distorch2-preview")
        self._num_waiting = 0

    async def of(self, widgets: _Widgets) -> tuple[int, dict[str, Any]]:
        """An HTTP status, and what `preview_for` returns or `error` and `input`."""
        if self._num_waiting >= _MOST_WAITING:
            return 429, {"error": "too many previews at a time", "input": ""}
        self._num_waiting += 1
        try:
            return 200, await asyncio.get_running_loop().run_in_executor(self._thread, self._make, widgets)
        except Mistake as mistake:
            return 400, {"error": str(mistake), "input": mistake.name}
        except (CheckpointError, PlanError) as error:
            return 400, {"error": str(error), "input": ""}
        except Exception as error:  # a model that ComfyUI is unloading just now, say
            logger.warning("DisTorch2: no preview (%s: %s)", type(error).__name__, error)
            return 503, {"error": "no preview now", "input": ""}
        finally:
            self._num_waiting -= 1

    def _make(self, widgets: _Widgets) -> dict[str, Any]:
        return preview_for(widgets, may_measure=not self._queue.currently_running)


def preview_for(widgets: _Widgets, may_measure: bool) -> dict[str, Any]:
    """What the settings of a node will do; `widgets` are its inputs by name, as text.

    They name files, as `ckpt_name`, `unet_name` or those of a text encoder. With `unet_compute_device` they are those
    of the checkpoint node; with `component` those of a node that splits a loaded model; otherwise those of a loader of
    one component, or of a checkpoint whose other components stay whole on its compute device. Raises `Mistake`,
    `CheckpointError` and `PlanError`.
    """
    source = _source(widgets)
    if "unet_compute_device" in widgets:
        unet, clip = (_request(widgets, prefix) for prefix in ("unet_", "clip_"))
        return preview.preview_loader(
            source, unet, clip, _one_of(selectable_devices(), "vae_device", widgets), may_measure
        )
    request = _request(widgets)
    if "component" in widgets:
        component = widgets["component"]
        if component not in preview.SPLIT_COMPONENTS:
            raise Mistake("component", f"component is {component!r}; use {', '.join(preview.SPLIT_COMPONENTS)}")
        return preview.preview_component(source, component, request, may_measure)
    whole = request_for(request.compute_device, 0.0, request.compute_device)
    of_clip = whole if "ckpt_name" in widgets else request
    return preview.preview_loader(source, request, of_clip, request.compute_device, may_measure)


def _source(widgets: _Widgets) -> preview.Source:
    if "ckpt_name" in widgets:
        return preview.checkpoint(_path_of("checkpoints", "ckpt_name", widgets))
    names = [name for name in TEXT_ENCODER_FILES if name in widgets]
    if names:
        paths = tuple(_path_of("text_encoders", name, widgets) for name in names)
        return preview.text_encoder(paths, clip_type_of(widgets.get("type", "")))
    if _text(widgets, "unet_name").lower().endswith(".gguf"):
        path, pack = _path_of(_GGUF_FOLDER, "unet_name", widgets), gguf_pack()
        if pack is None:
            raise Mistake("unet_name", "a preview of a GGUF file needs ComfyUI-GGUF")
        return preview.gguf_diffusion_model(path, pack)
    dtype = widgets.get("weight_dtype", "default")
    if dtype not in _DTYPES:
        raise Mistake("weight_dtype", f"weight_dtype is {dtype!r}; use {', '.join(_DTYPES)}")
    return preview.diffusion_model(_path_of("diffusion_models", "unet_name", widgets), _DTYPES[dtype])


def _path_of(folder: str, name: str, widgets: _Widgets) -> str:
    """Of a file in ComfyUI's lists, and no other."""
    file = _text(widgets, name)
    listed = folder_paths.get_filename_list(folder) if folder in folder_paths.folder_names_and_paths else []
    path = folder_paths.get_full_path(folder, file) if file in listed else None
    if path is None:
        raise Mistake(name, f"there is no {file!r} in the list of {folder}")
    return path


def _request(widgets: _Widgets, prefix: str = "") -> Any:
    expert = f"{prefix}expert_mode_allocations"
    try:
        return request_for(
            _one_of(selectable_devices(), f"{prefix}compute_device", widgets),
            _number(widgets, f"{prefix}virtual_vram_gb"),
            _one_of(selectable_donors(), f"{prefix}donor_device", widgets),
            widgets.get(expert, ""),
            widgets.get("donor_mode", AUTO),
            widgets.get("pack_weights", AUTO),
        )
    except AllocationError as error:
        raise Mistake(expert, str(error)) from error


def _text(widgets: _Widgets, name: str) -> str:
    if name not in widgets:
        raise Mistake(name, f"{name} is missing")
    return widgets[name]


def _one_of(devices: Sequence[str], name: str, widgets: _Widgets) -> str:
    """A device of this machine: a workflow may come from another."""
    device = _text(widgets, name)
    if device not in devices:
        raise Mistake(name, f"{name} is {device!r}; use {', '.join(devices)}")
    return device


def _number(widgets: _Widgets, name: str) -> float:
    text = _text(widgets, name)
    try:
        return float(text)
    except ValueError as error:
        raise Mistake(name, f"{name} is {text!r}; use a number") from error
