"""Copies of activations between two devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .streams import backend_of, stream_for


class Crossing:
    """Copies of activations between two devices, each way on a stream of its own where both have streams.

    What the device that receives is given afterwards waits for them. Two devices of the same kind may say that they can
    reach each other when they cannot: the first copy is checked, and where it is wrong copies go by way of the host.
    Those of another `lane` have streams of their own.
    """

    def __init__(self, one: torch.device, other: torch.device, lane: str = "") -> None:
        self._devices = one, other
        self._have_streams = all(backend_of(device) is not None for device in self._devices)
        purpose = f"crossing {lane}"
        self._streams = {device: stream_for(device, purpose) for device in self._devices if self._have_streams}
        self.is_direct: bool | None = None if self._have_streams and one.type == other.type else False
        """None until it is checked."""

    @contextlib.contextmanager
    def leaving(self, device: torch.device) -> Iterator[None]:
        """For copies from `device` of what it has been given to make so far."""
        if not self._have_streams:
            yield
            return
        if self.is_direct is None:
            self.check()
        stream = self._streams[device]
        stream.wait_stream(backend_of(device).current_stream(device))
        with backend_of(device).stream(stream):
            yield

    def copy(self, tensor: torch.Tensor, device: torch.device, into: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of `tensor` on `device`, in new memory or in that of a tensor there, that counts its writes."""
        if into is None:
            with torch.inference_mode(False):
                into = torch.empty_like(tensor, device=device, memory_format=torch.preserve_format)
        if self.is_direct:
            into.copy_(tensor, non_blocking=True)  # between devices torch waits for the streams of both, on both
        elif self._have_streams and tensor.device.type == "cuda" == device.type:
            self._copy_by_host(tensor, into)
        else:
            into.copy_(tensor.cpu())
        # Streams of another class are of a backend in Python, as the tests have, where torch has no memory to reuse.
        if self._have_streams and isinstance(self._streams[tensor.device], torch.Stream):
            tensor.record_stream(self._streams[tensor.device])
        return into

    def _copy_by_host(self, source: torch.Tensor, target: torch.Tensor) -> None:
        staged = torch.empty_like(source, device="cpu", pin_memory=True)
        staged.copy_(source, non_blocking=True)
        stream, current = self._streams[target.device], backend_of(target.device).current_stream(target.device)
        stream.wait_stream(self._streams[source.device])
        stream.wait_stream(current)  # which may have used the memory before
        with backend_of(target.device).stream(stream):
            target.copy_(staged, non_blocking=True)
        current.wait_stream(stream)

    def check(self) -> bool:
        """Whether bytes that are copied directly arrive, both ways; sets `is_direct`."""
        one, other = self._devices
        expected = torch.arange(2**16, dtype=torch.int32)
        self.is_direct = True
        try:
            with self.leaving(one):
                arrived = self.copy(expected.to(one), other)
            with self.leaving(other):
                back = self.copy(arrived, one)
            is_right = torch.equal(arrived.cpu(), expected) and torch.equal(back.cpu(), expected)
        except BaseException:
            self.is_direct = None
            raise
        self.is_direct = is_right
        return is_right
