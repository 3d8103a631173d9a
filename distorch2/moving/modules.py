"""Moving modules' own tensors from device to device; large ones from the host by way of page-locked memory."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..weights.devices import CPU
from ..weights.inventory import loaded_dtypes, own_tensors
from ..weights.quantised import is_quantised, plain_tensors, rebuilder
from ..weights.slab import allocate
from .pinning import PinnedSlabs
from .transfer import Upload

_BUFFER_BYTES = 8 * 1024**2
_NUM_BUFFERS = 8
UPLOAD_BYTES = _NUM_BUFFERS * _BUFFER_BYTES
_LARGE_BYTES = 1024**2


class Mover:
    """Moves or copies to one device, from `with` to its end. `pinned` page-locks the buffers, where that can be done.

    As with torch's own `.to()` a tensor stays the same object where it can: others may hold it, and are not to keep
    memory of a device that it has left.
    """

    def __init__(self, device: torch.device, pinned: PinnedSlabs) -> None:
        self._device, self._pinned = device, pinned
        self._is_set_up = False
        self._upload: Upload | None = None

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._upload is not None:
            try:
                self._upload.wait()
            finally:
                unlock(self._upload, self._pinned)

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, itself if it is there already. Only what is given after `flush` may read it."""
        parts = plain_tensors(tensor)
        if all(part.device == self._device for part in parts):
            return tensor
        return rebuilder(tensor)([self._moved(part.detach(), part.dtype) for part in parts])

    def flush(self) -> None:
        """Start the last of the copies."""
        if self._upload is not None:
            self._upload.flush()

    def move(self, module: torch.nn.Module, apart_from: Collection[str] = ()) -> None:
        """Move the tensors of the module itself, to the dtypes they are loaded in."""
        for name, tensor in own_tensors(module).items():
            if name in apart_from:
                continue
            with torch.inference_mode(tensor.is_inference()):
                self._move(module, name, tensor)

    def _move(self, module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
        parts = list(zip(plain_tensors(tensor), loaded_dtypes(module, name), strict=True))
        if all(part.device == self._device and part.dtype == dtype for part, dtype in parts):
            return
        moved = [self._moved(part.detach(), dtype) for part, dtype in parts]
        if not is_quantised(tensor) and torch._has_compatible_shallow_copy_type(tensor, moved[0]):
            tensor.data = moved[0]
        elif name in module._parameters:
            module._parameters[name] = rebuilder(tensor)(moved)
        else:
            module._buffers[name] = rebuilder(tensor)(moved).detach()

    def _moved(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Other types than torch's own may have a shape that is not that of their data.
        is_on_host = type(tensor) is torch.Tensor and tensor.device == CPU != self._device
        if is_on_host and tensor.is_contiguous() and tensor.nbytes >= _LARGE_BYTES:
            if not self._is_set_up:
                self._is_set_up, self._upload = True, page_locked_upload(self._device, self._pinned)
            if self._upload is not None:
                moved = torch.empty(tensor.shape, dtype=dtype, device=self._device)
                self._upload.copy(tensor, moved)
                return moved
        return tensor.to(device=self._device, dtype=dtype)


def page_locked_upload(device: torch.device, pinned: PinnedSlabs) -> Upload | None:
    """An `Upload` by way of buffers of its own, unless not even two can be page-locked."""
    buffers: list[torch.Tensor] = []
    while len(buffers) < _NUM_BUFFERS and pinned.pin(buffer := allocate(_BUFFER_BYTES, CPU)):
        buffers.append(buffer)
    if len(buffers) > 1:
        return Upload(device, buffers)
    for buffer in buffers:
        pinned.unpin(buffer)
    return None


def unlock(upload: Upload, pinned: PinnedSlabs) -> None:
    """Unlock the buffers of an upload that is over."""
    for buffer in upload.buffers:
        pinned.unpin(buffer)
